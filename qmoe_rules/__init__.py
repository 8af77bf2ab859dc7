"""Weight-only quantization of Mixture-of-Experts ONNX models, as onnxscript rewrite rules.

The public names but the errors, and the rooms that hold them, are imported when they are asked for:
a process that computes slabs, or prints a help, needs no graphs, and imports none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from qmoe_rules.errors import (
    ConfigError,
    QMoEError,
    SaveError,
    SourceError,
    UnsupportedNodeError,
    VerificationError,
)

__all__ = [
    "Calibration",
    "ConfigError",
    "NodeSummary",
    "QMoEError",
    "QuantizeMoEPass",
    "Recipe",
    "Report",
    "SaveError",
    "SourceError",
    "Target",
    "UnsupportedNodeError",
    "VerificationError",
    "VerificationReport",
    "calibrate",
    "fuse_experts_rules",
    "inspect",
    "moe_to_qmoe_rules",
    "normalize_moe_rules",
    "plan",
    "prepare",
    "qmoe_to_moe_rules",
    "quantize",
    "relayout_qmoe_rules",
    "save",
    "verify",
]

if TYPE_CHECKING:
    from qmoe_rules.calibration import calibrate
    from qmoe_rules.inspection import NodeSummary, inspect
    from qmoe_rules.passes import QuantizeMoEPass, prepare
    from qmoe_rules.pipeline import plan, quantize
    from qmoe_rules.recipe import Recipe
    from qmoe_rules.report import Report
    from qmoe_rules.rules import (
        fuse_experts_rules,
        moe_to_qmoe_rules,
        normalize_moe_rules,
        qmoe_to_moe_rules,
        relayout_qmoe_rules,
    )
    from qmoe_rules.saving import save
    from qmoe_rules.statistics import Calibration
    from qmoe_rules.targets import Target
    from qmoe_rules.verification import VerificationReport, verify

_ROOMS: dict[str, tuple[str, ...]] = {
    "calibration": ("calibrate",),
    "feeds": (),
    "inspection": ("NodeSummary", "inspect"),
    "loading": (),
    "pages": (),
    "passes": ("QuantizeMoEPass", "prepare"),
    "pipeline": ("plan", "quantize"),
    "recipe": ("Recipe",),
    "report": ("Report",),
    "rules": (
        "fuse_experts_rules",
        "moe_to_qmoe_rules",
        "normalize_moe_rules",
        "qmoe_to_moe_rules",
        "relayout_qmoe_rules",
    ),
    "saving": ("save",),
    "statistics": ("Calibration",),
    "targets": ("Target",),
    "verification": ("VerificationReport", "verify"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


if not TYPE_CHECKING:  # which knows every name from above, and would believe in any other

    def __getattr__(name: str) -> object:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        if name not in _ROOM_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        globals()[name] = found
        return found

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
