"""Cycles, depth and repetition; numbers and shapes of constants."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from tests.hostile._cases import behind, case, moe_of, proto_case, tensor_of

# Cycles, depth and repetition.


@proto_case("what they compute themselves")
def _node_that_reads_itself(proto: ModelProto) -> None:
    behind(proto, [helper.make_node("Identity", ["a"], ["a"])], "a")


@proto_case("what they compute themselves")
def _two_nodes_that_read_each_other(proto: ModelProto) -> None:
    nodes = [
        helper.make_node("Identity", ["b"], ["a"]),
        helper.make_node("Identity", ["a"], ["b"]),
    ]
    behind(proto, nodes, "a")


@proto_case("what they compute themselves")
def _moe_that_reads_itself(proto: ModelProto) -> None:
    moe_of(proto).input[0] = "y"


@proto_case(None)
def _nodes_in_another_order(proto: ModelProto) -> None:
    behind(proto, [], "b")
    proto.graph.node.append(helper.make_node("Identity", ["a"], ["b"]))
    proto.graph.node.append(helper.make_node("Identity", ["fc1"], ["a"]))


def chain(op_type: str, count: int, twice: bool = False, **attributes: Any) -> list[NodeProto]:
    """Returns nodes one behind the other, from fc1 to f`count`."""
    names = ["fc1", *(f"f{index}" for index in range(1, count + 1))]
    return [
        helper.make_node(op_type, [before] * (2 if twice else 1), [after], **attributes)
        for before, after in itertools.pairwise(names)
    ]


for axis in (0, 1, 2):

    @proto_case(None, f"diamonds of Concat along axis {axis}")
    def _diamonds(proto: ModelProto, axis: int = axis) -> None:
        behind(proto, chain("Concat", 60, twice=True, axis=axis), "f60")


@proto_case(None)
def _diamonds_of_concat_that_are_small(proto: ModelProto) -> None:
    behind(proto, chain("Concat", 12, twice=True, axis=0), "f12")


@proto_case(None)
def _diamonds_of_split_and_concat(proto: ModelProto) -> None:
    nodes, before = [], "fc1"
    for index in range(60):
        halves = [f"a{index}", f"b{index}"]
        nodes.append(helper.make_node("Split", [before], halves, axis=2, num_outputs=2))
        nodes.append(helper.make_node("Concat", halves, [f"c{index}"], axis=2))
        before = f"c{index}"
    behind(proto, nodes, before)


@proto_case(None)
def _three_thousand_transposes(proto: ModelProto) -> None:
    behind(proto, chain("Transpose", 3000, perm=[0, 2, 1]), "f3000")


@proto_case(None)
def _diamonds_of_add(proto: ModelProto) -> None:
    behind(proto, chain("Add", 2000, twice=True), "f2000")


@proto_case(None)
def _diamonds_of_add_behind_the_node(proto: ModelProto) -> None:
    nodes = chain("Add", 2000, twice=True)
    nodes[0].input[:] = ["y", "y"]
    proto.graph.node.extend(nodes)
    proto.graph.output[0].name = "f2000"


@case("not an ONNX model")
def _deep_subgraphs(folder: Path) -> None:
    """A graph in a node's attribute in a graph, as bytes: protobuf's own classes refuse to."""

    def field(number: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size > 127:
            length, size = length + bytes([size & 127 | 128]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + data

    graph = field(2, b"body")
    for _ in range(300):
        attribute = field(1, b"body") + field(6, graph) + b"\xa0\x01\x05"
        graph = field(1, field(4, b"If") + field(5, attribute)) + field(2, b"body")
    (folder / "model.onnx").write_bytes(b"\x08\x0a" + field(7, graph))


@proto_case(None)
def _subgraphs_as_deep_as_can_be(proto: ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    node = NodeProto()
    node.CopyFrom(moe_of(proto))
    node.output[0] = "inner"
    for depth in range(24):
        info = helper.make_tensor_value_info("inner", 1, None)
        body = helper.make_graph([node], f"body{depth}", [], [info])
        other = helper.make_node("Identity", ["x"], ["inner"])
        short = helper.make_graph([other], "short", [], [info])
        node = helper.make_node("If", ["yes"], ["inner"], then_branch=body, else_branch=short)
    proto.graph.node.append(node)


def functions(proto: ModelProto, count: int, calls: int, first: str = "MoE") -> None:
    """Adds functions F0, F1, ..., each of which calls the one before it several times."""
    inputs = ["x", "router_probs", "fc1", "fc2"]
    opsets = [
        helper.make_opsetid(domain, version)
        for domain, version in (("", 21), ("com.microsoft", 1), ("local", 1))
    ]
    for index in range(count):
        kind, domain = (first, "com.microsoft") if not index else (f"F{index - 1}", "local")
        nodes = [
            helper.make_node(kind, inputs, [f"y{call}"], domain=domain, name=f"n{call}")
            for call in range(calls)
        ]
        proto.functions.append(
            helper.make_function("local", f"F{index}", inputs, ["y0"], nodes, opsets)
        )
    proto.opset_import.append(helper.make_opsetid("local", 1))
    moe = moe_of(proto)
    fc2 = moe.input[4]
    del moe.input[:]
    del moe.attribute[:]
    moe.input.extend(["x", "router_probs", "fc1", fc2])
    moe.domain, moe.op_type = "local", f"F{count - 1}"


@proto_case("call one another")
def _functions_that_call_functions_twice(proto: ModelProto) -> None:
    functions(proto, 40, 2)


@proto_case("call one another")
def _many_functions_that_call_functions_twice(proto: ModelProto) -> None:
    functions(proto, 1200, 2)


@proto_case(None)
def _functions_that_call_functions(proto: ModelProto) -> None:
    functions(proto, 200, 1)


@proto_case("call themselves")
def _function_that_calls_itself(proto: ModelProto) -> None:
    functions(proto, 1, 1)
    node = helper.make_node("F0", list(proto.functions[0].input), ["z"], domain="local")
    proto.functions[0].node.append(node)


@proto_case("call themselves")
def _functions_that_call_each_other(proto: ModelProto) -> None:
    functions(proto, 3, 1)
    node = helper.make_node("F2", list(proto.functions[0].input), ["z"], domain="local")
    proto.functions[0].node.append(node)


@proto_case("call themselves")
def _function_that_calls_itself_without_a_moe(proto: ModelProto) -> None:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("local", 1)]
    node = helper.make_node("F", ["a"], ["b"], domain="local")
    proto.functions.append(helper.make_function("local", "F", ["a"], ["b"], [node], opsets))
    proto.opset_import.append(helper.make_opsetid("local", 1))


@proto_case("cannot be inlined: Opset mismatch")
def _function_of_another_opset(proto: ModelProto) -> None:
    functions(proto, 1, 1)
    proto.functions[0].opset_import[0].version = 11


@proto_case("cannot be inlined: Input mismatch")
def _function_that_is_called_with_more_than_it_takes(proto: ModelProto) -> None:
    functions(proto, 1, 1)
    call = next(node for node in proto.graph.node if node.domain == "local")
    call.input.extend(["x"] * 5)


@proto_case("'nothing', which nothing computes")
def _function_that_returns_what_it_does_not_have(proto: ModelProto) -> None:
    functions(proto, 1, 1)
    proto.functions[0].output[0] = "nothing"


@proto_case("two functions are named")
def _two_functions_of_one_name(proto: ModelProto) -> None:
    functions(proto, 1, 1)
    proto.functions.append(proto.functions[0])


@proto_case(None, rare=True)
def _ten_thousand_nodes(proto: ModelProto) -> None:
    nodes = [helper.make_node("Identity", ["x"], [f"i{index}"]) for index in range(10_000)]
    proto.graph.node.extend(nodes)


@proto_case(None)
def _a_hundred_nodes_that_share_a_weight(proto: ModelProto) -> None:
    for index in range(100):
        node = NodeProto()
        node.CopyFrom(moe_of(proto))
        node.output[0] = f"z{index}"
        proto.graph.node.append(node)


@proto_case(None)
def _three_hundred_tensors_in_the_same_bytes(proto: ModelProto) -> None:
    for index in range(300):
        tensor = TensorProto()
        tensor.CopyFrom(tensor_of(proto))
        tensor.name = f"t{index}"
        proto.graph.initializer.append(tensor)


@proto_case(None)
def _metadata_of_a_megabyte(proto: ModelProto) -> None:
    proto.metadata_props.add(key="\x1b[2J", value="x" * 1_000_000)
    proto.producer_name = "\x1b[2J"
    proto.doc_string = "\x1b[2J" * 1000


# Numbers.


@case("infinity|NaN|finite")
def _weights_that_are_not_finite(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(np.full(40_000, np.nan, np.float32).tobytes())


@case(None)
def _weights_as_large_as_can_be(folder: Path) -> None:
    largest = np.finfo(np.float32).max
    (folder / "model.onnx.data").write_bytes(np.full(40_000, largest, np.float32).tobytes())


@case(None)
def _weights_as_small_as_can_be(folder: Path) -> None:
    (folder / "model.onnx.data").write_bytes(np.full(40_000, 1e-45, np.float32).tobytes())


# Odd shapes of constants behind small nodes.


def rearranged(
    op_type: str, constants: dict[str, list[int]], **attributes: Any
) -> Iterator[NodeProto]:
    for name, values in constants.items():
        tensor = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        yield helper.make_node("Constant", [], [name], value=tensor)
    yield helper.make_node(op_type, ["fc1", *constants], ["odd"], **attributes)


BIG = (1 << 63) - 1
UNSOUND = (
    "Cast to a word",
    "Concat along a word",
    "Concat without an axis",
    "Identity of nothing",
    "Transpose of another type",
)
for name, nodes in {
    "Reshape to 2^62s": rearranged("Reshape", {"shape": [1 << 62, 1 << 62, 4]}),
    "Reshape to -1s": rearranged("Reshape", {"shape": [-1, -1, -1]}),
    "Reshape to -5": rearranged("Reshape", {"shape": [-5, 64, 64]}),
    "Reshape to zeros": rearranged("Reshape", {"shape": [0] * 9}),
    "Reshape to many": rearranged("Reshape", {"shape": [1] * 5000 + [2, 64, 64]}),
    "Reshape to 2^40 of nothing": rearranged("Reshape", {"shape": [1 << 40, 0, 1]}, allowzero=1),
    "Reshape to a scalar": rearranged("Reshape", {"shape": []}),
    "Transpose of nothing": rearranged("Transpose", {}, perm=[0, 0, 0]),
    "Transpose far away": rearranged("Transpose", {}, perm=[BIG, 1, 2]),
    "Transpose of less": rearranged("Transpose", {}, perm=[1]),
    "Concat far away": rearranged("Concat", {}, axis=BIG),
    "Concat without an axis": rearranged("Concat", {}),
    "Split into nothing": rearranged("Split", {"sizes": []}),
    "Split into negatives": rearranged("Split", {"sizes": [-10, 12]}),
    "Split into too much": rearranged("Split", {"sizes": [BIG]}),
    "Slice by zero": rearranged("Slice", {"s": [0], "e": [BIG], "a": [0], "t": [0]}),
    "Slice far away": rearranged("Slice", {"s": [-BIG], "e": [BIG], "a": [BIG], "t": [1]}),
    "Slice of two lengths": rearranged("Slice", {"s": [0, 0], "e": [1]}),
    "Squeeze of what is large": rearranged("Squeeze", {"axes": [0, 1, 2]}),
    "Squeeze far away": rearranged("Squeeze", {"axes": [BIG]}),
    "Unsqueeze far away": rearranged("Unsqueeze", {"axes": [BIG, -BIG]}),
    "Unsqueeze many": rearranged("Unsqueeze", {"axes": list(range(5000))}),
    "Unsqueeze the same": rearranged("Unsqueeze", {"axes": [0, 0, 0]}),
    "Cast to nothing": rearranged("Cast", {}, to=0),
    "Cast to 77": rearranged("Cast", {}, to=77),
    "Cast to a string": rearranged("Cast", {}, to=8),
    "Cast to a word": rearranged("Cast", {}, to="float"),
    "Transpose of another type": rearranged("Transpose", {}, perm="012"),
    "Concat along a word": rearranged("Concat", {}, axis="0"),
    "Identity of nothing": iter([helper.make_node("Identity", [], ["odd"])]),
    "Identity of an empty name": iter([helper.make_node("Identity", [""], ["odd"])]),
}.items():

    @proto_case(None if name not in UNSOUND else "node 'odd'", name)
    def _rearranged(proto: ModelProto, nodes: tuple[NodeProto, ...] = tuple(nodes)) -> None:
        behind(proto, list(nodes), "odd")
