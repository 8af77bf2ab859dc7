"""Which graphs are MoE's own routing, and what is only nearly so: one node decides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._routing import Routing, routing_of
from tests.expert_graphs import Builder, Layer

K, EXPERTS = 3, 6


class Router(Builder):
    """Writes one router over `scores` [tokens, E], of which `x` [tokens, H] are the tokens."""

    def __init__(self, dtype: Any = np.float32) -> None:
        super().__init__(Layer(dtype=dtype))
        self.scores = self.graph.input("scores", dtype, ("tokens", EXPERTS))
        self.x = self.graph.input("x", dtype, ("tokens", 64))

    def softmax(self, value: ir.Value | None = None, axis: int = -1) -> ir.Value:
        out = self.op("Softmax", value or self.scores, axis=axis)
        out.shape = self.scores.shape
        return out

    def cast(self, value: ir.Value, to: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=to)

    def chosen(self, ranked: ir.Value) -> ir.Value:
        """Returns the indices of the best, [tokens, K]."""
        indices = self.top(ranked, K)[1]
        indices.shape = ir.Shape(["tokens", K])
        return indices

    def gathered(self, ranked: ir.Value, indices: ir.Value, **attributes: int) -> ir.Value:
        out = self.op("GatherElements", ranked, indices, **attributes)
        out.shape = indices.shape
        return out

    def total(self, part: ir.Value, axis: int = -1, **attributes: int) -> ir.Value:
        return self.op("ReduceSum", part, self.constant([axis]), **attributes)


Written = Callable[[Router], tuple[ir.Value, ir.Value]]


def gathered(
    b: Router,
    axis: int | None = -1,
    source: ir.Value | None = None,
    ranked: ir.Value | None = None,
    chosen: ir.Value | None = None,
) -> tuple[ir.Value, ir.Value]:
    """The chosen of the softmax, picked with the indices, unless something else is given."""
    ranked = ranked or b.softmax()
    indices = b.chosen(ranked)
    attributes = {} if axis is None else {"axis": axis}
    return indices, b.gathered(source or ranked, chosen or indices, **attributes)


def normalized(b: Router, axis: int = -1, **attributes: int) -> tuple[ir.Value, ir.Value]:
    indices, part = gathered(b)
    return indices, shaped(b.op("Div", part, b.total(part, axis, **attributes)))


def softmax_of_chosen(b: Router, axis: int = -1, chosen: ir.Value | None = None) -> Any:
    values, indices = b.top(b.scores, K)
    out = b.op("Softmax", values if chosen is None else chosen, axis=axis)
    return indices, shaped(out)


def shaped(value: ir.Value) -> ir.Value:
    value.shape = ir.Shape(["tokens", K])
    return value


def ranked_after(b: Router, *types: ir.DataType) -> tuple[ir.Value, ir.Value]:
    """Ranks the softmax after it was cast to these types."""
    ranked = b.softmax()
    for dtype in types:
        ranked = b.cast(ranked, dtype)
    values, indices = b.top(ranked, K)
    return indices, shaped(values)


FLOAT, HALF, BFLOAT = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


@pytest.mark.parametrize(
    ("write", "normalize"),
    [
        (gathered, False),
        (lambda b: gathered(b, axis=1), False),
        (lambda b: gathered(b, ranked=b.softmax(axis=1)), False),
        (lambda b: gathered(b, source=b.op("Identity", s := b.softmax()), ranked=s), False),
        (normalized, True),
        (lambda b: normalized(b, axis=1, keepdims=1), True),
        (softmax_of_chosen, True),
        (lambda b: softmax_of_chosen(b, axis=1), True),
        # What keeps the order of the values, however often, may lie between.
        (lambda b: ranked_after(b, FLOAT), False),
        (lambda b: ranked_after(b, ir.DataType.DOUBLE, ir.DataType.DOUBLE), False),
        (lambda b: (t := gathered(b), (t[0], shaped(b.cast(t[1], HALF))))[1], False),
    ],
)
def test_moes_own_routing_in_other_words(write: Written, normalize: bool) -> None:
    router = Router()
    found = routing_of(*write(router), EXPERTS)
    assert isinstance(found, Routing)
    assert found.logits is router.scores
    assert (found.k, found.experts, found.normalize) == (K, EXPERTS, normalize)


@pytest.mark.parametrize(
    "write",
    [
        lambda b: gathered(b, axis=None),  # along the tokens
        lambda b: gathered(b, axis=0),
        lambda b: gathered(b, axis=-2),
        lambda b: gathered(b, source=b.op("Exp", b.scores)),
        lambda b: gathered(b, chosen=b.chosen(b.op("Neg", b.scores))),
        lambda b: gathered(b, ranked=b.softmax(axis=0)),
        lambda b: normalized(b, axis=0),
        lambda b: normalized(b, keepdims=0),
        lambda b: softmax_of_chosen(b, axis=0),
        lambda b: softmax_of_chosen(b, chosen=b.top(b.op("Neg", b.scores), K)[0]),
        # Rounding makes ties, and MoE prefers another one of them.
        lambda b: ranked_after(b, HALF),
        lambda b: ranked_after(b, ir.DataType.INT32, FLOAT),
        lambda b: ranked_after(b, ir.DataType.INT64),
    ],
)
def test_what_is_nearly_moes_own_routing_is_encoded(write: Written) -> None:
    router = Router()
    found = routing_of(*write(router), EXPERTS)
    assert isinstance(found, Routing)
    assert (found.logits, found.normalize) == (None, True)


@pytest.mark.parametrize(("before", "after"), [(HALF, BFLOAT), (BFLOAT, HALF)])
def test_types_of_one_width_do_not_hold_the_same_numbers(
    before: ir.DataType, after: ir.DataType
) -> None:
    router = Router(before.numpy())
    found = routing_of(*ranked_after(router, after), EXPERTS)
    assert isinstance(found, Routing)
    assert found.logits is None


# How many experts are chosen, and of how many


def best(b: Router, value: ir.Value | None = None, **attributes: int) -> ir.Value:
    return b.op("ArgMax", value or b.scores, **attributes)


def joined(b: Router, *parts: ir.Value, axis: int = -1) -> ir.Value:
    indices = b.op("Concat", *parts, axis=axis)
    indices.shape = ir.Shape(["tokens", len(parts)])
    return indices


def ranked(b: Router, value: ir.Value, axis: int, rank: int | None) -> ir.Value:
    """TopK along an axis, whose indices have a known rank or not."""
    indices = b.top(value, K)[1]
    node = indices.producer()
    assert node is not None
    node.attributes["axis"] = ir.AttrInt64("axis", axis)
    indices.shape = None if rank is None else ir.Shape(("tokens", K)[2 - rank :])
    return indices


def of_no_rank(b: Router) -> ir.Value:
    """Scores of which only the last size is known, from a weight."""
    return b.op("MatMul", ir.val("hidden"), b.random("gate", 64, EXPERTS))


@pytest.mark.parametrize(
    ("write", "k"),
    [
        (lambda b: best(b, axis=-1), 1),
        (lambda b: best(b, axis=-1, keepdims=1), 1),
        (lambda b: joined(b, best(b, axis=-1), best(b, axis=-1)), 2),
        (lambda b: joined(b, best(b, axis=-1), best(b, axis=-1), axis=1), 2),
        (lambda b: ranked(b, b.scores, 1, None), K),
        (lambda b: ranked(b, of_no_rank(b), 1, 2), K),
        (lambda b: b.cast(ranked(b, b.scores, -1, 2), ir.DataType.INT32), K),
        (lambda b: b.cast(ranked(b, b.scores, -1, 2), ir.DataType.INT64), K),
        (lambda b: b.op("Identity", ranked(b, b.scores, -1, 2)), K),
    ],
)
def test_the_chosen_are_counted(write: Callable[[Router], ir.Value], k: int) -> None:
    router = Router()
    weights = router.graph.input("weights", np.float32, ("tokens", k))
    found = routing_of(write(router), router.op("Relu", weights), EXPERTS)
    assert isinstance(found, Routing)
    assert (found.k, found.experts) == (k, EXPERTS)


def test_the_best_along_the_last_axis_by_its_number() -> None:
    router = Router()
    indices = best(router, axis=1)
    weights = router.op("Relu", router.graph.input("weights", np.float32, ("tokens", 1)))
    reason = f"{indices.name} does not come from TopK with a constant k"
    assert routing_of(indices, weights, EXPERTS) == reason
    indices.shape = ir.Shape(["tokens", 1])
    assert isinstance(routing_of(indices, weights, EXPERTS), Routing)


@pytest.mark.parametrize(
    "write",
    [
        lambda b: best(b),  # along the tokens
        lambda b: shaped(best(b)),
        lambda b: best(b, axis=0),
        lambda b: best(b, axis=-2),
        lambda b: best(b, axis=-1, keepdims=0),
        lambda b: joined(b, best(b, axis=-1), best(b, axis=-1), axis=0),
        lambda b: joined(b, best(b, axis=-1), b.graph.input("given", np.int64, ("tokens", 1))),
        lambda b: ranked(b, b.scores, 0, 2),
        lambda b: ranked(b, of_no_rank(b), 1, None),
        lambda b: b.cast(ranked(b, b.scores, -1, 2), FLOAT),
        lambda b: b.cast(ranked(b, b.scores, -1, 2), ir.DataType.UINT8),
        lambda b: b.op("Abs", ranked(b, b.scores, -1, 2)),
        lambda b: b.op("ArgMin", b.scores, axis=-1),
    ],
)
def test_what_is_no_choice_of_the_best(write: Callable[[Router], ir.Value]) -> None:
    router = Router()
    indices = write(router)
    found = routing_of(indices, router.op("Relu", router.scores), EXPERTS)
    assert found == f"{indices.name} does not come from TopK with a constant k"


def test_choices_among_different_numbers_of_experts() -> None:
    router = Router()
    fewer = router.graph.input("fewer", np.float32, ("tokens", EXPERTS - 1))
    indices = joined(router, best(router, axis=-1), best(router, fewer, axis=-1))
    weights = router.op("Relu", router.graph.input("weights", np.float32, ("tokens", 2)))
    for experts in (EXPERTS, EXPERTS - 1):
        found = routing_of(indices, weights, experts)
        assert found == f"how many experts {indices.name} ranks is not known"


@pytest.mark.parametrize("missing", ["indices", "weights"])
def test_tokens_that_are_not_those_of_the_hidden_states(missing: str) -> None:
    router = Router()
    other = router.graph.input("other", np.float32, ("others", EXPERTS))
    right: dict[str, ir.Value] = {}
    wrong: dict[str, ir.Value] = {}
    for found, scores, tokens in ((right, router.scores, "tokens"), (wrong, other, "others")):
        found["indices"] = router.chosen(scores)
        gathered = router.gathered(scores, found["indices"], axis=-1)
        found["weights"] = router.op("Sigmoid", gathered)
        for value in (gathered, *found.values()):
            value.shape = ir.Shape([tokens, K])
    given = right | {missing: wrong[missing]}
    assert isinstance(routing_of(**right, experts=EXPERTS, source=router.x), Routing)
    assert isinstance(routing_of(**given, experts=EXPERTS), Routing)
    reason = routing_of(**given, experts=EXPERTS, source=router.x)
    assert reason == f"{given[missing].name} is not known to have one row per token of x"
