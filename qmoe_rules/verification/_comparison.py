"""What differs between two models outside their experts: nodes, attributes, constants.

Both graphs are walked side by side, backwards from their outputs, so that the names of
intermediate values do not matter and what nothing uses is left out. MoE and QMoE are the same
node here; their weights are for the checks of each node.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import files, ops
from qmoe_rules.errors import SourceError
from qmoe_rules.slices import SlicedTensor

__all__ = ["Comparison", "Difference", "ancestors"]

Values = Sequence[ir.Value | None]

# What MoE and QMoE share, apart from their weights.
_SHARED = ("input", "router_probs", "fc1_experts_bias", "fc2_experts_bias", "fc3_experts_bias")


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both models.

    Attributes:
        at: The value of the float model that differs, or that a different node computes.
        text: What differs, in words.
    """

    at: ir.Value
    text: str


class Comparison:
    """The differences between two models, found by walking both at once.

    Attributes:
        differences: What was found so far.
        met: The MoE and QMoE nodes of the float model, and those found in their places.
        values: The values of the float model, and those found in their places.
        nodes: The other nodes, and those found in their places.
    """

    def __init__(self, before: ir.Model, after: ir.Model) -> None:
        """Compares the models from their outputs on.

        Args:
            before: The float model.
            after: The converted model.

        Raises:
            SourceError: The data behind a constant cannot be read.
        """
        self.differences: list[Difference] = []
        self.met: dict[ir.Node, ir.Node] = {}
        self._functions = (before.functions, after.functions)
        self.values: set[tuple[ir.Value, ir.Value]] = set()
        self.nodes: set[tuple[ir.Node, ir.Node]] = set()
        self._pending: list[tuple[ir.Value, ir.Value]] = []
        self._anchor = before.graph.outputs[0]
        self._graphs(before.graph, after.graph)

    def walk(self, before: ir.Value, after: ir.Value) -> None:
        """Compares two values, and what they are computed from."""
        self._pending.append((before, after))
        while self._pending:
            self._value(*self._pending.pop())

    def take(self, values: Values, without: ir.Value | None) -> list[Difference]:
        """Returns the differences on the way to some values, and forgets them.

        Args:
            values: Values of the float model.
            without: What is on the way to this value is left where it is.
        """
        if not self.differences:
            return []
        region = ancestors(*values) - ancestors(without)
        taken = [each for each in self.differences if each.at in region]
        self.differences = [each for each in self.differences if each.at not in region]
        return taken

    def _graphs(self, before: ir.Graph, after: ir.Graph) -> None:
        for domain, version in before.opset_imports.items():
            found = after.opset_imports.get(domain, version)
            if found != version:
                self._differ(self._anchor, f"opset {domain or 'ai.onnx'} {version}", f"{found}")
        for kind in ("inputs", "outputs"):
            names = [[value.name for value in getattr(graph, kind)] for graph in (before, after)]
            if names[0] != names[1]:
                self._differ(self._anchor, f"graph {kind} {_listed(names[0])}", _listed(names[1]))
        for a, b in zip(before.outputs, after.outputs, strict=False):
            self.walk(a, b)

    def _value(self, a: ir.Value, b: ir.Value) -> None:
        if (a, b) in self.values:
            return
        self.values.add((a, b))
        first, second = (ir.convenience.get_const_tensor(value) for value in (a, b))
        overridable = a.is_graph_input(), b.is_graph_input()
        if overridable[0] != overridable[1] or (all(overridable) and a.name != b.name):
            self._differ(a, *(_kind(value) for value in (a, b)))
            return
        if first is not None and second is not None:
            if not _same_tensor(first, second):
                self.differences.append(Difference(a, _changed(a, first, b, second)))
            return
        if (first is None) != (second is None):
            self._differ(a, *(_kind(value) for value in (a, b)))
            return
        x, y = a.producer(), b.producer()
        if x is None or y is None:
            if x is not y:
                self._differ(a, *(_kind(value) for value in (a, b)))
            return
        if a.index() != b.index():
            self._differ(a, f"output {a.index()} of {ops.label(x)}", f"output {b.index()}")
        elif (x, y) not in self.nodes:
            self.nodes.add((x, y))
            self._node(a, x, y)

    def _node(self, at: ir.Value, x: ir.Node, y: ir.Node) -> None:
        if _is_experts(x) and _is_experts(y):
            self.met.setdefault(x, y)
            given = [ops.inputs(node) for node in (x, y)]
            shared = list(given[0]) if x.op_type == y.op_type else _SHARED
            self._inputs(at, *([inputs[name] for name in shared] for inputs in given))
            return
        if x.op_identifier() != y.op_identifier():
            self._differ(at, f"{ops.label(x)} is {_operator(x)}", _operator(y))
            if x.op_type == "MatMul" and ops.is_op(y, "MatMulNBits"):
                self._inputs(at, x.inputs[:1], y.inputs[:1])  # what it multiplies is the same
            return
        self._function(at, x)
        self._attributes(at, x, y)
        self._inputs(at, *([_given(value) for value in node.inputs] for node in (x, y)))

    def _inputs(self, at: ir.Value, first: Values, second: Values) -> None:
        counts = [
            [index for index, v in enumerate(each) if v is not None] for each in (first, second)
        ]
        if counts[0] != counts[1]:
            self._differ(
                at, f"{ops.label(ops.producer(at))} has inputs {counts[0]}", f"{counts[1]}"
            )
        self._pending += [
            (a, b) for a, b in zip(first, second, strict=False) if a is not None and b is not None
        ]

    def _function(self, at: ir.Value, node: ir.Node) -> None:
        """Compares the model-local functions that a node calls, if it calls any."""
        found = [functions.get(node.op_identifier()) for functions in self._functions]
        if found[0] is None and found[1] is None:
            return
        if found[0] is None or found[1] is None:
            texts = ("a function" if each is not None else "an operator" for each in found)
            self._differ(at, *(f"{_operator(node)} is {text}" for text in texts))
            return
        self._body(found[0].graph, found[1].graph)

    def _attributes(self, at: ir.Value, x: ir.Node, y: ir.Node) -> None:
        for name in dict.fromkeys([*x.attributes, *y.attributes]):
            a, b = x.attributes.get(name), y.attributes.get(name)
            if a is not None and b is not None and _graphs_of(a) and a.type == b.type:
                for inner in zip(_graphs_of(a), _graphs_of(b), strict=False):
                    self._body(*inner)
            elif a is None or b is None or not _same_attribute(a, b):
                texts = ("absent" if each is None else _attribute(each) for each in (a, b))
                first, second = texts
                self._differ(at, f"attribute {name} of {ops.label(x)} is {first}", second)

    def _body(self, before: ir.Graph, after: ir.Graph) -> None:
        """Compares two subgraphs or functions; their inputs correspond by position."""
        self.values |= set(zip(before.inputs, after.inputs, strict=False))
        self._pending += list(zip(before.outputs, after.outputs, strict=False))

    def _differ(self, at: ir.Value, before: str, after: str) -> None:
        self.differences.append(Difference(at, f"{before}, and {after} in the converted model"))


def ancestors(*values: ir.Value | None) -> set[ir.Value]:
    """Returns values and everything that they are computed from."""
    found: set[ir.Value] = set()
    pending = [value for value in values if value is not None]
    while pending:
        value = pending.pop()
        if value in found:
            continue
        found.add(value)
        node = value.producer()
        if node is not None:
            pending += [given for given in node.inputs if given is not None]
            for attribute in node.attributes.values():
                inner = (each for graph in _graphs_of(attribute) for each in graph.all_nodes())
                pending += [given for each in inner for given in each.inputs if given is not None]
    return found


def _same_tensor(a: ir.TensorProtocol, b: ir.TensorProtocol) -> bool:
    """Returns whether two tensors have the same type, shape and bytes, read piece by piece."""
    return a is b or (
        a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape) and _digest(a) == _digest(b)
    )


def _digest(tensor: ir.TensorProtocol) -> bytes:
    digest = hashlib.sha256()
    try:
        for piece in _pieces(tensor):
            digest.update(piece)
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read tensor {tensor.name!r}: {error}") from error
    return digest.digest()


def _pieces(tensor: ir.TensorProtocol) -> Iterable[bytes]:
    if isinstance(tensor, ir.ExternalTensor):
        yield from files.chunks(tensor)
    elif isinstance(tensor, SlicedTensor):
        for index in range(tensor.slices.shape[0]):
            yield tensor.slices.read(index, index + 1).tobytes()
            tensor.slices.release(index, index + 1)
    elif tensor.dtype == ir.DataType.STRING:
        yield repr(np.asarray(tensor.numpy()).tolist()).encode()
    else:
        yield tensor.tobytes()


def _given(value: ir.Value | None) -> ir.Value | None:
    return None if value is None or value.name == "" else value


def _is_experts(node: ir.Node) -> bool:
    return ops.is_op(node, "MoE") or ops.is_op(node, "QMoE")


def _graphs_of(attribute: ir.Attr) -> list[ir.Graph]:
    if attribute.is_ref():
        return []
    if attribute.type == ir.AttributeType.GRAPH:
        return [attribute.as_graph()]
    return list(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else []


def _same_attribute(a: ir.Attr, b: ir.Attr) -> bool:
    if a.type != b.type or a.is_ref() or b.is_ref():
        return (a.type, a.ref_attr_name) == (b.type, b.ref_attr_name)
    if a.type in (ir.AttributeType.TENSOR, ir.AttributeType.TENSORS):
        first, second = (
            [each.value] if each.type == ir.AttributeType.TENSOR else each.value for each in (a, b)
        )
        return len(first) == len(second) and all(map(_same_tensor, first, second))
    if a.type in (ir.AttributeType.FLOAT, ir.AttributeType.FLOATS):
        # The file holds float32, and a rule may have written a Python float.
        numbers, others = (np.asarray(each.value, np.float32) for each in (a, b))
        return np.array_equal(numbers, others, equal_nan=True)
    return bool(a.value == b.value)


def _attribute(attribute: ir.Attr) -> str:
    text = str(attribute.value)
    return text if len(text) < 60 else f"{text[:60]}..."


def _kind(value: ir.Value) -> str:
    node = value.producer()
    if value.is_graph_input():
        return f"{value.name} is a graph input"
    if ir.convenience.get_const_tensor(value) is not None:
        return f"{value.name} is a constant"
    return (
        f"{value.name} is computed"
        if node is None
        else f"{value.name} comes from {_operator(node)}"
    )


def _operator(node: ir.Node) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _changed(a: ir.Value, first: ir.TensorProtocol, b: ir.Value, second: ir.TensorProtocol) -> str:
    types = [f"{each.dtype.name} {list(each.shape)}" for each in (first, second)]
    other = "" if a.name == b.name else f" ({b.name})"
    if types[0] != types[1]:
        return f"constant {a.name} is {types[0]}, and {types[1]}{other} in the converted model"
    return f"constant {a.name} has other values in the converted model{other}"


def _listed(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names))
