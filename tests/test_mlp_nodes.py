"""The nodes of an expert, which go when it does: those between its maps, and sizes that cut it."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from qmoe_rules.rules._mlp import FIRST_HALF, MLP, SECOND_HALF, match_mlp
from tests.mlp_blocks import Block, gated, linear


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
