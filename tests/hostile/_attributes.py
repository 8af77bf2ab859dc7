"""Attributes and slots of another type."""

from __future__ import annotations

from onnx import AttributeProto, ModelProto, TensorProto, helper

from tests.hostile._cases import moe_of, proto_case, set_attribute

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
