"""One expert between its linear maps, written node by node, and how it is read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir

from qmoe_rules.rules._mlp import MLP, Linear, match_mlp
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
