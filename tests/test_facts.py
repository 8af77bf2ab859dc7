"""What is believed of a value's shape is so when the graph runs; what is not certain is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._facts import last_size, same_size, same_tokens
from tests.small_graphs import TOKENS, WIDTH, Small, Write


def shaped(value: ir.Value, *shape: int | str | None) -> ir.Value:
    value.shape = ir.Shape(shape)
    return value


# Sizes


@pytest.mark.parametrize(
    ("write", "size"),
    [
        (lambda b: b.op("Exp", b.x), WIDTH),
        (lambda b: shaped(b.bare(b.x), "t", 6), 6),
        (lambda b: shaped(b.op("Exp", b.x), "t", None), WIDTH),
        (lambda b: b.bare(b.x), None),
        (lambda b: b.op("Sum", b.x), None),
        (lambda b: b.op("Exp", b.x, domain="other"), None),
        (lambda b: b.op("MatMul", b.x, b.matrix(WIDTH, 8)), 8),
        (lambda b: b.op("MatMul", b.op("Exp", b.cube), b.matrix(WIDTH, 8)), 8),
        (lambda b: b.op("MatMul", b.cube, b.matrix(WIDTH)), None),  # [batch, sequence]
        (lambda b: b.op("MatMul", b.x, b.op("Exp", b.matrix(WIDTH))), None),
        (lambda b: b.op("MatMul", b.x, b.bare(b.matrix(8, WIDTH))), None),
        (lambda b: b.op("Gemm", b.x, b.matrix(WIDTH, 8)), 8),
        (lambda b: b.op("Gemm", b.x, b.matrix(WIDTH, 8), transB=0), 8),
        (lambda b: b.op("Gemm", b.x, b.matrix(8, WIDTH), transB=1), 8),
        (lambda b: b.op("Gemm", b.x, b.bare(b.matrix(WIDTH, 8))), None),
        (lambda b: b.packed(b.x), 8),
        (lambda b: b.ranked(b.x), 3),
        (lambda b: b.ranked(b.x, output=1), 3),
        (lambda b: b.ranked(b.cube, axis=2), 3),
        (lambda b: b.ranked(b.x, axis=0), None),
        (lambda b: b.ranked(b.bare(b.x), axis=1), None),
        (lambda b: b.op("GatherElements", b.x, b.ranked(b.x, 2, output=1), axis=1), 2),
        (lambda b: b.reduced(b.x, [-1]), 1),
        (lambda b: b.reduced(b.x, [1], keepdims=1), 1),
        (lambda b: b.reduced(b.cube, [-1], keepdims=0), None),
        (lambda b: b.reduced(b.x, [0]), None),
        (lambda b: b.op("ReduceSum", b.x), None),
        (lambda b: b.op("Concat", b.x, b.matrix(TOKENS, 2), axis=-1), 8),
        (lambda b: b.op("Concat", b.x, b.matrix(TOKENS, 2), axis=1), 8),
        (lambda b: b.op("Concat", b.x, b.matrix(3, WIDTH), axis=0), None),
        (lambda b: b.op("Concat", b.x, b.bare(b.x), axis=-1), None),
        (lambda b: b.op("Add", b.x, b.matrix(1, 1)), WIDTH),
        (lambda b: b.op("Mul", b.reduced(b.x, [-1]), b.x), WIDTH),
        (lambda b: b.op("Sub", b.x, b.number(1.0)), WIDTH),
        (lambda b: b.op("Div", b.bare(b.x), b.x), WIDTH),
        (lambda b: b.op("Add", b.reduced(b.x, [-1]), b.matrix(1)), 1),
        (lambda b: b.op("Add", b.reduced(b.x, [-1]), b.bare(b.x)), None),
        (lambda b: b.op("Add", b.bare(b.x), b.bare(b.x)), None),
        (lambda b: b.op("Where", b.op("Less", b.x, b.x), b.reduced(b.x, [-1]), b.x), WIDTH),
        (lambda b: b.op("ScatterElements", b.x, b.constant([[1]]), b.matrix(1, 1)), WIDTH),
        (lambda b: b.op("Clip", b.x, b.number(0.0)), WIDTH),
    ],
)
def test_the_size_of_the_last_axis(write: Write, size: int | None) -> None:
    b = Small()
    value = write(b)
    assert last_size(value) == size
    if size is not None:
        assert b.run(value).shape[-1] == size


def test_sizes_that_are_given_at_run_time() -> None:
    b = Small()
    k = b.graph.input("k", np.int64, (1,))
    assert last_size(b.op("TopK", b.x, k)) is None
    assert last_size(b.op("Add", b.x, shaped(b.bare(b.x), "t", 7))) is None  # cannot run
    assert last_size(b.op("MatMulNBits", b.x, domain="com.microsoft")) is None
    assert last_size(b.op("TopK", b.x)) is None
    assert last_size(b.op("TopK", b.x, k=3)) == 3  # as before opset 10
    assert last_size(None) is None
    assert last_size(ir.val("scalar", shape=[])) is None


def test_a_size_is_looked_for_only_so_far_back() -> None:
    b = Small()
    value = b.x
    for _ in range(8):
        value = b.op("Exp", value)
    assert last_size(value) == WIDTH
    assert last_size(b.op("Exp", value)) is None
    doubled = b.op("Add", b.x, b.x)
    assert (last_size(doubled, 1), last_size(b.op("Add", doubled, doubled), 1)) == (WIDTH, None)
    matrix = b.op("Exp", b.matrix(WIDTH, 8))
    product = b.op("MatMul", b.x, shaped(matrix, WIDTH, None))
    assert (last_size(product, 2), last_size(product, 1)) == (8, None)


@pytest.mark.parametrize(
    ("first", "second", "is_same"),
    [
        (3, 3, True),
        (3, 4, False),
        (ir.SymbolicDim("n"), ir.SymbolicDim("n"), True),
        (ir.SymbolicDim("n"), ir.SymbolicDim("m"), False),
        (ir.SymbolicDim(None), ir.SymbolicDim(None), False),
        (3, ir.SymbolicDim("n"), False),
        (ir.SymbolicDim(None), 3, False),
    ],
)
def test_sizes_that_are_the_same(first: Any, second: Any, is_same: bool) -> None:
    assert same_size(first, second) is is_same


# Tokens


@pytest.mark.parametrize(
    ("write", "is_known"),
    [
        (lambda b: b.x, True),
        (lambda b: b.bare(b.x), False),
        (lambda b: shaped(b.bare(b.x), "tokens", 2), True),
        (lambda b: shaped(b.bare(b.x), "others", 2), False),
        (lambda b: shaped(b.bare(b.x), None, 2), False),
        (lambda b: shaped(b.bare(b.x), 2), False),
        (lambda b: shaped(b.op("Exp", b.x), None, None), True),
        (lambda b: shaped(b.op("Exp", b.x), "t"), False),
        (lambda b: b.op("Exp", b.op("Exp", b.x)), True),
        (lambda b: b.op("Exp", b.other), False),
        (lambda b: b.op("Exp", b.x, domain="other"), False),
        (lambda b: b.op("MatMul", b.x, b.matrix(WIDTH, 8)), True),
        (lambda b: b.op("MatMul", b.x, b.matrix(2, WIDTH, 8)), False),
        (lambda b: b.op("MatMul", b.x, b.matrix(WIDTH)), False),
        (lambda b: b.op("MatMul", b.x, b.bare(b.matrix(8, WIDTH))), False),
        (lambda b: b.op("MatMul", b.matrix(4, TOKENS), b.x), False),
        (lambda b: b.op("Gemm", b.x, b.matrix(WIDTH, 8)), True),
        (lambda b: b.op("Gemm", b.x, b.matrix(WIDTH, 8), transA=0), True),
        (lambda b: b.op("Gemm", b.x, b.matrix(TOKENS, 8), transA=1), False),
        (lambda b: b.op("Gemm", b.matrix(2, TOKENS), b.x), False),
        (lambda b: b.packed(b.x), True),
        (lambda b: b.ranked(b.x), True),
        (lambda b: b.ranked(b.x, output=1, axis=1), True),
        (lambda b: b.ranked(b.x, axis=0), False),
        (lambda b: b.ranked(b.bare(b.x), axis=1), False),
        (lambda b: b.op("GatherElements", b.matrix(5, 6), b.ranked(b.x, output=1), axis=1), True),
        (lambda b: b.picked(b.x, [[0, 1]], axis=1), False),
        (lambda b: b.reduced(b.x, [-1]), True),
        (lambda b: b.reduced(b.x, [1], "ReduceMax"), True),
        (lambda b: b.reduced(b.x, [0]), False),
        (lambda b: b.reduced(b.x, [0], "ReduceMax"), False),
        (lambda b: b.reduced(b.x, [-1], keepdims=0), False),
        (lambda b: b.op("Concat", b.ranked(b.x), b.ranked(b.x), axis=-1), True),
        (lambda b: b.op("Concat", b.x, b.ranked(b.x), axis=1), True),
        (lambda b: b.op("Concat", b.x, b.x, axis=0), False),
        (lambda b: b.op("Concat", b.bare(b.x), b.op("Exp", b.x), axis=1), False),
        (lambda b: b.op("Add", b.x, b.matrix(WIDTH)), True),
        (lambda b: b.op("Add", b.matrix(1, WIDTH), b.op("Exp", b.x)), True),
        (lambda b: b.op("Sub", b.bare(b.x), b.x), False),
        (lambda b: b.op("Sub", b.op("Exp", b.x), b.x), True),
        (lambda b: b.op("Add", b.x, b.matrix(1, 1, WIDTH)), False),
        (lambda b: b.op("Add", b.matrix(1, WIDTH), b.matrix(1, WIDTH)), False),
        (lambda b: b.op("Add", shaped(b.bare(b.x), 1, WIDTH), b.x), True),
        (lambda b: b.op("Add", shaped(b.bare(b.x), 5, WIDTH), b.x), False),
        (lambda b: b.op("Mul", b.x, b.matrix(2, 1, WIDTH)), False),
        (lambda b: b.op("Mul", b.op("Exp", b.x), b.matrix(TOKENS, 1)), False),
        (lambda b: b.op("Where", b.op("Less", b.x, b.x), b.number(0.0), b.x), True),
        (lambda b: b.op("Where", b.bare(b.x), None, None), False),
        (lambda b: b.op("Mean", b.x), False),
    ],
)
def test_one_row_per_token(write: Write, is_known: bool) -> None:
    b = Small()
    value = write(b)
    assert same_tokens(value, b.x) is is_known
    if is_known and value is not b.x:
        assert b.run(value).shape[:-1] == (TOKENS,)


def test_tokens_are_all_axes_but_the_last() -> None:
    b = Small()
    scores = b.op("MatMul", b.cube, b.matrix(WIDTH, 8))
    assert same_tokens(scores, b.cube)
    assert same_tokens(shaped(scores, "batch", "sequence", 8), b.cube)
    assert not same_tokens(shaped(b.bare(b.x), "batch", "tokens", 8), b.cube)
    assert not same_tokens(shaped(b.bare(b.x), "batch", 8), b.cube)
    # Where nothing is known of one of them.
    assert not same_tokens(b.bare(b.x), b.cube)
    assert same_tokens(shaped(b.op("Exp", source := b.bare(b.x)), "tokens", 6), source)


def test_sizes_that_are_known_to_differ_are_not_those_of_the_tokens() -> None:
    b = Small()
    source = shaped(b.bare(b.x), 4, 6)
    assert same_tokens(shaped(b.op("Exp", source), None, 6), source)
    assert not same_tokens(shaped(b.op("Exp", source), 5, 6), source)
    # One size alone says nothing.
    assert same_tokens(shaped(b.op("Exp", b.x), 4, 6), b.x)


def test_a_constant_may_not_add_an_axis_to_tokens_of_unknown_rank() -> None:
    b = Small()
    source = b.bare(b.x)
    assert same_tokens(b.op("Add", b.op("Exp", source), b.matrix(WIDTH)), source)
    assert not same_tokens(b.op("Add", b.op("Exp", source), b.matrix(1, WIDTH)), source)


def test_tokens_are_looked_for_among_so_many_values() -> None:
    b = Small()
    value = b.x
    for _ in range(100):
        value = b.op("Add", value, value)
    assert same_tokens(value, b.x)
    assert not same_tokens(b.op("Exp", value), b.x)
