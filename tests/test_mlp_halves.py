"""One linear map for gate and up: which Split and which Slice make its halves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._mlp import EVEN, FIRST_HALF, MLP, ODD, SECOND_HALF
from tests.mlp_blocks import Block, Reading, gated, read


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
