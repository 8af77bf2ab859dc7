"""Which activation an expert has, whatever an exporter wrote between its linear maps, or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._mlp import ALL, MLP, match_mlp
from tests.mlp_blocks import Block, Reading, gated, linear, read


def unary_silu(b: Block, op_type: str) -> ir.Value:
    """Returns gate * op(gate), which is silu where the operator is Sigmoid."""
    gate = b.map("gate")
    return b.op("Mul", gate, b.op(op_type, gate))


def sigmoid_of(b: Block, op_type: str, *others: ir.Value) -> ir.Value:
    """Returns gate * sigmoid(op(gate, ...)), or that of the others."""
    gate = b.map("gate")
    return b.op("Mul", gate, b.op("Sigmoid", b.op(op_type, *(others or (gate, b.number(1.702))))))


SWIGLU = ("swiglu", 1.0, 0.0, None)
CLAMPED = ("swiglu", 1.0, 0.0, 7.0)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda b: gated(b, b.silu(b.map("gate")), b.map("up")), SWIGLU),
        (lambda b: gated(b, b.map("up"), b.silu(b.map("gate"))), SWIGLU),
        (lambda b: gated(b, b.op("Swish", b.map("gate")), b.map("up")), SWIGLU),
        (
            lambda b: gated(b, b.op("Swish", b.map("gate"), alpha=1.5), b.map("up")),
            ("swiglu", 1.5, 0.0, None),
        ),
        (
            lambda b: gated(
                b, b.op("QuickGelu", b.map("gate"), domain="com.microsoft"), b.map("up")
            ),
            ("swiglu", pytest.approx(1.702), 0.0, None),
        ),
        (
            lambda b: gated(b, b.silu(b.map("gate"), 1.702), b.map("up")),
            ("swiglu", pytest.approx(1.702), 0.0, None),
        ),
        (
            lambda b: gated(b, b.silu(b.map("gate")), b.op("Add", b.map("up"), b.number(1.0))),
            ("swiglu", 1.0, 1.0, None),
        ),
        (
            lambda b: gated(
                b,
                b.silu(b.op("Min", b.map("gate"), b.number(7.0))),
                b.clip(b.map("up"), -7.0, 7.0),
            ),
            ("swiglu", 1.0, 0.0, 7.0),
        ),
        (
            lambda b: gated(
                b, b.silu(b.clip(b.map("gate"), None, 7.0)), b.clip(b.map("up"), -7.0, 7.0)
            ),
            CLAMPED,
        ),
        (
            lambda b: gated(
                b,
                b.silu(b.op("Min", b.number(7.0), b.map("gate"))),
                b.clip(b.map("up"), -7.0, 7.0),
            ),
            CLAMPED,
        ),
        (
            lambda b: gated(
                b, b.silu(b.clip(b.map("gate"), -65504.0, 7.0)), b.clip(b.map("up"), -7.0, 7.0)
            ),
            CLAMPED,
        ),
        (
            lambda b: gated(
                b,
                b.silu(b.op("Clip", b.map("gate"), None, b.number(7.0), None)),
                b.clip(b.map("up"), -7.0, 7.0),
            ),
            CLAMPED,
        ),
        (
            lambda b: gated(
                b,
                b.silu(b.clip(b.map("gate"), float(np.finfo(np.float32).min), 7.0)),
                b.clip(b.map("up"), -7.0, 7.0),
            ),
            ("swiglu", 1.0, 0.0, 7.0),
        ),
        (
            lambda b: gated(b, b.op("Gelu", b.map("gate"), approximate="tanh"), b.map("up")),
            ("geglu", 1.0, 0.0, None),
        ),
        (
            lambda b: gated(
                b, b.op("FastGelu", b.map("gate"), domain="com.microsoft"), b.map("up")
            ),
            ("geglu", 1.0, 0.0, None),
        ),
        (
            lambda b: gated(
                b, b.op("FastGelu", b.map("gate"), None, domain="com.microsoft"), b.map("up")
            ),
            ("geglu", 1.0, 0.0, None),
        ),
        (
            lambda b: gated(b, b.op("Relu", b.map("gate")), b.map("up")),
            ("relu", 1.0, 0.0, None),
        ),
    ],
)
def test_gated_activations(write: Reading, expected: Any, swapped: bool) -> None:
    found = read(write, swapped=swapped)
    assert isinstance(found, MLP)
    assert (found.activation, found.alpha, found.beta, found.limit) == expected
    assert (found.gate, found.up, found.down) == (("gate", ALL), ("up", ALL), "down")
    assert found.source.name == "x"


@pytest.mark.parametrize(
    ("write", "activation"),
    [
        (lambda b: b.silu(b.map("gate")), "silu"),
        (lambda b: b.op("Swish", b.map("gate")), "silu"),
        (lambda b: b.op("Relu", b.map("gate")), "relu"),
        (lambda b: b.op("Gelu", b.map("gate"), approximate="tanh"), "gelu"),
    ],
)
def test_plain_activations(write: Reading, activation: str) -> None:
    found = read(write)
    assert isinstance(found, MLP)
    assert (found.activation, found.gate, found.up) == (activation, ("gate", ALL), None)


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda b: b.x, "x is not computed by an activation"),
        (
            lambda b: gated(b, b.silu(b.map("gate")), b.clip(b.map("up"), -7.0, 7.0)),
            "the gate is clamped at None, and the linear half at 7.0",
        ),
        (
            lambda b: gated(
                b,
                b.silu(b.op("Min", b.map("gate"), b.number(6.0))),
                b.clip(b.map("up"), -7.0, 7.0),
            ),
            "the gate is clamped at 6.0, and the linear half at 7.0",
        ),
        (
            lambda b: gated(
                b, b.op("Relu", b.map("gate")), b.op("Add", b.map("up"), b.number(1.0))
            ),
            "relu with a clamp or a shift has no equal among MoE's activations",
        ),
        (
            lambda b: gated(b, b.silu(b.map("gate")), b.map("up", b.op("Neg", b.x))),
            "gate and up are not applied to the same hidden states",
        ),
        (lambda b: gated(b, b.op("Gelu", b.map("gate")), b.map("up")), None),
        (
            lambda b: gated(b, b.op("Gelu", b.map("gate"), domain="com.microsoft"), b.map("up")),
            None,
        ),
        (lambda b: gated(b, b.silu(b.map("gate")), b.clip(b.map("up"), -6.0, 7.0)), None),
        # A clamp of the gate from below, with any bound, or with one that is not known.
        (lambda b: gated(b, b.silu(b.clip(b.map("gate"), -3.0, 7.0)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.clip(b.map("gate"), -65503.0, 7.0)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.clip(b.map("gate"), None, None)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.op("Clip", b.map("gate"))), b.map("up")), None),
        (
            lambda b: gated(b, b.silu(b.op("Clip", b.map("gate"), b.x, b.number(7.0))), b.map("u")),
            None,
        ),
        (
            lambda b: gated(b, b.silu(b.op("Clip", b.map("gate"), None, b.x)), b.map("up")),
            None,
        ),
        # What is silu, gelu or relu but for one node.
        (lambda b: gated(b, unary_silu(b, "Tanh"), b.map("up")), None),
        (lambda b: gated(b, sigmoid_of(b, "Add"), b.map("up")), None),
        (lambda b: gated(b, sigmoid_of(b, "Mul", b.map("up"), b.number(1.702)), b.map("u")), None),
        (lambda b: gated(b, sigmoid_of(b, "Mul", b.map("up"), b.x), b.map("u")), None),
        (
            lambda b: gated(
                b, b.op("FastGelu", b.map("gate"), b.x, domain="com.microsoft"), b.map("up")
            ),
            None,
        ),
        (lambda b: gated(b, b.op("Relu", b.map("g"), domain="other"), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.map("gate")), b.silu(b.map("up"))), None),
        (lambda b: gated(b, b.map("gate"), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.cut(b.map("fused"), 0, 4)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.cut(b.map("fused"), 0, 16, 3)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.halves(b.map("fused"), axis=0)[0]), b.map("up")), None),
        (lambda b: b.silu(b.map("gate"), 1.702), None),
        (lambda b: b.op("Mul", b.op("Relu", b.map("gate")), b.number(0.5)), None),
        (lambda b: b.op("Mul", b.number(0.5), b.op("Relu", b.map("gate"))), None),
        (lambda b: b.op("Gelu", b.map("gate")), None),
    ],
)
def test_what_moe_cannot_compute(write: Reading, reason: str | None) -> None:
    found = read(write)
    assert isinstance(found, str)
    assert found.endswith("is no activation of MoE") if reason is None else found == reason


def test_what_no_linear_map_computes() -> None:
    block = Block()
    assert match_mlp(block.op("Neg", block.x), linear) == (
        "l0.Neg_1 is not computed by a linear map with constant weights"
    )
