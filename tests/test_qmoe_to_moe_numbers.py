"""QMoE back to a float MoE: the weights to the bit, and what they compute."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import reference
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantizers.rtn import rtn_numpy
from qmoe_rules.recipe import Recipe
from qmoe_rules.rules import moe_to_qmoe_rules
from qmoe_rules.saving import save
from tests.moe_models import SLOTS, Experts, relative_error, run, single, the_node
from tests.qmoe_models import Codes, constants, meant, reference_options, spec_of
from tests.qmoe_rewrites import FLOAT, back


@pytest.mark.parametrize(
    ("dtype", "layout", "target"),
    [
        (np.float32, "raw", "cpu"),
        (np.float16, "raw", "cuda"),
        (np.float16, "cutlass_sm80", "cuda"),
        (ml_dtypes.bfloat16, "cutlass_sm80", "cuda"),
    ],
)
@pytest.mark.parametrize(("bits", "block_size"), [(4, 0), (4, 32), (8, 0), (8, 64)])
def test_there_and_back_gives_the_dequantized_weights(
    bits: int, block_size: int, dtype: Any, layout: str, target: str, tmp_path: Path
) -> None:
    experts = Experts(dtype=dtype)
    recipe = Recipe(bits=bits, block_size=block_size, layout=layout, target=target)
    model = back(rewrite(single(experts, k=2), [*moe_to_qmoe_rules(recipe)]))
    save(model, tmp_path / "model.onnx")
    for each in (model, ir.load(tmp_path / "model.onnx")):
        found = constants(the_node(each, "MoE"))
        for name, weight in experts.arrays().items():
            array = found[SLOTS[name]]
            assert array.dtype == np.dtype(dtype)
            if name in ("fc1", "fc2"):
                packed = [rtn_numpy(expert, recipe.specs["fc1"]) for expert in weight]
                weight = np.stack([expert.dequantize().astype(dtype) for expert in packed])
            np.testing.assert_array_equal(array, weight)


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("block_size", [0, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_moe_computes_what_qmoe_does(bits: int, block_size: int, zero_points: bool) -> None:
    codes = Codes(fc1=spec_of(bits, block_size), zero_points=zero_points)
    model = codes.model()
    feeds = codes.experts.feeds()
    node = the_node(model)
    weights = codes.weights()
    before = reference.qmoe(
        feeds["x"],
        feeds["router_probs"],
        weights["fc1"],
        weights["fc2"],
        **reference_options(node),
    )
    (ran_before,) = run(model, feeds)

    model = back(model)
    node = the_node(model, "MoE")
    float_weights = [constants(node)[slot] for slot in FLOAT]
    after = reference.moe(
        feeds["x"], feeds["router_probs"], *float_weights, **reference_options(node)
    )
    np.testing.assert_array_equal(after, before)
    (ran_after,) = run(model, feeds)
    assert relative_error(ran_after, before) <= 1e-5
    # The CPU kernel of QMoE rounds activations for int8 blocks, and looks int2 up.
    inexact = block_size and bits != 4
    assert relative_error(ran_after, ran_before) <= (5e-2 if inexact else 1e-5)


@pytest.mark.parametrize("fc3", [False, True], ids=["fused", "fc3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("format", "block_size", "layout"),
    [
        ("mxfp4", 32, "k_packed"),
        ("mxfp4", 32, "n_packed"),
        ("nvfp4", 16, "k_packed"),
        ("nvfp4", 16, "n_packed"),
        ("fp8", 128, "raw"),
    ],
)
def test_floating_point_codes_become_the_weights_that_they_mean(
    format: str, block_size: int, layout: str, dtype: Any, fc3: bool
) -> None:
    experts = Experts(dtype=dtype, activation="silu" if fc3 else "swiglu")
    codes = Codes(experts, Spec(FORMATS[format], block_size), layout=layout, fc3=fc3)
    model = codes.model()
    meant = codes.weights()
    if fc3:  # the operator has no slot for the global scale of an fc3
        meant["fc3"] = replace(meant["fc3"], global_scale=None)
    runs = layout == "k_packed" and not fc3
    ran = run(model, experts.feeds()) if runs else []
    found = constants(the_node(back(model), "MoE"))
    for name, weight in meant.items():
        assert found[SLOTS[name]].dtype == dtype
        np.testing.assert_array_equal(found[SLOTS[name]], weight.dequantize().astype(dtype))
    assert not [slot for slot in found if "scale" in slot]
    for output in ran:
        (after,) = run(model, experts.feeds())
        assert relative_error(after, output) <= 3e-3  # QMoE rounds what it multiplies with


@pytest.mark.parametrize("layout", ["raw", "cutlass_sm80"])
def test_float16_weights_are_rounded_once(layout: str) -> None:
    codes = Codes(Experts(dtype=np.float16), spec_of(8, 32), zero_points=True, layout=layout)
    found = constants(the_node(back(codes.model()), "MoE"))
    for name, weight in codes.weights().items():
        assert found[SLOTS[name]].dtype == np.float16
        np.testing.assert_array_equal(found[SLOTS[name]], meant(weight))


@pytest.mark.parametrize(
    ("fc1", "fc2", "attributes"),
    [
        (8, 4, {}),
        (4, 8, {}),
        (8, 4, {"expert_weight_bits": 4, "fc1_expert_weight_bits": 8}),
        (2, 8, {"expert_weight_bits": 4, "fc1_expert_weight_bits": 2}),
    ],
)
def test_projections_of_different_widths(fc1: int, fc2: int, attributes: dict[str, Any]) -> None:
    codes = Codes(fc1=spec_of(fc1, 32), fc2=spec_of(fc2, 32), zero_points=True)
    found = constants(the_node(back(codes.model(**attributes)), "MoE"))
    for name, weight in codes.weights().items():
        np.testing.assert_array_equal(found[SLOTS[name]], meant(weight))


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_fc3_stays_an_fc3(activation: str) -> None:
    codes = Codes(Experts(activation=activation), spec_of(4, 32), fc3=True)
    node = the_node(back(codes.model()), "MoE")
    found, weights = constants(node), codes.weights()
    assert set(weights) == {"fc1", "fc2", "fc3"}
    for name, weight in weights.items():
        np.testing.assert_array_equal(found[SLOTS[name]], meant(weight))
    x, router = codes.experts.feeds().values()
    real = [found[SLOTS[name]] for name in ("fc1", "fc2", "fc3")]
    options = reference_options(node)
    np.testing.assert_array_equal(
        reference.moe(x, router, *real[:2], fc3=real[2], **options),
        reference.qmoe(x, router, weights["fc1"], weights["fc2"], fc3=weights["fc3"], **options),
    )
