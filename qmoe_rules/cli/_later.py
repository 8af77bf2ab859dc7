"""Modules that wait until something asks them for a name.

Nearly half of the time that `qmoe plan` takes would go into modules that no plan calls: onnx-ir
computes with symbolic sizes in sympy, and onnxscript folds constants with the reference operators
of onnx. Both import them at once, and need them when such a thing occurs; then they are loaded.
An application may decide that; a library may not.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["import_later"]

# onnx_ir._symbolic_shapes asks sympy for names as soon as it is loaded.
_LATE = frozenset({"sympy", "onnx_ir._symbolic_shapes", "onnx.reference.ops"})


class _Later:
    """Finds the modules above where they always are, and has them loaded when they are used."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        found = PathFinder.find_spec(name, path, target) if name in _LATE else None
        if found is not None and found.loader is not None:
            found.loader = importlib.util.LazyLoader(found.loader)
        return found


def import_later() -> None:
    """Lets the modules wait that have not been imported yet."""
    if _Later not in sys.meta_path:
        sys.meta_path.insert(0, _Later)
