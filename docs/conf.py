"""How the documents are built: `sphinx-build -W --keep-going -n docs build/docs`."""

from __future__ import annotations

from importlib.metadata import version as installed_version
from typing import Any

project = "qmoe_rules"
author = "The qmoe_rules authors"
copyright = author
version = release = installed_version("qmoe-rules")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxarg.ext"]
exclude_patterns = ["_build"]
# Of the domain of sphinxarg, which knows no references of any kind.
suppress_warnings = ["myst.domains"]

html_theme = "furo"
html_title = "qmoe_rules"
html_static_path: list[str] = []

myst_heading_anchors = 3

# In docstrings a name between backticks is code.
default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True

# What other packages define has no page here; annotations name the package's own classes by the
# module that defines them.
_OTHERS = "collections|concurrent|datetime|np|npt|numpy|onnx_ir|onnxscript|os|pathlib"
nitpick_ignore_regex = [(r"py:.*", rf"({_OTHERS})(\..*)?"), (r"py:.*", r"qmoe_rules\.\w+\..*")]


def _keep_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Lets ||x|| be a norm, and no substitution of reStructuredText."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app: Any) -> None:
    """Connects the hook."""
    app.connect("autodoc-process-docstring", _keep_bars)
