"""Nodes that are normalized and quantized in one sweep: the bytes of interleaved weights."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import QuantizeMoEPass, moe_to_qmoe_rules, ops, reference
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from tests.gated_nodes import (
    ALPHA,
    FORMS,
    INT4,
    apart,
    arrays_of,
    attributes_of,
    both,
    constants,
    interleaved,
    meaning,
    normal,
    written,
)
from tests.moe_models import Experts, Graph, inputs_of, quantized, relative_error, run, the_node


def initializers(model: ir.Model) -> dict[str, bytes]:
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.tobytes() for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("form", "activation"), [("fc3", "swiglu"), ("fc3", "silu"), ("halves", "swiglu")]
)
def test_a_node_is_quantized_in_the_same_sweep(
    form: str, activation: str, dtype: npt.DTypeLike
) -> None:
    biases = ("fc1", "fc3") if form == "fc3" else ("fc1",)
    more = {} if activation == "silu" else ALPHA
    model = apart(form, activation, biases, dtype, normalize_routing_weights=1, **more)
    feeds = Experts(dtype=dtype).feeds()
    real = meaning(the_node(model, "MoE"), feeds)
    report = Report()
    rewrite(model, both(report, bits=4, block_size=32))
    node = the_node(model)
    assert [(row.node, row.status) for row in report.rows] == [("moe", CONVERTED)]
    assert sorted(model.graph.initializers) == [
        "fc1_bias_interleaved",
        "fc1_interleaved_quantized",
        "fc1_interleaved_scales",
        "fc2_bias",
        "fc2_quantized",
        "fc2_scales",
    ]
    actual = run(model, feeds)[0]
    assert relative_error(actual, real) <= INT4
    spec = Recipe(bits=4, block_size=32).specs["fc1"]
    arrays: dict[str, Any] = normal(arrays_of(form, biases, dtype))
    arrays |= {name: quantized(arrays[name], spec) for name in ("fc1", "fc2")}
    values = ops.attributes(node)
    kept = {name: values[name] for name in ops.MOE_ATTRIBUTES if values[name] is not None}
    exact = reference.moe(feeds["x"], feeds["router_probs"], **arrays, **kept)
    assert relative_error(actual, exact) <= (1e-5 if dtype is np.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("form", "activation", "biases"), FORMS)
def test_the_bytes_are_those_of_the_interleaved_weights(
    form: str, activation: str, biases: tuple[str, ...], dtype: npt.DTypeLike
) -> None:
    target = "cpu" if dtype is np.float32 else "cuda"
    if target == "cpu" and activation in ("gelu", "geglu"):
        pytest.skip("no kernel for geglu in float32")
    model = rewrite(apart(form, activation, biases, dtype), both(bits=4, target=target))
    graph = Graph()
    x, router = inputs_of(graph, Experts(dtype=dtype))
    weights = graph.weights(normal(arrays_of(form, biases, dtype)))
    node = the_node(model)
    values = ops.attributes(node)
    attributes = {name: values[name] for name in ops.MOE_ATTRIBUTES if values[name] is not None}
    direct = graph.model(graph.moe(x, router, weights, **attributes))
    rewrite(direct, moe_to_qmoe_rules(bits=4, target=target))
    renamed = {name.replace("_interleaved", ""): b for name, b in initializers(model).items()}
    expected = initializers(direct)
    if biases == ("fc3",):
        renamed["fc1_bias"] = renamed.pop("fc3_bias")
    assert renamed == expected
    assert written(node) == written(the_node(direct))


def test_the_pass_normalizes_first() -> None:
    model = apart("fc3", "silu", ("fc1", "fc3"))
    quantize = QuantizeMoEPass(bits=8)
    quantize(model)
    assert [(row.node, row.status) for row in quantize.report.rows] == [("moe", CONVERTED)]
    assert the_node(model)


def test_a_node_as_the_genai_builder_makes_phimoe() -> None:
    """Three weights, no biases, the sparse mixer, empty names for what is missing."""
    graph = Graph()
    x, router = inputs_of(graph, Experts(dtype=np.float16))
    arrays = arrays_of("fc3", dtype=np.float16)
    w = graph.weights({name: arrays[name] for name in ("fc1", "fc2", "fc3")})
    empty = [ir.Value(name="") for _ in range(3)]
    slots = (x, router, w["fc1"], empty[0], w["fc2"], empty[1], w["fc3"], empty[2])
    y = graph.op(
        "MoE",
        *slots,
        out="y",
        like=x,
        name="/model/layers.0/moe/MoE",
        domain=ops.DOMAIN,
        **attributes_of("fc3", "silu", use_sparse_mixer=1, normalize_routing_weights=0),
    )
    report = Report()
    model = rewrite(graph.model(y), both(report, bits=4))
    node = the_node(model, "MoE")
    values = ops.attributes(node)
    assert node.name == "/model/layers.0/moe/MoE"
    assert (values["activation_type"], values["swiglu_fusion"]) == ("swiglu", 1)
    assert (values["use_sparse_mixer"], values["k"]) == (1, 2)
    assert len(node.inputs) == 5
    np.testing.assert_array_equal(constants(node)["fc1"], interleaved(arrays["fc1"], arrays["fc3"]))
    (row,) = report.rows  # of the new node: nothing about fc3 is left to say
    assert (row.node, row.status) == (node.name, SKIPPED)
    assert "use_sparse_mixer=1" in row.reason
    node.attributes.add(ir.AttrInt64("use_sparse_mixer", 0))
    assert the_node(rewrite(model, moe_to_qmoe_rules(bits=4)))
