"""Tensors whose shape, bytes and type do not go together."""

from __future__ import annotations

from typing import Any

from onnx import ModelProto, TensorProto, helper

from tests.hostile._cases import OUTSIDE, place, proto_case, tensor_of

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


def inlined(proto: ModelProto) -> TensorProto:
    """Returns a tensor whose data are no longer in a file, nor anywhere else yet."""
    tensor = tensor_of(proto)
    tensor.ClearField("data_location")
    del tensor.external_data[:]
    return tensor


@proto_case(OUTSIDE)
def _external_entry_that_nobody_knows(proto: ModelProto) -> None:
    """The parser warns of it: that must not stand in front of the error."""
    del tensor_of(proto).external_data[:]
    tensor_of(proto).external_data.add(key="", value="model.onnx.data")


@proto_case(r"has the attributes \[''\]")
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
    tensor = inlined(proto)
    tensor.raw_data = bytes(100)


@proto_case("its shape asks for")
def _inline_tensor_of_more_bytes(proto: ModelProto) -> None:
    tensor = inlined(proto)
    tensor.raw_data = bytes(2 * 64 * 64 * 4 + 1)


@proto_case("its shape asks for")
def _inline_tensor_of_nothing(proto: ModelProto) -> None:
    inlined(proto)


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
    tensor = inlined(proto)
    tensor.int64_data.extend([1] * (2 * 64 * 64))
