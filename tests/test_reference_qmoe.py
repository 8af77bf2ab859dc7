"""The reference of QMoE against the CPU kernel of onnxruntime."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from qmoe_rules import reference
from tests.reference_runs import (
    EXACT,
    EXPERTS,
    HIDDEN,
    INTER,
    SWIGLU,
    TIES,
    TOKENS,
    Array,
    Inputs,
    interleave,
    relative_error,
    run_ort,
)


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


def test_qmoe_ties_match_onnxruntime() -> None:
    logits = np.tile(TIES, (4, 1))[:TOKENS]
    attributes = SWIGLU | {"k": 2, "normalize_routing_weights": 1}
    check_qmoe(4, 0, attributes, {"router_probs": logits})


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
