"""Weight-only quantization of Mixture-of-Experts ONNX models, as onnxscript rewrite rules."""

from __future__ import annotations

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

from qmoe_rules.calibration import calibrate
from qmoe_rules.errors import (
    ConfigError,
    QMoEError,
    SaveError,
    SourceError,
    UnsupportedNodeError,
    VerificationError,
)
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
