"""Logits that something may have made equal are not handed over: MoE and TopK rank equals apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._routing import Routing, routing_of
from tests.test_routing_forms import EXPERTS, K, Router

Written = Callable[[Router], ir.Value]


def product(b: Router) -> ir.Value:
    return b.op("MatMul", b.x, b.random("weight", 64, EXPERTS))


def row(b: Router, *numbers: float) -> ir.Value:
    return b.constant([numbers], np.float32)


def overridable(b: Router) -> ir.Value:
    value = b.graph.weight("default", np.full((1, EXPERTS), 2, np.float32), "initializer")
    ir.Graph([value], [], nodes=[])  # which makes it an input
    return value


def double(b: Router, value: ir.Value) -> ir.Value:
    return b.cast(value, ir.DataType.DOUBLE)


HANDED_OVER: dict[str, Written] = {
    "an input": lambda b: b.scores,
    "a product": product,
    "gemm": lambda b: b.op("Gemm", b.x, b.random("weight", 64, EXPERTS)),
    "packed": lambda b: b.op("MatMulNBits", b.x, domain="com.microsoft", N=EXPERTS, K=64),
    "scaled": lambda b: b.op("Mul", product(b), b.number(2.0)),
    "scaled the other way round": lambda b: b.op("Mul", b.number(2.0), product(b)),
    "divided": lambda b: b.op("Div", product(b), b.number(2.0)),
    "shifted": lambda b: b.op("Add", row(b, 0, 1, 2, 3, 4, 5), product(b)),
    "less": lambda b: b.op("Sub", product(b), b.number(0.0)),
    "reshaped": lambda b: b.op("Reshape", product(b), b.constant([0, EXPERTS])),
    "flat": lambda b: b.op("Flatten", product(b), axis=1),
    "there and back": lambda b: b.op(
        "Squeeze", b.op("Unsqueeze", product(b), b.constant([0])), b.constant([0])
    ),
    "in steps": lambda b: b.op(
        "Identity", b.op("Add", b.op("Mul", product(b), b.number(2.0)), b.number(1.0))
    ),
    "wider": lambda b: b.cast(
        b.op("Identity", b.cast(product(b), ir.DataType.DOUBLE)), ir.DataType.DOUBLE
    ),
}
ENCODED: dict[str, Written] = {
    "clamped": lambda b: b.op("Relu", product(b)),
    "clamped and scaled": lambda b: b.op("Mul", b.op("Relu", product(b)), b.number(2.0)),
    "clamped and reshaped": lambda b: b.op(
        "Reshape", b.op("Relu", product(b)), b.constant([-1, EXPERTS])
    ),
    "in steps": lambda b: b.op(
        "Add", b.op("Mul", b.op("Ceil", product(b)), b.number(2.0)), b.number(1.0)
    ),
    "masked": lambda b: b.op("Mul", product(b), row(b, 1, 0, 1, 1, 1, 1)),
    "divided by infinity": lambda b: b.op("Div", product(b), row(b, 1, np.inf, 1, 1, 1, np.inf)),
    "divided by nothing": lambda b: b.op("Div", product(b), row(b, 1, 0, 1, 1, 1, 0)),
    "minus infinity": lambda b: b.op("Add", product(b), row(b, 1, -np.inf, 1, 1, 1, -np.inf)),
    "by a default": lambda b: b.op("Mul", product(b), overridable(b)),
    "by itself": lambda b: b.op("Mul", product(b), b.op("Sigmoid", b.scores)),
    "two constants": lambda b: b.op("Mul", b.number(2.0), row(b, 0, 1, 2, 3, 4, 5)),
    "constants": lambda b: b.op("Add", b.number(2.0), row(b, 0, 1, 2, 3, 4, 5)),
    "whole numbers": lambda b: b.cast(b.cast(product(b), ir.DataType.INT64), ir.DataType.FLOAT),
    "narrower": lambda b: b.cast(product(b), ir.DataType.FLOAT16),
    "another domain": lambda b: b.op("MatMul", b.x, domain="local"),
}


def handed_over(write: Written, late: bool) -> ir.Value | None:
    """Returns the logits of a router that ranks scores, or logits before their softmax."""
    b = Router()
    logits = write(b)
    logits.shape = b.scores.shape
    indices = b.chosen(logits if late else b.softmax(logits))
    weights = indices.producer().outputs[0]  # type: ignore[union-attr]
    weights.shape = ir.Shape(["tokens", K])
    if late:
        weights = b.op("Softmax", weights, axis=-1)
        weights.shape = ir.Shape(["tokens", K])
    found = routing_of(indices, weights, EXPERTS)
    assert isinstance(found, Routing), found
    return found.logits


@pytest.mark.parametrize("late", [False, True], ids=["softmax first", "softmax last"])
@pytest.mark.parametrize("name", HANDED_OVER)
def test_logits_that_are_apart(name: str, late: bool) -> None:
    assert handed_over(HANDED_OVER[name], late) is not None


@pytest.mark.parametrize("late", [False, True], ids=["softmax first", "softmax last"])
@pytest.mark.parametrize("name", ENCODED)
def test_logits_that_may_be_equal(name: str, late: bool) -> None:
    assert handed_over(ENCODED[name], late) is None
