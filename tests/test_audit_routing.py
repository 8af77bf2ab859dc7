"""The audit and routing: router weights, their normalization, a Softmax before the router."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.kernels import GARBAGE, RIGHT, UNKNOWN
from tests.audits import INT4, judged, routed, softmax, the_node
from tests.contract import Cell
from tests.moe_models import Graph


def cast_softmax(graph: Graph, logits: ir.Value) -> ir.Value:
    wide = graph.op("Cast", logits, out="wide", to=ir.DataType.FLOAT)
    weights = graph.op("Softmax", wide, out="wide_weights", axis=1)
    return graph.op("Cast", weights, out="weights", to=ir.DataType.FLOAT16)


def softmax_of_experts(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.op("Softmax", logits, out="weights", axis=0)


def sigmoid(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.op("Sigmoid", logits, out="weights")


def constant(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.weight("weights", np.ones((6, 4), np.float16))


def from_outside(graph: Graph, logits: ir.Value) -> ir.Value:
    return graph.input("weights", np.float16, ("tokens", 4))


@pytest.mark.parametrize(
    ("make", "cuda"),
    [
        (softmax, RIGHT),
        (cast_softmax, RIGHT),
        (softmax_of_experts, GARBAGE),
        (sigmoid, GARBAGE),
        (constant, GARBAGE),
        (from_outside, UNKNOWN),
    ],
)
def test_router_weights_that_cuda_never_reads(make: Any, cuda: str) -> None:
    model = routed(make)
    assert judged(model, "cuda").verdict == cuda
    assert judged(model, "cpu").verdict == RIGHT
    assert judged(model, "portable").verdict == cuda


@pytest.mark.parametrize(
    ("format", "layout", "verdict"),
    [("int4", "raw", GARBAGE), ("mxfp4", "k_packed", RIGHT), ("int3", "raw", RIGHT)],
)
def test_only_the_old_kernel_of_the_cpu_ignores_normalize(
    format: str, layout: str, verdict: str
) -> None:
    cell = Cell(format, block_size=32, normalize=0)
    assert judged(cell.direct(layout), "cpu").verdict == verdict
    every_expert = cell.but(k=4)  # all of them together: there is nothing to renormalize
    assert judged(every_expert.direct(layout), "cpu").verdict == RIGHT


def test_a_softmax_in_front_of_the_router_is_noted() -> None:
    model = INT4.direct()
    node = the_node(model)
    logits = node.inputs[1]
    assert logits is not None
    node.replace_input_with(1, ir.node("Softmax", [logits]).outputs[0])
    found = judged(model, "portable")
    assert found.verdict == RIGHT
    assert found.notes[-1].startswith("router_probs comes from a Softmax")
