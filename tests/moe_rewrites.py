"""Small models through `moe_to_qmoe_rules`, and what is left in them.

Every resulting model passes `onnx.checker` and runs; see `moe_models.run`.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import rewrite

from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.recipe import Recipe
from qmoe_rules.rules import moe_to_qmoe_rules
from tests.moe_models import Array, Arrays, Experts, Graph, expected, inputs_of

EXACT = 1e-5
EXPERTS = Experts()
ATTRIBUTES: dict[str, Any] = {**EXPERTS.attributes, "k": 2}
SPEC = Recipe().specs["fc1"]
PLANNED = ["fc1_quantized", "fc1_scales", "fc2_quantized", "fc2_scales"]


def convert(model: ir.Model, recipe: Recipe | None = None, **fields: Any) -> ir.Model:
    return rewrite(model, [*moe_to_qmoe_rules(recipe, **fields)])


def wanted(feeds: Arrays, experts: Experts = EXPERTS, **attributes: Any) -> Array:
    return expected(experts.arrays(), feeds, SPEC, **{**ATTRIBUTES, **attributes})


def planned_names(graph: ir.Graph) -> list[str]:
    return sorted(
        name
        for name, value in graph.initializers.items()
        if isinstance(value.const_value, PlannedTensor)
    )


def float_weights(model: ir.Model) -> list[str | None]:
    """Returns the 3-D float arrays that are left, in initializers or in Constant nodes."""
    values = [value for graph in model.graphs() for value in graph.initializers.values()]
    values += [node.outputs[0] for node in model.graph.all_nodes() if node.op_type == "Constant"]
    tensors = [(value.name, ir.convenience.get_const_tensor(value)) for value in values]
    return [
        name
        for name, tensor in tensors
        if tensor is not None and len(tensor.shape) == 3 and not isinstance(tensor, PlannedTensor)
    ]


def two_nodes_with_the_same_weights() -> ir.Model:
    graph = Graph()
    x, router_probs = inputs_of(graph, EXPERTS)
    weights = graph.weights(EXPERTS.arrays())
    first = graph.moe(x, router_probs, weights, out="first", name="first", **ATTRIBUTES)
    y = graph.moe(first, router_probs, weights, name="second", **ATTRIBUTES)
    return graph.model(y)
