"""Reports as web pages: one self-contained file, without scripts and without the network.

Templates lay out what `_figures` has computed; everything that comes from a model is escaped, and
the page's own policy forbids scripts and requests, should anything slip through.
"""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qmoe_rules.errors import SaveError
from qmoe_rules.pages import _figures as figures
from qmoe_rules.recipe import MOST_BITS, Recipe
from qmoe_rules.report import Report, human_bytes
from qmoe_rules.staging import naming_errors, resolved

if TYPE_CHECKING:
    import jinja2

    from qmoe_rules.verification import VerificationReport

__all__ = ["check_page", "report_page", "verification_page", "write_page"]

_PACKAGES = (
    "qmoe-rules",
    "numpy",
    "numba",
    "ml_dtypes",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
)


def report_page(
    report: Report,
    recipe: Recipe,
    *,
    source: str = "",
    destination: str = "",
    made: datetime | None = None,
) -> str:
    """Returns what `plan` or `quantize` reported as an HTML page.

    Args:
        report: What became of every node. The errors of the experts are shown where `quantize`
            was asked to measure them.
        recipe: What was asked for.
        source: What to call the source model.
        destination: What to call the model that was written; empty for a plan.
        made: When; now where it is left out.
    """
    return _render(
        "report.html.j2",
        made,
        figures=figures.of_report(report),
        report=report,
        recipe=list(_fields(recipe)),
        source=source,
        destination=destination,
    )


def verification_page(
    report: VerificationReport,
    *,
    before: str = "",
    after: str = "",
    made: datetime | None = None,
) -> str:
    """Returns what `verify` found as an HTML page.

    Args:
        report: What was found.
        before: What to call the float model.
        after: What to call the converted model.
        made: When; now where it is left out.
    """
    return _render(
        "verification.html.j2",
        made,
        figures=figures.of_verification(report),
        report=report,
        before=before,
        after=after,
    )


def check_page(path: str | os.PathLike[str]) -> None:
    """Raises SaveError where `write_page` could not write, as far as that is known beforehand."""
    file = resolved(Path(path))  # a link may lead to a model
    if file.suffix.lower() not in (".html", ".htm"):
        raise SaveError(f"cannot write the page {file}: its name has to end in .html")
    if file.is_dir():
        raise SaveError(f"cannot write the page {file}: it is a folder")
    folder = next(folder for folder in file.parents if folder.exists())
    with naming_errors(file):
        tempfile.TemporaryFile(dir=folder).close()


def write_page(page: str, path: str | os.PathLike[str]) -> None:
    """Writes a page, and the folders above it; the file is there as a whole or as it was.

    Raises:
        SaveError: It cannot be written, or its name does not end in .html.
    """
    check_page(path)
    file = resolved(Path(path))
    with naming_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".qmoe-page-", dir=file.parent) as folder:
            whole = Path(folder) / file.name
            whole.write_text(page, encoding="utf-8", errors="backslashreplace")
            whole.replace(file)


def _render(template: str, made: datetime | None, **given: Any) -> str:
    when = (made or datetime.now(UTC)).astimezone(UTC)
    return (
        _environment()
        .get_template(template)
        .render(given, made=when, versions=list(_versions()), platform=platform.platform())
    )


def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("qmoe_rules.pages"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": human_bytes, "figure": figures.figure}
    return environment


def _fields(recipe: Recipe) -> Iterator[tuple[str, list[str]]]:
    """Yields the fields of a recipe that say something, each with its values in words."""
    yield "stored as", ["by the budget" if recipe.budget else recipe.describe()]
    yield "method", [recipe.method]
    yield "target", [recipe.target]
    if recipe.budget:
        budget = float(recipe.budget)
        each = budget <= MOST_BITS
        yield "budget", [f"{budget:g} bits per weight" if each else human_bytes(int(budget))]
    if recipe.calibration is not None:
        yield "calibration", [str(getattr(recipe.calibration, "path", recipe.calibration))]
    if recipe.nodes_to_exclude:
        yield "excluded", list(recipe.nodes_to_exclude)
    if recipe.given_overrides:
        yield (
            "overrides",
            [
                f"{each.pattern}: {', '.join(f'{name}={value}' for name, value in each.settings)}"
                for each in recipe.given_overrides
            ],
        )


def _versions() -> Iterator[tuple[str, str]]:
    for name in _PACKAGES:
        try:
            yield name, version(name)
        except PackageNotFoundError:
            continue
    yield "Python", platform.python_version()
