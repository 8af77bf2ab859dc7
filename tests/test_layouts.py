"""Stored bytes against ONNX Runtime's packer and kernels, a closed formula, and their inverses.

`golden/cutlass_packed_weights.npz` holds, per width and [N, K], raw bytes and what ONNX Runtime's
packer for CUDA made of them. The CPU kernel of ONNX Runtime 1.32 reads some of these layouts.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules import layouts, reference
from qmoe_rules.formats import FORMATS, Format, Spec, pack, unpack
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantized import QuantizedWeights
from tests.moe_models import Array, Experts, relative_error, run, the_node
from tests.qmoe_models import Codes, reference_options

Bytes = npt.NDArray[np.uint8]

GOLDEN = Path(__file__).parent / "golden" / "cutlass_packed_weights.npz"
CASES = [f"int{b}_{shape}" for b in (4, 8) for shape in ("64x64", "128x192", "32x256", "96x128")]
PACKED = ["cutlass_sm80", "cutlass_sm90"]
# Every layout and format that go together, of which sm90 is read by no kernel.
PAIRS = [
    *(("raw", name) for name in ("int2", "int3", "int4", "int8", "fp8")),
    *((layout, name) for layout in PACKED for name in ("int2", "int4", "int8")),
    *((layout, name) for layout in ("n_packed", "k_packed") for name in ("mxfp4", "nvfp4")),
]


@pytest.fixture(params=["compiled", "numpy"])
def _each_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with the compiled orders, where there are any, and with their definitions."""
    if request.param == "numpy":
        monkeypatch.setattr(layouts, "kernels", lambda: None)


@pytest.fixture(scope="module")
def golden() -> dict[str, Bytes]:
    with np.load(GOLDEN) as arrays:
        return dict(arrays)


def random_raw(rows: int, columns: int, bits: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)


def divisors(layout: str, format: Format) -> tuple[int, int]:
    """What N and K are divisible by in a layout, as ONNX Runtime's tools ask for it."""
    if layout in PACKED:
        return 64 // format.bits, 64
    return 2 if layout == "n_packed" else 1, {2: 4, 3: 8, 4: 2, 8: 1}[format.bits]


@st.composite
def stored_somehow(draw: st.DrawFn) -> tuple[str, Bytes, Format]:
    """(layout, raw bytes, format) of any shape that the layout holds."""
    layout, name = draw(st.sampled_from(PAIRS))
    format = FORMATS[name]
    step, tile = divisors(layout, format)
    most = 6 if layout in PACKED else 150  # steps of N or K, which are small ones elsewhere
    rows, columns = draw(st.integers(1, most)) * step, draw(st.integers(1, most)) * tile
    return layout, random_raw(rows, columns, format.bits, draw(st.integers(0, 2**32))), format


def test_the_cases_are_all_that_the_golden_file_holds(golden: dict[str, Bytes]) -> None:
    kinds = ("raw", "sm80", "sm90")
    assert sorted(golden) == sorted(f"{kind}_{case}" for kind in kinds for case in CASES)


@pytest.mark.usefixtures("_each_engine")
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


@pytest.mark.usefixtures("_each_engine")
@pytest.mark.parametrize("layout", PACKED)
@pytest.mark.parametrize(
    ("bits", "rows", "columns"),
    [(4, 32, 128), (8, 16, 192), (4, 16, 64), (2, 64, 128), (2, 32, 192)],
)
def test_the_order_is_the_closed_formula(layout: str, bits: int, rows: int, columns: int) -> None:
    raw = random_raw(rows, columns, bits)
    expected = packed_by_formula(unpack(raw, bits), bits, layout)
    np.testing.assert_array_equal(LAYOUTS[layout].store(raw, bits), expected)
    np.testing.assert_array_equal(LAYOUTS[layout].load(expected, bits), raw)


@settings(max_examples=120)
@given(stored_somehow())
def test_load_inverts_store(drawn: tuple[str, Bytes, Format]) -> None:
    name, raw, format = drawn
    layout, bits, (rows, row_bytes) = LAYOUTS[name], format.bits, raw.shape
    columns = row_bytes * 8 // bits
    if name != "cutlass_sm90":  # whose bytes are known, and which no kernel reads
        assert layout.refuse(rows, columns, format) is None
    stored = layout.store(raw, bits)
    assert stored.dtype == np.uint8
    assert stored.shape == layout.stored_shape(rows, columns, bits)
    np.testing.assert_array_equal(layout.load(stored, bits), raw)
    np.testing.assert_array_equal(layout.store(layout.load(stored, bits), bits), stored)


@settings(max_examples=60)
@given(stored_somehow())
def test_a_layout_moves_codes_and_changes_none(drawn: tuple[str, Bytes, Format]) -> None:
    name, raw, format = drawn
    stored = LAYOUTS[name].store(raw, format.bits)
    before, after = (np.bincount(unpack(data, format.bits).ravel()) for data in (raw, stored))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(("layout", "format"), PAIRS)
def test_where_a_code_goes_does_not_depend_on_the_codes(layout: str, format: str) -> None:
    """Storing a xor equals the xor of what is stored, which only a fixed permutation does."""
    store, bits = LAYOUTS[layout].store, FORMATS[format].bits
    one, other = (random_raw(32, 128, bits, seed) for seed in (1, 2))
    np.testing.assert_array_equal(store(one ^ other, bits), store(one, bits) ^ store(other, bits))


@pytest.mark.parametrize(("layout", "format"), PAIRS)
def test_the_source_bytes_are_left_alone(layout: str, format: str) -> None:
    bits = FORMATS[format].bits
    raw = random_raw(32, 128, bits)
    before = raw.copy()
    LAYOUTS[layout].load(LAYOUTS[layout].store(raw, bits), bits)
    np.testing.assert_array_equal(raw, before)


@pytest.mark.parametrize("layout", ["raw", "k_packed"])
def test_the_packed_bytes_as_they_stand(layout: str) -> None:
    raw = random_raw(3, 10, 4)
    np.testing.assert_array_equal(LAYOUTS[layout].store(raw, 4), raw)
    assert LAYOUTS[layout].stored_shape(3, 10, 4) == (3, 5)


@pytest.mark.usefixtures("_each_engine")
def test_n_packed_holds_two_rows_in_a_byte_the_even_one_low() -> None:
    raw = random_raw(6, 10, 4)
    codes, stored = unpack(raw, 4), LAYOUTS["n_packed"].store(raw, 4)
    assert stored.shape == LAYOUTS["n_packed"].stored_shape(6, 10, 4) == (10, 3)
    for n, k in np.ndindex(codes.shape):
        assert stored[k, n // 2] >> 4 * (n % 2) & 15 == codes[n, k]
    np.testing.assert_array_equal(LAYOUTS["n_packed"].load(stored, 4), raw)


def test_what_a_node_says_of_a_layout() -> None:
    assert {name: (layout.prepacked, layout.transposed) for name, layout in LAYOUTS.items()} == {
        "raw": (0, False),
        "cutlass_sm80": (1, True),
        "cutlass_sm90": (1, True),
        "n_packed": (0, True),
        "k_packed": (1, False),
    }


# What a layout holds.


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_holds_the_formats_of_its_kind(layout: str, format: Format) -> None:
    holders = [name for name in LAYOUTS if format.quant_type in LAYOUTS[name].quant_types]
    expected = None
    if layout not in holders:
        expected = f"layout {layout} is not one of {format.name}'s ({', '.join(holders)})"
        assert LAYOUTS[layout].refuse(64, 64, format) == expected
    assert LAYOUTS[layout].refuse_format(format) == expected


def test_the_layouts_of_every_kind_of_format() -> None:
    holders = {
        name: [layout for layout in LAYOUTS if not LAYOUTS[layout].refuse_format(format)]
        for name, format in FORMATS.items()
    }
    integers, floats = ["raw", *PACKED], ["n_packed", "k_packed"]
    assert holders == {
        **dict.fromkeys(("int2", "int3", "int4", "int8"), integers),
        **dict.fromkeys(("mxfp4", "nvfp4"), floats),
        "fp8": ["raw"],
    }


@settings(max_examples=200)
@given(
    st.sampled_from([pair for pair in PAIRS if pair[0] != "cutlass_sm90"]),
    st.integers(1, 130),
    st.integers(1, 130),
)
def test_a_shape_is_taken_exactly_where_its_sizes_divide(
    pair: tuple[str, str], rows: int, columns: int
) -> None:
    layout, format = LAYOUTS[pair[0]], FORMATS[pair[1]]
    step, tile = divisors(layout.name, format)
    spec = Spec(format)
    taken = not (spec.refuse_shape(rows, columns) or layout.refuse(rows, columns, format))
    assert taken == (rows % step == 0 and columns % tile == 0)


NO_SM90 = (
    "layout cutlass_sm90 is never read by QMoE: every GPU, Hopper and later too, reads "
    "cutlass_sm80 (measured with onnxruntime-gpu 1.31.1 on an H200)"
)


@pytest.mark.parametrize(
    ("layout", "rows", "columns", "format", "reason"),
    [
        ("raw", 1, 2, "int4", None),
        ("raw", 7, 3, "int8", None),
        ("cutlass_sm80", 16, 64, "int4", None),
        ("cutlass_sm80", 8, 64, "int8", None),
        ("cutlass_sm80", 32, 64, "int2", None),
        (
            "cutlass_sm80",
            64,
            64,
            "int3",
            "layout cutlass_sm80 holds 2-bit, 4-bit and 8-bit codes, not 3-bit ones",
        ),
        ("cutlass_sm80", 64, 96, "int4", "layout cutlass_sm80 needs K divisible by 64, and K=96"),
        (
            "cutlass_sm80",
            24,
            64,
            "int4",
            "layout cutlass_sm80 needs N divisible by 16 at 4 bits, and N=24",
        ),
        (
            "cutlass_sm80",
            20,
            64,
            "int8",
            "layout cutlass_sm80 needs N divisible by 8 at 8 bits, and N=20",
        ),
        (
            "cutlass_sm80",
            48,
            64,
            "int2",
            "layout cutlass_sm80 needs N divisible by 32 at 2 bits, and N=48",
        ),
        ("cutlass_sm90", 64, 64, "int4", NO_SM90),
        ("cutlass_sm90", 64, 64, "int3", NO_SM90),
        ("n_packed", 7, 64, "nvfp4", "layout n_packed holds two rows per byte, and N=7 is odd"),
        ("k_packed", 7, 64, "nvfp4", None),
    ],
)
def test_shapes_that_a_layout_cannot_hold_are_refused_with_the_reason(
    layout: str, rows: int, columns: int, format: str, reason: str | None
) -> None:
    assert LAYOUTS[layout].refuse(rows, columns, FORMATS[format]) == reason


# ONNX Runtime's CPU kernel, which since 1.32 reads what CUDA reads.


def computed(codes: Codes) -> tuple[Array, dict[str, Array]]:
    """Returns what ONNX Runtime makes of a node, and its inputs."""
    feeds = codes.experts.feeds((24,))
    (output,) = run(codes.model(), feeds)
    return output, feeds


def meant(codes: Codes, feeds: dict[str, Array], fc1: Array, fc2: Array) -> Array:
    options = reference_options(the_node(codes.model()))
    return reference.moe(feeds["x"], feeds["router_probs"], fc1, fc2, **options)


@pytest.mark.parametrize("block", [32, 64, 128])
@pytest.mark.parametrize("format", ["int2", "int4"])
def test_the_kernel_reads_sm80_bytes_as_they_are_meant(format: str, block: int) -> None:
    spec = Spec(FORMATS[format], block)
    experts = Experts(hidden=128, inter=256, bias=False)  # the weights alone are compared
    codes = Codes(experts, spec, layout="cutlass_sm80")
    output, feeds = computed(codes)
    weights = {name: each.dequantize() for name, each in codes.weights().items()}
    assert relative_error(output, meant(codes, feeds, **weights)) < 1e-6
    for weight in weights.values():
        weight[..., [0, 1]] = weight[..., [1, 0]]
    assert relative_error(output, meant(codes, feeds, **weights)) > 1e-2


@pytest.mark.parametrize(("format", "block"), [("mxfp4", 32), ("nvfp4", 16)])
def test_the_kernel_reads_k_packed_bytes_as_they_are_meant(format: str, block: int) -> None:
    """It rounds scale * global scale to bfloat16, and the weight that follows (measured)."""
    spec = Spec(FORMATS[format], block)
    codes = Codes(Experts(hidden=128, inter=192, bias=False), spec, layout="k_packed")
    output, feeds = computed(codes)
    weights = {name: rounded_twice(each) for name, each in codes.weights().items()}
    assert relative_error(output, meant(codes, feeds, **weights)) < 1e-6


def rounded_twice(weights: QuantizedWeights) -> Array:
    assert weights.global_scale is not None
    factors = weights.scales.astype(np.float32) * weights.global_scale[:, None, None]
    steps = np.repeat(_bfloat16(factors), weights.spec.block_size, axis=-1)
    return _bfloat16(weights.spec.format.decode(weights.codes) * steps)


def _bfloat16(array: Array) -> Array:
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)
