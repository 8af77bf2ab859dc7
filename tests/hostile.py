"""Models that mean harm, or were harmed: small, made by code, each with what becomes of it.

Every case begins with the same good model of one MoE node, `model.onnx` and `model.onnx.data` in a
folder of their own, and spoils it. Beside that folder lies `outside`, which nobody may read.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from tests.moe_models import Experts, single

__all__ = ["CASES", "SECRET", "Case", "good_model"]

EXPERTS = Experts(experts=2, hidden=64, inter=64, activation="silu")
SECRET = b"secret " * 20_000
"""What lies outside, long enough to pass for any tensor of the model."""

OUTPUT = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


@dataclass(frozen=True)
class Case:
    """One way to spoil the model.

    Attributes:
        name: What it is.
        spoil: Does it, given the model's folder.
        message: What the one error says, as a regular expression; None where the model is one like
            any other, and its nodes are converted or skipped.
        rare: Whether it is much like others, and is left to the long lane.
    """

    name: str
    spoil: Callable[[Path], object]
    message: str | None
    rare: bool = False


def good_model(folder: Path) -> Path:
    """Writes the model to `folder / "model"`, and what is secret to `folder / "outside"`."""
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.data").write_bytes(SECRET)
    model = folder / "model"
    model.mkdir()
    (model / "zeros.data").write_bytes(bytes(70_000))
    ir.save(single(EXPERTS), model / "model.onnx", external_data="model.onnx.data")
    return model


CASES: list[Case] = []


Add = Callable[[Callable[..., object]], object]


def case(message: str | None, name: str = "", *, rare: bool = False) -> Add:
    """Adds a function of the folder as a case."""

    def add(spoil: Callable[..., object]) -> object:
        CASES.append(Case(name or _title(spoil), spoil, message, rare))
        return spoil

    return add


def proto_case(message: str | None, name: str = "", *, rare: bool = False) -> Add:
    """Adds a function of the ModelProto as a case."""

    def add(change: Callable[..., object]) -> object:
        def spoil(folder: Path) -> None:
            proto = onnx.load(folder / "model.onnx", load_external_data=False)
            change(proto)
            (folder / "model.onnx").write_bytes(proto.SerializeToString())

        return case(message, name or _title(change), rare=rare)(spoil)

    return add


def _title(function: Callable[..., object]) -> str:
    return function.__name__.strip("_").replace("_", " ")


def tensor_of(proto: ModelProto, name: str = "fc1") -> TensorProto:
    found: TensorProto = next(each for each in proto.graph.initializer if each.name == name)
    return found


def place(proto: ModelProto, name: str = "fc1", **entries: Any) -> None:
    """Changes where a tensor is said to lie."""
    tensor = tensor_of(proto, name)
    merged = {each.key: each.value for each in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in merged.items():
        tensor.external_data.add(key=key, value=str(value))


def moe_of(proto: ModelProto) -> NodeProto:
    found: NodeProto = next(node for node in proto.graph.node if node.op_type == "MoE")
    return found


def set_attribute(proto: ModelProto, name: str, value: object) -> None:
    node = moe_of(proto)
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def behind(proto: ModelProto, nodes: list[NodeProto], value: str) -> None:
    """Lets fc1 come from nodes."""
    moe = moe_of(proto)
    moe.input[2] = value
    others = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *others])


# Bytes.

for size in (0, 1, 2, 10, 100, 400):

    @case(r"not an ONNX model", f"cut to {size} bytes")
    def _cut(folder: Path, size: int = size) -> None:
        os.truncate(folder / "model.onnx", size)


@case("not an ONNX model")
def _zeros(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(bytes(1000))


@case("not an ONNX model")
def _ones(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 1000)


@case("not an ONNX model")
def _a_length_of_2_to_the_63(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x3a" + b"\xff" * 8 + b"\x7f" + b"x" * 100)


@case("2 GB", "a sparse file of 3 GB")
def _large(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 3 << 30)


@case("no regular file")
def _model_that_is_a_pipe(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


@case("no regular file")
def _model_that_is_a_device(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("/dev/zero")


@case("Text format|not an ONNX model", "deeply nested groups")
def _groups(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x3b" * 100_000)


# Places of external data.

OUTSIDE = "outside the model's folder"


@proto_case(OUTSIDE)
def _climbing(proto: ModelProto) -> None:
    place(proto, location="../outside/secret.data")


@proto_case(OUTSIDE)
def _climbing_from_a_folder_that_is_not_there(proto: ModelProto) -> None:
    place(proto, location="no/../../outside/secret.data")


@proto_case(OUTSIDE)
def _absolute(proto: ModelProto) -> None:
    place(proto, location="/etc/passwd", offset=0)


@proto_case(OUTSIDE)
def _the_process_itself(proto: ModelProto) -> None:
    place(proto, location="/proc/self/mem", offset=0)


@proto_case(OUTSIDE)
def _small_climbing_tensor(proto: ModelProto) -> None:
    """Of less than 256 bytes, which is read when the graph is written."""
    tensor = TensorProto(name="small", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    proto.graph.initializer.append(tensor)


@proto_case(OUTSIDE)
def _climbing_constant_node(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


@proto_case(OUTSIDE)
def _climbing_constant_in_a_subgraph(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[64])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("c", 1, None)])
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    proto.graph.node.append(
        helper.make_node("If", ["yes"], ["unused"], then_branch=body, else_branch=body)
    )


@proto_case(OUTSIDE)
def _climbing_constant_in_a_function(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[64])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    opsets = [helper.make_opsetid("", 21)]
    proto.functions.append(helper.make_function("local", "F", [], ["c"], [node], opsets))
    proto.opset_import.append(helper.make_opsetid("local", 1))


@proto_case("Sparse tensors are not supported")
def _climbing_sparse_tensor(proto: ModelProto) -> None:
    values = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[4])
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="../outside/secret.data")
    indices = helper.make_tensor("indices", TensorProto.INT64, [4], range(4))
    sparse = helper.make_sparse_tensor(values, indices, [100])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))


@case(OUTSIDE)
def _symlink(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("../outside/secret.data")


@case(OUTSIDE)
def _symlink_of_symlinks(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("second")
    (folder / "second").symlink_to(folder / "third")
    (folder / "third").symlink_to("../outside/secret.data")


@case(OUTSIDE)
def _symlinked_folder(folder: Path) -> None:
    (folder / "weights").symlink_to("../outside")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    place(proto, location="weights/secret.data")
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


@case("can be in no file")
def _loop_of_symlinks(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("second")
    (folder / "second").symlink_to("model.onnx.data")


@case("several hard links")
def _hard_link(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.link(folder.parent / "outside" / "secret.data", folder / "model.onnx.data")


@case("no regular file")
def _data_that_are_a_pipe(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")


@case("no regular file")
def _empty_tensor_in_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = TensorProto(name="empty", data_type=TensorProto.FLOAT, dims=[0])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="pipe")
    proto.graph.initializer.append(tensor)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


@case("no regular file")
def _data_that_are_a_folder(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").mkdir()


LOCATIONS = {
    "empty": ("", OUTSIDE),
    "dot": (".", OUTSIDE),
    "dots": ("..", OUTSIDE),
    "root": ("/", OUTSIDE),
    "nul": ("model.onnx.data\0", "can be in no file"),
    "very long": ("x" * 100_000, "its external data 'xxx"),
    "very deep": ("x/" * 2000, "cannot read its external data"),
    "escape": ("\x1b[2J\x1b]0;title\x07.data", "No such file"),
    "two lines": ("a\nqmoe: all is well\nb", "No such file"),
    "surrogate": ("\udcff", "not UTF-8"),
    "url": ("http://localhost/model.onnx.data", "No such file"),
}
for name, (location, message) in LOCATIONS.items():

    @case(message, f"location: {name}")
    def _located(folder: Path, location: str = location) -> None:
        proto = onnx.load(folder / "model.onnx", load_external_data=False)
        marker = "L0CATI0N"
        place(proto, location=marker * (len(location.encode("utf-8", "surrogatepass")) // 8 + 1))
        tensor = tensor_of(proto)
        data = location.encode("utf-8", "surrogateescape")
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = marker
        if len(data) == 1 and data == b"\xff":
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "L"
            raw = proto.SerializeToString().replace(b"location\x12\x01L", b"location\x12\x01\xff")
            (folder / "model.onnx").write_bytes(raw)
            return
        place(proto, location=location)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())


# Sizes that lie.

LIE = "non-negative|truncated|cannot hold|invalid literal|integer string conversion"
LIES: dict[str, dict[str, Any]] = {
    "negative offset": {"offset": -1},
    "negative offset into another tensor": {"offset": -4096},
    "negative length": {"length": -1},
    "offset of 2^63": {"offset": 1 << 63},
    "offset of 2^64": {"offset": 1 << 64},
    "length of 2^70": {"length": 1 << 70},
    "offset and length that overflow": {"offset": (1 << 64) - 4, "length": 8},
    "offset of 5000 digits": {"offset": "9" * 5000},
    "offset that is no number": {"offset": "0x10"},
    "offset with spaces": {"offset": " 1 0 "},
    "offset that is a fraction": {"offset": "1.5"},
    "length too short": {"length": 4},
}
for name, lie in LIES.items():

    @proto_case(LIE, name)
    def _spoiled(proto: ModelProto, entries: dict[str, Any] = lie) -> None:
        place(proto, **entries)


@proto_case(OUTSIDE)
def _external_entry_that_nobody_knows(proto: ModelProto) -> None:
    """The parser warns of it: that must not stand in front of the error."""
    del tensor_of(proto).external_data[:]
    tensor_of(proto).external_data.add(key="", value="model.onnx.data")


@proto_case("has the attributes ['']")
def _constant_of_no_name(proto: ModelProto) -> None:
    node = helper.make_node("Constant", [], ["c"], value_int=3)
    node.attribute[0].name = ""
    proto.graph.node.insert(0, node)


@proto_case(None)
def _overlapping_tensors(proto: ModelProto) -> None:
    place(proto, "fc2", offset=4)


@proto_case(None)
def _offset_that_is_not_aligned(proto: ModelProto) -> None:
    """The bytes are zeros there, whatever else they would be."""
    place(proto, "fc1", offset=32_769, location="zeros.data")


SHAPE = "no tensor can have|its shape asks for|cannot hold"
for name, dims in {
    "2^40": [1 << 40, 64, 64],
    "product of 2^64": [1 << 32, 1 << 32, 1],
    "product of 2^63 times many": [1 << 62, 1 << 62, 1 << 62, 1 << 62],
    "negative": [-2, 64, 64],
    "two negative": [-2, -64, 64],
    "all -1": [-1, -1, -1],
    "smallest": [-(1 << 63), 1, 1],
    "many": [1] * 10_000,
    "more than numpy has": [2] + [1] * 64 + [64, 64],
}.items():
    for where in ("external", "inline", "typed"):

        @proto_case(
            None if name.startswith("more") or (name, where) == ("many", "external") else SHAPE,
            f"dims: {name}, {where}",
            rare=where == "typed",
        )
        def _sized(proto: ModelProto, dims: list[int] = dims, where: str = where) -> None:
            tensor = tensor_of(proto)
            del tensor.dims[:]
            tensor.dims.extend(dims)
            if where == "external":
                return
            tensor.ClearField("data_location")
            del tensor.external_data[:]
            if where == "inline":
                tensor.raw_data = bytes(2 * 64 * 64 * 4)
            else:
                tensor.float_data.extend([0.5] * (2 * 64 * 64))


for name, dims in {
    "no experts": [0, 64, 64],
    "no rows": [2, 0, 64],
    "2^40 experts of nothing": [1 << 40, 0, 64],
    "2^62 rows of nothing": [2, 1 << 62, 0],
    "scalar": [],
}.items():

    @proto_case(None, f"dims: {name}")
    def _empty(proto: ModelProto, dims: list[int] = dims) -> None:
        for tensor in (tensor_of(proto, "fc1"), tensor_of(proto, "fc2")):
            del tensor.dims[:]
            tensor.dims.extend(dims)
        for info in proto.graph.value_info:
            proto.graph.value_info.remove(info)


@proto_case("its shape asks for")
def _inline_tensor_of_fewer_bytes(proto: ModelProto) -> None:
    tensor = tensor_of(proto)
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    tensor.raw_data = bytes(100)


@proto_case("its shape asks for")
def _inline_tensor_of_more_bytes(proto: ModelProto) -> None:
    tensor = tensor_of(proto)
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    tensor.raw_data = bytes(2 * 64 * 64 * 4 + 1)


@proto_case("its shape asks for")
def _inline_tensor_of_nothing(proto: ModelProto) -> None:
    tensor = tensor_of(proto)
    tensor.ClearField("data_location")
    del tensor.external_data[:]


@proto_case("its shape asks for")
def _small_tensor_of_nothing(proto: ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="small", data_type=1, dims=[4]))


@proto_case("its shape asks for")
def _constant_of_2_to_the_40(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=1, dims=[1 << 40])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


@proto_case(None)
def _both_inline_and_external(proto: ModelProto) -> None:
    tensor_of(proto).raw_data = bytes(8)


@proto_case("element type UNDEFINED", "neither type nor data")
def _undefined(proto: ModelProto) -> None:
    proto.graph.initializer.append(TensorProto(name="nothing"))


for kind in (0, 8, 9, 14, 15, 21, 22, 77, -1):

    @proto_case(
        None if kind in (9, 21, 22) else "element type|cannot hold", f"weights of type {kind}"
    )
    def _typed(proto: ModelProto, kind: int = kind) -> None:
        tensor_of(proto).data_type = kind


@proto_case("STRING in a file")
def _string_tensor_in_a_file(proto: ModelProto) -> None:
    tensor = TensorProto(name="s", data_type=TensorProto.STRING, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="model.onnx.data")
    proto.graph.initializer.append(tensor)


@proto_case("its shape asks for")
def _typed_data_of_another_type(proto: ModelProto) -> None:
    tensor = tensor_of(proto)
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    tensor.int64_data.extend([1] * (2 * 64 * 64))


# Names.

NAMES = {
    "path": "../../../outside/secret.data",
    "absolute path": "/etc/passwd",
    "escape": "\x1b[2J\x1b[31mred\x1b]0;title\x07\x9b2J",
    "two lines": "moe\nqmoe: all is well",
    "carriage return": "error\rfine ",
    "right to left": "moe\u202egnp.exe\u2066",
    "nul": "a\0b",
    "very long": "n" * 1_000_000,
    "markup": "[red]moe[/red] [link=x]",
    "format": "%s%n{0}{x}",
    "backspaces": "evil\b\b\b\b",
    "line separator": "a\u2028b\u2029c\x85d",
    "pattern": "re:(a+)+$",
}

USUAL = ("escape", "path", "two lines", "very long")

for name, text in NAMES.items():
    rare = name not in USUAL

    @proto_case(None, f"node named: {name}", rare=rare)
    def _named_node(proto: ModelProto, text: str = text) -> None:
        moe_of(proto).name = text

    @proto_case(None, f"skipped node named: {name}", rare=rare)
    def _named_skipped_node(proto: ModelProto, text: str = text) -> None:
        moe_of(proto).name = text
        set_attribute(proto, "activation_type", text)
        set_attribute(proto, text or "x", 1)

    @proto_case(None, f"weight named: {name}", rare=rare)
    def _named_weight(proto: ModelProto, text: str = text) -> None:
        tensor_of(proto).name = text
        moe_of(proto).input[2] = text

    @proto_case(None, f"weight that is computed named: {name}", rare=rare)
    def _named_computed(proto: ModelProto, text: str = text) -> None:
        behind(proto, [helper.make_node("Abs", ["fc1"], [text], name=text)], text)

    @proto_case("tensor '", f"tensor that is not there named: {name}", rare=rare)
    def _named_missing(proto: ModelProto, text: str = text) -> None:
        place(proto, length=4)
        tensor_of(proto).name = text
        moe_of(proto).input[2] = text

    @proto_case(None, f"input named: {name}", rare=rare)
    def _named_input(proto: ModelProto, text: str = text) -> None:
        proto.graph.input[0].name = text
        moe_of(proto).input[0] = text

    @proto_case(None, f"output named: {name}", rare=rare)
    def _named_output(proto: ModelProto, text: str = text) -> None:
        proto.graph.output[0].name = text
        moe_of(proto).output[0] = text
        moe_of(proto).name = ""

    @proto_case(None, f"dimension named: {name}", rare=rare)
    def _named_dimension(proto: ModelProto, text: str = text) -> None:
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param = text


@case(None)
def _side_file_named_by_an_escape(folder: Path) -> None:
    (folder / "\x1b[2J\nqmoe: done").symlink_to("../outside/secret.data")


@case("holds 2|does not exist")
def _models_named_by_an_escape(folder: Path) -> None:
    (folder / "model.onnx").rename(folder / "\x1b[2J.onnx")
    (folder / "second\x9b2J.onnx").write_bytes(b"")


@proto_case("not UTF-8")
def _name_that_is_no_utf8(proto: ModelProto) -> None:
    raw = proto.SerializeToString().replace(b"\x1a\x03moe", b"\x1a\x03m\xffe")
    proto.ParseFromString(raw)


# Names that collide or lack.


@proto_case("fc1")
def _two_initializers_of_one_name(proto: ModelProto) -> None:
    other = helper.make_tensor("fc1", TensorProto.FLOAT, [2, 64, 64], [0.5] * (2 * 64 * 64))
    proto.graph.initializer.append(other)


@proto_case("y")
def _two_outputs_of_one_name(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Identity", ["x"], ["y"]))


@proto_case("fc1")
def _node_that_computes_an_initializer(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Identity", ["x"], ["fc1"]))


@proto_case("x")
def _node_that_computes_an_input(proto: ModelProto) -> None:
    proto.graph.node.append(helper.make_node("Identity", ["router_probs"], ["x"]))


@proto_case("x")
def _two_inputs_of_one_name(proto: ModelProto) -> None:
    proto.graph.input.append(proto.graph.input[0])


@proto_case("has no name")
def _initializer_without_a_name(proto: ModelProto) -> None:
    proto.graph.initializer.append(helper.make_tensor("", TensorProto.FLOAT, [100], [0.5] * 100))


@proto_case("has no name")
def _input_without_a_name(proto: ModelProto) -> None:
    proto.graph.input.append(helper.make_tensor_value_info("", TensorProto.FLOAT, [1]))


@proto_case("'nobody', which nothing computes")
def _output_that_nobody_computes(proto: ModelProto) -> None:
    proto.graph.output.append(helper.make_tensor_value_info("nobody", TensorProto.FLOAT, [1]))


@proto_case("nobody")
def _weight_that_nobody_has(proto: ModelProto) -> None:
    moe_of(proto).input[2] = "nobody"


@proto_case(None)
def _nodes_of_one_name(proto: ModelProto) -> None:
    second = NodeProto()
    second.CopyFrom(moe_of(proto))
    second.output[0] = "z"
    proto.graph.node.append(second)


@proto_case(None)
def _names_that_are_wanted_for_new_values(proto: ModelProto) -> None:
    for index, name in enumerate(("fc1_quantized", "fc1_scales", "fc1_quantized_1")):
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.FLOAT, [1], [0.5]))
        proto.graph.node.append(helper.make_node("Identity", [name], [f"kept{index}"]))
        proto.graph.output.append(helper.make_tensor_value_info(f"kept{index}", 1, [1]))


@proto_case("no outputs")
def _no_graph(proto: ModelProto) -> None:
    proto.ClearField("graph")


@proto_case(None)
def _no_opsets(proto: ModelProto) -> None:
    del proto.opset_import[:]


@proto_case(None)
def _opset_of_2_to_the_62(proto: ModelProto) -> None:
    proto.opset_import[0].version = 1 << 62


@proto_case(None)
def _ir_version_of_2_to_the_62(proto: ModelProto) -> None:
    proto.ir_version = 1 << 62


# Attributes and slots of another type.

for name, value in {
    "k": "two",
    "activation_type": 3,
    "swiglu_fusion": "yes",
    "swiglu_limit": "high",
    "use_sparse_mixer": [1, 2],
    "normalize_routing_weights": 0.5,
    "activation_alpha": [],
    "unknown": "x" * 100_000,
}.items():

    @proto_case(None if value != [] else "has no type", f"attribute {name} of another type")
    def _attribute(proto: ModelProto, name: str = name, value: object = value) -> None:
        if value == []:
            moe_of(proto).attribute.append(AttributeProto(name=name))
        else:
            set_attribute(proto, name, value)


for name, number in {"k": (1 << 63) - 1, "swiglu_limit": float("nan"), "swiglu_fusion": -7}.items():

    @proto_case(None, f"attribute {name} of {number}")
    def _extreme(proto: ModelProto, name: str = name, number: float = number) -> None:
        set_attribute(proto, name, number)


@proto_case(None)
def _attribute_that_is_a_graph(proto: ModelProto) -> None:
    set_attribute(proto, "k", helper.make_graph([], "k", [], []))


@proto_case("an attribute twice: k")
def _attribute_that_is_there_twice(proto: ModelProto) -> None:
    moe_of(proto).attribute.extend([helper.make_attribute("k", 1), helper.make_attribute("k", 2)])


@proto_case(None)
def _reference_to_an_attribute_outside_a_function(proto: ModelProto) -> None:
    moe_of(proto).attribute.append(
        AttributeProto(name="k", ref_attr_name="k", type=AttributeProto.INT)
    )


@proto_case(None)
def _no_inputs(proto: ModelProto) -> None:
    del moe_of(proto).input[:]


@proto_case("has no output")
def _no_outputs(proto: ModelProto) -> None:
    moe = moe_of(proto)
    proto.graph.node.append(helper.make_node("Identity", ["x"], ["y"]))
    del moe.output[:]


@proto_case(None)
def _ten_thousand_inputs(proto: ModelProto) -> None:
    moe_of(proto).input.extend(["x"] * 10_000)


@proto_case(None)
def _two_outputs(proto: ModelProto) -> None:
    moe_of(proto).output.append("more")


@proto_case(None)
def _the_same_weight_everywhere(proto: ModelProto) -> None:
    moe = moe_of(proto)
    del moe.input[:]
    moe.input.extend(["fc1"] * 8)


@proto_case(None)
def _types_that_are_no_tensors(proto: ModelProto) -> None:
    sequence = helper.make_tensor_sequence_value_info("x", TensorProto.FLOAT, None)
    proto.graph.input[0].CopyFrom(sequence)


@proto_case(None)
def _value_info_that_lies(proto: ModelProto) -> None:
    proto.graph.input[1].CopyFrom(
        helper.make_tensor_value_info("router_probs", TensorProto.STRING, [-5, 1 << 62])
    )


@proto_case(None)
def _huge_input(proto: ModelProto) -> None:
    proto.graph.input[0].CopyFrom(
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1 << 40, 64])
    )


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
