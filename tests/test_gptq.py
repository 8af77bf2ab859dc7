"""Error feedback: the two engines agree, the loss is less, and nothing is lost on the way."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import pytest

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._feedback import Curvature
from qmoe_rules.quantizers.gptq import gptq, gptq_numpy
from qmoe_rules.quantizers.rtn import rtn
from qmoe_rules.quantizers.search import search
from qmoe_rules.statistics import Statistics
from tests.test_search import FLOATS, SPECS, drawn

Array = npt.NDArray[Any]

# fp8 has relative errors, and is left to `search`, which leaves it to `rtn`.
FED = [*SPECS, *(spec for spec in FLOATS if not spec.format.square)]
COLUMNS = 256


def seen(columns: int = COLUMNS, tokens: int = 1000, seed: int = 5) -> Statistics:
    """Returns the statistics of inputs whose columns differ in size and go together."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, 12)) @ rng.standard_normal((12, columns))
    inputs = (mixed / 3 + rng.standard_normal((tokens, columns))) * rng.lognormal(0, 0.7, columns)
    hessian = (inputs.T @ inputs / tokens).astype(np.float32)
    return Statistics(tokens, np.diagonal(hessian).copy(), hessian)


def loss(weight: Array, quantized: QuantizedWeights, statistics: Statistics) -> float:
    """Returns the output's error relative to the output, both squared."""
    hessian = np.asarray(statistics.hessian, np.float64)
    real = weight.astype(np.float64)
    off = real - quantized.dequantize()
    return float(((off @ hessian) * off).sum() / ((real @ hessian) * real).sum())


def same_bytes(first: QuantizedWeights, second: QuantizedWeights) -> None:
    for part, array in first.parts().items():
        assert array.tobytes() == second.parts()[part].tobytes(), part


@pytest.mark.parametrize("spec", FED, ids=str)
@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=list(SCALE_DTYPES))
def test_both_engines_write_the_same_bytes(spec: Spec, dtype: np.dtype) -> None:
    weight = drawn(150, dtype=dtype)
    weight[3] = 0
    weight[5, :40] = 0
    same_bytes(gptq(weight, spec, seen()), gptq_numpy(weight, spec, seen()))


@pytest.mark.parametrize("spec", FED, ids=str)
def test_the_output_loses_less(spec: Spec) -> None:
    weight, statistics = drawn(100), seen()
    found = loss(weight, gptq(weight, spec, statistics), statistics)
    means = Statistics(statistics.tokens, statistics.mean_square)
    assert found < 0.7 * loss(weight, search(weight, spec, means), statistics)
    assert found < 0.6 * loss(weight, rtn(weight, spec), statistics)


@pytest.mark.parametrize("spec", FED, ids=str)
def test_outputs_stay_as_large_as_they_were(spec: Spec) -> None:
    """By the Hessian that quantization goes by, which is damped."""
    weight, statistics = drawn(60, dtype=np.float32), seen()
    curvature = Curvature.of(np.asarray(statistics.hessian), 32)
    assert curvature is not None
    real = weight[:, curvature.order].astype(np.float64)
    found = gptq(weight, spec, statistics).dequantize()[:, curvature.order].astype(np.float64)
    sizes = real @ curvature.hessian
    kept, whole = (sizes * found).sum(axis=1), (sizes * real).sum(axis=1)
    if spec.format.element is not None:  # one factor for the whole expert
        kept, whole = kept.sum(), whole.sum()
    np.testing.assert_allclose(kept / whole, 1, atol=2e-3)


@pytest.mark.parametrize("spec", FED, ids=str)
def test_columns_that_do_not_go_together_get_the_nearest_codes(spec: Spec) -> None:
    weight = drawn(50, dtype=np.float32)
    statistics = Statistics(1000, np.ones(COLUMNS, np.float32), np.eye(COLUMNS, dtype=np.float32))
    found = gptq(weight, spec, statistics)
    # Codes were chosen before the last factor, which is a few percent.
    off = np.abs(weight - found.dequantize())
    scales = np.abs(found.scales.astype(np.float32).reshape(50, -1))
    if found.global_scale is not None:
        scales = scales * found.global_scale
    steps = np.repeat(scales, COLUMNS // scales.shape[1], axis=1)
    codes = np.abs(found.dequantize() / np.where(steps, steps, 1))
    if spec.format.element is None:
        ends = np.isin(found.codes, [0, spec.format.max_code])
        assert (off <= steps * (0.501 + 0.15 * codes))[~ends].all()
    assert loss(weight, found, statistics) < 1.02 * loss(
        weight, search(weight, spec, Statistics(1000, statistics.mean_square)), statistics
    )


def test_the_rounding_is_the_best_there_is_where_all_can_be_tried() -> None:
    """Columns that go together: the nearest codes are not the best ones."""
    spec = Spec(FORMATS["int2"], 0, signed=False)
    hessian = np.full((4, 4), 0.9, np.float32) + 0.1 * np.eye(4, dtype=np.float32)
    statistics = Statistics(100, np.ones(4, np.float32), hessian)
    weight = np.array([[0.4, 0.4, 0.4, 0.4], [-2.0, 0.4, 0.4, 0.4]], np.float32)
    found = gptq(weight, spec, statistics)
    codes = np.array(np.meshgrid(*[range(4)] * 4)).reshape(4, -1).T - 2.0
    off = weight[1] - codes * float(found.scales[1])
    least = ((off @ hessian) * off).sum(axis=1).min()
    own = weight[1] - found.dequantize()[1]
    assert own @ hessian @ own <= least * 1.05
    nearest = weight[1] - rtn(weight, spec).dequantize()[1]
    assert own @ hessian @ own < 0.5 * (nearest @ hessian @ nearest)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_representable_weights_stay_exact(spec: Spec) -> None:
    once = rtn(drawn(dtype=np.float32), spec)
    weight = once.dequantize()
    exact = (rtn(weight, spec).dequantize() == weight).all(axis=1)
    assert exact.any()
    found = gptq(weight, spec, seen()).dequantize()
    np.testing.assert_allclose(found[exact], weight[exact], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("spec", [*SPECS, *FLOATS], ids=str)
def test_without_a_hessian_it_is_the_search(spec: Spec) -> None:
    weight, statistics = drawn(), seen()
    means = Statistics(statistics.tokens, statistics.mean_square)
    for known in (None, means):
        same_bytes(gptq(weight, spec, known), search(weight, spec, known))
    nothing = Statistics(9, means.mean_square, np.zeros((COLUMNS, COLUMNS), np.float32))
    same_bytes(gptq(weight, spec, nothing), search(weight, spec, nothing))
    if spec.format.square:
        same_bytes(gptq(weight, spec, statistics), search(weight, spec, statistics))


@pytest.mark.parametrize("spec", FED, ids=str)
def test_the_unit_of_the_inputs_does_not_matter(spec: Spec) -> None:
    weight, statistics = drawn(), seen()
    for power in (-60, 60):
        factor = np.float32(2.0**power)
        scaled = Statistics(
            1000, statistics.mean_square * factor, np.asarray(statistics.hessian) * factor
        )
        same_bytes(gptq(weight, spec, scaled), gptq(weight, spec, statistics))


@pytest.mark.parametrize("tokens", [1, 40])
def test_inputs_that_span_little_are_enough(tokens: int) -> None:
    """The Hessian is singular: it cannot be factored as it is."""
    weight, statistics, spec = drawn(), seen(tokens=tokens), Spec(FORMATS["int4"], 32)
    found = gptq(weight, spec, statistics)
    assert np.isfinite(found.dequantize()).all()
    means = Statistics(tokens, statistics.mean_square)
    assert loss(weight, found, statistics) < 0.3 * loss(
        weight, search(weight, spec, means), statistics
    )


def test_columns_that_were_never_seen_are_quantized_all_the_same() -> None:
    statistics, weight, spec = seen(), drawn(), Spec(FORMATS["int4"], 32)
    hessian = np.array(statistics.hessian)
    hessian[:, 7] = hessian[7] = 0
    hessian[:, 64:96] = hessian[64:96] = 0
    known = Statistics(1000, np.diagonal(hessian).copy(), hessian)
    off = np.abs(weight - gptq(weight, spec, known).dequantize())[:, [7, *range(64, 96)]]
    near = np.abs(weight - rtn(weight, spec).dequantize())[:, [7, *range(64, 96)]]
    assert np.square(off).mean() < 2 * np.square(near).mean()


def test_a_hessian_that_rounding_made_indefinite_is_damped_further() -> None:
    hessian = np.ones((64, 64), np.float32) - 2 * np.eye(64, dtype=np.float32)
    np.fill_diagonal(hessian, 1)
    hessian[0, 1] = hessian[1, 0] = -1
    statistics = Statistics(100, np.ones(64, np.float32), hessian)
    found = gptq(drawn(20, 64), Spec(FORMATS["int4"], 32), statistics)
    assert np.isfinite(found.dequantize()).all()


def test_a_hessian_whose_mean_is_no_float32_is_no_hessian() -> None:
    statistics, weight, spec = seen(), drawn(20), Spec(FORMATS["int4"], 32)
    hessian = np.zeros((COLUMNS, COLUMNS), np.float32)
    hessian[3, 3] = 1e-45
    least = Statistics(100, statistics.mean_square, hessian)
    same_bytes(gptq(weight, spec, least), search(weight, spec, least))


_RUN = """
import hashlib, sys, threading
import numpy as np
from threadpoolctl import threadpool_info
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantizers._blas import one_thread
from qmoe_rules.quantizers.gptq import gptq
from tests.test_gptq import drawn, seen

def threads():
    return [each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"]

found = [threads()]
inside, leave = threading.Event(), threading.Event()

def other():
    with one_thread():
        inside.set()
        leave.wait(60)

thread = threading.Thread(target=other)
with one_thread():
    thread.start()
    inside.wait(60)
found.append(threads())
leave.set()
thread.join()
found.append(threads())
parts = gptq(drawn(300, 512), Spec(FORMATS["int4"], 32), seen(512)).parts()
print(found, hashlib.sha256(b"".join(array.tobytes() for array in parts.values())).hexdigest())
"""


def test_the_blas_has_one_thread_meanwhile_and_the_bytes_are_the_same() -> None:
    said = {}
    for count in (1, 2):
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": str(count)}
        run = subprocess.run(
            [sys.executable, "-c", _RUN],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        said[count] = run.stdout.rsplit(maxsplit=1)
    before, _, after = ast.literal_eval(said[2][0])
    if set(before) != {2}:
        pytest.skip("needs two processors, and OpenBLAS")
    assert ast.literal_eval(said[2][0]) == [before, [1] * len(before), after]
    assert after == before  # not only when the first caller is done, but when the last one is
    assert said[1][1] == said[2][1]


@pytest.mark.parametrize("dtype", SCALE_DTYPES.values(), ids=list(SCALE_DTYPES))
def test_scales_of_the_greatest_weights_are_finite(dtype: np.dtype) -> None:
    end = ml_dtypes.finfo(dtype).max  # type: ignore[no-untyped-call]
    weight = np.full((20, COLUMNS), end, dtype)
    weight[:, ::3] = -weight[:, ::3]
    found = gptq(weight, Spec(FORMATS["int2"], 32), seen())
    assert np.isfinite(found.scales.astype(np.float32)).all()
    same_bytes(found, gptq_numpy(weight, Spec(FORMATS["int2"], 32), seen()))


def test_weights_that_are_not_finite_are_a_source_error() -> None:
    weight = drawn()
    weight[7, 9] = np.inf
    with pytest.raises(SourceError, match=r"^row 7 holds an infinity or a NaN$"):
        gptq(weight, Spec(FORMATS["int4"], 32), seen())


@pytest.mark.parametrize(
    ("hessian", "reason"),
    [
        (np.eye(128, dtype=np.float32), r"^hessian is \[128, 128\], where K=256$"),
        (np.full((256, 256), np.nan, np.float32), "^hessian holds an infinity or a NaN$"),
        (np.diag([-1, *[1] * 255]).astype(np.float32), "^hessian is negative somewhere on its dia"),
    ],
    ids=["size", "NaN", "negative"],
)
def test_statistics_that_do_not_fit_are_refused(hessian: Array, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        gptq(drawn(), Spec(FORMATS["int4"], 32), Statistics(9, np.ones(256, np.float32), hessian))
