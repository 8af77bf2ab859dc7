"""The tolerance of every kernel path, and the error that it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.providers import TARGETS
from qmoe_rules.testing import LayerDesign, ModelDesign, WeightDesign, build_model
from qmoe_rules.verification._execution import relative_error
from qmoe_rules.verification._tolerances import PROVIDERS, runs_on, tolerance_of
from tests.verifications import INT4, TINY, Draft, checked, converted, saved

EXECUTION = [("fp32", {"bits": 4}, 1e-6), ("fp32", {"bits": 8}, 1e-6), ("fp16", {"bits": 4}, 5e-4)]


@pytest.mark.parametrize(("model", "recipe", "limit"), EXECUTION)
def test_exact_paths_are_far_below_their_tolerance(
    model: str, recipe: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    report = checked(TINY[model], converted(TINY[model], tmp_path / "out", **recipe))
    assert all((node.execution_error or 1) < limit for node in report.nodes)


def test_what_a_type_holds_only_as_subnormals_is_no_error() -> None:
    half, zero = SCALE_DTYPES["float16"], np.zeros((2, 3))
    small = np.full((2, 3), 6e-5)
    assert relative_error(zero, small) == 1.0
    assert relative_error(zero, small, half) == 0.0
    assert relative_error(zero, 10 * small, half) == 1.0
    assert relative_error(np.full((2, 3), 1.055e-3), np.full((2, 3), 1e-3), half) > 0.05
    assert relative_error(np.full((2, 3), 1e-3), small, half) > 10
    assert relative_error(np.full((2, 3), np.nan), small, half) == float("inf")


def test_every_kernel_path_has_a_tolerance_below_any_layout_bug() -> None:
    for provider, target in PROVIDERS.items():
        for name, kernel in TARGETS[target].providers[0].kernels.items():
            for dtype in SCALE_DTYPES:
                for size in kernel.blocks:
                    for rescaled in (False, True):
                        spec = Spec(FORMATS[name], size)
                        row = tolerance_of(provider, spec, dtype, rescaled=rescaled)
                        assert 0 < row.error < 0.05


def test_a_lower_accuracy_level_has_its_own_tolerance(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    draft = Draft(after)
    draft.set(accuracy_level=4)
    draft.save()
    report = checked(TINY["fp32"], after)
    assert report.passed
    first, second = report.nodes
    assert (first.tolerance, second.tolerance) == (2.5e-2, 1e-5)
    assert (first.execution_error or 0) > 1e-3


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(
    ("scale", "tolerance", "least", "most"),
    [(1.0, 1e-5, 0.0, 1e-6), (2.0**-12, 1e-5, 0.0, 1e-6), (1.1, 2.5e-2, 1e-3, 2.5e-2)],
)
def test_the_cpu_rounds_global_scales(
    format: str, scale: float, tolerance: float, least: float, most: float, tmp_path: Path
) -> None:
    weights = WeightDesign(base="normal", seed=6)
    layer = LayerDesign(experts=2, k=2, activation="swiglu", form="interleaved", weights=weights)
    before = saved(build_model(ModelDesign(layers=(layer,), hidden=64)), tmp_path / "before")
    after = converted(before, tmp_path / "after", format=format, target="cpu")
    draft = Draft(after)
    for name in ("fc1", "fc2"):
        draft[f"l0_{name}_global_scale"] = np.full(2, scale, np.float32)
    draft.save()
    (node,) = checked(before, after).nodes  # whose weights may be far from the float ones
    assert node.tolerance == tolerance
    assert least <= (node.execution_error or 0.0) <= most


def test_what_cuda_hands_to_the_cpu_is_judged_as_the_cpu() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert [runs_on(cuda, dtype) for dtype in SCALE_DTYPES] == [cpu, cuda, cuda]
    assert [runs_on(cpu, dtype) for dtype in SCALE_DTYPES] == [cpu] * 3
