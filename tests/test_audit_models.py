"""The audit of whole models: those of exporters, and what the rules make for a target."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.kernels import GARBAGE, REFUSED, RIGHT, UNKNOWN
from qmoe_rules.loading import load, locate
from qmoe_rules.providers import TARGETS
from tests.audits import INT4, MXFP4, NVFP4, judged
from tests.contract import Cell

# --- The models of other exporters ---------------------------------------------------------------

ON_EVERY_PROVIDER = {"portable": RIGHT, "cpu": RIGHT, "cuda": RIGHT, "webgpu": RIGHT}
MOE = {**ON_EVERY_PROVIDER, "trt-rtx": UNKNOWN}
CUDA_MOE = {
    "portable": REFUSED,
    "cpu": REFUSED,
    "cuda": RIGHT,
    "webgpu": REFUSED,
    "trt-rtx": UNKNOWN,
}
SHARED: dict[str, dict[str, str]] = {
    "bytelm-swiglu16-fp16": MOE,
    "bytelm-swiglu16-fp32": MOE,
    "bytelm-tiny8-fp16": MOE,
    "bytelm-tiny8-fp32": MOE,
    "genai-gemma4-fp16-cuda": CUDA_MOE,  # geglu
    "genai-gptoss-bf16-cuda": CUDA_MOE,
    "genai-gptoss-fp16-cuda": MOE,
    "genai-gptoss-fp32-cpu": MOE,
    # float32 runs on the CPU in a session for CUDA, and the CPU takes unstated bytes for raw ones.
    "genai-gptoss-int4-cpu": {**ON_EVERY_PROVIDER, "trt-rtx": UNKNOWN},
    "genai-gptoss-int4-cuda": {
        "portable": GARBAGE,
        "cpu": GARBAGE,
        "cuda": RIGHT,
        "webgpu": GARBAGE,
        "trt-rtx": GARBAGE,
    },
    "genai-phimoe-int4-cuda-raw": dict.fromkeys(TARGETS, REFUSED),
    "genai-qwen3_5_moe-fp16-cuda": MOE,
    "mobius-deepseek_v3-fp32-cpu": {},
    "mobius-gemma4-fp32-cpu": MOE,
    "mobius-gptoss-fp16-cuda": {},
    "mobius-gptoss-fp32-cpu": {},
    "mobius-mixtral-fp32-cpu": {},
    "mobius-phimoe-fp32-cpu": {},
    "torch-deepseek_v3-batched_mm-fp32-none": {},
    "torch-mixtral-batched_mm-fp32-none": {},
}


@pytest.mark.parametrize("name", SHARED)
def test_the_models_of_exporters(name: str, shared: Path) -> None:
    nodes = list(ops.nodes(load(locate(shared / "models" / name).model), "MoE", "QMoE"))
    verdicts = {
        target: {audit(node, target).verdict for node in nodes} for target in TARGETS if nodes
    }
    assert verdicts == {target: {verdict} for target, verdict in SHARED[name].items()}


def test_every_shared_model_has_its_verdicts(shared: Path) -> None:
    assert {path.name for path in (shared / "models").iterdir() if path.is_dir()} == set(SHARED)


# --- The library's own nodes ---------------------------------------------------------------------

CELLS = st.builds(
    Cell,
    format=st.sampled_from(["int2", "int3", "int4", "int8"]),
    fc2_format=st.sampled_from([None, None, "int8", "int4"]),
    block_size=st.sampled_from([0, 16, 32, 64]),
    symmetric=st.booleans(),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    activation=st.sampled_from(["swiglu", "geglu", "silu"]),
    fusion=st.sampled_from([1, 2]),
    bias=st.booleans(),
    normalize=st.sampled_from([0, 1]),
    sparse_mixer=st.sampled_from([0, 0, 0, 1]),
    limit=st.sampled_from([None, 7.0]),
    hidden=st.sampled_from([64, 96, 128]),
    inter=st.sampled_from([64, 192]),
) | st.builds(
    lambda form, **fields: form.but(**fields),
    st.sampled_from([MXFP4, NVFP4, Cell("fp8", block_size=128), Cell("fp8")]),
    dtype=st.sampled_from(["float32", "float16"]),
    hidden=st.sampled_from([64, 96, 128]),
)


@given(cell=CELLS, target=st.sampled_from(sorted(TARGETS)))
@settings(max_examples=150)
def test_whatever_the_rules_make_for_a_target_is_right_there(cell: Cell, target: str) -> None:
    made = cell.convert(target)
    if not isinstance(made, str):
        found = judged(made, target)
        assert (found.verdict, found.reason) == (RIGHT, "")


def test_the_property_sees_both_sides() -> None:
    assert isinstance(INT4.convert("portable"), ir.Model)
    assert isinstance(INT4.but(block_size=16).convert("portable"), str)
