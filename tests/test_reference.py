"""The reference against the CPU kernels of onnxruntime, and against algebra elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from qmoe_rules import reference

Array = npt.NDArray[Any]
Inputs = dict[str, Any]  # arrays by name, and attributes, as `moe` takes them

# All different, so that a transposed or misread axis cannot go unnoticed.
TOKENS, EXPERTS, HIDDEN, INTER = 10, 6, 16, 12
EXACT = 1e-6
SWIGLU: Inputs = {"activation_type": "swiglu", "swiglu_fusion": 1}
# Names of the inputs by position; "none" stands for the six that no test gives.
MOE_INPUTS = ("x", "router_probs", "fc1", "fc1_bias", "fc2", "fc2_bias")
QMOE_INPUTS = (
    *("x", "router_probs", "fc1", "fc1_scales", "fc1_bias", "fc2", "fc2_scales", "fc2_bias"),
    *["none"] * 6,
    "router_weights",
)


def run_ort(op_type: str, inputs: Inputs, attributes: Inputs) -> Array:
    """Runs one MoE or QMoE node on the CPU; weights are initializers, activations are inputs."""
    order = MOE_INPUTS if op_type == "MoE" else QMOE_INPUTS
    fed = {name: inputs[name] for name in ("x", "router_probs", "router_weights") if name in inputs}
    dtype = helper.np_dtype_to_tensor_dtype(inputs["x"].dtype)
    node = helper.make_node(
        op_type,
        [name if name in inputs else "" for name in order],
        ["y"],
        domain="com.microsoft",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, dtype, array.shape) for name, array in fed.items()],
        [helper.make_tensor_value_info("y", dtype, inputs["x"].shape)],
        [numpy_helper.from_array(inputs[name], name) for name in inputs if name not in fed],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, fed)[0])


def relative_error(actual: Array, expected: Array) -> float:
    assert actual.shape == expected.shape
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def make_inputs(
    rows: int, *, bias: bool = True, shape: Sequence[int] = (TOKENS, HIDDEN), seed: int = 0
) -> Inputs:
    """Random float32 inputs whose hidden values have a spread of about one."""
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.standard_normal(shape),
        "router_probs": 2 * rng.standard_normal((TOKENS, EXPERTS)),
        "fc1": rng.standard_normal((EXPERTS, rows, HIDDEN)) / HIDDEN**0.5,
        "fc2": rng.standard_normal((EXPERTS, HIDDEN, INTER)) / INTER**0.5,
    }
    if bias:
        inputs["fc1_bias"] = rng.standard_normal((EXPERTS, rows))
        inputs["fc2_bias"] = rng.standard_normal((EXPERTS, HIDDEN))
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def check_moe(inputs: Inputs, attributes: Inputs, bound: float = EXACT) -> None:
    given = {name: value for name, value in attributes.items() if value is not None}
    assert relative_error(run_ort("MoE", inputs, given), reference.moe(**inputs, **given)) <= bound


def interleave(gate: Array, linear: Array) -> Array:
    """[E, I, ...] twice -> [E, 2I, ...] with rows g0, l0, g1, l1, ..."""
    return np.stack([gate, linear], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


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


# --- routing -------------------------------------------------------------------------------------

TIES = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 2, 1, 2, 1, 1]], np.float32)


def test_ties_go_to_the_higher_expert() -> None:
    indices, _ = reference.route(TIES, 2, normalize=False)
    assert indices.tolist() == [[5, 4], [2, 1], [3, 1]]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("normalize", [0, 1])
def test_ties_match_onnxruntime(normalize: int, k: int) -> None:
    inputs = make_inputs(INTER, shape=(len(TIES), HIDDEN)) | {"router_probs": TIES}
    attributes = {"activation_type": "silu", "k": k, "normalize_routing_weights": normalize}
    check_moe(inputs, attributes)


def test_masked_experts_weigh_nothing() -> None:
    logits = np.array([[-np.inf, 0.0, -np.inf, -np.inf, -np.inf, -np.inf]], np.float32)
    inputs = make_inputs(INTER, shape=(1, HIDDEN)) | {"router_probs": logits}
    for normalize in (0, 1):
        check_moe(
            inputs,
            {"activation_type": "silu", "k": 3, "normalize_routing_weights": normalize},
        )


def test_router_weights_mix_and_logits_choose() -> None:
    logits = np.array([[3.0, 1.0, 2.0]])
    mixing = np.array([[0.25, 0.9, 0.75]])
    indices, weights = reference.route(logits, 2, normalize=False, router_weights=mixing)
    assert indices.tolist() == [[0, 2]]
    assert weights.tolist() == [[0.25, 0.75]]
    _, weights = reference.route(logits, 2, normalize=True, router_weights=2 * mixing)
    np.testing.assert_allclose(weights, [[0.25, 0.75]])


# --- QMoE against onnxruntime --------------------------------------------------------------------


class Weights:
    """Quantized weights by hand: random codes and scales, and the bytes that QMoE stores."""

    def __init__(self, rng: np.random.Generator, bits: int, block: int, rows: int, columns: int):
        self.bits = bits
        self.codes = rng.integers(0, 2**bits, (EXPERTS, rows, columns))
        shape = (EXPERTS, rows, columns // block) if block else (EXPERTS, rows)
        spread = 2 ** (bits - 1) * columns**0.5
        self.scales = (rng.uniform(0.5, 2.0, shape) / spread).astype(np.float32)

    def dequantize(self) -> Array:
        scales = self.scales.reshape(*self.codes.shape[:2], -1)
        scales = np.repeat(scales, self.codes.shape[2] // scales.shape[2], axis=2)
        return np.asarray((self.codes - 2 ** (self.bits - 1)) * scales.astype(np.float64))

    def raw(self) -> npt.NDArray[np.uint8]:
        """The low bits of a byte hold the lower column."""
        if self.bits == 8:
            return self.codes.astype(np.uint8)
        return (self.codes[..., 0::2] | self.codes[..., 1::2] << 4).astype(np.uint8)


QHIDDEN, QINTER = 96, 64


def check_qmoe(
    bits: int, block: int, attributes: Inputs, activations: Inputs | None = None
) -> None:
    """Compares one QMoE node, with biases, to the reference on its own inputs."""
    rng = np.random.default_rng(bits + block)
    rows = 2 * QINTER if attributes["activation_type"] == "swiglu" else QINTER
    fc1 = Weights(rng, bits, block, rows, QHIDDEN)
    fc2 = Weights(rng, bits, block, QHIDDEN, QINTER)
    given: Inputs = {
        "x": rng.standard_normal((TOKENS, QHIDDEN)),
        "router_probs": 2 * rng.standard_normal((TOKENS, EXPERTS)),
        "fc1_bias": rng.standard_normal((EXPERTS, rows)),
        "fc2_bias": rng.standard_normal((EXPERTS, QHIDDEN)),
    }
    given = {name: array.astype(np.float32) for name, array in given.items()} | (activations or {})
    stored = {"fc1": fc1.raw(), "fc1_scales": fc1.scales}
    stored |= {"fc2": fc2.raw(), "fc2_scales": fc2.scales}
    layout = {"expert_weight_bits": bits, "quant_type": "int", "weights_prepacked": 0}
    layout |= {"block_size": block} if block else {}  # the CPU kernel refuses -1 and 0
    actual = run_ort("QMoE", given | stored, attributes | layout)
    expected = reference.qmoe(fc1=fc1, fc2=fc2, **given, **attributes)
    assert relative_error(actual, expected) <= EXACT


FORMATS = pytest.mark.parametrize(
    ("bits", "block"), [(4, 0), (8, 0), (4, 32)], ids=["int4", "int8", "int4-block32"]
)


@FORMATS
@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_qmoe_matches_onnxruntime(activation: str, bits: int, block: int) -> None:
    attributes = {
        "activation_type": activation,
        "swiglu_fusion": int(activation == "swiglu"),
        "k": 2,
        "normalize_routing_weights": 1,
    }
    check_qmoe(bits, block, attributes)


@pytest.mark.parametrize("limit", [7.0, 0.5])
def test_qmoe_swiglu_clamps_like_onnxruntime(limit: float) -> None:
    attributes = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": limit}
    check_qmoe(4, 32, SWIGLU | attributes | {"k": 2, "normalize_routing_weights": 1})


@FORMATS
def test_qmoe_unnormalized_needs_router_weights(bits: int, block: int) -> None:
    """The CPU kernel ignores normalize_routing_weights=0, unless input 14 holds the softmax."""
    logits = 2 * np.random.default_rng(7).standard_normal((TOKENS, EXPERTS)).astype(np.float32)
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    attributes = SWIGLU | {"k": 2, "normalize_routing_weights": 0}
    check_qmoe(bits, block, attributes, {"router_probs": logits, "router_weights": softmax})
    indices, weights = reference.route(logits, 2, normalize=False)
    expected = np.take_along_axis(softmax, indices, axis=-1)
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("normalize", [0, 1])
def test_qmoe_router_weights_match_onnxruntime(normalize: int) -> None:
    mixing = np.random.default_rng(8).uniform(0.1, 1.0, (TOKENS, EXPERTS)).astype(np.float32)
    attributes = SWIGLU | {"k": 3, "normalize_routing_weights": normalize}
    check_qmoe(4, 32, attributes, {"router_weights": mixing})


def test_qmoe_all_zero_router_weights_stay_zero() -> None:
    indices, weights = reference.route(TIES, 2, normalize=True, router_weights=np.zeros_like(TIES))
    assert indices.shape == (3, 2)
    assert not weights.any()


def test_qmoe_ties_match_onnxruntime() -> None:
    logits = np.tile(TIES, (4, 1))[:TOKENS]
    attributes = SWIGLU | {"k": 2, "normalize_routing_weights": 1}
    check_qmoe(4, 0, attributes, {"router_probs": logits})


# --- what no CPU kernel runs, by algebra ---------------------------------------------------------


def split_inputs() -> tuple[Inputs, Inputs]:
    """Inputs without fc1, and apart from them fc1 (the gate) and fc3 (the linear part)."""
    shared, other = make_inputs(INTER), make_inputs(INTER, seed=1)
    parts = {"fc1": shared.pop("fc1"), "fc1_bias": shared.pop("fc1_bias")}
    return shared, parts | {"fc3": other["fc1"], "fc3_bias": other["fc1_bias"]}


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


def test_qmoe_dequantizes_fc3() -> None:
    rng = np.random.default_rng(3)
    fc1, fc3 = (Weights(rng, 4, 0, INTER, HIDDEN) for _ in range(2))
    fc2 = Weights(rng, 4, 0, HIDDEN, INTER)
    x, logits = rng.standard_normal((TOKENS, HIDDEN)), rng.standard_normal((TOKENS, EXPERTS))
    actual = reference.qmoe(x, logits, fc1, fc2, fc3=fc3, activation_type="swiglu")
    fused = interleave(fc1.dequantize(), fc3.dequantize())
    expected = reference.moe(
        x, logits, fused, fc2.dequantize(), activation_type="swiglu", swiglu_fusion=1
    )
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


# --- refusals ------------------------------------------------------------------------------------

ZEROS = np.zeros
REFUSALS: list[tuple[Inputs, str]] = [
    ({"use_sparse_mixer": 1}, "use_sparse_mixer=1: sparse mixer routing is missing"),
    ({"activation_type": "relu2"}, "unknown activation_type 'relu2', not in relu, silu, "),
    ({"activation_type": "swiglu"}, r"fc1 must have shape \[6, 24, 16\], got \[6, 12, 16\]"),
    ({"k": 0}, "k must be between 1 and 6 experts, got 0"),
    ({"k": 7}, "k must be between 1 and 6 experts, got 7"),
    ({"x": ZEROS(HIDDEN)}, r"x must be 2-D or 3-D and fc2 3-D, got shapes \(16,\)"),
    ({"fc2": ZEROS((HIDDEN, INTER))}, r"fc2 3-D, got shapes \(10, 16\), \(16, 12\)"),
    ({"fc2": ZEROS((EXPERTS, INTER, HIDDEN))}, r"fc1 must have shape \[6, 16, 16\]"),
    ({"fc2": ZEROS((EXPERTS, 8, INTER))}, r"fc2 must have shape \[6, 16, 12\], got \[6, 8, 12\]"),
    (
        {"router_probs": ZEROS((9, EXPERTS))},
        r"router_probs must have shape \[10, 6\], got \[9, 6\]",
    ),
    ({"fc1_bias": ZEROS((EXPERTS, 3))}, r"fc1_bias must have shape \[6, 12\], got \[6, 3\]"),
    ({"fc2_bias": ZEROS(HIDDEN)}, r"fc2_bias must have shape \[6, 16\], got \[16\]"),
    ({"router_weights": ZEROS((2, 2))}, r"router_weights must have shape \[10, 6\], got \[2, 2\]"),
    ({"fc3_bias": ZEROS((EXPERTS, INTER))}, "fc3_bias is given without fc3"),
    ({"fc3": ZEROS((EXPERTS, INTER, HIDDEN))}, "fc3 needs activation_type swiglu, geglu or silu"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS, ids=[reason for _, reason in REFUSALS])
def test_moe_refuses(change: Inputs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reference.moe(**(make_inputs(INTER) | change))


def test_moe_refuses_fc3_beside_a_fused_fc1() -> None:
    shared, parts = split_inputs()
    with pytest.raises(ValueError, match="and swiglu_fusion 0"):
        reference.moe(**shared, **parts, **SWIGLU)


@pytest.mark.parametrize(
    ("width", "keywords", "reason"),
    [
        (4, {"fusion": 0}, "need fusion 1 or 2 and an even width, got 0 and 4"),
        (3, {"fusion": 1}, "need fusion 1 or 2 and an even width, got 1 and 3"),
        (4, {"fusion": 1, "limit": -1.0}, "swiglu_limit must not be negative, got -1.0"),
    ],
)
def test_activate_refuses(width: int, keywords: Inputs, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        reference.activate(np.zeros((2, width)), "swiglu", **keywords)


def test_route_refuses_logits_in_3d() -> None:
    with pytest.raises(ValueError, match=r"must be \[tokens, experts\], got shape \(1, 2, 3\)"):
        reference.route(np.zeros((1, 2, 3)), 1, normalize=True)
