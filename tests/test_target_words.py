"""What targets say of storages and nodes where several formats, providers or versions meet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import Facts
from qmoe_rules.providers import CPU, TARGETS
from qmoe_rules.targets import Target

PLAIN = Facts(dtype="float16", activation="swiglu", fusion=1, hidden=128, inter=192)


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
