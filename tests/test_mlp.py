"""An expert is read from whatever an exporter wrote between its linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._mlp import (
    ALL,
    EVEN,
    FIRST_HALF,
    MLP,
    ODD,
    SECOND_HALF,
    Linear,
    match_mlp,
)
from tests import expert_graphs
from tests.expert_graphs import Builder, Layer

Reading = Callable[["Block"], ir.Value]


class Block(Builder):
    """Writes one expert; its maps are gate, up, down and fused, all of x but down."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(Layer(**fields))
        self.x = expert_graphs.source(self.graph, self.layer)

    def map(self, name: str, source: ir.Value | None = None) -> ir.Value:
        """Appends a linear map, which is any MatMul here."""
        out = self.op("MatMul", source or self.x, self.random(name, 8, 8))
        out.shape = ir.Shape(["b", "s", 16 if name == "fused" else 8])
        return out

    def silu(self, value: ir.Value, alpha: float = 1.0) -> ir.Value:
        inner = value if alpha == 1.0 else self.op("Mul", value, self.number(alpha))
        return self.op("Mul", value, self.op("Sigmoid", inner))

    def cut(self, value: ir.Value, start: int, end: int, step: int = 1) -> ir.Value:
        out = self.op("Slice", value, *(self.constant([each]) for each in (start, end, -1, step)))
        out.shape = ir.Shape(["b", "s", 8])
        return out

    def halves(self, value: ir.Value, **attributes: int) -> tuple[ir.Value, ir.Value]:
        node = ir.node("Split", [value], {"axis": -1, **attributes}, num_outputs=2)
        for output, name in zip(node.outputs, ("first", "second"), strict=True):
            output.name = name
        self.graph.nodes.append(node)
        return node.outputs[0], node.outputs[1]

    def clip(self, value: ir.Value, low: float | None, high: float | None) -> ir.Value:
        return self.op(
            "Clip", value, *(None if each is None else self.number(each) for each in (low, high))
        )


def linear(value: ir.Value) -> Linear[str] | None:
    """Takes every MatMul for a linear map called by its weight."""
    node = value.producer()
    if node is None or node.op_type != "MatMul":
        return None
    source, weight = node.inputs
    assert source is not None
    assert weight is not None
    return Linear(source, str(weight.name).rpartition(".")[2])


def read(write: Reading, **fields: Any) -> MLP[str] | str:
    block = Block(**fields)
    return match_mlp(block.map("down", write(block)), linear)


def gated(b: Block, gate: ir.Value, up: ir.Value) -> ir.Value:
    return b.op("Mul", gate, up)


SWIGLU = ("swiglu", 1.0, 0.0, None)


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
            ("swiglu", 1.0, 0.0, 7.0),
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
    ("cut", "columns"),
    [
        (lambda b, v: b.halves(v), (FIRST_HALF, SECOND_HALF)),
        (lambda b, v: b.halves(v)[::-1], (SECOND_HALF, FIRST_HALF)),
        (lambda b, v: b.halves(v, num_outputs=2), (FIRST_HALF, SECOND_HALF)),
        (lambda b, v: (b.cut(v, 0, 2**63 - 1, 2), b.cut(v, 1, 2**63 - 1, 2)), (EVEN, ODD)),
        (lambda b, v: (b.cut(v, 1, 16, 2), b.cut(v, 0, 16, 2)), (ODD, EVEN)),
        (lambda b, v: (b.cut(v, 0, 8), b.cut(v, 8, 16)), (FIRST_HALF, SECOND_HALF)),
        (lambda b, v: (b.cut(v, 0, 8), b.cut(v, 8, 2**31 - 1)), (FIRST_HALF, SECOND_HALF)),
    ],
)
def test_one_map_for_gate_and_up(cut: Any, columns: tuple[str, str]) -> None:
    def write(b: Block) -> ir.Value:
        fused = b.map("fused")
        gate, up = cut(b, fused)
        return gated(b, b.silu(gate), up)

    found = read(write)
    assert isinstance(found, MLP)
    assert (found.gate, found.up) == (("fused", columns[0]), ("fused", columns[1]))


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
        (lambda b: gated(b, b.op("Relu", b.map("g"), domain="other"), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.map("gate")), b.silu(b.map("up"))), None),
        (lambda b: gated(b, b.map("gate"), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.cut(b.map("fused"), 0, 4)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.cut(b.map("fused"), 0, 16, 3)), b.map("up")), None),
        (lambda b: gated(b, b.silu(b.halves(b.map("fused"), axis=0)[0]), b.map("up")), None),
        (lambda b: b.silu(b.map("gate"), 1.702), None),
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


def test_nodes_are_those_between_the_maps() -> None:
    block = Block(limit=7.0, alpha=1.702, beta=1.0, hidden=8, inter=8)
    found = match_mlp(block.expert(block.x, "e", block.layer), linear)
    assert isinstance(found, MLP)
    between = {node for node in block.graph.nodes if node.op_type not in ("Constant", "MatMul")}
    assert between <= set(found.nodes)
    assert set(found.nodes) <= set(block.graph.nodes)
