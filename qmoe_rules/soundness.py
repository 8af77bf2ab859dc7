"""What every ONNX model is, checked before anything else looks at it.

The parser takes much that no runtime would: names that nobody or two nodes stand behind, tensors
of other sizes than their shapes, nodes and functions that wait for themselves. What is sound here
can be walked, sorted, inlined and saved.
"""

from __future__ import annotations

import functools
import graphlib
import itertools
import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import onnx
import onnx_ir as ir

__all__ = ["defects"]

# Of an inlined model: so many nodes, or so many times those of the file. A chain of functions that
# each call the next one twice has more than any memory.
_MOST_NODES, _MOST_TIMES = 100_000, 20

_COMPLEX = (onnx.TensorProto.COMPLEX64, onnx.TensorProto.COMPLEX128)
_MOE = ("MoE", "QMoE")

_Reads = dict[str, str]
"""Names of values that are read, each with who reads it."""


def defects(proto: onnx.ModelProto) -> Iterator[str]:
    """Yields what is wrong with a model, in words; nothing where it is sound.

    Args:
        proto: The model as it was parsed. The files of external tensors are not looked at.
    """
    graph, opset = proto.graph, _opset(proto.opset_import)
    free = yield from _body(graph.input, graph.initializer, graph.node, graph.output, opset)
    yield from _missing(free)
    for function in proto.functions:
        opset = _opset(function.opset_import)
        free = yield from _body(function.input, (), function.node, function.output, opset)
        yield from _missing(free)
    yield from _calls(proto)


def _body(
    inputs: Iterable[onnx.ValueInfoProto | str],
    initializers: Iterable[onnx.TensorProto],
    nodes: Sequence[onnx.NodeProto],
    outputs: Iterable[onnx.ValueInfoProto | str],
    opset: int,
) -> Generator[str, None, _Reads]:
    """Yields what is wrong with a graph, a body or a function; returns what it reads of others."""
    given, constants = [_name(value) for value in inputs], []
    for tensor in initializers:
        constants.append(tensor.name)
        yield from _tensor(tensor)
    made = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    computed = [name for node in nodes for name in node.output if name]
    for names in (given, constants, computed):
        yield from _names(names)
        yield from _twice(names)
    # An initializer of an input's name is the input's default; a node must not compute either.
    yield from _twice([*{*given, *constants}, *made])
    free: _Reads = {}
    needs: list[_Reads] = []
    for node in nodes:
        reads = yield from _node(node, opset)
        needs.append(reads)
        free |= reads
    free |= {_name(value): "the graph's output" for value in outputs}
    if not _in_order(made, needs):
        yield from _cycle(made, needs, nodes)
    own = {*given, *constants, *made}
    return {name: who for name, who in free.items() if name and name not in own}


def _node(node: onnx.NodeProto, opset: int) -> Generator[str, None, _Reads]:
    """Yields what is wrong with a node; returns what it reads, its bodies too."""
    label = _label(node)
    for text in (node.name, node.op_type, node.domain, *node.input):
        yield from _text(text)
    if node.domain == "com.microsoft" and node.op_type in _MOE and not any(node.output):
        yield f"{label} has no output"
    yield from (f"{label} has an attribute twice: {each}" for each in _repeated(node.attribute))
    if node.domain in ("", "ai.onnx"):
        yield from _misuse(node, opset)
    reads = dict.fromkeys(node.input, label)
    for attribute in node.attribute:
        if not (attribute.type or attribute.ref_attr_name):
            yield f"{label}: attribute {attribute.name!r} has no type"
        tensors = itertools.chain(
            [attribute.t] if attribute.HasField("t") else (), attribute.tensors
        )
        for tensor in tensors:
            yield from _tensor(tensor)
        bodies = itertools.chain([attribute.g] if attribute.HasField("g") else (), attribute.graphs)
        for body in bodies:
            inner = yield from _body(body.input, body.initializer, body.node, body.output, opset)
            reads |= inner
    return reads


def _misuse(node: onnx.NodeProto, opset: int) -> Iterator[str]:
    """Yields how a node of a standard operator differs from what the operator takes."""
    schema = _schema(node.op_type, opset)
    if schema is None:
        return
    for what, count, least, most in (
        ("inputs", len(node.input), schema.min_input, schema.max_input),
        ("outputs", len(node.output), schema.min_output, schema.max_output),
    ):
        if not least <= count <= most:
            yield f"{_label(node)} has {count} {what}; {node.op_type} has {least} to {most}"
    given = {attribute.name for attribute in node.attribute}
    for name, wanted in schema.attributes.items():
        if wanted.required and name not in given:
            yield f"{_label(node)} lacks the attribute {name}"
    if node.op_type == "Constant" and (len(given) != 1 or not given <= schema.attributes.keys()):
        yield f"{_label(node)} has the attributes {sorted(given)}, where it has one of its values"
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        wanted_type: Any = None if known is None else known.type
        if attribute.ref_attr_name or known is None:  # a function's reference may have no type
            continue
        if attribute.type != wanted_type.value:
            kind = onnx.AttributeProto.AttributeType.Name(attribute.type)
            yield f"{_label(node)}: attribute {attribute.name} is {kind}, not {wanted_type.name}"


@functools.lru_cache(maxsize=1024)
def _schema(op_type: str, opset: int) -> onnx.defs.OpSchema | None:
    try:
        return onnx.defs.get_schema(op_type, opset)
    except onnx.defs.SchemaError:
        return None


def _opset(imports: Iterable[onnx.OperatorSetIdProto]) -> int:
    """Returns the version of the standard operators, at most the latest that is known."""
    latest = onnx.defs.onnx_opset_version()
    versions = (each.version for each in imports if each.domain in ("", "ai.onnx"))
    return min(max(versions, default=latest), latest)


def _tensor(tensor: onnx.TensorProto) -> Iterator[str]:
    """Yields how the shape, the type and the data of a tensor disagree."""
    yield from _text(tensor.name)
    label = f"tensor {tensor.name!r}"
    try:
        dtype = ir.DataType(tensor.data_type)
    except ValueError:
        yield f"{label} has the unknown element type {tensor.data_type}"
        return
    dims = list(tensor.dims)
    external = tensor.data_location == onnx.TensorProto.EXTERNAL
    is_string = dtype == ir.DataType.STRING
    if dtype == ir.DataType.UNDEFINED or (is_string and external):
        yield f"{label} has the element type {dtype.name}{' in a file' if external else ''}"
        return
    count = math.prod(dims)
    nbytes = count if is_string else -(-count * dtype.bitwidth // 8)
    if min(dims, default=0) < 0 or nbytes >= 1 << 63:
        yield f"{label} has the shape {_shown(dims)}, which no tensor can have"
        return
    if external:
        for entry in tensor.external_data:
            yield from _text(entry.value)
        return
    if tensor.HasField("raw_data") and not is_string:
        if len(tensor.raw_data) != nbytes:
            yield f"{label} holds {len(tensor.raw_data)} bytes; its shape asks for {nbytes}"
        return
    held = len(getattr(tensor, onnx.helper.tensor_dtype_to_field(tensor.data_type)))
    count *= 2 if tensor.data_type in _COMPLEX else 1
    packed = -(-count * dtype.bitwidth // 8) if not is_string and dtype.bitwidth < 8 else count
    if held not in (count, packed):
        yield f"{label} holds {held} numbers; its shape asks for {count}"


def _calls(proto: onnx.ModelProto) -> Iterator[str]:
    """Yields what is wrong with the calls of functions, in themselves and in number."""
    bodies = {(each.domain, each.name, each.overload): each.node for each in proto.functions}
    if len(bodies) < len(proto.functions):
        names = ((each.domain, each.name, each.overload) for each in proto.functions)
        yield from (f"two functions are named {name}" for name in _repeats(names))
    inside = {key: [*_all_nodes(nodes)] for key, nodes in bodies.items()}
    calls = {
        key: [name for node in nodes if (name := _called(node)) in bodies]
        for key, nodes in inside.items()
    }
    try:
        order = [*graphlib.TopologicalSorter(calls).static_order()]
    except graphlib.CycleError as error:
        circle = [f"{domain}::{name}" for domain, name, _ in error.args[1]]
        yield f"functions call themselves: {' in '.join(circle[:8])}"
        return
    sizes: dict[tuple[str, str, str], int] = {}
    for key in order:
        sizes[key] = len(inside[key]) + sum(sizes[each] for each in calls[key])
    nodes = [*_all_nodes(proto.graph.node)]
    written = len(nodes) + sum(map(len, inside.values()))
    size = len(nodes) + sum(sizes.get(_called(node), 0) for node in nodes)
    if size > (most := max(_MOST_NODES, _MOST_TIMES * written)):
        yield f"its functions call one another until {written} nodes are more than {most}"


def _all_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from _all_nodes(body.node)


def _called(node: onnx.NodeProto) -> tuple[str, str, str]:
    return node.domain, node.op_type, node.overload


def _in_order(made: Mapping[str, int], needs: Sequence[_Reads]) -> bool:
    """Returns whether every node comes behind those that it reads from."""
    return all(made.get(name, -1) < index for index, reads in enumerate(needs) for name in reads)


def _cycle(
    made: Mapping[str, int], needs: Sequence[_Reads], nodes: Sequence[onnx.NodeProto]
) -> Iterator[str]:
    """Yields which nodes wait for each other."""
    waits = {
        index: [made[name] for name in reads if name in made] for index, reads in enumerate(needs)
    }
    try:
        graphlib.TopologicalSorter(waits).prepare()
    except graphlib.CycleError as error:
        circle = [_label(nodes[index]) for index in error.args[1]]
        yield f"nodes read what they compute themselves: {', '.join(circle[:8])}"


def _missing(free: _Reads) -> Iterator[str]:
    yield from (f"{who} reads {name!r}, which nothing computes" for name, who in free.items())


def _names(names: Sequence[str]) -> Iterator[str]:
    for name in names:
        yield from _text(name)
    if "" in names:
        yield "an input or an initializer has no name"


def _twice(names: Sequence[str]) -> Iterator[str]:
    yield from (f"two values are named {name!r}" for name in _repeats(names))


def _repeated(attributes: Sequence[onnx.AttributeProto]) -> Iterator[str]:
    return _repeats(attribute.name for attribute in attributes)


def _repeats(names: Iterable[object]) -> Iterator[str]:
    seen: set[object] = set()
    for name in names:
        if name in seen:
            yield str(name)
        seen.add(name)


def _text(text: object) -> Iterator[str]:
    if not isinstance(text, str):  # what protobuf hands out where the bytes are no UTF-8
        yield f"a name is not UTF-8: {text!r}"


def _name(value: onnx.ValueInfoProto | str) -> str:
    return value if isinstance(value, (str, bytes)) else value.name


def _label(node: onnx.NodeProto) -> str:
    return f"node {(node.name or ', '.join(map(str, node.output)))!r} ({node.op_type})"


def _shown(dims: Sequence[int]) -> str:
    return f"[{', '.join(map(str, dims[:8]))}{', ...' if len(dims) > 8 else ''}]"
