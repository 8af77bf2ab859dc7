"""Mixed precision: the least error within a budget, counted in the bytes that are written."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules import ConfigError, Recipe, plan, quantize
from qmoe_rules.budget import Choice, allocate, choices_for
from qmoe_rules.facts import FloatMoE
from tests.moe_models import Experts, single, the_node

nodes = st.lists(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1)), min_size=1, max_size=5),
    min_size=1,
    max_size=4,
)


def choice(nbytes: int, error: float) -> Choice:
    return Choice(4, 4, 32, nbytes, error)


@settings(deadline=None)
@given(given_=nodes, limit=st.integers(1, 160))
def test_no_other_choices_within_the_limit_are_better(
    given_: list[list[tuple[int, float]]], limit: int
) -> None:
    found = [[choice(*each) for each in node] for node in given_]
    fitting = [
        sum(each.error for each in combination)
        for combination in itertools.product(*found)
        if sum(each.nbytes for each in combination) <= limit
    ]
    if not fitting:
        with pytest.raises(ConfigError, match=f"a budget of {limit} bytes for the experts is too"):
            allocate(found, limit)
        return
    taken = allocate(found, limit)
    assert all(each in node for each, node in zip(taken, found, strict=True))
    assert sum(each.nbytes for each in taken) <= limit
    assert sum(each.error for each in taken) == pytest.approx(min(fitting))


@pytest.mark.parametrize("budget", [3.0, 4.5, 6.0, "400kB"])
def test_what_is_written_meets_the_budget(
    budget: float | str, tiny_fp32: Path, tmp_path: Path
) -> None:
    report = quantize(tiny_fp32, tmp_path / "out", budget=budget, target="cpu")
    weights = sum(each.weights for row in report.rows for each in row.projections)
    limit = 400_000 if isinstance(budget, str) else budget * weights / 8
    assert sum(row.bytes_after for row in report.rows) <= limit
    planned = plan(tiny_fp32, budget=budget, target="cpu")
    assert [row.stored for row in planned.rows] == [row.stored for row in report.rows]


def test_more_bytes_are_less_error(tiny_fp32: Path, tmp_path: Path) -> None:
    worst = []
    for budget in (3, 4.5, 8.5):
        report = quantize(tiny_fp32, tmp_path / str(budget), budget=budget, measured=True)
        worst.append(max(max(p.errors) for row in report.rows for p in row.projections))
    assert worst == sorted(worst, reverse=True)
    assert worst[0] > 3 * worst[-1]


def test_nodes_that_an_override_names_are_left_alone(tiny_fp32: Path) -> None:
    override = ("layers.0.moe", {"bits": 8})
    first, second = plan(tiny_fp32, budget=3, target="cpu", overrides=[override]).rows
    assert first.stored.startswith("int8 row")
    assert 8 * second.bytes_after <= 3 * sum(each.weights for each in second.projections)


def test_a_budget_that_nothing_meets(tiny_fp32: Path) -> None:
    with pytest.raises(ConfigError) as error:
        plan(tiny_fp32, budget=1)
    needed = re.search(r"the smallest recipe that the target takes needs (\d+)$", str(error.value))
    assert needed is not None
    assert sum(row.bytes_after for row in plan(tiny_fp32, budget=f"{needed[1]}B").rows) == int(
        needed[1]
    )


def test_int8_has_one_scale_per_row_where_the_cpu_rounds_activations() -> None:
    """Blocks are closer to the weights, and the kernel's rounding costs more than they gain."""

    def best(target: str, **fields: Any) -> Choice:
        moe = FloatMoE.of(the_node(single(Experts(dtype="float16", hidden=128, inter=128)), "MoE"))
        assert isinstance(moe, FloatMoE)
        found = choices_for(moe, "moe", Recipe(budget=16, target=target, **fields))
        return min(found, key=lambda each: each.error)

    for target in ("cpu", "portable"):
        assert (best(target).bits, best(target).block_size) == (8, 0)
    assert best("cuda").bits == 8
    assert best("cuda").block_size == 32
