"""The compiled engine against numpy, byte for byte, and what it asks of numba and the disk.

`test_rtn`, `test_floats` and `test_layouts` hold what the numbers mean; here, that it does not
matter who computes them.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import engine
from qmoe_rules.quantizers.floats import float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy
from qmoe_rules.testing import expert_shapes, expert_weights

Weight = npt.NDArray[np.generic]
Bytes = npt.NDArray[np.uint8]

DTYPES = list(SCALE_DTYPES.values())
INTEGERS = [f"int{bits}" for bits in (2, 3, 4, 8)]
# Powers of two, as recipes have them, and sizes that vectors of 16 columns do not fill.
BLOCKS = (0, 8, 16, 24, 32, 48, 96)
INTEGER_SPECS = [
    Spec(FORMATS[name], block, symmetric, signed)
    for name in INTEGERS
    for block in BLOCKS
    for symmetric, signed in ((True, True), (True, False), (False, True))
]
FLOAT_SPECS = [
    Spec(FORMATS["mxfp4"], 32),
    Spec(FORMATS["nvfp4"], 16),
    *(Spec(FORMATS["fp8"], block) for block in (0, 8, 16, 24, 128)),
]
SPECS = INTEGER_SPECS + FLOAT_SPECS
ROWS, COLUMNS = 20, 96

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True, scope="module")
def _compiled_engine() -> None:
    """Without it, every comparison of the engines would compare numpy with itself."""
    assert engine.kernels() is not None


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the import of the compiled engine fail, as it does without numba."""
    monkeypatch.setitem(sys.modules, "qmoe_rules.quantizers._kernels", None)
    engine.kernels.cache_clear()
    yield
    engine.kernels.cache_clear()


def in_numpy(weight: Weight, spec: Spec) -> QuantizedWeights:
    return (rtn_numpy if spec.format.element is None else float_rtn_numpy)(weight, spec)


def assert_same(one: QuantizedWeights, other: QuantizedWeights) -> None:
    """Byte for byte: signs of zeros count."""
    for part in ("packed", "scales", "zero_points", "global_scale"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert (ours is None) == (theirs is None), f"{part}, {one.spec}"
        if ours is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), f"{part}, {one.spec}"
            bits = f"u{ours.itemsize}"
            np.testing.assert_array_equal(
                np.atleast_1d(ours).view(bits), np.atleast_1d(theirs).view(bits), err_msg=part
            )


def weights(dtype: np.dtype, seed: int = 0) -> Weight:
    """Rows of very different sizes, among them zeros, zeros of both signs and subnormals."""
    rng = np.random.default_rng(seed)
    info: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    weight = (rng.standard_normal((ROWS, COLUMNS)) * 2.0 ** rng.integers(-9, 9, (ROWS, 1))).astype(
        dtype
    )
    weight[2] = 0
    weight[3] = rng.choice([0.0, -0.0], COLUMNS)
    weight[4] = rng.integers(-9, 10, COLUMNS) * float(info.smallest_subnormal)
    weight[5] = rng.choice([-1, 1], COLUMNS) * float(info.max)
    weight[6:9, :48] = 0
    weight[9] = np.abs(weight[9].astype(np.float32))
    weight[10] = -np.abs(weight[10].astype(np.float32))
    return weight


def every_finite_pattern(name: str) -> Weight:
    """All finite numbers of a 16-bit type in rows of 32: neighbours share a block."""
    patterns = np.arange(2**16, dtype=np.uint16).view(SCALE_DTYPES[name])
    finite = patterns[np.isfinite(patterns.astype(np.float32))]
    return finite.reshape(-1, 32)


def finite_weights(spec: Spec) -> SearchStrategy[Weight]:
    """Weights [N, K] of any finite numbers, of many shapes that a spec takes."""
    step = spec.format.codes_per_group
    if spec.block_size and not spec.format.square:
        step = int(np.lcm(step, spec.block_size))
    largest = max(200 // step, 1) * step
    shapes = expert_shapes(max_experts=1, max_rows=4, max_columns=largest, column_step=step)
    return expert_weights(shapes=shapes).map(lambda weight: weight[0])


# The same bytes.


@each_dtype
@pytest.mark.parametrize("seed", range(3))
def test_the_engine_writes_what_numpy_does(dtype: np.dtype, seed: int) -> None:
    weight = weights(dtype, seed)
    for spec in SPECS:
        assert_same(rtn(weight, spec), in_numpy(weight, spec))


@settings(max_examples=300)
@given(st.data(), st.sampled_from(SPECS))
def test_the_engine_writes_what_numpy_does_of_any_patterns(data: st.DataObject, spec: Spec) -> None:
    weight = data.draw(finite_weights(spec))
    assert_same(rtn(weight, spec), in_numpy(weight, spec))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
@pytest.mark.parametrize("columns", [32, 31])
def test_every_16_bit_number_is_read_right(name: str, columns: int) -> None:
    """In whole vectors of a row and in what they leave over."""
    weight = every_finite_pattern(name)[:, :columns]
    for spec in (Spec(FORMATS["int8"], columns), Spec(FORMATS["int8"], columns, symmetric=False)):
        assert_same(rtn(weight, spec), rtn_numpy(weight, spec))
    for size in (1, 8):
        spec = Spec(FORMATS["fp8"], size)
        assert_same(rtn(weight, spec), float_rtn_numpy(weight, spec))


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_scales_are_rounded_to_16_bits_as_numpy_rounds(name: str) -> None:
    """Float32 peaks at and beside the middle of neighbours, from subnormals to the largest."""
    instructions = importlib.import_module("qmoe_rules.quantizers._kernels.instructions")
    nearest, dtype = instructions.nearest, SCALE_DTYPES[name]

    def one_by_one(values: Any, least: Any, found: Any) -> None:
        for i in range(values.size):
            found[i] = nearest(values[i], least)

    rounded = importlib.import_module("numba").njit(one_by_one)
    last = int(np.array(np.inf, dtype).view(np.uint16)) - 1
    below = np.arange(0, last, 7, dtype=np.uint16)
    low, high = (each.view(dtype).astype(np.float64) for each in (below, below + np.uint16(1)))
    middle = ((low + high) / 2).astype(np.float32)
    near = [middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(np.inf))]
    values = np.concatenate([*near, low.astype(np.float32)])
    values = np.concatenate([values, -values])
    found = np.empty(values.shape, engine.patterns(np.zeros(1, dtype)).dtype)
    rounded(values, found.dtype.type(0), found)
    np.testing.assert_array_equal(found.view(np.uint16), values.astype(dtype).view(np.uint16))
    rounded(values, found.dtype.type(5), found)
    least = np.array([5], np.uint16).view(dtype)[0]
    expected = values.astype(dtype)
    small = np.abs(expected.astype(np.float32)) < np.float32(least)
    expected[small] = np.copysign(np.float32(least), values[small]).astype(dtype)
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("name", ["e2m1", "e4m3"])
@each_dtype
def test_floating_point_codes_are_ml_dtypes_own(name: str, dtype: np.dtype) -> None:
    """Every 16-bit number, and float32 numbers at and beside the middle of neighbours."""
    format = FORMATS[{"e2m1": "mxfp4", "e4m3": "fp8"}[name]]
    if dtype.itemsize == 2:
        weight = every_finite_pattern(dtype.name)
    else:
        codes = np.arange(2 ** (format.bits - 1) - 1, dtype=np.uint8)
        middle = (format.decode(codes) + format.decode(codes + np.uint8(1))) / 2
        middle = middle[np.isfinite(middle)]
        beside = [np.nextafter(middle, np.float32(end)) for end in (0, np.inf)]
        values = np.concatenate([middle, *beside, np.array([0, 1e-45, 1e38, 3e38], np.float32)])
        weight = np.resize(np.concatenate([values, -values]), (32, 32))
    kernels: Any = engine.kernels()
    packed = np.empty((len(weight), 32 * format.bits // 8), np.uint8)
    steps = np.ones((len(weight), 1), np.float32)
    kernels.round_floats(engine.patterns(weight), steps, 32, 1, format.bits, packed)
    quantized = QuantizedWeights(packed, steps, Spec(format, 32))
    np.testing.assert_array_equal(quantized.codes, format.encode(weight.astype(np.float32)))


@each_dtype
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_the_first_row_that_is_not_finite_is_told(dtype: np.dtype, value: float) -> None:
    for spec in SPECS:
        for column in (0, 15, 16, COLUMNS - 1):
            weight = weights(dtype)
            weight[11, column] = value
            weight[12, 0] = np.inf
            with pytest.raises(SourceError, match=r"^row 11 holds an infinity or a NaN$"):
                rtn(weight, spec)


# What comes in and what is touched.


@each_dtype
def test_it_does_not_matter_how_weights_lie_in_memory(dtype: np.dtype) -> None:
    weight = weights(dtype)
    read_only = weight.copy()
    read_only.flags.writeable = False
    shifted = np.empty(weight.nbytes + 1, np.uint8)[1:]
    shifted[:] = weight.view(np.uint8).ravel()
    unaligned = shifted.view(dtype).reshape(weight.shape)
    assert not unaligned.flags.aligned
    views = {
        "Fortran": np.asfortranarray(weight),
        "every other column": np.repeat(weight, 2, axis=1)[:, ::2],
        "backwards": weight[::-1, ::-1].copy()[::-1, ::-1],
        "read-only": read_only,
        "unaligned": unaligned,
    }
    for spec in (Spec(FORMATS["int4"], 32), Spec(FORMATS["int3"]), *FLOAT_SPECS):
        for view in views.values():
            assert_same(rtn(view, spec), rtn(weight, spec))


def test_sources_of_every_kind_meet_the_same_compiled_code() -> None:
    kernels: Any = engine.kernels()
    weight, spec = weights(DTYPES[0]), Spec(FORMATS["int4"], 32)
    rtn(weight, spec)
    compiled = len(kernels.round_integers.signatures)
    read_only = weight.copy()
    read_only.flags.writeable = False
    for each in (read_only, np.asfortranarray(weight), weight[::2]):
        rtn(each, spec)
    assert len(kernels.round_integers.signatures) == compiled


@pytest.mark.parametrize("columns", [2, 6, 14, 16, 18, 34])
def test_nothing_is_written_beside_the_bytes_of_an_array(columns: int) -> None:
    """A vector or an integer may reach beyond a row: into buffers, and nowhere else."""
    kernels: Any = engine.kernels()
    for bits in (2, 3, 4, 8):
        width = columns * 8  # fills whole bytes of any width
        weight = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
        whole = np.full((5, width * bits // 8), 0xA5, np.uint8)
        scales = np.full((5, 1), 7, np.uint32)
        kernels.round_integers(
            engine.patterns(weight),
            engine.infinity(weight.dtype),
            np.uint32(1),
            bits,
            width,
            True,
            whole[1:-1],
            scales[1:-1],
            None,
        )
        assert (whole[[0, -1]] == 0xA5).all()
        assert (scales[[0, -1]] == 7).all()
        expected = rtn_numpy(weight, Spec(FORMATS[f"int{bits}"], width))
        np.testing.assert_array_equal(whole[1:-1], expected.packed)


@each_dtype
def test_threads_give_the_same_bytes(dtype: np.dtype) -> None:
    sources = [weights(dtype, seed) for seed in range(6)] * 4
    for spec in (Spec(FORMATS["int4"], 32), Spec(FORMATS["nvfp4"], 16)):
        expected = [rtn(weight, spec) for weight in sources]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(rtn, sources, [spec] * len(sources)))
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)


# Orders of bytes.

LAYOUT_CASES = [
    *(
        ("cutlass_sm80", bits, 64 // bits * n, 64 * k)
        for bits in (2, 4, 8)
        for n in (1, 3)
        for k in (1, 5)
    ),
    *(
        ("n_packed", 4, rows, columns)
        for rows in (2, 16, 30, 130, 258)
        for columns in (2, 16, 34, 96)
    ),
]


def raw_bytes(rows: int, columns: int, bits: int) -> Bytes:
    return np.random.default_rng(0).integers(0, 256, (rows, columns * bits // 8), dtype=np.uint8)


@pytest.mark.parametrize(("name", "bits", "rows", "columns"), LAYOUT_CASES)
def test_compiled_orders_are_those_of_numpy(name: str, bits: int, rows: int, columns: int) -> None:
    layout, raw = LAYOUTS[name], raw_bytes(rows, columns, bits)
    assert layout.compiled is not None
    assert layout.refuse_shape(rows, columns, bits) is None
    stored = layout.store(raw, bits)
    np.testing.assert_array_equal(stored, layout.permute(raw, bits))
    np.testing.assert_array_equal(layout.load(stored, bits), layout.restore(stored, bits))
    np.testing.assert_array_equal(layout.load(stored, bits), raw)


@pytest.mark.parametrize(
    ("name", "kernels"), [(n, x.compiled) for n, x in LAYOUTS.items() if x.compiled]
)
def test_the_kernels_do_the_work_and_nothing_beside(
    name: str, kernels: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, raw = LAYOUTS[name], raw_bytes(32, 128, 4)
    compiled, asked = engine.kernels(), []
    for kernel in set(kernels):
        run = getattr(compiled, kernel)

        def watched(source: Bytes, bits: int, target: Bytes, run: Any = run) -> None:
            asked.append(run)
            whole = np.full((len(target) + 2, target.shape[1]), 0xA5, np.uint8)
            run(source, bits, whole[1:-1])
            assert (whole[[0, -1]] == 0xA5).all()
            target[:] = whole[1:-1]

        monkeypatch.setattr(compiled, kernel, watched)
    stored = layout.store(raw, 4)
    np.testing.assert_array_equal(layout.load(stored, 4), raw)
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["cutlass_sm80", "n_packed"])
def test_it_does_not_matter_how_bytes_lie_in_memory(name: str) -> None:
    layout, raw = LAYOUTS[name], raw_bytes(32, 128, 4)
    read_only = raw.copy()
    read_only.flags.writeable = False
    shifted = np.empty(raw.size + 1, np.uint8)[1:]
    shifted[:] = raw.ravel()
    for view in (
        read_only,
        shifted.reshape(raw.shape),
        np.asfortranarray(raw),
        raw.repeat(2, 0)[::2],
    ):
        stored = layout.store(view, 4)
        np.testing.assert_array_equal(stored, layout.store(raw, 4))
        np.testing.assert_array_equal(layout.load(np.asfortranarray(stored), 4), raw)


@pytest.mark.parametrize(("rows", "columns"), [(16, 96), (8, 64), (17, 64)])
def test_shapes_that_do_not_fit_never_reach_the_kernels(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They check no bounds; numpy does."""
    layout, raw = LAYOUTS["cutlass_sm80"], raw_bytes(rows, columns, 4)
    compiled: Any = engine.kernels()
    monkeypatch.setattr(compiled, "store_tiles", None)
    monkeypatch.setattr(compiled, "load_tiles", None)
    for convert, meaning in ((layout.store, layout.permute), (layout.load, layout.restore)):
        try:
            expected = meaning(raw, 4)
        except ValueError:
            with pytest.raises(ValueError, match="cannot reshape"):
                convert(raw, 4)
        else:
            np.testing.assert_array_equal(convert(raw, 4), expected)


# numba and the disk.


@pytest.mark.usefixtures("_no_kernels")
@each_dtype
def test_without_numba_numpy_does_the_work_and_says_so_once(
    dtype: np.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    weight = weights(dtype)
    for spec in SPECS:
        assert_same(rtn(weight, spec), in_numpy(weight, spec))
    for name, bits, rows, columns in LAYOUT_CASES:
        raw = raw_bytes(rows, columns, bits)
        np.testing.assert_array_equal(LAYOUTS[name].load(LAYOUTS[name].store(raw, bits), bits), raw)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.message.startswith("numba cannot be used, and numpy is several times slower: ")


def test_processors_that_store_high_bytes_first_take_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Kernels read several codes, or bytes, as one integer."""
    engine.kernels.cache_clear()
    monkeypatch.setattr(sys, "byteorder", "big")
    try:
        assert engine.kernels() is None
    finally:
        engine.kernels.cache_clear()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


SAME_BYTES = """
import numpy as np
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantizers import engine
from qmoe_rules.quantizers.floats import float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy
from qmoe_rules.testing import expert_shapes, expert_weights
patterns = np.arange(2**16, dtype=np.uint16).view(np.float16)
weight = patterns[np.isfinite(patterns)].reshape(-1, 32)
int8, fp8 = Spec(FORMATS["int8"], 32), Spec(FORMATS["fp8"])
for spec, meaning in ((int8, rtn_numpy), (fp8, float_rtn_numpy)):
    one, other = rtn(weight, spec), meaning(weight, spec)
    assert one.packed.tobytes() == other.packed.tobytes()
    assert one.scales.tobytes() == other.scales.tobytes()
stats = engine.kernels().round_integers.stats
print(weight.size, len(stats.cache_hits), len(stats.cache_misses))
"""

WITHOUT_HALF_INSTRUCTIONS = """
import platform
import llvmlite.binding as llvm
features = llvm.get_host_cpu_features()
features.pop("f16c", None)
llvm.get_host_cpu_features = lambda: features
platform.machine = lambda: "a machine without float16"
from qmoe_rules.quantizers._kernels import instructions
assert not instructions._HAS_NATIVE_HALF
"""

WITHOUT_A_FOLDER = """
import logging
logging.basicConfig(format="%(levelname)s %(message)s")
import numba.core.caching
numba.core.caching.CacheImpl._locator_classes = []
"""


@pytest.fixture(scope="module")
def poor() -> subprocess.CompletedProcess[str]:
    """A process without float16 and without a folder; so no kernel compiled here is reused."""
    done = run_python(WITHOUT_A_FOLDER + WITHOUT_HALF_INSTRUCTIONS + SAME_BYTES)
    assert done.returncode == 0, done.stderr
    return done


def test_float16_is_read_right_on_processors_that_have_none(
    poor: subprocess.CompletedProcess[str],
) -> None:
    assert poor.stdout.split()[0] == str(2**16 - 2 * 2**10)  # all but infinities and NaN


def test_without_a_folder_for_them_they_are_compiled_again_with_one_warning(
    poor: subprocess.CompletedProcess[str],
) -> None:
    assert poor.stdout.split()[1:] == ["0", "1"]
    (line,) = [line for line in poor.stderr.splitlines() if "compiled kernels" in line]
    assert line.startswith("WARNING compiled kernels cannot be kept, and are compiled in every")
    assert "NUMBA_CACHE_DIR" in line


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path) -> None:
    first, second = (run_python(SAME_BYTES, NUMBA_CACHE_DIR=str(tmp_path)) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.split()[1:] == ["0", "1"]
    assert second.stdout.split()[1:] == ["1", "0"]


def test_numba_that_may_not_compile_is_no_numba(tmp_path: Path) -> None:
    code = "from qmoe_rules.quantizers import engine; print(engine.kernels())"
    done = run_python(code, NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "None"


def test_a_dry_run_does_without_numba(tiny_fp32: Path) -> None:
    """Neither the import nor a plan of a model needs it; a quantized weight does."""
    code = (
        "import sys, qmoe_rules; qmoe_rules.plan(sys.argv[1]); print('numba' in sys.modules);"
        "from qmoe_rules.quantizers import engine; engine.kernels(); print('numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_fp32)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"]
