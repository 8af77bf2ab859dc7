"""An expert's weight is read from whatever an exporter wrote, and nothing else is."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.report import Report
from qmoe_rules.rules.fuse_unrolled_experts import FuseUnrolledExperts
from tests.unrolled_graphs import Cut, T

RULE = FuseUnrolledExperts(Report())

Writing = Callable[[Cut], ir.Value | None]


def of_sum(total: Callable[[Cut], ir.Value]) -> Writing:
    return lambda b: b.share(b.tall(total(b)))


SHARES: dict[str, Writing] = {
    "unsqueezed": of_sum(lambda b: b.slots()),
    "unsqueezed from the end": lambda b: b.share(b.tall(b.slots(), -1)),
    "reshaped": lambda b: b.share(b.reshaped(b.slots(), -1, 1)),
    "cast": lambda b: b.share(b.cast(b.cast(b.tall(b.slots())))),
    "zeros first": of_sum(lambda b: b.sum(b.zeros(), b.slot(0), b.slot(1))),
    "zeros last": of_sum(lambda b: b.sum(b.slots(), b.zeros())),
    "zeros cast": of_sum(lambda b: b.sum(b.cast(b.zeros()), b.slots())),
    "default zeros": of_sum(
        lambda b: b.sum(
            b.op("ConstantOfShape", b.op("Shape", b.x, start=0, end=1)), b.slot(1), b.slot(0)
        )
    ),
    "zeros without a start": of_sum(lambda b: b.sum(b.slots(), b.zeros(end=1))),
    "another order": of_sum(lambda b: b.sum(b.slot(1), b.slot(0))),
    "another tree": of_sum(lambda b: b.sum(b.sum(b.slot(1), b.zeros()), b.sum(b.slot(0)))),
    "axes from the end": of_sum(
        lambda b: b.sum(b.slot(0, axis=-1, squeezed=-1), b.slot(1, axis=1, squeezed=-1))
    ),
    "with steps": of_sum(lambda b: b.sum(b.slot(0, steps=(1,)), b.slot(1, steps=(2,)))),
    "like the weights": of_sum(
        lambda b: b.sum(
            b.slot(0),
            b.op(
                "Mul",
                b.op("CastLike", b.op("Equal", b.column(b.indices, 1), b.constant([3])), b.weights),
                b.column(b.weights, 1),
            ),
        )
    ),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_what_it_says(name: str, swapped: bool) -> None:
    builder = Cut(swapped=swapped)
    value = SHARES[name](builder)
    assert value is not None
    term = RULE.term(value)
    assert term is not None
    assert (term.expert, term.value) == (3, builder.y)
    assert (term.indices, term.weights) == (builder.indices, builder.weights)
    assert term.refuse_mask() is None
    others = ("Constant", "Gather", "MatMul", "Shape", "Slice", "Squeeze")
    assert set(term.nodes) == {n for n in builder.graph.nodes if n.op_type not in others}
    feeds = builder.feeds()
    chosen = np.where(feeds["indices"] == 3, feeds["weights"], 0).sum(-1, keepdims=True)
    y = feeds["x"] @ builder.stack.const_value.numpy()[3]  # type: ignore[union-attr]
    assert np.allclose(builder.result(value), y * chosen, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3])
def test_all_columns_make_a_share(k: int) -> None:
    builder = Cut(k)
    assert RULE.term(builder.share(builder.tall(builder.slots()))) is not None


def doubled(b: Cut, total: ir.Value, times: int = 1) -> ir.Value:
    """Returns what is added to itself again and again."""
    for _ in range(times):
        total = b.op("Add", total, total)
    return total


NO_SHARES: dict[str, Writing] = {
    "nothing": lambda b: None,
    "an input": lambda b: b.x,
    "no product": lambda b: b.op("Add", b.y, b.tall(b.slots())),
    "another Mul": lambda b: b.op("Mul", b.y, b.tall(b.slots()), domain="local"),
    "no value": lambda b: b.op("Mul", None, b.tall(b.slots())),
    # No column
    "a row": lambda b: b.share(b.slots()),
    "unsqueezed to a row": lambda b: b.share(b.tall(b.slots(), 0)),
    "reshaped to a row": lambda b: b.share(b.reshaped(b.slots(), 1, -1)),
    "reshaped to more axes": lambda b: b.share(b.reshaped(b.slots(), -1, 1, 1)),
    "reshaped to more and fewer": lambda b: b.share(b.reshaped(b.slots(), -1, 2)),
    "reshaped to what is not known": lambda b: b.share(
        b.op("Reshape", b.slots(), b.op("Shape", b.x))
    ),
    "unsqueezed twice": lambda b: b.share(b.op("Unsqueeze", b.slots(), b.constant([1, 2]))),
    "whole numbers": lambda b: b.share(b.cast(b.cast(b.tall(b.slots()), ir.DataType.INT64))),
    "flat": lambda b: b.share(b.op("Flatten", b.slots())),
    # No sum of all columns
    "a column too few": of_sum(lambda b: b.slot(0)),
    "the other too few": of_sum(lambda b: b.slot(1)),
    "a column twice": of_sum(lambda b: b.sum(b.slots(), b.slot(0))),
    "a column too many": of_sum(lambda b: b.sum(b.slots(), b.slot(2))),
    "only zeros": of_sum(lambda b: b.zeros()),
    "something else": of_sum(lambda b: b.sum(b.slots(), b.column(b.weights, 0))),
    "something before": of_sum(lambda b: b.sum(b.column(b.weights, 0), b.slots())),
    "nothing added": of_sum(lambda b: b.op("Add", b.slots(), None)),
    "another sum": of_sum(lambda b: b.op("Sub", b.slot(0), b.slot(1))),
    "twice as much": of_sum(lambda b: doubled(b, b.slots())),
    "twice nothing": of_sum(lambda b: b.sum(b.slots(), doubled(b, b.sum(b.zeros(), b.zeros())))),
    "ones": of_sum(lambda b: b.sum(b.zeros(number=1), b.slots())),
    "zeros of all axes": of_sum(lambda b: b.sum(b.zeros(start=0), b.slots())),
    "zeros of another axis": of_sum(lambda b: b.sum(b.zeros(start=1, end=2), b.slots())),
    "zeros of no axis": of_sum(lambda b: b.sum(b.zeros(start=1, end=1), b.slots())),
    "zeros of a constant size": of_sum(lambda b: b.sum(b.filled(b.constant([T])), b.slots())),
    # No slots
    "other weights": of_sum(lambda b: b.sum(b.slot(0), b.slot(1, weights=b.others))),
    "another expert": of_sum(lambda b: b.sum(b.slot(0), b.slot(1, expert=2))),
    "crossed": of_sum(lambda b: b.sum(b.slot(0, other=1), b.slot(1, other=0))),
    "shifted": of_sum(lambda b: b.sum(b.slot(0), b.op("Add", *sides(b)))),
    "no mask": of_sum(lambda b: b.sum(b.slot(0), b.op("Mul", *(b.column(b.weights, 1),) * 2))),
    "a mask of no column": of_sum(
        lambda b: b.op(
            "Mul",
            b.cast(b.op("Equal", b.indices, b.constant(3))),
            b.column(b.weights, 0),
        )
    ),
    "a mask of whole rows": of_sum(
        lambda b: b.op("Mul", sides(b)[0], b.weights),
    ),
    # No columns
    "of tokens": of_sum(lambda b: b.sum(*(b.slot(j, axis=0, squeezed=0) for j in (0, 1)))),
    "cut across": of_sum(lambda b: b.sum(*(b.slot(j, axis=0) for j in (0, 1)))),
    "squeezed across": of_sum(lambda b: b.sum(*(b.slot(j, squeezed=0) for j in (0, 1)))),
    "two columns": of_sum(lambda b: b.sum(*(b.slot(j, end=2) for j in (0, 1)))),
    "from the end": of_sum(lambda b: b.sum(b.slot(-2, end=-1), b.slot(1))),
}


def sides(b: Cut) -> Sequence[ir.Value]:
    """Returns the mask and the weights of column 1."""
    equal = b.op("Equal", b.column(b.indices, 1), b.constant(3))
    return b.cast(equal), b.column(b.weights, 1)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", NO_SHARES)
def test_what_only_looks_like_a_share_is_none(name: str, swapped: bool) -> None:
    assert RULE.term(NO_SHARES[name](Cut(swapped=swapped))) is None


def test_what_is_added_to_itself_is_looked_at_once() -> None:
    """It has 2 ** 64 ways to its slots; looking is counted in calls."""
    builder = Cut()
    value = builder.share(builder.tall(doubled(builder, builder.slots(), 64)))
    events = itertools.count()

    def count(*_event: object) -> None:
        assert next(events) < 100_000

    sys.setprofile(count)
    try:
        assert RULE.term(value) is None
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("which", ["indices", "weights"])
@pytest.mark.parametrize("shape", [None, ("B", "T", 2), ("T", None)])
def test_what_is_not_known_to_be_all_columns(which: str, shape: Any) -> None:
    builder = Cut()
    value = builder.share(builder.tall(builder.slots()))
    assert RULE.term(value) is not None
    getattr(builder, which).shape = None if shape is None else ir.Shape(shape)
    is_known = which == "weights" and shape == ("T", None)  # as many as there are indices
    assert (RULE.term(value) is not None) == is_known


def test_one_column_of_how_many_is_not_known() -> None:
    builder = Cut()
    builder.indices.shape = ir.Shape(["T", None])
    assert RULE.term(builder.share(builder.tall(builder.slot(0)))) is None


# A few slices that are written otherwise


def without_axes(b: Cut, value: ir.Value, j: int) -> ir.Value:
    cut = b.op("Slice", value, b.constant([0, j]), b.constant([T, j + 1]))
    return b.op("Squeeze", cut, b.constant([1]))


def squeezed_anyhow(b: Cut, value: ir.Value, j: int) -> ir.Value:
    cut = b.op("Slice", value, *(b.constant([each]) for each in (j, j + 1, 1)))
    return b.op("Squeeze", cut)


def computed(b: Cut, value: ir.Value, j: int) -> ir.Value:
    start = b.op("Add", b.constant([0]), b.constant([j]))
    cut = b.op("Slice", value, start, b.constant([j + 1]), b.constant([1]))
    return b.op("Squeeze", cut, b.constant([1]))


def of_nothing(b: Cut, value: ir.Value, j: int) -> ir.Value:
    cut = b.op("Slice", None, *(b.constant([each]) for each in (j, j + 1, 1)))
    return b.op("Squeeze", cut, b.constant([1]))


def gathered(b: Cut, value: ir.Value, j: int) -> ir.Value:
    return b.op("Squeeze", b.op("Gather", value, b.constant([j]), axis=1), b.constant([1]))


@pytest.mark.parametrize("column", [without_axes, squeezed_anyhow, computed, of_nothing, gathered])
def test_columns_that_are_not_read(column: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cut, "column", column)
    builder = Cut()
    assert RULE.term(builder.share(builder.tall(builder.slots()))) is None


def test_axes_that_are_attributes() -> None:
    """Before opset 13 they are no inputs."""
    builder = Cut()
    old = builder.op("Unsqueeze", builder.slots(), axes=[1])
    assert RULE.term(builder.share(old)) is not None
    assert RULE.term(builder.share(builder.op("Unsqueeze", builder.slots(), axes=[0]))) is None
    matrix = builder.op("Squeeze", builder.matrix([3]), axes=[0])
    assert RULE.linear(builder.product(matrix)) is not None
