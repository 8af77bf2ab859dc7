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


def split(b: Block, *sizes: ir.Value, rank: int | None = 3, **attributes: int) -> ir.Value:
    """The first half of the fused map, unless the attributes or the sizes say otherwise."""
    outputs = attributes.pop("outputs", 2)
    node = ir.node("Split", [b.map("fused"), *sizes], attributes, num_outputs=outputs)
    for number, output in enumerate(node.outputs):
        output.name = f"part{number}"
        output.shape = None if rank is None else ir.Shape(("b", "s", 8)[3 - rank :])
    b.graph.nodes.append(node)
    return node.outputs[0]


@pytest.mark.parametrize(
    ("write", "is_half"),
    [
        (lambda b: split(b, axis=-1), True),
        (lambda b: split(b, axis=2), True),
        (lambda b: split(b, axis=1), False),
        (lambda b: split(b, axis=-2), False),
        (lambda b: split(b), False),  # along the first axis
        (lambda b: split(b, rank=2), False),
        (lambda b: split(b, rank=None), False),
        (lambda b: split(b, axis=2, rank=None), False),
        (lambda b: split(b, axis=-1, outputs=3), False),
        (lambda b: split(b, b.constant([8, 8]), axis=-1), True),
        (lambda b: split(b, b.constant([4, 12]), axis=-1), False),
        (lambda b: split(b, b.graph.input("sizes", np.int64, (2,)), axis=-1), False),
        (
            lambda b: split(b, b.graph.weight("s", np.array([8, 8]), "overridable"), axis=-1),
            False,
        ),
    ],
)
def test_which_split_makes_halves(write: Reading, is_half: bool) -> None:
    def activated(b: Block) -> ir.Value:
        gate = write(b)
        b.graph.model(gate)  # so that inputs with a default are known as such
        return gated(b, b.silu(gate), b.map("up"))

    found = read(activated)
    assert isinstance(found, MLP) == is_half
    if isinstance(found, MLP):
        assert found.gate == ("fused", FIRST_HALF)


def sliced(
    b: Block, *bounds: int | ir.Value, rank: int | None = 3, width: int | None = 16
) -> ir.Value:
    """A Slice of the fused map, whose width is not known where it is None."""
    fused = b.op("MatMul", b.x, ir.val("l0.fused"))
    fused.shape = ir.Shape(["b", "s", width])
    values = [each if isinstance(each, ir.Value) else b.constant([each]) for each in bounds]
    out = b.op("Slice", fused, *values)
    out.shape = None if rank is None else ir.Shape(("b", "s", 8)[3 - rank :])
    return out


@pytest.mark.parametrize(
    ("write", "columns"),
    [
        (lambda b: sliced(b, 0, 8, -1), FIRST_HALF),
        (lambda b: sliced(b, 0, 8, 2), FIRST_HALF),
        (lambda b: sliced(b, 8, 16, 2, 1), SECOND_HALF),
        (lambda b: sliced(b, 0, 16, 2, 2), EVEN),
        (lambda b: sliced(b, 0, 2**31 - 1, 2, 2, width=None), EVEN),
        (lambda b: sliced(b, 1, 2**63 - 1, -1, 2, width=None), ODD),
        (lambda b: sliced(b, 0, 2**31 - 2, 2, 2, width=None), None),
        (lambda b: sliced(b, 0, 14, 2, 2), None),
        (lambda b: sliced(b, 2, 16, 2, 2), None),
        (lambda b: sliced(b, 0, 8, -1, width=None), None),
        (lambda b: sliced(b, 0, 8, 1), None),
        (lambda b: sliced(b, 0, 8, 0, rank=None), None),
        (lambda b: sliced(b, 0, 8, 2, rank=None), None),
        (lambda b: sliced(b, 0, 8), None),
        (lambda b: sliced(b), None),
        (lambda b: sliced(b, b.graph.input("start", np.int64, (1,)), 8, -1), None),
        (lambda b: sliced(b, 0, b.graph.input("end", np.int64, (1,)), -1), None),
        (lambda b: b.op("Other", b.map("fused"), *(b.constant([n]) for n in (0, 8, -1))), None),
    ],
)
def test_which_slice_makes_halves_or_every_other_column(
    write: Reading, columns: str | None
) -> None:
    found = read(lambda b: gated(b, b.silu(write(b)), b.map("up")))
    assert isinstance(found, MLP) == (columns is not None)
    if isinstance(found, MLP):
        assert found.gate == ("fused", columns)


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


@pytest.mark.parametrize("swapped", [False, True])
def test_nodes_are_those_between_the_maps(swapped: bool) -> None:
    block = Block(limit=7.0, alpha=1.702, beta=1.0, hidden=8, inter=8, swapped=swapped)
    found = match_mlp(block.expert(block.x, "e", block.layer), linear)
    assert isinstance(found, MLP)
    between = {node for node in block.graph.nodes if node.op_type not in ("Constant", "MatMul")}
    assert between <= set(found.nodes)
    assert set(found.nodes) <= set(block.graph.nodes)


def test_nodes_of_an_expert_with_nothing_to_multiply() -> None:
    block = Block()
    found = match_mlp(block.map("down", block.silu(block.map("gate"))), linear)
    assert isinstance(found, MLP)
    assert sorted({node.op_type for node in found.nodes}) == ["MatMul", "Mul", "Sigmoid"]


def test_sizes_that_bound_a_slice_go_with_the_expert() -> None:
    """As exporters compute them: half of a width is the size of another value."""
    block = Block()
    size = block.op("Shape", ir.val("halved", ir.DataType.FLOAT, (3, 8)), start=1)
    other = block.op("Shape", ir.val("other", ir.DataType.FLOAT, (3, 8)), start=1)
    fused = block.map("fused")
    ends = block.constant([16]), block.constant([-1])
    first = block.op("Slice", fused, block.constant([0]), size, ends[1])
    second = block.op("Slice", fused, other, *ends)
    hidden = gated(block, block.silu(first), second)
    found = match_mlp(block.map("down", hidden), linear)
    assert isinstance(found, MLP)
    assert (found.gate, found.up) == (("fused", FIRST_HALF), ("fused", SECOND_HALF))
    assert {size.producer(), other.producer()} <= set(found.nodes)
