"""Cells that are audited, and what the CPU provider makes of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from qmoe_rules import ops
from qmoe_rules.audit import Audit, audit
from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT
from tests.contract import Cell, serialized
from tests.moe_models import Array, Graph, relative_error

Model = ir.Model
Alter = Callable[[Model], None]

INT4, INT8 = Cell("int4", block_size=32), Cell("int8")
MXFP4, NVFP4 = Cell("mxfp4", block_size=32), Cell("nvfp4", block_size=16)
RELU = INT4.but(activation="relu")
# H == I and no gate: the weights have one shape in every layout.
SQUARE = RELU.but(hidden=128, inter=128)


def the_node(model: Model) -> ir.Node:
    (node,) = ops.nodes(model, "MoE", "QMoE")
    return node


def judged(model: Model, target: str) -> Audit:
    return audit(the_node(model), target)


def replaced(model: Model, slot: str, change: Callable[[Array], Array]) -> Model:
    """Returns the model with one initializer changed."""
    value = model.graph.initializers[slot]
    assert value.const_value is not None
    array = np.ascontiguousarray(change(value.const_value.numpy()))
    tensor = ir.tensor(array, name=slot)
    value.const_value, value.shape, value.dtype = tensor, ir.Shape(array.shape), tensor.dtype
    return model


def routed(make: Callable[[Graph, ir.Value], ir.Value]) -> Model:
    """Returns a QMoE whose `router_weights` are made from `router_probs`."""
    model = INT4.but(normalize=0).direct()
    node, graph = the_node(model), Graph()
    logits = node.inputs[1]
    assert logits is not None
    given = {**ops.inputs(node), "router_weights": make(graph, logits)}
    twin = ir.node("QMoE", ops.slots("QMoE", given), domain=ops.DOMAIN)
    twin.attributes.update(node.attributes)
    twin.outputs[0].name = "routed"
    ir.convenience.replace_nodes_and_values(
        model.graph, node, [node], [*graph.nodes, twin], node.outputs, twin.outputs
    )
    return model


def softmax(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.op("Softmax", logits, out="weights", axis=-1)


def outcome(model: Model, cell: Cell, expected: Array) -> str:
    """Returns what the CPU provider makes of a model, in the words of the audit."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(
            serialized(model), options, providers=["CPUExecutionProvider"]
        )
        (actual,) = session.run(None, cell.feeds())
    except Exception:  # whatever the runtime throws is a refusal
        return REFUSED
    return RIGHT if relative_error(np.asarray(actual), expected) < 0.03 else GARBAGE
