"""Which nodes a target takes, as was measured of each provider, and the reason if not."""

from __future__ import annotations

import itertools

import pytest

from qmoe_rules.kernels import Facts, Specs
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import CPU, CUDA, TARGETS
from qmoe_rules.targets import Target
from tests.target_facts import INT4_128, PLAIN, SPECS, both, changed, specs_of

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
