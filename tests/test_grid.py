"""No cell of the contract may load, run and be wrong on the CPU provider; see `tests.grid`."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from qmoe_rules.formats import pack
from qmoe_rules.quantized import QuantizedWeights
from tests.contract import Cell, serialized
from tests.grid import (
    ACTIVATIONS,
    BLOCKS,
    DTYPES,
    FACTORS,
    SIZES,
    STORAGES,
    full,
    measure,
    reduced,
    run,
    takes,
    tolerance,
    with_factors,
)
from tests.moe_models import relative_error

Storage = tuple[str, int, bool]


def named(storage: Storage) -> str:
    format, block, symmetric = storage
    return f"{format}-{block}-{'symmetric' if symmetric else 'asymmetric'}"


def complaints(cells: Iterator[Cell]) -> list[str]:
    return [outcome.complaint for outcome in map(measure, cells) if outcome.complaint]


@pytest.mark.parametrize("storage", STORAGES, ids=named)
def test_every_cell_runs_right_or_is_refused(storage: Storage) -> None:
    assert complaints(reduced(*storage)) == []


@pytest.mark.slow
@pytest.mark.parametrize("storage", STORAGES, ids=named)
def test_every_cell_of_the_full_product_runs_right_or_is_refused(storage: Storage) -> None:
    assert complaints(full(*storage)) == []


@pytest.mark.parametrize(
    ("cells", "count"), [(reduced, 1), (full, 36)], ids=["reduced", "full product"]
)
def test_every_pair_of_values_is_run(
    cells: Callable[[str, int, bool], Iterator[Cell]], count: int
) -> None:
    """The values that are taken, two and two, of integers other than int3."""
    integers = [storage for storage in STORAGES if storage[0] in ("int2", "int4", "int8")]
    runs = [factors(cell) for s in integers for cell in cells(*s) if takes(cell)]
    assert len(runs) == count * len(integers) * 2 * 5  # two types, five activations
    values: dict[str, tuple[Any, ...]] = {
        "format": ("int2", "int4", "int8"),
        "block_size": BLOCKS,
        "symmetric": (True, False),
        "dtype": DTYPES[:2],
        "activation": ("relu", "gelu", "silu", "identity", "swiglu"),
        **FACTORS,
    }
    for first, second in itertools.combinations(values, 2):
        wanted = set(itertools.product(values[first], values[second]))
        assert {(one[first], one[second]) for one in runs} == wanted, (first, second)


def factors(cell: Cell) -> dict[str, Any]:
    return vars(cell) | {"size": SIZES[cell.block_size].index((cell.hidden, cell.inter))}


def test_blocks_are_odd_and_even_in_number() -> None:
    for block, sizes in SIZES.items():
        counts = {(hidden // block % 2, inter // block % 2) for hidden, inter in sizes if block}
        assert not block or {(1, 1), (0, 0)} <= counts, block
        assert all(size % (block or 1) == 0 for pair in sizes for size in pair)


def test_every_type_and_activation_is_asked_for() -> None:
    for storage in STORAGES:
        asked = {(cell.dtype, cell.activation, cell.fusion) for cell in reduced(*storage)}
        assert asked == {(dtype, *activation) for dtype in DTYPES for activation in ACTIVATIONS}


def swapped_neighbours(weight: QuantizedWeights) -> QuantizedWeights:
    codes = weight.codes.reshape(*weight.packed.shape[:-1], -1, 2)[..., ::-1]
    packed = pack(codes.reshape(weight.codes.shape), weight.spec.format.bits)
    return dataclasses.replace(weight, packed=packed)


def shifted(part: str) -> Callable[[QuantizedWeights], QuantizedWeights]:
    """Gives every block, or row where a row has one scale, what belongs to the one before."""

    def shift(weight: QuantizedWeights) -> QuantizedWeights:
        array = getattr(weight, part)
        return dataclasses.replace(weight, **{part: np.roll(array, 1, axis=-1)})

    return shift


MISREADINGS = {
    "codes": swapped_neighbours,
    "scales": shifted("scales"),
    "zero points": shifted("zero_points"),
}


def plain_cell(format: str, block: int, symmetric: bool) -> Cell:
    return with_factors(Cell(format, None, block, symmetric), False, 1, 2, 1)


@pytest.mark.parametrize(
    ("storage", "misread"),
    [
        pytest.param(storage, misread, id=f"{named(storage)}-{misread}")
        for storage, misread in itertools.product(STORAGES, MISREADINGS)
        if takes(plain_cell(*storage)) and not (storage[2] and misread == "zero points")
    ],
)
def test_the_tolerance_is_less_than_a_misreading(storage: Storage, misread: str) -> None:
    """Three times what is allowed, where only fc2 is misread."""
    cell = plain_cell(*storage)
    weights = cell.quantized(cell.recipe("cpu").specs)
    wrong = weights | {"fc2": MISREADINGS[misread](weights["fc2"])}
    model = serialized(cell.direct("k_packed" if "fp4" in cell.format else "raw", wrong))
    actual = run(model, cell)
    assert relative_error(actual, cell.expected(wrong)) <= tolerance(cell)
    assert relative_error(actual, cell.expected(weights)) > 3 * tolerance(cell)
