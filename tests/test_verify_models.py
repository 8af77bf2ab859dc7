"""`verify` on other people's models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmoe_rules import verify
from tests.verifications import checked, converted, failed

CPU_ONLY, ANY, CUDA_ONLY = ("cpu", "portable"), ("cpu", "portable", "cuda"), ("cuda",)
REAL = {
    "bytelm-swiglu16-fp32": CPU_ONLY,
    "genai-gemma4-fp16-cuda": CUDA_ONLY,
    "genai-gptoss-bf16-cuda": CUDA_ONLY,
    "genai-gptoss-fp16-cuda": ANY,
    "genai-gptoss-fp32-cpu": CPU_ONLY,
    "genai-qwen3_5_moe-fp16-cuda": ANY,
    "mobius-deepseek_v3-fp32-cpu": CPU_ONLY,
    "mobius-gemma4-fp32-cpu": CPU_ONLY,
    "mobius-gptoss-fp32-cpu": CPU_ONLY,
    "mobius-mixtral-fp32-cpu": CPU_ONLY,
    "mobius-phimoe-fp32-cpu": CPU_ONLY,
    "torch-deepseek_v3-batched_mm-fp32-none": CPU_ONLY,
    "torch-mixtral-batched_mm-fp32-none": CPU_ONLY,
}
WIDTHS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)
@pytest.mark.parametrize(
    ("model", "target"), [(model, target) for model, found in REAL.items() for target in found]
)
def test_real_models_pass(
    model: str, target: str, bits: int, symmetric: bool, shared: Path, tmp_path: Path
) -> None:
    before = shared / "models" / model
    recipe: dict[str, Any] = {"bits": bits, "block_size": 32, "symmetric": symmetric}
    after = converted(before, tmp_path / "out", target=target, **recipe)
    found = verify(before, after, whole_model=bits == 4 and symmetric)
    assert found.passed, found.summary()
    for node in found.nodes:
        told = [note.startswith("checked with the reference alone") for note in node.notes]
        assert told == ([] if node.execution_error is not None else [True])
        assert (node.execution_error is None) == (REAL[model] == CUDA_ONLY)
    if bits == 4 and symmetric and REAL[model] != CUDA_ONLY:
        assert found.whole_model == "ran on random inputs"


def test_a_router_that_another_tool_quantized_is_found(shared: Path) -> None:
    before, after = (shared / "models" / f"genai-gptoss-{kind}-cpu" for kind in ("fp32", "int4"))
    report = checked(before, after)
    assert failed(report) == {"outside", "routing"}
    assert all("is MatMul, and com.microsoft::MatMulNBits" in f.reason for f in report.failed)
    assert all((node.execution_error or 1) < 1e-6 for node in report.nodes)


def test_packed_bytes_that_a_cpu_would_take_for_raw_ones(shared: Path) -> None:
    before, after = (shared / "models" / f"genai-gptoss-{kind}-cuda" for kind in ("fp16", "int4"))
    assert "stored" in failed(checked(before, after))
    told = checked(before, after, source_layout="cutlass_sm80")
    assert failed(told) == {"outside", "routing"}
    assert "their shape says cutlass_sm80" in told.nodes[0].notes[1]
