"""Targets against what was measured of each provider: who takes what, and the reason if not."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import Facts, Specs
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import CPU, CUDA, TARGETS, TRT_RTX, WEBGPU
from qmoe_rules.targets import Target

# A node that every target takes; the tables below say what they change of it.
PLAIN = Facts(dtype="float16", activation="swiglu", fusion=1, hidden=128, inter=192)
PROVIDERS = {"cpu": CPU, "cuda": CUDA, "webgpu": WEBGPU, "trt-rtx": TRT_RTX}

GRID = [
    Facts(*values)
    for values in itertools.product(
        ("float32", "float16", "bfloat16", "float64"),
        ("relu", "gelu", "silu", "identity", "swiglu", "geglu", "relu2"),
        (0, 1, 2),
        (64, 96),
        (128, 100),
        (False, True),
        (False, True),
    )
]
BLOCKS = (0, 8, 16, 32, 48, 64, 128, 256, 512)
SPECS = [
    Spec(format, block, symmetric)
    for format in FORMATS.values()
    for block in BLOCKS
    for symmetric in (True, False)
    if symmetric or format.element is None
]


def specs_of(fc1: str, block: int = 0, *, fc2: str | None = None, symmetric: bool = True) -> Specs:
    """Both projections in one way, but for the format of fc2."""
    return {
        name: Spec(FORMATS[format], block, symmetric)
        for name, format in (("fc1", fc1), ("fc2", fc2 or fc1))
    }


def both(spec: Spec) -> Specs:
    return {"fc1": spec, "fc2": spec}


INT4_128 = specs_of("int4", 128)


def changed(**fields: Any) -> Facts:
    return dataclasses.replace(PLAIN, **fields)


def refusal_of(target: Target, facts: Facts) -> str | None:
    """Returns the target's reason against a node that is stored as every target takes it."""
    assert target.refuse_storage(INT4_128, "raw") is None
    return target.refuse(facts, INT4_128)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_a_plain_node(target: str) -> None:
    assert refusal_of(TARGETS[target], PLAIN) is None


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            changed(dtype="bfloat16"),
            "the CPU provider has no bfloat16 kernel (it has float16, float32)",
        ),
        (
            changed(activation="geglu"),
            "the CPU provider has no kernel for activation 'geglu' "
            "(it has gelu, identity, relu, silu, swiglu)",
        ),
        (changed(fusion=2), "the CPU provider does not take swiglu_fusion=2 (it takes 1)"),
        (
            changed(limit_after_activation=True),
            "the CPU provider does not honour swiglu_limit_after_activation=1",
        ),
        # Several at once: the type comes first.
        (
            changed(dtype="bfloat16", activation="geglu", fusion=2),
            "the CPU provider has no bfloat16 kernel (it has float16, float32)",
        ),
    ],
)
def test_what_cpu_refuses_and_cuda_takes(facts: Facts, reason: str) -> None:
    assert refusal_of(TARGETS["cuda"], facts) is None
    for target in ("cpu", "portable"):
        assert refusal_of(TARGETS[target], facts) == reason


@pytest.mark.parametrize(("hidden", "inter"), [(96, 64), (64, 96), (32, 32)])
def test_cuda_wants_sizes_divisible_by_64_and_cpu_does_not(hidden: int, inter: int) -> None:
    facts = changed(hidden=hidden, inter=inter)
    reason = (
        "the CUDA provider needs hidden and inter sizes divisible by 64, and they are "
        f"{hidden} and {inter}"
    )
    assert refusal_of(TARGETS["cpu"], facts) is None
    assert refusal_of(TARGETS["cuda"], facts) == refusal_of(TARGETS["portable"], facts) == reason


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            changed(dtype="float64"),
            "the CUDA provider has no float64 kernel (it has bfloat16, float16)",
        ),
        (
            changed(activation="tanh"),
            "the CUDA provider has no kernel for activation 'tanh' "
            "(it has geglu, gelu, identity, relu, silu, swiglu)",
        ),
        (
            changed(fusion=0),
            "the CUDA provider is not known to honour swiglu_fusion=0 without fc3",
        ),
        (
            changed(activation="geglu", fusion=0),
            "the CUDA provider does not take swiglu_fusion=0 (it takes 1, 2)",
        ),
        # CUDA for its sizes, CPU for its type.
        (
            changed(dtype="bfloat16", hidden=96),
            "the CUDA provider needs hidden and inter sizes divisible by 64, and they are "
            "96 and 192",
        ),
    ],
)
def test_what_neither_cuda_nor_cpu_takes(facts: Facts, reason: str) -> None:
    assert refusal_of(TARGETS["cuda"], facts) == reason
    assert refusal_of(TARGETS["cpu"], facts) is not None
    assert refusal_of(TARGETS["portable"], facts) is not None


def test_a_separate_gate_is_refused_by_cpu_too() -> None:
    reason = "the CPU provider does not take swiglu_fusion=0 (it takes 1)"
    assert refusal_of(TARGETS["cpu"], changed(fusion=0)) == reason
    assert refusal_of(TARGETS["portable"], changed(fusion=0)) == reason


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
@pytest.mark.parametrize("target", ["cpu", "cuda", "portable", "webgpu"])
def test_activations_without_a_gate_need_no_fusion(target: str, activation: str) -> None:
    assert refusal_of(TARGETS[target], changed(activation=activation, fusion=0)) is None


def test_portable_takes_exactly_what_cpu_and_cuda_both_take() -> None:
    portable = TARGETS["portable"]
    for facts in GRID:
        # float32 runs on the CPU, even in a session for CUDA.
        providers = (CPU,) if facts.dtype == "float32" else (CPU, CUDA)
        reasons = [reason for each in providers if (reason := each.refuse(facts, INT4_128))]
        assert refusal_of(portable, facts) == (reasons[0] if reasons else None), facts
    assert sum(refusal_of(portable, facts) is None for facts in GRID) >= 10  # the grid says both
    taken = 0
    for spec, layout in itertools.product(SPECS, LAYOUTS):
        stored = both(spec)
        reason = CPU.refuse_specs(stored) or CUDA.refuse_specs(stored)
        reason = reason or CPU.refuse_layout(layout, stored) or CUDA.refuse_layout(layout, stored)
        assert portable.refuse_storage(stored, layout) == reason, spec
        taken += reason is None
    assert taken >= 10


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


def test_what_a_node_must_say_for_a_target() -> None:
    said = {
        name: (
            target.reads_normalize(specs_of("int4", 32)),
            target.reads_prepacked,
            target.wants_limit,
        )
        for name, target in TARGETS.items()
    }
    assert said == {
        "portable": (False, True, False),
        "cpu": (False, True, False),
        "cuda": (True, True, False),
        "webgpu": (False, True, False),
        "trt-rtx": (False, False, True),
    }


def test_the_cpu_routes_its_packed_formats_as_the_node_says() -> None:
    honoured = {
        format
        for format, block in (("int4", 32), ("int3", 32), ("mxfp4", 32), ("nvfp4", 16))
        if TARGETS["cpu"].reads_normalize(specs_of(format, block))
    }
    assert honoured == {"int3", "mxfp4", "nvfp4"}


def test_who_takes_no_negative_scales() -> None:
    refused = {
        (target, format)
        for target, format in itertools.product(TARGETS, FORMATS)
        if not TARGETS[target].signed(format)
    }
    assert refused == {("cpu", "int3"), ("portable", "int3"), ("trt-rtx", "int4")}


COARSE = {
    "int2": "the CPU provider looks int2 products up in tables, up to 2 % off",
    "int8": "the CPU provider rounds activations to int8 with blockwise int8, 1 to 2 % off",
}


@pytest.mark.parametrize("target", ["cpu", "cuda", "portable"])
def test_what_is_less_exact_than_its_weights_is_said(target: str) -> None:
    for spec in SPECS:
        if TARGETS[target].refuse_storage(both(spec), "raw"):
            continue
        coarse = target != "cuda" and spec.block_size >= (32 if spec.format.bits == 2 else 16)
        warnings = {COARSE[spec.format.name]} if coarse and spec.format.name in COARSE else set()
        found = TARGETS[target].warnings(PLAIN, both(spec))
        assert {each for each in found if " off" in each} == warnings, spec


@pytest.mark.parametrize(
    ("target", "facts", "specs", "warnings"),
    [
        ("portable", PLAIN, specs_of("int4", 32), ()),
        ("cuda", PLAIN, specs_of("int2", 32, fc2="int8"), ()),
        (
            "cpu",
            PLAIN,
            specs_of("int3", 32),
            ("the CPU provider loads int3 from ONNX Runtime 1.32 on",),
        ),
        (
            "cpu",
            PLAIN,
            specs_of("mxfp4", 32),
            ("the CPU provider loads mxfp4 from ONNX Runtime 1.32 on",),
        ),
        (
            "portable",
            changed(dtype="float32"),
            specs_of("int8", 32),
            (
                COARSE["int8"],
                "the CUDA provider has no float32 kernel: ONNX Runtime runs such nodes on the CPU",
            ),
        ),
        (
            "cuda",
            changed(activation="geglu"),
            specs_of("int4", 32),
            ("the CUDA provider loads geglu from ONNX Runtime 1.32 on",),
        ),
        (
            "webgpu",
            PLAIN,
            specs_of("int4", 32),
            (
                "the WebGPU provider: read in the source of onnxruntime 1.32; not measured",
                "the WebGPU provider loads int4 from ONNX Runtime 1.31 on",
            ),
        ),
        (
            "trt-rtx",
            PLAIN,
            specs_of("int4", 128),
            (
                "the TensorRT-RTX provider: as onnxruntime-genai 0.18 writes for it; version "
                "2.0.0.40 was reported wrong; not measured",
            ),
        ),
    ],
)
def test_what_the_owner_of_a_node_is_told(
    target: str, facts: Facts, specs: Specs, warnings: tuple[str, ...]
) -> None:
    assert TARGETS[target].warnings(facts, specs) == warnings


def test_a_target_is_known_by_its_own_name_and_providers() -> None:
    assert {name: target.providers for name, target in TARGETS.items()} == {
        "portable": (CPU, CUDA),
        "cpu": (CPU,),
        "cuda": (CUDA,),
        "webgpu": (WEBGPU,),
        "trt-rtx": (TRT_RTX,),
    }
    assert all(target.name == name for name, target in TARGETS.items())


@pytest.mark.parametrize("target", ["portable", "cpu", "cuda", "webgpu"])
def test_a_fusion_without_a_gate_reads_out_of_bounds_and_is_refused(target: str) -> None:
    refusal = refusal_of(TARGETS[target], changed(activation="silu"))
    provider = TARGETS[target].providers[0].name
    reason = f"{provider} has no gate to fuse with activation 'silu' and swiglu_fusion=1"
    assert refusal == reason


@pytest.mark.parametrize("target", TARGETS)
def test_the_sparse_mixer_is_computed_by_none(target: str) -> None:
    refusal = refusal_of(TARGETS[target], changed(sparse_mixer=True))
    assert "use_sparse_mixer=1" in str(refusal)


def test_float32_runs_on_the_cpu_in_a_session_for_cuda() -> None:
    facts = changed(dtype="float32")
    refusal = "the CUDA provider has no float32 kernel (it has bfloat16, float16)"
    assert refusal_of(TARGETS["cuda"], facts) == refusal
    assert refusal_of(TARGETS["portable"], facts) is None


# Kernels of their own.


@pytest.mark.parametrize(
    ("target", "specs", "facts", "reason"),
    [
        ("cpu", specs_of("int3", 32), PLAIN, None),
        ("cpu", specs_of("int3", 32), changed(dtype="bfloat16"), None),
        (
            "cpu",
            specs_of("int3", 32),
            changed(dtype="float32"),
            "the CPU provider has no float32 int3 kernel (it has bfloat16, float16)",
        ),
        (
            "cpu",
            specs_of("int3", 32),
            changed(activation="silu", fusion=0),
            "the CPU provider has no int3 kernel for activation 'silu' (it has swiglu)",
        ),
        ("cpu", specs_of("nvfp4", 16), changed(dtype="bfloat16"), None),
        (
            "cpu",
            specs_of("nvfp4", 16),
            changed(hidden=80),
            "the CPU provider needs hidden and inter sizes divisible by 32, and they are 80 and "
            "192",
        ),
        (
            "cpu",
            specs_of("mxfp4", 32),
            changed(dtype="float64"),
            "the CPU provider has no float64 mxfp4 kernel (it has bfloat16, float16, float32)",
        ),
        (
            "cuda",
            specs_of("mxfp4", 32),
            changed(activation="geglu"),
            "the CUDA provider has no mxfp4 kernel for activation 'geglu' "
            "(it has gelu, identity, relu, silu, swiglu)",
        ),
        (
            "cuda",
            specs_of("mxfp4", 32),
            changed(hidden=96),
            "the CUDA provider needs hidden and inter sizes divisible by 64, and they are 96 and "
            "192",
        ),
        ("cuda", specs_of("nvfp4", 16), changed(hidden=80), None),
        ("webgpu", specs_of("fp8", 128), changed(fusion=2), None),
        (
            "webgpu",
            specs_of("fp8", 128),
            changed(dtype="bfloat16"),
            "the WebGPU provider has no bfloat16 fp8 kernel (it has float16, float32)",
        ),
        (
            "trt-rtx",
            INT4_128,
            changed(dtype="float32"),
            "the TensorRT-RTX provider has no float32 kernel (it has bfloat16, float16)",
        ),
        (
            "trt-rtx",
            INT4_128,
            changed(activation="silu", fusion=0),
            "the TensorRT-RTX provider has no kernel for activation 'silu' (it has swiglu)",
        ),
    ],
)
def test_what_a_kernel_of_one_format_takes(
    target: str, specs: Specs, facts: Facts, reason: str | None
) -> None:
    assert TARGETS[target].refuse(facts, specs) == reason


@pytest.mark.parametrize(
    ("hidden", "inter", "reason"),
    [
        (128, 256, None),
        (192, 128, "K=192 has 3 of block_size=64"),  # fc1's
        (128, 192, "K=192 has 3 of block_size=64"),  # fc2's
        (64, 64, "K=64 has 1 of block_size=64"),
    ],
)
@pytest.mark.parametrize("target", ["cuda", "portable"])
def test_cuda_misreads_int4_zero_points_of_an_odd_number_of_blocks(
    target: str, hidden: int, inter: int, reason: str | None
) -> None:
    facts = changed(hidden=hidden, inter=inter)
    misread = "the CUDA provider misreads the zero points of an odd number of blocks, and "
    refusal = TARGETS[target].refuse(facts, specs_of("int4", 64, symmetric=False))
    assert refusal == (f"{misread}{reason}" if reason else None)
    for format in ("int2", "int8"):
        assert TARGETS[target].refuse(facts, specs_of(format, 64, symmetric=False)) is None
    assert TARGETS[target].refuse(facts, specs_of("int4", 64)) is None
    assert TARGETS["cpu"].refuse(facts, specs_of("int4", 64, symmetric=False)) is None


@pytest.mark.parametrize(("fc1", "fc2"), [("int4", "int8"), ("int8", "int4"), ("int4", "int2")])
def test_cuda_reads_the_zero_points_of_mixed_widths_by_another_kernel(fc1: str, fc2: str) -> None:
    specs = specs_of(fc1, 64, fc2=fc2, symmetric=False)
    assert TARGETS["cuda"].refuse(changed(hidden=192, inter=64), specs) is None


@pytest.mark.parametrize(
    ("activation", "fusion", "rows"), [("swiglu", 1, 384), ("geglu", 2, 384), ("silu", 0, 192)]
)
def test_the_shapes_of_the_projections(activation: str, fusion: int, rows: int) -> None:
    facts = changed(activation=activation, fusion=fusion)
    assert facts.shapes == {"fc1": (rows, 128), "fc2": (128, 192)}
