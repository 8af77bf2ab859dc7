"""The reference of MoE against the CPU kernel of onnxruntime, and against algebra elsewhere."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from qmoe_rules import reference
from tests.reference_runs import (
    EXPERTS,
    HIDDEN,
    INTER,
    SWIGLU,
    TOKENS,
    Inputs,
    check_moe,
    interleave,
    make_inputs,
    relative_error,
    split_inputs,
)

# --- MoE against onnxruntime ---------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(TOKENS, HIDDEN), (2, TOKENS // 2, HIDDEN)], ids=["2d", "3d"])
@pytest.mark.parametrize("k", [1, 3, EXPERTS])
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("activation", ["relu", "silu", "identity", "gelu", "swiglu"])
def test_moe_matches_onnxruntime(
    activation: str, bias: bool, normalize: int, k: int, shape: tuple[int, ...]
) -> None:
    gated = activation == "swiglu"
    check_moe(
        make_inputs(2 * INTER if gated else INTER, bias=bias, shape=shape),
        {
            "k": k,
            "activation_type": activation,
            "swiglu_fusion": int(gated),
            "normalize_routing_weights": normalize,
        },
    )


@pytest.mark.parametrize("limit", [None, float("inf"), 7.0, 0.5, 0.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.0), (1.702, 1.0)])
def test_swiglu_clamps_like_onnxruntime(alpha: float, beta: float, limit: float | None) -> None:
    inputs = make_inputs(2 * INTER)
    attributes = SWIGLU | {"activation_alpha": alpha, "activation_beta": beta, "k": 2}
    check_moe(inputs, attributes | {"swiglu_limit": limit})


def test_swiglu_limit_is_reached() -> None:
    """Guards the test above: with this data the limits of 0.5 and 7 do not mean the same."""
    inputs = make_inputs(2 * INTER)
    loose, tight = (reference.moe(**inputs, **SWIGLU, swiglu_limit=limit) for limit in (7.0, 0.5))
    assert relative_error(loose, tight) > 0.1


def test_sigmoid_sees_the_clamped_gate() -> None:
    """The order that the kernel confirms above, in numbers: g = 3 and l = -4 with limit 1."""
    hidden = np.array([[3.0, -4.0]])
    actual = reference.activate(hidden, "swiglu", alpha=2.0, beta=0.25, limit=1.0, fusion=1)
    np.testing.assert_allclose(actual, [[1.0 / (1.0 + np.exp(-2.0)) * (-1.0 + 0.25)]])


def test_gate_has_no_lower_clamp() -> None:
    hidden = np.array([[-3.0, 1.0]])
    actual = reference.activate(hidden, "swiglu", limit=1.0, fusion=1)
    np.testing.assert_allclose(actual, [[-3.0 / (1.0 + np.exp(3.0))]])


def test_moe_float16_matches_onnxruntime() -> None:
    inputs = {name: array.astype(np.float16) for name, array in make_inputs(2 * INTER).items()}
    check_moe(inputs, SWIGLU | {"k": 2, "normalize_routing_weights": 1}, bound=2e-3)


def test_moe_accepts_bfloat16() -> None:
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in make_inputs(INTER).items()}
    widened: Inputs = {name: array.astype(np.float64) for name, array in rounded.items()}
    np.testing.assert_array_equal(reference.moe(**rounded, k=2), reference.moe(**widened, k=2))


# --- what no CPU kernel runs, by algebra ---------------------------------------------------------


@pytest.mark.parametrize("activation", ["swiglu", "geglu"])
def test_the_layouts_of_a_gated_activation_mean_the_same(activation: str) -> None:
    shared, parts = split_inputs()
    keywords: Inputs = {"activation_type": activation, "k": 2, **shared}
    if activation == "swiglu":
        keywords |= {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.5}
    names = (("fc1", "fc3"), ("fc1_bias", "fc3_bias"))
    mixed: Inputs = {gate: interleave(parts[gate], parts[linear]) for gate, linear in names}
    halves: Inputs = {
        gate: np.concatenate([parts[gate], parts[linear]], 1) for gate, linear in names
    }
    expected = reference.moe(**mixed, **keywords, swiglu_fusion=1)
    for actual in (
        reference.moe(**halves, **keywords, swiglu_fusion=2),
        reference.moe(**parts, **keywords, swiglu_fusion=0),
    ):
        np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)
    confused = reference.moe(**mixed, **keywords, swiglu_fusion=2)
    assert relative_error(confused, expected) > 0.1


@pytest.mark.parametrize("activation", ["geglu", "silu"])
def test_fc3_is_the_linear_part(activation: str) -> None:
    """Token by token, with the formula written out; swiglu's attributes must not leak in."""
    shared, parts = split_inputs()
    swiglu_only: Inputs = {"activation_alpha": 3.0, "activation_beta": 5.0}
    actual = reference.moe(
        **shared, **parts, **swiglu_only, swiglu_limit=0.1, k=1, activation_type=activation
    )
    p = {name: array.astype(np.float64) for name, array in (shared | parts).items()}
    best = p["router_probs"].argmax(axis=-1)
    for token, e in enumerate(best):
        gate = p["fc1"][e] @ p["x"][token] + p["fc1_bias"][e]
        linear = p["fc3"][e] @ p["x"][token] + p["fc3_bias"][e]
        tanh_argument = 0.7978845608028654 * (gate + 0.044715 * gate**3)
        geglu = 0.5 * gate * (1 + np.tanh(tanh_argument)) * linear
        silu = gate / (1 + np.exp(-gate)) * linear
        hidden = geglu if activation == "geglu" else silu
        weight = np.exp(p["router_probs"][token, e]) / np.exp(p["router_probs"][token]).sum()
        expected = weight * (p["fc2"][e] @ hidden + p["fc2_bias"][e])
        np.testing.assert_allclose(actual[token], expected, rtol=1e-9)
