"""What a target says of the nodes that it takes: what they must state, and what is less exact."""

from __future__ import annotations

import itertools

import pytest

from qmoe_rules.formats import FORMATS
from qmoe_rules.kernels import Facts, Specs
from qmoe_rules.providers import CPU, CUDA, TARGETS, TRT_RTX, WEBGPU
from tests.target_facts import PLAIN, SPECS, both, changed, specs_of


def test_a_target_is_known_by_its_own_name_and_providers() -> None:
    assert {name: target.providers for name, target in TARGETS.items()} == {
        "portable": (CPU, CUDA),
        "cpu": (CPU,),
        "cuda": (CUDA,),
        "webgpu": (WEBGPU,),
        "trt-rtx": (TRT_RTX,),
    }
    assert all(target.name == name for name, target in TARGETS.items())


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
