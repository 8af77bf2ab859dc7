"""Why `resolve` cannot read a chain of nodes slice by slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.weights import resolve
from tests.chains import MOVED, SPREAD, Chain, array_of


def shape_that_is_computed(chain: Chain) -> None:
    shape = chain.graph.op("Abs", chain.constant([2, 3, 4]), out="shape")
    chain.then("Reshape", chain.array, shape)


def axes_that_may_be_overridden(chain: Chain) -> None:
    axes = chain.graph.weight("axes", np.array([0]), "overridable")
    chain.then("Unsqueeze", chain.array[None], axes)
    chain.graph.done(chain.value, opsets={"": 21})  # only a graph knows its inputs


def source_that_is_computed(chain: Chain) -> None:
    chain.then("Neg", chain.array).then("Transpose", chain.array)


def partner_that_is_computed(chain: Chain) -> None:
    other = chain.graph.op("Neg", chain.value, out="other")
    chain.then("Concat", chain.array, other, axis=1)


def foreign_operator(chain: Chain) -> None:
    other = chain.graph.op("Identity", chain.value, out="foreign", domain="elsewhere")
    chain.value = other


def wrong_shape_in_the_model(chain: Chain) -> None:
    chain.then("Transpose", chain.array)
    chain.value.shape = ir.Shape((2, 3, 4))


WHY: dict[str, tuple[Callable[[Chain], Any], str]] = {
    "computed shape": (
        shape_that_is_computed,
        "shape, which Reshape reads, is not a constant",
    ),
    "overridable axes": (
        axes_that_may_be_overridden,
        "axes, which Unsqueeze reads, is not a constant",
    ),
    "computed source": (source_that_is_computed, "v0 is not a constant"),
    "computed partner": (partner_that_is_computed, "other is not a constant"),
    "foreign operator": (foreign_operator, "foreign is not a constant"),
    "missing source": (
        lambda c: ops.producer(c.then("Identity", c.array).value).replace_input_with(0, None),
        "an input is missing",
    ),
    "other shape": (
        wrong_shape_in_the_model,
        "v0 is [4, 3, 2] where the model says [2, 3, 4]",
    ),
    "backwards": (
        lambda c: c.then(
            "Slice",
            c.array[::-1],
            c.constant([-1]),
            c.constant([-9]),
            c.constant([0]),
            c.constant([-1]),
        ),
        "v4 is cut out backwards",
    ),
    "old Slice": (
        lambda c: c.then("Slice", c.array[1:], starts=[1], ends=[2]),
        "v0 is cut by a Slice of before opset 10",
    ),
    "float8": (
        lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT8E4M3FN.value),
        "v0 is cast to FLOAT8E4M3FN",
    ),
    "wrong Reshape": (
        lambda c: c.then("Reshape", c.array, c.constant([5, -1])),
        "[2, 3, 4] cannot be reshaped to [5, 4]",
    ),
    "spread": (
        lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT16.value).then(
            "Reshape", c.array, c.constant([6, 4])
        ),
        SPREAD,
    ),
    "moved": (
        lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT16.value).then(
            "Transpose", c.array.T
        ),
        MOVED,
    ),
}


@pytest.mark.parametrize("case", WHY)
def test_what_cannot_be_read_has_a_reason(case: str) -> None:
    build, reason = WHY[case]
    chain = Chain(array_of(2, 3, 4))
    build(chain)
    assert resolve(chain.value) == reason


def test_a_scalar_is_no_weight() -> None:
    chain = Chain(np.array(3, np.float32))
    chain.then("Transpose", chain.array)
    assert resolve(chain.value) == "v0: Transpose cannot be read: list index out of range"
