"""`calibrate` one node: what every expert sees, against the float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file

from qmoe_rules import calibrate, ops
from tests.calibrations import FLOAT32, SMALL, assert_seen, joined, seen, several
from tests.moe_models import Experts, Graph, single
from tests.moe_models import inputs_of as graph_inputs

ACTIVATIONS = ["relu", "silu", "gelu", "identity", "swiglu", "geglu"]  # geglu runs nowhere on CPU
PRECISION = {np.float32: FLOAT32, np.float16: FLOAT32, ml_dtypes.bfloat16: FLOAT32}


@pytest.mark.parametrize("dtype", list(PRECISION), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_statistics_are_those_of_the_reference(activation: str, normalize: int, dtype: Any) -> None:
    experts = Experts(4, 32, 48, activation, dtype=dtype)
    options = {**experts.attributes, "k": 2, "normalize_routing_weights": normalize}
    options |= {"activation_alpha": 1.7, "activation_beta": 0.5, "swiglu_limit": 1.5}
    feeds = several(experts, 3)
    calibration = calibrate(single(experts, **options), feeds, hessian=True)
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    assert calibration.nodes == ("moe",)
    assert calibration.tokens == 120
    assert_seen(calibration, "moe", seen(experts.arrays(), x, logits, **options), PRECISION[dtype])


def test_more_rows_than_are_taken_at_a_time() -> None:
    feeds = several(SMALL, 3, (7, 130))
    calibration = calibrate(single(SMALL, shape=(1, 1), k=3), feeds, hessian=True)
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    assert_seen(calibration, "moe", seen(SMALL.arrays(), x, logits, 3, **SMALL.attributes))


def test_without_hessians_the_means_are_the_same() -> None:
    feeds = several(SMALL, 2)
    with_them, without = (calibrate(single(SMALL), feeds, hessian=h) for h in (True, False))
    for expert, projection in itertools.product(range(4), ("fc1", "fc2")):
        first = with_them.statistics("moe", projection, expert)
        second = without.statistics("moe", projection, expert)
        np.testing.assert_array_equal(first.mean_square, second.mean_square)
        assert second.hessian is None


def test_one_token() -> None:
    (feed,) = several(SMALL, 1, (1,))
    calibration = calibrate(single(SMALL), [feed], hessian=True)
    expected = seen(SMALL.arrays(), feed["x"], feed["router_probs"], **SMALL.attributes)
    assert sorted(calibration.counts("moe", "fc1")) == [0, 0, 0, 1]
    assert_seen(calibration, "moe", expected)


def test_one_expert_of_a_long_name() -> None:
    """Most of the header is names: it has room for every one of them."""
    one, model = replace(SMALL, experts=1), single(replace(SMALL, experts=1))
    next(ops.nodes(model, "MoE")).name = name = "moe" * 100
    (feed,) = several(one, 1)
    calibration = calibrate(model, [feed], hessian=True)
    expected = seen(one.arrays(), feed["x"], feed["router_probs"], **one.attributes)
    assert_seen(calibration, name, expected)


@pytest.mark.parametrize("masked", [-1e9, -np.inf])
def test_an_expert_that_never_fires(masked: float, tmp_path: Path) -> None:
    feeds = several(SMALL, 2)
    for feed in feeds:
        feed["router_probs"][:, 2] = masked
    path = tmp_path / "calibration.safetensors"
    calibration = calibrate(single(SMALL, k=2), feeds, path, hessian=True)
    idle = calibration.statistics("moe", "fc2", 2)
    assert idle.tokens == 0
    assert not idle.mean_square.any()
    assert idle.hessian is None
    stored = load_file(path)
    assert {name for name in stored if "hessian" in name} == {
        f"moe/{projection}/hessian/{expert}"
        for projection in ("fc1", "fc2")
        for expert in (0, 1, 3)
    } | {"moe/fc1/hessian"}
    fallback = calibration.for_expert("moe", "fc2", 2)
    assert fallback is not None
    assert fallback.tokens == 0
    np.testing.assert_array_equal(fallback.mean_square, calibration.pooled("moe", "fc2"))
    assert fallback.mean_square.all()


def test_masked_experts_that_are_chosen_all_the_same_have_not_fired() -> None:
    feeds = several(SMALL, 1)
    feeds[0]["router_probs"][:, 1:] = -np.inf
    calibration = calibrate(single(SMALL, k=3), feeds)
    assert list(calibration.counts("moe", "fc1")) == [40, 0, 0, 0]


def test_an_output_that_nothing_needs_is_not_computed() -> None:
    arrays = SMALL.arrays()
    arrays["fc2"][:] = np.nan
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    y = graph.moe(x, router, graph.weights(arrays), **SMALL.attributes)
    assert calibrate(graph.model(y), several(SMALL, 1)).tokens == 40


def test_the_model_is_not_changed() -> None:
    model = single(SMALL, swiglu_fusion=2)
    before = ir.to_proto(model).SerializeToString()
    calibrate(model, several(SMALL, 1))
    assert ir.to_proto(model).SerializeToString() == before


# Forms of a node that CPU has no kernel for.


@pytest.mark.parametrize("activation", ["swiglu", "silu", "geglu"])
def test_separate_gate_and_up_weights_are_interleaved_first(activation: str) -> None:
    arrays, rng = Experts(4, 32, 48, "silu").arrays(), np.random.default_rng(9)
    arrays["fc3"] = rng.standard_normal(arrays["fc1"].shape).astype(np.float32)
    feeds = several(SMALL, 2)
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    y = graph.moe(x, router, graph.weights(arrays), activation_type=activation, k=2)
    calibration = calibrate(graph.model(y), feeds, hessian=True)
    together = {
        "fc1": np.stack((arrays["fc1"], arrays["fc3"]), axis=2).reshape(4, 96, 32),
        "fc1_bias": np.stack((arrays["fc1_bias"], 0 * arrays["fc1_bias"]), 2).reshape(4, 96),
    }
    fused = "geglu" if activation == "geglu" else "swiglu"
    expected = seen(
        together,
        joined(feeds, "x"),
        joined(feeds, "router_probs"),
        2,
        activation_type=fused,
        swiglu_fusion=1,
    )
    assert_seen(calibration, "moe", expected)


def test_halves_of_fc1_are_interleaved_first() -> None:
    feeds = several(SMALL, 2)
    calibration = calibrate(single(SMALL, swiglu_fusion=2), feeds, hessian=True)
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    options = {**SMALL.attributes, "swiglu_fusion": 2}
    assert_seen(calibration, "moe", seen(SMALL.arrays(), x, logits, **options))
