"""What is believed of a value's numbers and type, and of a node, is so; nothing else is."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._facts import (
    axis_of,
    both_ways,
    is_last_axis,
    is_op,
    not_negative,
    number,
    over_last_axis,
    producer,
    rank,
    scalar,
    type_of,
)
from tests.small_graphs import FLOAT, HALF, INT64, WIDTH, Small, Write

# Signs


@pytest.mark.parametrize(
    ("write", "is_known"),
    [
        (lambda b: b.x, False),
        (lambda b: b.op("Abs", b.x), True),
        (lambda b: b.op("Abs", b.x, domain="other"), False),
        (lambda b: b.op("Add", b.op("Exp", b.x), b.op("Abs", b.x)), True),
        (lambda b: b.op("Add", b.op("Exp", b.x), b.x), False),
        (lambda b: b.op("Add", b.x, b.op("Exp", b.x)), False),
        (lambda b: b.op("Sum", b.op("Exp", b.x), b.op("Exp", b.x), b.x), False),
        (lambda b: b.ranked(b.op("Exp", b.x), axis=0), True),
        (lambda b: b.reduced(b.op("Exp", b.x), [-1]), True),  # whatever the axes are
        (lambda b: b.reduced(b.x, [0]), False),
        (lambda b: b.op("Max", b.x, b.number(0.0)), False),  # it is, and that is not looked for
        (lambda b: b.op("Mul", b.op("Abs", b.x), b.constant(0.0, np.float32)), True),
        (lambda b: b.op("Mul", b.op("Abs", b.x), b.constant([1.0, -1e-9] * 3, np.float32)), False),
        (lambda b: b.op("Mul", b.op("Abs", b.x), b.constant(np.nan, np.float32)), False),
        (lambda b: b.op("Mul", b.op("Abs", b.x), b.weight("given", np.ones(1, "f4"))), False),
        (lambda b: b.op("Cast", b.op("Less", b.x, b.x), to=FLOAT), False),
        (lambda b: b.op("Cast", boolean(b.op("Less", b.x, b.x)), to=FLOAT), True),
        (
            lambda b: b.op("Add", b.x, b.op("Cast", boolean(b.op("Less", b.x, b.x)), to=FLOAT)),
            False,
        ),
        (lambda b: b.op("Cast", b.weight("text", np.array(["-1"])), to=FLOAT), False),
        (lambda b: b.op("Cast", b.text("1"), to=FLOAT), False),
        (lambda b: b.op("Where", b.op("Less", b.x, b.x), b.op("Exp", b.x), b.number(0.0)), True),
        (lambda b: b.op("Where", b.op("Less", b.x, b.x), b.x, b.number(0.0)), False),
        (lambda b: b.op("Where", b.op("Less", b.x, b.x), b.number(0.0), b.x), False),
        (lambda b: b.scattered(b.op("Exp", b.x), 2.0), True),
        (lambda b: b.scattered(b.x, 2.0), False),
        (lambda b: b.op("Add", b.x, b.scattered(b.op("Exp", b.x), 2.0)), False),
        (lambda b: b.op("Add", b.x, b.op("Where", b.x, b.number(1.0), b.number(0.0))), False),
        (lambda b: b.scattered(b.op("Exp", b.x), -2.0), False),
        (lambda b: b.op("Clip", b.op("Exp", b.x), b.number(-1.0), b.number(-1.0)), False),
        (lambda b: b.op("Concat", b.op("Exp", b.x), None, axis=0), False),
    ],
)
def test_what_is_never_negative(write: Write, is_known: bool) -> None:
    b = Small()
    value = write(b)
    b.graph.model(value)  # so that inputs with a default are known as such
    assert not_negative(value) is is_known


def test_the_signs_of_many_values_and_of_large_constants() -> None:
    b = Small()
    value = b.op("Exp", b.x)
    for _ in range(300):
        value = b.op("Add", value, value)
    assert not_negative(value)
    assert not_negative(b.weight("large", np.zeros((256, 256), np.float32)))
    assert not not_negative(b.weight("larger", np.zeros(65537, np.float32)))  # is not read


def boolean(value: ir.Value) -> ir.Value:
    value.type = ir.TensorType(ir.DataType.BOOL)
    return value


# Types


@pytest.mark.parametrize(
    ("write", "dtype"),
    [
        (lambda b: b.bare(b.x), None),
        (lambda b: b.half(b.bare(b.x)), HALF),
        (lambda b: b.op("Cast", b.x, to=HALF, domain="other"), None),
        (lambda b: b.op("Add", b.half(b.x), b.half(b.x)), HALF),
        (lambda b: b.op("Mul", b.bare(b.half(b.x)), b.half(b.x)), HALF),
        (lambda b: b.op("Sub", b.half(b.x), b.bare(b.half(b.x))), HALF),
        (lambda b: b.op("Sub", b.bare(b.x), b.bare(b.x)), None),
        (lambda b: b.op("Where", b.op("Less", b.x, b.x), b.x, b.x), None),
        (lambda b: b.op("Softmax", b.half(b.x)), HALF),
        (lambda b: b.op("Reshape", b.x, b.constant([-1])), FLOAT),
        (lambda b: b.op("Reshape", b.bare(b.x), declared(b.constant([-1]), INT64)), None),
        (lambda b: b.op("Unsqueeze", b.half(b.x), declared(b.constant([0]), INT64)), HALF),
        (lambda b: b.reduced(b.half(b.x), [-1]), HALF),
        (lambda b: b.ranked(b.half(b.x)), HALF),
        (lambda b: b.ranked(b.half(b.x), output=1), INT64),
        (lambda b: b.picked(b.half(b.x), [[0]]), HALF),
        (lambda b: b.packed(b.x), FLOAT),
        (lambda b: b.op("TopK", b.half(b.x), domain="other"), None),
    ],
)
def test_types(write: Write, dtype: ir.DataType | None) -> None:
    b = Small()
    value = write(b)
    assert type_of(value) == dtype
    if dtype is not None:
        assert b.run(value, dtype).dtype == dtype.numpy()  # which the runtime checks as well


def declared(value: ir.Value, dtype: ir.DataType) -> ir.Value:
    value.type = ir.TensorType(dtype)
    return value


def test_a_type_is_looked_for_only_so_far_back() -> None:
    b = Small()
    value = b.half(b.x)
    for _ in range(15):
        value = b.op("Sigmoid", value)
    assert type_of(value) == HALF
    assert type_of(b.op("Sigmoid", value)) is None
    assert type_of(b.op("Add", b.x, b.x), 1) == FLOAT
    total = b.op("Add", b.op("Add", b.x, b.x), b.bare(b.x))
    assert (type_of(total, 2), type_of(total, 1)) == (FLOAT, None)
    assert (type_of(b.x, 0), type_of(None)) == (FLOAT, None)


# Numbers


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda b: b.constant(3), 3),
        (lambda b: b.constant([3]), 3),
        (lambda b: b.constant([[3]]), None),  # one axis more than the result may have
        (lambda b: b.constant([3, 3]), None),
        (lambda b: b.constant([]), None),
        (lambda b: b.number(0.5), 0.5),
        (lambda b: b.half(b.number(0.5)), None),
        (lambda b: b.weight("kept", np.array(2)), 2),
        (lambda b: b.weight("given", np.array(2)), None),
        (lambda b: b.text("2"), None),
        (lambda b: b.x, None),
        (lambda b: b.op("Shape", b.x), None),
        (lambda b: b.op("Shape", b.x, start=1), WIDTH),
        (lambda b: b.op("Shape", b.x, start=-1), WIDTH),
        (lambda b: b.op("Shape", b.x, end=1), None),  # [tokens]
        (lambda b: b.op("Shape", b.x, start=2), None),
        (lambda b: b.op("Shape", b.cube, start=-1, end=3), WIDTH),
        (lambda b: b.op("Shape", b.matrix(2, 3, 4), start=1, end=2), 3),
        (lambda b: b.op("Shape", b.matrix(2, 3, 4), start=1), None),
        (lambda b: b.op("Shape", b.matrix(7)), 7),
        (lambda b: b.op("Shape", b.bare(b.x), start=1), None),
        (lambda b: b.op("Size", b.matrix(7)), None),
    ],
)
def test_a_number_that_is_known(write: Write, found: float | None) -> None:
    b = Small()
    value = write(b)
    b.graph.model(value)  # so that inputs with a default are known as such
    assert number(value) == found
    is_size = (node := value.producer()) is not None and node.op_type == "Shape"
    assert scalar(value) == (None if is_size else found)


def test_no_value_is_no_number() -> None:
    assert (scalar(None), number(None), rank(None)) == (None, None, None)


# Axes and nodes


@pytest.mark.parametrize(
    ("axes", "ranks", "is_last"),
    [
        ([-1], 3, True),
        ([2], 3, True),
        ([1], 2, True),
        ([-1], None, True),
        ([0], None, False),
        ([1], 3, False),
        ([-2], 3, False),
        ([3], 3, False),
        ([1, 2], 3, False),
        ([], 3, False),
        (None, 3, False),
    ],
)
def test_axes_that_are_the_last(axes: list[int] | None, ranks: int | None, is_last: bool) -> None:
    b = Small()
    value = ir.val("value", shape=None if ranks is None else [None] * ranks)
    given = () if axes is None else (b.constant(axes),)
    old = {} if axes is None else {"axes": ir.AttrInt64s("axes", axes)}
    for node in (
        ir.node("ReduceSum", [value, *given]),
        ir.Node("", "ReduceSum", [value], old.values()),
    ):
        assert over_last_axis(node, value) is is_last
        assert axis_of(node) == (axes[0] if axes is not None and len(axes) == 1 else None)
    if axes is not None and len(axes) == 1:
        assert is_last_axis(ir.node("Softmax", [value], {"axis": axes[0]}), value) is is_last
    assert is_last_axis(ir.node("Softmax", [value]), value)
    assert not is_last_axis(ir.node("Split", [value]), value, default=0)


def test_axes_that_are_given_at_run_time() -> None:
    b = Small()
    axes = b.weight("given", np.array([-1]))
    b.graph.model(b.x)
    assert not over_last_axis(ir.node("ReduceSum", [b.x, axes]), b.x)


def test_nodes_are_of_the_standard_domain() -> None:
    b = Small()
    value = b.op("Add", b.x, b.other)
    node = value.producer()
    assert node is not None
    assert producer(value, "Mul", "Add") is node
    assert is_op(node, "Add", "Mul")
    assert not is_op(node, "Mul")
    assert (producer(value, "Mul"), producer(b.x, "Add"), producer(None, "Add")) == (None,) * 3
    assert both_ways(node) == ((b.x, b.other), (b.other, b.x))
    assert both_ways(None) == ()
    other = b.op("Add", b.x, b.other, domain="com.microsoft")
    assert producer(other, "Add") is None
