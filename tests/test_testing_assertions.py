"""The assertions of `qmoe_rules.testing`: what they let pass, and what they say of the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError
from qmoe_rules.passes import prepare
from qmoe_rules.rules import (
    apply_rules,
    fuse_experts_rules,
    moe_to_qmoe_rules,
    qmoe_to_moe_rules,
)
from qmoe_rules.testing import (
    LayerDesign,
    ModelDesign,
    assert_same_meaning,
    assert_untouched,
    assert_valid,
    build_model,
)
from tests import expert_graphs
from tests.moe_models import Array, nodes_of, the_node

TWO = ModelDesign(
    layers=(
        LayerDesign(experts=3, k=2, activation="swiglu", form="interleaved", biases=("fc1", "fc2")),
        LayerDesign(experts=2, k=1, activation="silu", router="matmul"),
    ),
    residual=True,
    annotated=True,
)


def quantized(design: ModelDesign = TWO, **fields: Any) -> tuple[ir.Model, ir.Model]:
    model = build_model(design)
    after = prepare(model.clone())
    apply_rules(after, moe_to_qmoe_rules(**fields))
    return model, after


def initializer(model: ir.Model, name: str) -> Array:
    """The array of an initializer, which may be changed in place."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    array: Array = value.const_value.numpy().copy()
    value.const_value = ir.tensor(array, name=name)
    return array


@pytest.mark.parametrize("fields", [{}, {"bits": 8, "block_size": 32}, {"symmetric": False}])
def test_quantized_models_pass_and_so_do_protos(fields: dict[str, Any]) -> None:
    before, after = quantized(target="cpu", **fields)
    texts = [ir.to_proto(model).SerializeToString() for model in (before, after)]
    for models in ((before, after), (ir.to_proto(before), ir.to_proto(after))):
        assert_same_meaning(*models)
        assert_untouched(*models)
        assert_valid(models[1], runs_on="cpu")
    assert texts == [ir.to_proto(model).SerializeToString() for model in (before, after)]


def test_dequantized_models_mean_what_the_quantized_ones_do() -> None:
    _, before = quantized(target="cpu", bits=8, block_size=32)
    after = before.clone()
    apply_rules(after, qmoe_to_moe_rules())
    assert not nodes_of(after, "QMoE")
    assert_same_meaning(before, after)
    initializer(after, "l1_fc2_quantized_dequantized")[:] += 1
    with pytest.raises(AssertionError, match=r"output y is .* off what it was"):
        assert_same_meaning(before, after)


def test_exchanged_experts_are_named() -> None:
    before, after = quantized(target="cpu")
    codes = initializer(after, "l0_fc1_quantized")
    codes[:] = codes[::-1].copy()
    with pytest.raises(
        AssertionError, match=r"/layers.0/moe: fc1 of expert \d is .* off the float"
    ):
        assert_same_meaning(before, after)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["interleaved", "halves", "fc3"])
def test_a_change_of_what_a_float_model_computes_is_placed(form: str, dtype: str) -> None:
    layer = LayerDesign(activation="swiglu", form=form, experts=2)
    before = build_model(ModelDesign(layers=(layer,), dtype=dtype))
    after = before.clone()
    assert_same_meaning(before, after)
    initializer(after, "l0_fc2")[1, 5] *= 3
    message = (
        r"output y is 0\.\d+ off .* at \[\d+, 5\]: .*\n/layers.0/moe: constant l0_fc2 has other"
    )
    with pytest.raises(AssertionError, match=message):
        assert_same_meaning(before, after)


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_experts_that_were_spelled_out_are_compared_too(dtype: type) -> None:
    before = expert_graphs.model(dtype=dtype)
    after = before.clone()
    apply_rules(after, fuse_experts_rules())
    fc2 = ops.inputs(the_node(after, "MoE"))["fc2_experts_weights"]
    assert fc2 is not None
    assert_same_meaning(before, after)
    assert_untouched(before, after)
    assert_same_meaning(before, before)  # no MoE in either
    initializer(after, str(fc2.name))[0] *= 1.5
    with pytest.raises(AssertionError, match=r"output y is 0\.\d+ off what it was"):
        assert_same_meaning(before, after)


def test_given_feeds_are_what_the_models_run_on() -> None:
    before = build_model(ModelDesign(layers=(LayerDesign(place="if"),)))
    after = before.clone()
    (node,) = [each for each in after.graph if each.op_type == "If"]
    then = node.attributes["then_branch"].as_graph()
    (moe,) = then
    moe.attributes["activation_type"] = ir.AttrString("activation_type", "identity")
    x = np.ones((2, 32), np.float32)
    feeds = {"x": x, "router0": np.zeros((2, 1), np.float32)}
    assert_same_meaning(before, after, feeds={**feeds, "flag0": np.array(False)})
    with pytest.raises(AssertionError, match="computed by ONNX Runtime"):
        assert_same_meaning(before, after, feeds={**feeds, "flag0": np.array(True)})
    with pytest.raises(ConfigError, match="input 'flag0' is missing"):
        assert_same_meaning(before, after, feeds=feeds)


def changed_constant(model: ir.Model) -> None:
    initializer(model, "l0_norm")[3] = 0.25


def renamed_initializer(model: ir.Model) -> None:
    model.graph.initializers["l0_norm"].name = "scale"


def changed_operator(model: ir.Model) -> None:
    node = next(each for each in model.graph if each.op_type == "Mul")
    node.op_type = "Sub"


def renamed_node(model: ir.Model) -> None:
    next(each for each in model.graph if each.op_type == "MatMul").name = "other"


def lost_node_metadata(model: ir.Model) -> None:
    next(each for each in model.graph if each.op_type == "MatMul").metadata_props.clear()


def lost_model_metadata(model: ir.Model) -> None:
    model.metadata_props.clear()


def renamed_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "z"


def retyped_input(model: ir.Model) -> None:
    model.graph.inputs[0].shape = ir.Shape([1, 32])


def newer_opset(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 22


def lost_import(model: ir.Model) -> None:
    del model.graph.opset_imports[ops.DOMAIN]


def changed_bias(model: ir.Model) -> None:
    initializer(model, "l0_fc1_bias")[0, 0] = 9


def fewer_experts_per_token(model: ir.Model) -> None:
    nodes_of(model, "QMoE")[0].attributes["k"] = ir.AttrInt64("k", 1)


def another_activation(model: ir.Model) -> None:
    nodes_of(model, "QMoE")[1].attributes["activation_type"] = ir.AttrString(
        "activation_type", "relu"
    )


TOUCHED: dict[Callable[[ir.Model], None], str] = {
    changed_constant: "constant l0_norm has other values",
    renamed_initializer: "name of initializer l0_norm is 'scale'",
    changed_operator: "is Mul, and Sub in the converted model",
    renamed_node: "name of node .* is 'other'",
    lost_node_metadata: "metadata_props of node .* is None, and was {'position'",
    lost_model_metadata: "metadata_props of the model is None, and was {'origin': 'model'}",
    renamed_output: "name of graph output y is 'z', and was 'y'",
    retyped_input: r"shape of graph input x is \[1, 32\], and was \['tokens', 32\]",
    newer_opset: "opset ai.onnx 21, and 22 in the converted model",
    lost_import: "opset import com.microsoft is gone",
    changed_bias: "constant l0_fc1_bias has other values",
    fewer_experts_per_token: "/layers.0/moe: k=1, and 2 in the float model",
    another_activation: "/layers.1/moe: activation_type=relu, and silu in the float model",
}


@pytest.mark.parametrize("touch", TOUCHED, ids=lambda touch: touch.__name__)
def test_what_is_touched_is_said(touch: Callable[[ir.Model], None]) -> None:
    before, after = quantized()
    touch(after)
    with pytest.raises(AssertionError, match=TOUCHED[touch]):
        assert_untouched(before, after)


def test_exceptions_are_by_name_or_pattern() -> None:
    before, after = quantized()
    changed_constant(after)
    assert_untouched(before, after, except_=["l0_norm"])
    assert_untouched(before, after, except_=["*_norm"])
    with pytest.raises(AssertionError, match="l0_norm"):
        assert_untouched(before, after, except_=["l1_norm"])
    with pytest.raises(ConfigError, match="no regular expression"):
        assert_untouched(before, after, except_=["re:("])


def test_what_is_not_valid_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    model = build_model(ModelDesign(layers=(LayerDesign(activation="swiglu", form="fc3"),)))
    assert_valid(model)
    assert_valid(model, runs_on="cuda")
    with pytest.raises(AssertionError, match=r"/layers.0/moe .* the CPU provider"):
        assert_valid(model, runs_on="cpu")
    with pytest.raises(ConfigError, match="runs_on='gpu'"):
        assert_valid(model, runs_on="gpu")
    the_node(model, "MoE").attributes["k"] = ir.AttrInt64("k", 2)
    with pytest.raises(AssertionError, match=r"/layers.0/moe: k=2 with 1 experts"):
        assert_valid(model)
    proto = ir.to_proto(build_model(ModelDesign()))
    proto.graph.node[0].input[0] = "nowhere"
    assert isinstance(proto, onnx.ModelProto)
    with pytest.raises(AssertionError, match=r"onnx.checker: .*nowhere"):
        assert_valid(proto)
    proto = ir.to_proto(build_model(ModelDesign()))
    proto.graph.ClearField("output")
    with pytest.raises(
        AssertionError, match=r"does not run the model: .* its graph has no outputs"
    ):
        assert_valid(proto, runs_on="cpu")
