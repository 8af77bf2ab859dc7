"""Hypothesis strategies and assertions for property-based tests of what works on MoE models.

For exporters that write MoE nodes, for rewrite rules, and for whoever deploys quantized models.
`docs/testing.md` is the guide. Only this room imports hypothesis, which `pip install
'qmoe-rules[testing]'` installs.
"""

from __future__ import annotations

try:
    import hypothesis  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "qmoe_rules.testing needs hypothesis; pip install 'qmoe-rules[testing]'"
    ) from error

from qmoe_rules.testing._building import build_model
from qmoe_rules.testing._designs import LayerDesign, ModelDesign
from qmoe_rules.testing._feeds import feeds_for
from qmoe_rules.testing._meaning import assert_same_meaning
from qmoe_rules.testing._models import model_designs, moe_models, moe_nodes
from qmoe_rules.testing._recipes import recipes
from qmoe_rules.testing._untouched import assert_untouched
from qmoe_rules.testing._validity import assert_valid
from qmoe_rules.testing._weights import (
    Corner,
    WeightDesign,
    activation_dtypes,
    expert_shapes,
    expert_weights,
    weight_designs,
)

__all__ = [
    "Corner",
    "LayerDesign",
    "ModelDesign",
    "WeightDesign",
    "activation_dtypes",
    "assert_same_meaning",
    "assert_untouched",
    "assert_valid",
    "build_model",
    "expert_shapes",
    "expert_weights",
    "feeds_for",
    "model_designs",
    "moe_models",
    "moe_nodes",
    "recipes",
    "weight_designs",
]
