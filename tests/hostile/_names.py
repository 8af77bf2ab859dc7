"""Names that are odd, collide or lack."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto, NodeProto, TensorProto, helper

from tests.hostile._cases import behind, case, moe_of, place, proto_case, set_attribute, tensor_of

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
