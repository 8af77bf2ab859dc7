"""Small models through `moe_to_qmoe_rules`, and what is left in them."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import rewrite

from qmoe_rules.recipe import Recipe
from qmoe_rules.rules import moe_to_qmoe_rules

EXACT = 1e-5


def convert(model: ir.Model, recipe: Recipe | None = None, **fields: Any) -> ir.Model:
    return rewrite(model, [*moe_to_qmoe_rules(recipe, **fields)])
