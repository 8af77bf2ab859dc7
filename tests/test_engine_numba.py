"""What the compiled engine asks of numba, the processor and the disk, and what does without."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantizers import engine
from qmoe_rules.quantizers.rtn import rtn
from tests.engines import LAYOUT_CASES, SPECS, assert_same, each_dtype, in_numpy, raw_bytes, weights

pytestmark = pytest.mark.usefixtures("compiled_engine")


@pytest.fixture
def _no_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the import of the compiled engine fail, as it does without numba."""
    monkeypatch.setitem(sys.modules, "qmoe_rules.quantizers._kernels", None)
    engine.kernels.cache_clear()
    yield
    engine.kernels.cache_clear()


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
