"""What the rule leaves of the values around a node: their types, and the reasons it was given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from tests.moe_models import Experts, Graph, inputs_of, the_node


def between(experts: Experts) -> ir.Model:
    """A MoE whose output nobody has given a type or a shape."""
    graph = Graph()
    x, router_probs = inputs_of(graph, experts)
    moe = graph.moe(x, router_probs, graph.weights(experts.arrays()), **experts.attributes)
    moe.type = moe.shape = None
    return graph.model(graph.op("Abs", moe, out="z", like=x))


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        ({"format": "mxfp4", "target": "cpu"}, True),
        ({"format": "nvfp4", "target": "cpu"}, True),
        ({"bits": 4}, False),
    ],
)
def test_the_type_is_written_down_where_the_scales_do_not_tell_it(
    fields: dict[str, Any], known: bool
) -> None:
    model = between(Experts(dtype=np.float16))
    assert apply_rules(model, moe_to_qmoe_rules(**fields))
    output = the_node(model).outputs[0]
    assert output.dtype == (ir.DataType.FLOAT16 if known else None)
