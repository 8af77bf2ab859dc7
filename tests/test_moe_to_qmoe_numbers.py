"""One node through the rule: it computes what the float64 reference does on its codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.recipe import Recipe
from tests.moe_models import Experts, expected, relative_error, run, single, the_node
from tests.moe_rewrites import EXACT, convert

FP16 = 2e-3
INT8_BLOCKS = 5e-2  # the CPU kernel rounds activations to int8 there
INT2_BLOCKS = 3e-2  # and looks int2 products up
BFLOAT16 = 1e-2  # and rounds fp4's scales to bfloat16, which matters unless they are powers of two


def converted_error(
    experts: Experts, recipe: Recipe, shape: tuple[int, ...] = (6,), **attributes: Any
) -> float:
    """Converts a node, runs it and returns how far it is from the reference."""
    model = convert(single(experts, shape=shape, **attributes), recipe)
    assert the_node(model)
    feeds = experts.feeds(shape)
    wanted = expected(experts.arrays(), feeds, recipe.specs, **{**experts.attributes, **attributes})
    return relative_error(run(model, feeds)[0], wanted)


RECIPES = [(4, 0), (4, 32), (4, 64), (8, 0), (8, 32)]


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "identity", "swiglu"])
@pytest.mark.parametrize(("bits", "block_size"), RECIPES)
def test_converted_model_matches_the_reference(bits: int, block_size: int, activation: str) -> None:
    bound = INT8_BLOCKS if (bits, block_size) == (8, 32) else EXACT
    recipe = Recipe(bits=bits, block_size=block_size)
    assert converted_error(Experts(activation=activation), recipe, k=2) <= bound


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
@pytest.mark.parametrize(("bits", "block_size"), RECIPES)
def test_float16_matches_the_reference(bits: int, block_size: int, activation: str) -> None:
    bound = INT8_BLOCKS if (bits, block_size) == (8, 32) else FP16
    recipe = Recipe(bits=bits, block_size=block_size)
    experts = Experts(activation=activation, dtype=np.float16)
    assert converted_error(experts, recipe, k=2) <= bound


@pytest.mark.parametrize(
    ("fields", "dtype", "bound"),
    [
        ({"bits": 2, "target": "cpu"}, np.float32, EXACT),
        ({"bits": 2, "block_size": 16, "target": "cpu"}, np.float32, EXACT),
        ({"bits": 2, "block_size": 64}, np.float16, INT2_BLOCKS),
        ({"bits": 3, "block_size": 32, "target": "cpu"}, np.float16, FP16),
        ({"bits": 3, "block_size": 64, "target": "cpu"}, np.float16, FP16),
        ({"symmetric": False, "target": "cpu"}, np.float32, EXACT),
        ({"symmetric": False, "block_size": 32}, np.float32, EXACT),
        ({"symmetric": False, "block_size": 32}, np.float16, FP16),
        ({"symmetric": False, "bits": 2, "target": "cpu"}, np.float32, EXACT),
        ({"symmetric": False, "bits": 8, "target": "cpu"}, np.float32, EXACT),
        ({"symmetric": False, "bits": 8, "block_size": 64}, np.float32, INT8_BLOCKS),
        ({"format": "mxfp4", "target": "cpu"}, np.float32, EXACT),
        ({"format": "mxfp4", "target": "cpu"}, np.float16, FP16),
        ({"format": "nvfp4", "target": "cpu"}, np.float32, BFLOAT16),
        ({"format": "nvfp4", "target": "cpu"}, np.float16, FP16),
    ],
    ids=str,
)
def test_every_format_of_the_cpu_matches_the_reference(
    fields: dict[str, Any], dtype: Any, bound: float
) -> None:
    assert converted_error(Experts(dtype=dtype, bias=False), Recipe(**fields), k=2) <= bound


@pytest.mark.parametrize("target", ["portable", "cpu"])
@pytest.mark.parametrize("shape", [(1, 128), (6,), (2, 5)], ids=["one batch", "2-D", "3-D"])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_routing_matches_the_reference(
    k: int, normalize: int, shape: tuple[int, ...], target: str
) -> None:
    experts, recipe = Experts(experts=5), Recipe(block_size=32, target=target)
    error = converted_error(experts, recipe, shape, k=k, normalize_routing_weights=normalize)
    assert error <= EXACT


def test_normalization_makes_a_difference() -> None:
    """Guards the test above: its tolerance tells the two kinds of routing apart."""
    experts = Experts(experts=5)
    feeds = experts.feeds()
    outputs = [
        expected(
            experts.arrays(), feeds, None, k=2, normalize_routing_weights=on, **experts.attributes
        )
        for on in (0, 1)
    ]
    assert relative_error(outputs[0], outputs[1]) > 0.05


@pytest.mark.parametrize("limit", [None, 7.0, 0.5])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.702, 1.0)])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_swiglu_parameters_survive(
    bias: bool, alpha: float, beta: float, limit: float | None
) -> None:
    attributes: dict[str, Any] = {"activation_alpha": alpha, "activation_beta": beta, "k": 2}
    if limit is not None:
        attributes["swiglu_limit"] = limit
    error = converted_error(Experts(bias=bias), Recipe(block_size=64), **attributes)
    assert error <= EXACT


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_packed_bytes_run_through_the_cpu_path_for_them(block_size: int) -> None:
    """The CPU provider of onnxruntime 1.32 reads int4 bytes with weights_prepacked=1 as CUDA."""
    recipe = Recipe(block_size=block_size, target="cuda", layout="cutlass_sm80")
    error = converted_error(
        Experts(inter=256, dtype=np.float16), recipe, k=2, normalize_routing_weights=1
    )
    assert error <= FP16


def test_packed_bytes_are_not_the_raw_ones() -> None:
    """Guards the test above: the CPU does tell the layouts apart."""
    experts = Experts(inter=256, dtype=np.float16)
    recipe = Recipe(block_size=64, target="cuda")
    attributes = {**experts.attributes, "k": 2, "normalize_routing_weights": 1}
    model = convert(single(experts, **attributes), recipe)
    the_node(model).attributes.add(ir.AttrInt64("weights_prepacked", 1))
    for value in list(model.graph.initializers.values()):
        if value.name in ("fc1_quantized", "fc2_quantized"):
            experts_, rows, row_bytes = value.const_value.numpy().shape  # type: ignore[union-attr]
            stored = value.const_value.numpy().reshape(experts_, row_bytes * 2, rows // 2)  # type: ignore[union-attr]
            value.const_value = ir.tensor(stored)
            value.shape = ir.Shape(stored.shape)
    feeds = experts.feeds()
    wanted = expected(experts.arrays(), feeds, recipe.specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) > 0.5


def test_softmax_is_right_without_an_import_of_the_default_domain() -> None:
    experts = Experts()
    attributes = {**experts.attributes, "k": 2}
    model = convert(single(opsets={"com.microsoft": 1}, **attributes))
    feeds = experts.feeds()
    wanted = expected(experts.arrays(), feeds, Recipe().specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT
