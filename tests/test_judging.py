"""What targets make of nodes that are there, and how it is said where several things meet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import GARBAGE, REFUSED, UNKNOWN, Facts, Fault, Stored
from qmoe_rules.providers import CPU, CUDA, TARGETS, TRT_RTX, WEBGPU
from qmoe_rules.targets import Provider, Target

PLAIN = Facts(dtype="float16", activation="swiglu", fusion=1, hidden=128, inter=192)
RAW, SM80 = frozenset({"raw"}), frozenset({"cutlass_sm80"})


def stored(
    format: str = "int4",
    block: int = 32,
    prepacked: int = 0,
    layouts: frozenset[str] = RAW,
    *,
    fc2: str | None = None,
    symmetric: bool = True,
) -> Stored:
    specs = {
        name: Spec(FORMATS[each], block, symmetric)
        for name, each in (("fc1", format), ("fc2", fc2 or format))
    }
    return Stored(specs, prepacked, layouts)


@pytest.mark.parametrize("provider", [CPU, CUDA, WEBGPU], ids=lambda each: each.name)
def test_a_plain_node_is_right(provider: Provider) -> None:
    assert provider.judge(PLAIN, stored()) is None
    assert provider.judge(replace(PLAIN, fusion=1), None) is None


PACKED = "the CPU provider takes the bytes for raw ones, as weights_prepacked=1; "


@pytest.mark.parametrize(
    ("provider", "facts", "node", "fault"),
    [
        # What is wrong with every node stored so.
        (
            CPU,
            PLAIN,
            stored("fp8", 128),
            Fault(REFUSED, "the CPU provider has no kernel for fp8", "storage"),
        ),
        (
            CPU,
            PLAIN,
            stored("int4", fc2="int8"),
            Fault(REFUSED, "the CPU provider does not take int4 in fc1 and int8 in fc2", "storage"),
        ),
        (CUDA, PLAIN, stored("int4", fc2="int8"), None),
        # Who it is handed to has no such kernel, though its kernel of floats takes the node.
        (
            CUDA,
            replace(PLAIN, dtype="float32"),
            stored("fp8", 128),
            Fault(REFUSED, "the CPU provider has no kernel for fp8", "storage"),
        ),
        # With the node, whose K is 128 in fc1 and 192 in fc2.
        (
            CPU,
            replace(PLAIN, dtype="bfloat16"),
            stored(),
            Fault(
                REFUSED, "the CPU provider has no bfloat16 kernel (it has float16, float32)", "type"
            ),
        ),
        (
            CUDA,
            PLAIN,
            stored(block=64, symmetric=False),
            Fault(
                GARBAGE,
                "the CUDA provider misreads the zero points of an odd number of blocks, and K=192 "
                "has 3 of block_size=64",
                "storage",
            ),
        ),
        (
            WEBGPU,
            PLAIN,
            stored(block=128),
            Fault(
                REFUSED,
                "the WebGPU provider wants whole blocks, and K=192 with block_size=128",
                "storage",
            ),
        ),
        (
            CUDA,
            replace(PLAIN, sparse_mixer=True),
            stored(),
            Fault(
                GARBAGE,
                "the CUDA provider ignores use_sparse_mixer=1 and would route differently",
                "sparse_mixer",
            ),
        ),
        (
            WEBGPU,
            replace(PLAIN, scales=frozenset({"float32"})),
            stored(),
            Fault(
                UNKNOWN,
                "the WebGPU provider is not known to honour scales of another type than the "
                "input's",
                "scale_type",
            ),
        ),
        (WEBGPU, replace(PLAIN, scales=frozenset({"float32"})), stored("fp8", 128), None),
        # With the order of the bytes.
        (
            CUDA,
            PLAIN,
            stored(prepacked=1),
            Fault(
                GARBAGE,
                "the CUDA provider takes the bytes for cutlass_sm80 ones, as weights_prepacked=1; "
                "their shape says raw",
                "layout",
            ),
        ),
        (CUDA, PLAIN, stored(prepacked=1, layouts=SM80), None),
        # Of several faults: what is refused computes nothing, so it is no garbage.
        (
            CUDA,
            replace(PLAIN, sparse_mixer=True, activation="tanh", fusion=0),
            stored(),
            Fault(
                REFUSED,
                "the CUDA provider has no kernel for activation 'tanh' "
                "(it has geglu, gelu, identity, relu, silu, swiglu)",
                "activation",
            ),
        ),
        # A type that another provider is handed.
        (CUDA, replace(PLAIN, dtype="float32"), stored(), None),
        (
            CUDA,
            replace(PLAIN, dtype="float32", sparse_mixer=True),
            stored(),
            Fault(
                GARBAGE,
                "the CPU provider ignores use_sparse_mixer=1 and would route differently",
                "sparse_mixer",
            ),
        ),
        # A provider that nobody has seen refusing anything.
        (TRT_RTX, replace(PLAIN, inter=256), stored(block=128, prepacked=-1), None),
        (
            TRT_RTX,
            replace(PLAIN, inter=256, limited=False),
            stored(block=128, prepacked=-1),
            Fault(
                UNKNOWN,
                "the TensorRT-RTX provider wants swiglu_limit to be present, as far as is known",
                "swiglu_limit",
            ),
        ),
        # Versions that differ.
        (
            CPU,
            PLAIN,
            stored(prepacked=1),
            Fault(
                UNKNOWN,
                "before ONNX Runtime 1.32, it is right; from then on, the CPU provider takes the "
                "bytes for cutlass_sm80 ones, as weights_prepacked=1; their shape says raw",
                "layout",
            ),
        ),
        (
            CPU,
            PLAIN,
            stored(prepacked=1, layouts=SM80),
            Fault(
                UNKNOWN,
                f"before ONNX Runtime 1.32, {PACKED}their shape says cutlass_sm80; from then on, "
                "it is right",
                "layout",
            ),
        ),
        (
            CPU,
            replace(PLAIN, activation="silu", fusion=0),
            stored(prepacked=1, layouts=SM80),
            Fault(
                GARBAGE,
                f"before ONNX Runtime 1.32, {PACKED}their shape says cutlass_sm80; from then on, "
                "the CPU provider has no kernel for activation 'silu' (it has swiglu)",
                "layout",
            ),
        ),
        (
            CPU,
            PLAIN,
            stored(block=256, prepacked=1, layouts=SM80),
            Fault(
                GARBAGE,
                f"before ONNX Runtime 1.32, {PACKED}their shape says cutlass_sm80; from then on, "
                "the CPU provider does not take block_size=256 with int4 (it takes 32, 64, 128)",
                "layout",
            ),
        ),
        # Float weights.
        (
            CPU,
            replace(PLAIN, activation="geglu"),
            None,
            Fault(
                REFUSED,
                "the CPU provider has no kernel for activation 'geglu' "
                "(it has gelu, identity, relu, silu, swiglu)",
                "activation",
            ),
        ),
        (
            CPU,
            replace(PLAIN, sparse_mixer=True),
            None,
            Fault(
                GARBAGE,
                "the CPU provider ignores use_sparse_mixer=1 and would route differently",
                "sparse_mixer",
            ),
        ),
        (
            CUDA,
            replace(PLAIN, fc3=True, fusion=0),
            None,
            Fault(
                GARBAGE,
                "the CUDA provider may misread fc3 with float16 and MoE, by the kernel it picks",
                "activation",
            ),
        ),
        (
            TRT_RTX,
            PLAIN,
            None,
            Fault(UNKNOWN, "what the TensorRT-RTX provider does with MoE is not known", "type"),
        ),
    ],
)
def test_what_is_worst_with_a_node(
    provider: Provider, facts: Facts, node: Stored | None, fault: Fault | None
) -> None:
    assert provider.judge(facts, node) == fault
    assert Target("own", (provider,)).judge(facts, node) == fault


def test_garbage_is_the_worst_that_one_of_several_providers_makes() -> None:
    """A node that one of them refuses is at least noticed."""
    facts = replace(PLAIN, dtype="bfloat16", sparse_mixer=True)
    assert CPU.judge(facts, stored()).verdict == REFUSED  # type: ignore[union-attr]
    found = TARGETS["portable"].judge(facts, stored())
    assert found == CUDA.judge(facts, stored())
    assert found is not None
    assert found.verdict == GARBAGE


def test_reasons_against_a_storage_are_counted() -> None:
    both = {name: Spec(FORMATS["int4"], 48, symmetric=False) for name in ("fc1", "fc2")}
    fc2 = both | {"fc1": Spec(FORMATS["int4"], 32)}
    counts = [TARGETS["cuda"].objections(specs) for specs in (both, fc2, stored().specs)]
    assert counts == [4, 2, 0]
    assert TARGETS["portable"].objections(both) == 4 + TARGETS["cpu"].objections(both)


def test_two_formats_are_both_named() -> None:
    specs = {name: Spec(FORMATS[f"int{bits}"], 512) for name, bits in (("fc1", 4), ("fc2", 8))}
    assert TARGETS["cuda"].refuse_storage(specs, "raw") == (
        "the CUDA provider does not take block_size=512 with int4 and int8 "
        "(it takes 16, 32, 64, 128, 256)"
    )


def test_two_providers_that_read_nothing_in_common_are_both_named() -> None:
    specs = dict.fromkeys(("fc1", "fc2"), Spec(FORMATS["mxfp4"], 32))
    assert TARGETS["portable"].refuse_storage(specs, None) == (
        "no layout of mxfp4 is read by both the CPU provider (k_packed) and "
        "the CUDA provider (n_packed)"
    )
    assert TARGETS["cuda"].refuse_storage(specs, None) is None


def test_what_newer_versions_load_is_said_in_words() -> None:
    facts = replace(PLAIN, limit_after_activation=True)
    specs = dict.fromkeys(("fc1", "fc2"), Spec(FORMATS["int4"], 32))
    assert TARGETS["cuda"].warnings(facts, specs) == (
        "the CUDA provider loads swiglu_limit_after_activation=1 from ONNX Runtime 1.32 on",
    )


@pytest.mark.parametrize("since", [None, "1.40"])
def test_a_float_node_has_a_kernel_of_its_own(since: str | None) -> None:
    assert CPU.moe is not None
    target = Target("own", (replace(CPU, moe=replace(CPU.moe, since=since)),))
    told = [] if since is None else ["the CPU provider loads MoE from ONNX Runtime 1.40 on"]
    assert [each for each in target.warnings(PLAIN, {}) if "loads" in each] == told
