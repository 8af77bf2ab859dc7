"""The schemas of `com.microsoft::MoE` and `com.microsoft::QMoE`: slots, attributes, shapes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from qmoe_rules.kernels import GATED
from qmoe_rules.statistics import PROJECTIONS

__all__ = [
    "DOMAIN",
    "MOE_ATTRIBUTES",
    "MOE_INPUTS",
    "QMOE_INPUTS",
    "agree",
    "attributes",
    "cast_type",
    "discard",
    "graphs",
    "in_function",
    "inputs",
    "is_op",
    "label",
    "nodes",
    "producer",
    "projections",
    "refuse_shapes",
    "refuse_unknown",
    "routes_by_softmax",
    "slot",
    "slots",
    "static_shape",
]

DOMAIN = "com.microsoft"

MOE_INPUTS = (
    "input",
    "router_probs",
    "fc1_experts_weights",
    "fc1_experts_bias",
    "fc2_experts_weights",
    "fc2_experts_bias",
    "fc3_experts_weights",
    "fc3_experts_bias",
)

QMOE_INPUTS = (
    "input",
    "router_probs",
    "fc1_experts_weights",
    "fc1_scales",
    "fc1_experts_bias",
    "fc2_experts_weights",
    "fc2_scales",
    "fc2_experts_bias",
    "fc3_experts_weights",
    "fc3_scales",
    "fc3_experts_bias",
    "fc1_zero_points",
    "fc2_zero_points",
    "fc3_zero_points",
    "router_weights",
    "fc1_global_scale",
    "fc2_global_scale",
    "fc1_act_scale",
    "fc2_act_scale",
    "fc1_act_block_scale",
    "fc2_act_block_scale",
)

_INPUTS = {"MoE": MOE_INPUTS, "QMoE": QMOE_INPUTS}

# Defaults of onnxruntime 1.32's schemas. They are always written out, because they have differed
# between versions. Attributes whose default is None mean something only by being present.
_SHARED_ATTRIBUTES: dict[str, Any] = {
    "activation_alpha": 1.0,
    "activation_beta": 0.0,
    "activation_type": "relu",
    "k": 1,
    "normalize_routing_weights": 0,
    "swiglu_fusion": 0,
    "swiglu_limit": None,
    "swiglu_limit_after_activation": None,
    "use_sparse_mixer": 0,
}
MOE_ATTRIBUTES = tuple(_SHARED_ATTRIBUTES)
_QMOE_ATTRIBUTES: dict[str, Any] = {
    "accuracy_level": None,
    "block_size": None,
    "expert_weight_bits": 4,
    "fc1_expert_weight_bits": None,
    "fc2_expert_weight_bits": None,
    "fc3_expert_weight_bits": None,
    "quant_type": "int",
    "weights_prepacked": -1,
}
_NUMBERS = frozenset({"activation_alpha", "activation_beta", "swiglu_limit"})
_WORDS = frozenset({"activation_type", "quant_type"})
_ATTRIBUTES = {"MoE": _SHARED_ATTRIBUTES, "QMoE": {**_SHARED_ATTRIBUTES, **_QMOE_ATTRIBUTES}}


def is_op(node: ir.Node, op_type: str) -> bool:
    """Returns whether the node is `com.microsoft::op_type`."""
    return node.domain == DOMAIN and node.op_type == op_type


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yields every graph of a model: the main one, the functions', and the subgraphs of both."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield graph
        yield from graph.subgraphs()


def nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yields the model's nodes of these operators, in subgraphs and functions too."""
    for node in itertools.chain.from_iterable(graphs(model)):
        if any(is_op(node, op_type) for op_type in op_types):
            yield node


def label(node: ir.Node) -> str:
    """Returns what to call a node: its name, or that of its first output."""
    return node.name or (node.outputs[0].name if node.outputs else None) or "(unnamed)"


def cast_type(node: ir.Node) -> ir.DataType | None:
    """Returns the type that a Cast casts to, None where it does not say.

    It is a number; before opset 6 it was a text, and in a function it may be the caller's.
    """
    to = node.attributes.get("to")
    if to is None or to.is_ref() or to.type != ir.AttributeType.INT:
        return None
    number = to.as_int()
    return ir.DataType(number) if number in ir.DataType.__members__.values() else None


def discard(value: ir.Value) -> None:
    """Removes a constant that nothing uses, and the nodes and constants that only it used."""
    pending = [value]
    while pending:
        unused = pending.pop()
        graph = unused.graph
        # A dry run leaves uses by nodes that never came into a graph.
        used = any(consumer.graph is not None for consumer in unused.consumers())
        if graph is None or used or unused.is_graph_output() or unused.is_graph_input():
            continue
        node = unused.producer()
        if node is None:
            graph.initializers.pop(str(unused.name), None)
        elif not any(output.uses() or output.is_graph_output() for output in node.outputs):
            pending += [source for source in node.inputs if source is not None]
            graph.remove(node, safe=True)


def in_function(model: ir.Model, node: ir.Node) -> bool:
    """Returns whether the node is inside a model-local function, or a subgraph of one."""
    return any(
        node.graph is graph
        for function in model.functions.values()
        for graph in (function.graph, *function.graph.subgraphs())
    )


def producer(value: ir.Value) -> ir.Node:
    """Returns the node that computes a value."""
    node = value.producer()
    if node is None:
        raise AssertionError(f"{value.name} has no producer")
    return node


def inputs(node: ir.Node) -> dict[str, ir.Value | None]:
    """Returns every input of a MoE or QMoE node by its schema name, None where it is left out.

    A value with an empty name means a missing input, as it does in the file.
    """
    given = [None if value is None or value.name == "" else value for value in node.inputs]
    padded = itertools.chain(given, itertools.repeat(None))
    return dict(zip(_INPUTS[node.op_type], padded, strict=False))


def projections(given: Mapping[str, ir.Value | None]) -> tuple[str, ...]:
    """Returns the projections of a node: fc1, fc2 and, where anything of it is there, fc3.

    Args:
        given: The node's inputs, from `inputs`.
    """
    fc3 = any(value is not None for name, value in given.items() if name.startswith("fc3_"))
    return (*PROJECTIONS, "fc3") if fc3 else PROJECTIONS


def routes_by_softmax(node: ir.Node) -> bool:
    """Returns whether `router_probs` comes from a Softmax; the operator applies softmax again."""
    router = inputs(node)["router_probs"]
    softmax = router.producer() if router is not None else None
    return softmax is not None and (softmax.domain, softmax.op_type) == ("", "Softmax")


def slot(projection: str, part: str) -> str:
    """Returns the QMoE input that holds a part of a projection (see `formats.Spec.parts`)."""
    return f"{projection}_experts_weights" if part == "weights" else f"{projection}_{part}"


def slots(op_type: str, given: Mapping[str, ir.Value | None]) -> list[ir.Value | None]:
    """Returns inputs by schema name in the slots of an operator, without trailing missing ones."""
    values = [given.get(name) for name in _INPUTS[op_type]]
    while values and values[-1] is None:
        values.pop()
    return values


def attributes(node: ir.Node) -> dict[str, Any]:
    """Returns every attribute of a MoE or QMoE node as Python values, defaults filled in.

    Attributes that have no default and are absent are None. One of another type than the schema's
    counts as absent; `refuse_unknown` tells.
    """
    values = dict(_ATTRIBUTES[node.op_type])
    for name in values:
        attribute = node.attributes.get(name)
        if attribute is not None and not attribute.is_ref() and attribute.type == _type(name):
            values[name] = attribute.value
    return values


def refuse_unknown(node: ir.Node) -> str | None:
    """Returns what a MoE or QMoE node has that the schemas do not know, or None."""
    for name, attribute in node.attributes.items():
        if name not in _ATTRIBUTES[node.op_type]:
            return f"{node.op_type} has no attribute {name!r}"
        if attribute.type != _type(name):
            return f"attribute {name!r} is {attribute.type.name}, not {_type(name).name}"
    known = len(_INPUTS[node.op_type])
    if any(value is not None and value.name != "" for value in node.inputs[known:]):
        return f"it has more inputs than the {known} that are known"
    return None


def _type(attribute: str) -> ir.AttributeType:
    if attribute in _NUMBERS:
        return ir.AttributeType.FLOAT
    return ir.AttributeType.STRING if attribute in _WORDS else ir.AttributeType.INT


def static_shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """Returns the sizes of a value, None for each unknown one, or None when its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in value.shape)


def refuse_shapes(
    fc1: tuple[int, ...],
    fc2: tuple[int, ...],
    given: Mapping[str, ir.Value | None],
    values: Mapping[str, Any],
    fc3: tuple[int, ...] | None = None,
) -> str | None:
    """Returns how the shapes of a MoE or QMoE disagree, or None when they agree.

    With F = 2 for gated activations without fc3 and 1 for others: fc1 [E, F*I, H], fc2 [E, H, I],
    fc3 [E, I, H], biases [E, F*I], [E, H] and [E, I], input [..., H], router_probs
    [tokens, E].

    Args:
        fc1: Shape of the fc1 weight.
        fc2: Shape of the fc2 weight.
        given: The node's inputs, from `inputs`.
        values: The node's attributes, from `attributes`.
        fc3: Shape of the fc3 weight, None where there is none.
    """
    activation, fusion = values["activation_type"], values["swiglu_fusion"]
    gated = activation in GATED and fc3 is None
    if fc3 is not None and fusion:
        return f"swiglu_fusion={fusion} with fc3, which is the gate's partner already"
    if not gated and fusion:
        return f"swiglu_fusion={fusion} with activation {activation!r}, which has no gate to fuse"
    if gated and not fusion:
        return f"activation {activation!r} with swiglu_fusion=0 and no fc3: the gate is missing"
    if (values["swiglu_limit"] or 0) < 0:
        return f"swiglu_limit={values['swiglu_limit']:g} is negative, which ends the whole process"
    experts, hidden, inter = fc2
    if not 1 <= values["k"] <= experts:
        return f"k={values['k']} with {experts} experts"
    expected = (experts, inter * (2 if gated else 1), hidden)
    for name, found in (("fc1", fc1), ("fc3", fc3)):
        if found is not None and found != expected:
            return (
                f"{name}_experts_weights is {list(found)}; fc2_experts_weights {list(fc2)} with "
                f"activation {activation!r} asks for {list(expected)}"
            )
    rank = len(static_shape(given["input"]) or ())
    shapes: dict[str, tuple[int | None, ...]] = {
        "fc1_experts_bias": (experts, fc1[1]),
        "fc2_experts_bias": (experts, hidden),
        "fc3_experts_bias": (experts, inter),
        "input": (*[None] * (rank - 1), hidden),
        "router_probs": (None, experts),
    }
    for name, shape in shapes.items():
        known = static_shape(given[name])
        if known is not None and not agree(known, shape):
            return f"{name} is {_shown(known)}; the weights ask for {_shown(shape)}"
    return None


def require_model(model: object) -> None:
    """Raises TypeError for what is no model of onnx-ir, and says what would make one."""
    if not isinstance(model, ir.Model):
        raise TypeError(
            f"expected an onnx_ir.Model, not {type(model).__name__}; onnx_ir.load makes one of a "
            "file, onnx_ir.from_proto of a ModelProto"
        )


def agree(known: tuple[int | None, ...], expected: tuple[int | None, ...]) -> bool:
    """Returns whether known sizes and expected ones can be the same, None standing for any."""
    return len(known) == len(expected) and all(
        a is None or b is None or a == b for a, b in zip(known, expected, strict=True)
    )


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
