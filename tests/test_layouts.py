"""Stored bytes against ONNX Runtime's own packer, a closed formula, and their own inverses.

`golden/cutlass_packed_weights.npz` holds, per width and [N, K], raw bytes and what ONNX Runtime's
packer for CUDA made of them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules.formats import pack, unpack
from qmoe_rules.layouts import LAYOUTS

Bytes = npt.NDArray[np.uint8]

GOLDEN = Path(__file__).parent / "golden" / "cutlass_packed_weights.npz"
CASES = [f"int{b}_{shape}" for b in (4, 8) for shape in ("64x64", "128x192", "32x256", "96x128")]
PACKED = ["cutlass_sm80", "cutlass_sm90"]


@pytest.fixture(scope="module")
def golden() -> dict[str, Bytes]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def random_raw(rows: int, columns: int, bits: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)


@st.composite
def stored_somehow(draw: st.DrawFn) -> tuple[str, Bytes, int]:
    """(layout, raw bytes, bits) of a shape that the layout holds."""
    layout = draw(st.sampled_from(["raw", *PACKED]))
    bits = draw(st.sampled_from([4, 8]))
    rows = draw(st.integers(1, 6)) * (1 if layout == "raw" else 64 // bits)
    columns = draw(st.integers(1, 5)) * (2 if layout == "raw" else 64)
    return layout, random_raw(rows, columns, bits, draw(st.integers(0, 2**32))), bits


def test_the_cases_are_all_that_the_golden_file_holds(golden: dict[str, Bytes]) -> None:
    kinds = ("raw", "sm80", "sm90")
    assert sorted(golden) == sorted(f"{kind}_{case}" for kind in kinds for case in CASES)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize("case", CASES)
def test_bytes_equal_those_of_the_packer_of_onnxruntime(
    golden: dict[str, Bytes], case: str, layout: str
) -> None:
    bits = int(case[3])
    raw, stored = golden[f"raw_{case}"], golden[f"{layout[-4:]}_{case}"]
    np.testing.assert_array_equal(LAYOUTS[layout].store(raw, bits), stored)
    np.testing.assert_array_equal(LAYOUTS[layout].load(stored, bits), raw)


def packed_by_formula(codes: Bytes, bits: int, layout: str) -> Bytes:
    """The order of ONNX Runtime's packers in closed form, one stored field at a time."""
    rows, columns = codes.shape
    interleave, word = 16 // bits, 32 // bits
    group = 8 * interleave
    within_word = [*range(0, word, 2), *range(1, word, 2)]
    source = [0] * group
    for quarter in range(4):
        for r in range(group // 4):
            source[(group // 4) * quarter + r] = 2 * quarter + 8 * (r // 2) + r % 2
    fields = np.empty(rows * columns, np.uint8)
    for p in range(fields.size):
        place = p // word * word + within_word[p % word]
        if layout == "cutlass_sm80":
            rest, r = divmod(place, 64)
            rest, i = divmod(rest, interleave)
            g, t = divmod(rest, columns // 64)
            n, k = g * interleave + i, 64 * t + r
        else:
            n, k = divmod(place, columns)
        fields[p] = codes[n, group * (k // group) + source[k % group]]
    return pack(fields.reshape(columns, rows), bits)


@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize(("bits", "rows", "columns"), [(4, 32, 128), (8, 16, 192), (4, 16, 64)])
def test_the_order_is_the_closed_formula(layout: str, bits: int, rows: int, columns: int) -> None:
    raw = random_raw(rows, columns, bits)
    expected = packed_by_formula(unpack(raw, bits), bits, layout)
    np.testing.assert_array_equal(LAYOUTS[layout].store(raw, bits), expected)


@settings(max_examples=60, deadline=None)
@given(stored_somehow())
def test_load_inverts_store(drawn: tuple[str, Bytes, int]) -> None:
    name, raw, bits = drawn
    layout, (rows, row_bytes) = LAYOUTS[name], raw.shape
    columns = row_bytes * 8 // bits
    if name != "cutlass_sm90":  # whose bytes are known, and which no kernel reads
        assert layout.refuse(rows, columns, bits) is None
    stored = layout.store(raw, bits)
    assert stored.dtype == np.uint8
    assert stored.shape == layout.stored_shape(rows, columns, bits)
    np.testing.assert_array_equal(layout.load(stored, bits), raw)
    np.testing.assert_array_equal(layout.store(layout.load(stored, bits), bits), stored)


@settings(max_examples=30, deadline=None)
@given(stored_somehow())
def test_a_layout_moves_codes_and_changes_none(drawn: tuple[str, Bytes, int]) -> None:
    name, raw, bits = drawn
    stored = LAYOUTS[name].store(raw, bits)
    before, after = (np.bincount(unpack(data, bits).ravel()) for data in (raw, stored))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", PACKED)
def test_where_a_code_goes_does_not_depend_on_the_codes(layout: str, bits: int) -> None:
    """Storing a xor equals the xor of what is stored, which only a fixed permutation does."""
    store = LAYOUTS[layout].store
    one, other = (random_raw(32, 128, bits, seed) for seed in (1, 2))
    np.testing.assert_array_equal(store(one ^ other, bits), store(one, bits) ^ store(other, bits))


@pytest.mark.parametrize("layout", ["raw", *PACKED])
def test_the_source_bytes_are_left_alone(layout: str) -> None:
    raw = random_raw(32, 128, 4)
    before = raw.copy()
    LAYOUTS[layout].load(LAYOUTS[layout].store(raw, 4), 4)
    np.testing.assert_array_equal(raw, before)


def test_raw_is_the_packed_bytes_as_they_stand() -> None:
    raw = random_raw(3, 10, 4)
    np.testing.assert_array_equal(LAYOUTS["raw"].store(raw, 4), raw)
    assert LAYOUTS["raw"].stored_shape(3, 10, 4) == (3, 5)


def test_only_raw_is_not_prepacked() -> None:
    assert {name: layout.prepacked for name, layout in LAYOUTS.items()} == {
        "raw": 0,
        "cutlass_sm80": 1,
        "cutlass_sm90": 1,
    }


@pytest.mark.parametrize(
    ("layout", "rows", "columns", "bits", "reason"),
    [
        ("raw", 1, 2, 4, None),
        ("raw", 7, 3, 8, None),
        ("cutlass_sm80", 16, 64, 4, None),
        ("cutlass_sm80", 8, 64, 8, None),
        (
            "cutlass_sm80",
            64,
            64,
            2,
            "layout cutlass_sm80 holds 4-bit and 8-bit codes, not 2-bit ones",
        ),
        (
            "cutlass_sm80",
            64,
            96,
            4,
            "layout cutlass_sm80 needs K divisible by 64, and K=96",
        ),
        (
            "cutlass_sm80",
            24,
            64,
            4,
            "layout cutlass_sm80 needs N divisible by 16 at 4 bits, and N=24",
        ),
        (
            "cutlass_sm80",
            20,
            64,
            8,
            "layout cutlass_sm80 needs N divisible by 8 at 8 bits, and N=20",
        ),
        (
            "cutlass_sm90",
            64,
            64,
            4,
            "layout cutlass_sm90 is never read by QMoE: every GPU, Hopper and later too, reads "
            "cutlass_sm80 (measured with onnxruntime-gpu 1.31.1 on an H200)",
        ),
    ],
)
def test_shapes_that_a_layout_cannot_hold_are_refused_with_the_reason(
    layout: str, rows: int, columns: int, bits: int, reason: str | None
) -> None:
    assert LAYOUTS[layout].refuse(rows, columns, bits) == reason
