"""Which formats, blocks and layouts a target takes, and the reason if not."""

from __future__ import annotations

import itertools

import pytest

from qmoe_rules.formats import FORMATS
from qmoe_rules.kernels import Specs
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import CPU, CUDA, TARGETS, TRT_RTX, WEBGPU
from tests.target_facts import specs_of

PROVIDERS = {"cpu": CPU, "cuda": CUDA, "webgpu": WEBGPU, "trt-rtx": TRT_RTX}


@pytest.mark.parametrize(
    ("target", "format", "blocks", "with_zero_points"),
    [
        ("cpu", "int2", {0, 16, 32, 64, 128, 256}, {0, 16, 32, 64, 128, 256}),
        ("cpu", "int3", {32, 64, 128}, set()),
        ("cpu", "int4", {0, 16, 32, 64, 128, 256}, {0, 16, 32, 64, 128, 256}),
        ("cpu", "int8", {0, 16, 32, 64, 128, 256}, {0, 16, 32, 64, 128, 256}),
        ("cpu", "mxfp4", {32}, set()),
        ("cpu", "nvfp4", {16}, set()),
        ("cpu", "fp8", set(), set()),
        ("cuda", "int2", {16, 32, 64, 128, 256}, {32, 64, 128, 256}),
        ("cuda", "int3", set(), set()),
        ("cuda", "int4", {0, 32, 64, 128, 256}, {32, 64, 128, 256}),
        ("cuda", "int8", {0, 32, 64, 128, 256}, {32, 64, 128, 256}),
        ("cuda", "mxfp4", {32}, set()),
        ("cuda", "nvfp4", {16}, set()),
        ("cuda", "fp8", set(), set()),
        ("webgpu", "int2", set(), set()),
        ("webgpu", "int3", set(), set()),
        ("webgpu", "int4", {0, 16, 32, 64, 128, 256}, set()),
        ("webgpu", "int8", {0, 16, 32, 64, 128, 256}, set()),
        ("webgpu", "mxfp4", set(), set()),
        ("webgpu", "nvfp4", set(), set()),
        ("webgpu", "fp8", {128}, set()),
        ("trt-rtx", "int2", set(), set()),
        ("trt-rtx", "int3", set(), set()),
        ("trt-rtx", "int4", {128}, set()),
        ("trt-rtx", "int8", set(), set()),
        ("trt-rtx", "mxfp4", set(), set()),
        ("trt-rtx", "nvfp4", set(), set()),
        ("trt-rtx", "fp8", set(), set()),
    ],
)
def test_block_sizes_that_a_provider_takes(
    target: str, format: str, blocks: set[int], with_zero_points: set[int]
) -> None:
    for symmetric, expected in ((True, blocks), (False, with_zero_points)):
        taken = {
            size
            for size in range(513)
            if not PROVIDERS[target].refuse_specs(specs_of(format, size, symmetric=symmetric))
        }
        assert taken == expected


def test_the_formats_that_may_differ_between_fc1_and_fc2() -> None:
    mixed = {
        (name, fc1, fc2)
        for name, provider in PROVIDERS.items()
        for fc1, fc2 in itertools.permutations(FORMATS, 2)
        if not provider.refuse_specs(specs_of(fc1, 128, fc2=fc2))
    }
    assert mixed == {
        ("cuda", fc1, fc2) for fc1, fc2 in itertools.permutations(("int2", "int4", "int8"), 2)
    }


@pytest.mark.parametrize(
    ("target", "specs", "reason"),
    [
        (
            "cuda",
            specs_of("int4", 16),
            "the CUDA provider does not take block_size=16 with int4 "
            "(it takes 0, 32, 64, 128, 256)",
        ),
        (
            "portable",
            specs_of("int8", 16),
            "the CUDA provider does not take block_size=16 with int8 "
            "(it takes 0, 32, 64, 128, 256)",
        ),
        (
            "cpu",
            specs_of("int8", 512),
            "the CPU provider does not take block_size=512 with int8 "
            "(it takes 0, 16, 32, 64, 128, 256)",
        ),
        ("portable", specs_of("int3", 32), "the CUDA provider has no kernel for int3"),
        ("cpu", specs_of("fp8", 128), "the CPU provider has no kernel for fp8"),
        (
            "cuda",
            specs_of("int4", symmetric=False),
            "the CUDA provider takes no zero points with int4 and block_size=0 "
            "(it does with 32, 64, 128, 256)",
        ),
        (
            "cpu",
            specs_of("int3", 64, symmetric=False),
            "the CPU provider takes no zero points with int3",
        ),
        (
            "webgpu",
            specs_of("int4", 32, symmetric=False),
            "the WebGPU provider takes no zero points with int4",
        ),
        (
            "cpu",
            specs_of("int4", 32, fc2="int8"),
            "the CPU provider does not take int4 in fc1 and int8 in fc2",
        ),
        (
            "webgpu",
            specs_of("int8", 32, fc2="int4"),
            "the WebGPU provider does not take int8 in fc1 and int4 in fc2",
        ),
        # fc2 is asked about as fc1 is.
        ("webgpu", specs_of("int4", 32, fc2="int2"), "the WebGPU provider has no kernel for int2"),
    ],
)
def test_storage_without_a_kernel_is_refused_with_the_reason(
    target: str, specs: Specs, reason: str
) -> None:
    assert TARGETS[target].refuse_storage(specs, "raw") == reason


@pytest.mark.parametrize(
    ("target", "specs", "read"),
    [
        ("cpu", specs_of("int4"), {"raw"}),
        ("cpu", specs_of("int2", 32), {"raw"}),
        ("cpu", specs_of("mxfp4", 32), {"k_packed"}),
        ("cuda", specs_of("int4"), {"raw", "cutlass_sm80"}),
        ("cuda", specs_of("int8", 64), {"raw", "cutlass_sm80"}),
        ("cuda", specs_of("int2", 64), {"raw"}),
        ("cuda", specs_of("int4", 64, fc2="int8"), {"raw"}),
        ("cuda", specs_of("nvfp4", 16), {"n_packed"}),
        ("portable", specs_of("int8"), {"raw"}),
        ("portable", specs_of("mxfp4", 32), set()),
        ("webgpu", specs_of("int4"), {"raw"}),
        ("webgpu", specs_of("fp8", 128), {"raw"}),
        ("trt-rtx", specs_of("int4", 128), {"raw"}),
    ],
)
def test_layouts_that_a_target_reads(target: str, specs: Specs, read: set[str]) -> None:
    found = {layout for layout in LAYOUTS if not TARGETS[target].refuse_storage(specs, layout)}
    assert found == read


@pytest.mark.parametrize(
    ("target", "specs", "layout", "reason"),
    [
        (
            "cpu",
            specs_of("int4"),
            "cutlass_sm80",
            "the CPU provider misreads layout 'cutlass_sm80' (it reads raw)",
        ),
        (
            "portable",
            specs_of("int4"),
            "cutlass_sm80",
            "the CPU provider misreads layout 'cutlass_sm80' (it reads raw)",
        ),
        (
            "cuda",
            specs_of("int4"),
            "cutlass_sm90",
            "the CUDA provider misreads layout 'cutlass_sm90' (it reads cutlass_sm80, raw)",
        ),
        (
            "cuda",
            specs_of("int8", 32, fc2="int4"),
            "cutlass_sm80",
            "the CUDA provider misreads layout 'cutlass_sm80' (it reads raw)",
        ),
        (
            "cpu",
            specs_of("nvfp4", 16),
            "n_packed",
            "the CPU provider misreads layout 'n_packed' (it reads k_packed)",
        ),
    ],
)
def test_layouts_that_would_be_misread_are_refused(
    target: str, specs: Specs, layout: str, reason: str
) -> None:
    assert TARGETS[target].refuse_storage(specs, layout) == reason
