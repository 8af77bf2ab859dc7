"""Experts that all compute every token become one MoE, whatever their form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qmoe_rules import save
from tests import expert_graphs
from tests.expert_graphs import ROUTERS, Layer
from tests.fusions import GPTOSS, fused
from tests.moe_models import relative_error, run, the_node


def check_same(layer: Layer, tolerance: float = 1e-6) -> ir.Node:
    """Fuses a layer, checks that it computes the same in one MoE, and returns the MoE."""
    model = expert_graphs.model(layer)
    feeds = [expert_graphs.feeds(layer, tokens) for tokens in ((1, 1), (4, 5))]
    before = [run(model, feed)[0] for feed in feeds]
    assert fused(model).rows == []
    assert not [node for node in model.graph if node.op_type in ("Equal", "Sigmoid", "Relu")][1:]
    assert not any(value.name and ".experts." in value.name for value in old_weights(model))
    for feed, expected in zip(feeds, before, strict=True):
        assert relative_error(run(model, feed)[0], expected) < tolerance
    return the_node(model, "MoE")


def old_weights(model: ir.Model) -> list[ir.Value]:
    """Returns the initializers of single experts that are left."""
    return [
        value for value in model.graph.initializers.values() if "experts_" not in str(value.name)
    ]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("router", sorted(set(ROUTERS) - {"signed"}))
def test_every_router_is_kept(router: str, dtype: Any) -> None:
    layer = Layer(router=router, dtype=dtype)
    node = check_same(layer, 1e-6 if dtype is np.float32 else 2e-3)
    direct = {"softmax_topk": 0, "softmax_topk_norm": 1, "topk_softmax": 1, "float32": 1}
    assert node.attributes.get_int("normalize_routing_weights") == direct.get(router, 1)
    assert node.attributes.get_int("k") == 2
    router_probs = node.inputs[1]
    assert router_probs is not None
    encoded = "Cast" if router not in direct else "Reshape"
    assert router_probs.producer().op_type == encoded  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": 2, "k": 1},
        {"experts": 16, "k": 5},
        {"bias": True},
        {"bias": True, "swapped": True},
        {"flat": True},
        {"flat": True, "gemm": True, "bias": True},
        {"flat": True, "gemm": True},
        {"keepdims": 0},
        {"shared": "before"},
        {"shared": "after"},
        {"shared": "before", "experts": 1, "k": 1},
        {"activation": "silu"},
        {"activation": "relu", "bias": True},
        {"activation": "gelu"},
        {"numbers": [3, 0, 2, 1]},
        GPTOSS,
        {**GPTOSS, "limit": 0.25, "swapped": True},
        {**GPTOSS, "limit": None, "alpha": 0.7, "beta": 0.0},
        {"homes": {"experts.1.down.weight_t": "constant"}},
    ],
    ids=str,
)
def test_every_form_of_expert_is_kept(fields: dict[str, Any]) -> None:
    check_same(Layer(**fields))


def test_attributes_are_all_written_out() -> None:
    node = check_same(Layer(**GPTOSS))
    values = {name: attribute.value for name, attribute in node.attributes.items()}
    assert values == {
        "activation_alpha": pytest.approx(1.702),
        "activation_beta": 1.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": 7.0,
        "use_sparse_mixer": 0,
    }
    plain = check_same(Layer(activation="relu"))
    assert plain.attributes.get_int("swiglu_fusion") == 0
    assert "swiglu_limit" not in plain.attributes


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_weights_are_the_experts_rows_in_turn(dtype: Any) -> None:
    model = expert_graphs.model(dtype=dtype, bias=True)
    old = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}  # type: ignore[union-attr]
    fused(model)
    new = [value.const_value.numpy() for value in the_node(model, "MoE").inputs[2:] if value]  # type: ignore[union-attr]
    assert [array.dtype for array in new] == [np.dtype(dtype)] * 4
    for expert in range(4):
        name = f"l0.experts.{expert}"
        fc1, fc1_bias, fc2, fc2_bias = (array[expert] for array in new)
        assert np.array_equal(fc1[0::2], old[f"{name}.gate.weight_t"].T)
        assert np.array_equal(fc1[1::2], old[f"{name}.up.weight_t"].T)
        assert np.array_equal(fc1_bias[0::2], old[f"{name}.gate.bias"])
        assert np.array_equal(fc1_bias[1::2], old[f"{name}.up.bias"])
        assert np.array_equal(fc2, old[f"{name}.down.weight_t"].T)
        assert np.array_equal(fc2_bias, old[f"{name}.down.bias"])


def test_node_and_weights_have_names_of_the_experts() -> None:
    model = expert_graphs.model()
    fused(model)
    node = the_node(model, "MoE")
    assert node.name == "l0.experts"
    assert [value.name for value in node.inputs[2:] if value] == [
        "l0.experts.fc1_experts_weights",
        "l0.experts.fc2_experts_weights",
    ]


def test_nothing_is_read_before_the_model_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    original = expert_graphs.model()
    ir.save(original, path, external_data="model.data", size_threshold_bytes=0)
    model = ir.load(path)
    fused(model)
    assert len(model.graph.initializers) == 3
    save(model, tmp_path / "fused" / "model.onnx")
    feeds = expert_graphs.feeds()
    session = ort.InferenceSession(tmp_path / "fused" / "model.onnx")
    assert relative_error(session.run(None, feeds)[0], run(original, feeds)[0]) < 1e-6


def test_512_experts_and_a_recursion_limit_do_not_meet() -> None:
    model = expert_graphs.model(experts=512, hidden=8, inter=8, k=8)
    feeds = expert_graphs.feeds(Layer(hidden=8))
    before = run(model, feeds)[0]
    assert fused(model).rows == []
    assert sum(1 for _ in model.graph) == 5
    assert relative_error(run(model, feeds)[0], before) < 1e-6
