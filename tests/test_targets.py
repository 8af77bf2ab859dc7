"""Targets against what was measured of each provider: who takes what, and the reason if not."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from qmoe_rules.formats import FORMATS, Format, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import CPU, CUDA, TARGETS
from qmoe_rules.targets import Facts, Target

INT2, INT4, INT8 = Format("int2", 2), FORMATS["int4"], FORMATS["int8"]
# A node that every target takes; the tables below say what they change of it.
PLAIN = Facts(dtype="float16", activation="swiglu", fusion=1, hidden=128, inter=192)

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
SPECS = [
    Spec(code, block)
    for code in (INT2, INT4, INT8)
    for block in (0, 8, 16, 32, 48, 64, 128, 256, 512)
]


def changed(**fields: Any) -> Facts:
    return dataclasses.replace(PLAIN, **fields)


def refusal_of(target: Target, facts: Facts) -> str | None:
    """Returns the target's reason against a node that is stored as every target takes it."""
    return target.refuse(facts, Spec(INT4, 32), "raw")


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
        assert refusal_of(TARGETS[target], facts) == f"{reason}; target='cuda' takes it"


@pytest.mark.parametrize(("hidden", "inter"), [(96, 64), (64, 96), (32, 32)])
def test_cuda_wants_sizes_divisible_by_64_and_cpu_does_not(hidden: int, inter: int) -> None:
    facts = changed(hidden=hidden, inter=inter)
    reason = (
        "the CUDA provider needs hidden and inter sizes divisible by 64, and they are "
        f"{hidden} and {inter}; target='cpu' takes it"
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
        (changed(fusion=0), "the CUDA provider does not take swiglu_fusion=0 (it takes 1, 2)"),
        (
            changed(activation="geglu", fusion=0),
            "the CUDA provider does not take swiglu_fusion=0 (it takes 1, 2)",
        ),
        # CUDA for its sizes, CPU for its type: no target is left to suggest.
        (
            changed(dtype="bfloat16", hidden=96),
            "the CUDA provider needs hidden and inter sizes divisible by 64, and they are "
            "96 and 192",
        ),
    ],
)
def test_what_no_target_takes_comes_without_a_suggestion(facts: Facts, reason: str) -> None:
    assert refusal_of(TARGETS["cuda"], facts) == reason
    assert all("; target=" not in str(refusal_of(target, facts)) for target in TARGETS.values())
    assert None not in [refusal_of(target, facts) for target in TARGETS.values()]


def test_a_separate_gate_is_refused_by_cpu_too() -> None:
    reason = "the CPU provider does not take swiglu_fusion=0 (it takes 1)"
    assert refusal_of(TARGETS["cpu"], changed(fusion=0)) == reason
    assert refusal_of(TARGETS["portable"], changed(fusion=0)) == reason


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "identity"])
def test_activations_without_a_gate_need_no_fusion(activation: str) -> None:
    for target in TARGETS.values():
        assert refusal_of(target, changed(activation=activation, fusion=0)) is None


def test_portable_takes_exactly_what_cpu_and_cuda_both_take() -> None:
    portable = TARGETS["portable"]
    for facts in GRID:
        # float32 runs on the CPU, even in a session for CUDA.
        providers = (CPU,) if facts.dtype == "float32" else (CPU, CUDA)
        reasons = [reason for provider in providers if (reason := provider.refuse(facts))]
        refusal = refusal_of(portable, facts)
        assert (refusal is None) == (not reasons), facts
        if refusal:
            assert refusal.partition("; target=")[0] == reasons[0], facts
    assert sum(refusal_of(portable, facts) is None for facts in GRID) >= 10  # the grid says both
    for spec in SPECS:
        both = CPU.refuse_spec(spec) or CUDA.refuse_spec(spec)
        assert portable.refuse_spec(spec) == both, spec
    for layout in LAYOUTS:
        both = CPU.refuse_layout(layout) or CUDA.refuse_layout(layout)
        assert portable.refuse_layout(layout) == both, layout


@pytest.mark.parametrize("name", TARGETS)
def test_a_suggested_target_takes_the_node_and_none_is_left_out(name: str) -> None:
    for facts in GRID:
        refusal = refusal_of(TARGETS[name], facts)
        if refusal is None:
            continue
        takers = {f"target={other!r} takes it" for other in TARGETS if not _refused(other, facts)}
        suggestion = refusal.partition("; ")[2]
        assert suggestion in takers if takers else not suggestion, facts


def _refused(target: str, facts: Facts) -> bool:
    if target == "portable" and facts.dtype == "float32":
        target = "cpu"
    return any(provider.refuse(facts) for provider in TARGETS[target].providers)


@pytest.mark.parametrize("code", [INT4, INT8], ids=str)
@pytest.mark.parametrize(
    ("target", "blocks"),
    [
        ("cpu", {0, 16, 32, 64, 128, 256}),
        ("cuda", {0, 32, 64, 128, 256}),
        ("portable", {0, 32, 64, 128, 256}),
    ],
)
def test_block_sizes_that_a_target_takes(target: str, blocks: set[int], code: Format) -> None:
    taken = {size for size in range(513) if not TARGETS[target].refuse_spec(Spec(code, size))}
    assert taken == blocks


@pytest.mark.parametrize(
    ("target", "spec", "reason"),
    [
        (
            "cuda",
            Spec(INT4, 16),
            "the CUDA provider does not take block_size=16 with int4 "
            "(it takes 0, 32, 64, 128, 256)",
        ),
        (
            "portable",
            Spec(INT8, 16),
            "the CUDA provider does not take block_size=16 with int8 "
            "(it takes 0, 32, 64, 128, 256)",
        ),
        (
            "cpu",
            Spec(INT8, 512),
            "the CPU provider does not take block_size=512 with int8 "
            "(it takes 0, 16, 32, 64, 128, 256)",
        ),
        ("cpu", Spec(INT2, 32), "the CPU provider has no kernel for int2"),
        ("cuda", Spec(INT2), "the CUDA provider has no kernel for int2"),
    ],
)
def test_storage_without_a_kernel_is_refused_with_the_reason(
    target: str, spec: Spec, reason: str
) -> None:
    assert TARGETS[target].refuse_spec(spec) == reason


@pytest.mark.parametrize(
    ("target", "layout", "reason"),
    [
        ("cpu", "raw", None),
        ("cuda", "raw", None),
        ("portable", "raw", None),
        ("cuda", "cutlass_sm80", None),
        ("cpu", "cutlass_sm80", "the CPU provider misreads layout 'cutlass_sm80' (it reads raw)"),
        (
            "portable",
            "cutlass_sm80",
            "the CPU provider misreads layout 'cutlass_sm80' (it reads raw)",
        ),
        (
            "cuda",
            "cutlass_sm90",
            "the CUDA provider misreads layout 'cutlass_sm90' (it reads cutlass_sm80, raw)",
        ),
    ],
)
def test_layouts_that_would_be_misread_are_refused(
    target: str, layout: str, reason: str | None
) -> None:
    assert TARGETS[target].refuse_layout(layout) == reason


@pytest.mark.parametrize(("target", "reads"), [("cpu", False), ("cuda", True), ("portable", False)])
def test_only_cuda_reads_normalize_routing_weights_by_itself(target: str, reads: bool) -> None:
    assert TARGETS[target].reads_normalize is reads


@pytest.mark.parametrize("target", TARGETS)
def test_only_blockwise_int8_on_cpu_is_less_exact_than_its_weights(target: str) -> None:
    warned = {
        str(spec): TARGETS[target].warnings(PLAIN, spec) for spec in SPECS if spec.format != INT2
    }
    coarse = "the CPU provider rounds activations to int8 with blockwise int8, 1 to 2 % off"
    for spec, warnings in warned.items():
        expected = (coarse,) if target != "cuda" and spec.startswith("int8 block") else ()
        assert warnings == expected, spec


def test_a_target_is_known_by_its_own_name_and_providers() -> None:
    assert {name: target.providers for name, target in TARGETS.items()} == {
        "portable": (CPU, CUDA),
        "cpu": (CPU,),
        "cuda": (CUDA,),
    }
    assert all(target.name == name for name, target in TARGETS.items())


def test_a_target_that_would_not_store_the_node_so_is_not_suggested() -> None:
    facts = changed(fusion=2)
    assert "target='cuda'" in str(TARGETS["cpu"].refuse(facts, Spec(INT4, 32), "raw"))
    assert "target=" not in str(TARGETS["cpu"].refuse(facts, Spec(INT4, 16), "raw"))


@pytest.mark.parametrize("target", TARGETS)
def test_a_fusion_without_a_gate_reads_out_of_bounds_and_is_refused(target: str) -> None:
    assert "has no gate to fuse" in str(refusal_of(TARGETS[target], changed(activation="silu")))


@pytest.mark.parametrize("target", TARGETS)
def test_the_sparse_mixer_is_computed_by_none(target: str) -> None:
    refusal = refusal_of(TARGETS[target], changed(sparse_mixer=True))
    assert "ignores use_sparse_mixer=1 and would route differently" in str(refusal)


def test_float32_runs_on_the_cpu_in_a_session_for_cuda() -> None:
    facts, spec = changed(dtype="float32"), Spec(INT4, 32)
    refusal = "the CUDA provider has no float32 kernel (it has bfloat16, float16)"
    assert TARGETS["cuda"].refuse(facts, spec, "cutlass_sm80") == refusal
    assert TARGETS["cuda"].refuse(facts, spec, "raw") == f"{refusal}; target='portable' takes it"
    assert TARGETS["portable"].refuse(facts, spec, "raw") is None
    assert TARGETS["portable"].warnings(facts, spec) == (
        "the CUDA provider has no float32 kernel: ONNX Runtime runs such nodes on the CPU",
    )


def test_geglu_is_told_to_need_a_newer_runtime() -> None:
    (warning,) = TARGETS["cuda"].warnings(changed(activation="geglu"), Spec(INT4, 32))
    assert warning == "the CUDA provider loads geglu from ONNX Runtime 1.32 on"
