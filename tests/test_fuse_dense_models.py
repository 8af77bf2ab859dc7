"""Models as an exporter writes them, whose experts all compute every token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qmoe_rules import (
    Report,
    fuse_experts_rules,
    moe_to_qmoe_rules,
    qmoe_to_moe_rules,
    save,
)
from qmoe_rules.report import CONVERTED
from qmoe_rules.rules import apply_rules
from tests.fusions import fused
from tests.moe_models import Array, nodes_of, relative_error

SAMPLES = {
    "mobius-deepseek_v3-fp32-cpu": 1,
    "mobius-gptoss-fp32-cpu": 2,
    "mobius-mixtral-fp32-cpu": 2,
    "mobius-phimoe-fp32-cpu": 2,
}


def language_feeds(model: ir.Model, batch: int, length: int = 7) -> dict[str, Array]:
    """Returns tokens without a past for a language model."""
    rng = np.random.default_rng(batch)
    feeds = {}
    for value in model.graph.inputs:
        shape = [_size(size, batch, length) for size in value.shape or ()]
        if value.name == "input_ids":
            array: Any = rng.integers(0, 256, shape)
        elif value.name == "position_ids":
            array = np.broadcast_to(np.arange(length), shape)
        else:
            array = np.ones(shape)
        feeds[str(value.name)] = array.astype(value.dtype.numpy())  # type: ignore[union-attr]
    return feeds


def _size(size: int | ir.SymbolicDim, batch: int, length: int) -> int:
    if isinstance(size, int):
        return size
    return {"batch": batch, "past_sequence_len": 0}.get(str(size.value), length)


def outputs_of(path: Path, feeds: Sequence[dict[str, Array]]) -> list[list[Array]]:
    """Runs a model in a file."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [[np.asarray(out) for out in session.run(None, feed)] for feed in feeds]


def errors(actual: Sequence[Sequence[Array]], expected: Sequence[Sequence[Array]]) -> list[float]:
    return [
        relative_error(a, b)
        for first, second in zip(actual, expected, strict=True)
        for a, b in zip(first, second, strict=True)
    ]


@pytest.mark.parametrize("name", SAMPLES)
def test_exported_models(name: str, shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / name / "model.onnx"
    model = ir.load(path)
    feeds = [language_feeds(model, batch) for batch in (1, 4)]
    assert fused(model).rows == []
    assert len(nodes_of(model, "MoE")) == SAMPLES[name]
    assert Counter(node.op_type for node in model.graph)["Equal"] == 0
    assert not [each for each in model.graph.initializers if "experts.0" in each]
    save(model, tmp_path / "fused.onnx")
    found = outputs_of(tmp_path / "fused.onnx", feeds)
    assert max(errors(found, outputs_of(path, feeds))) < 1e-5


@pytest.mark.parametrize(("bits", "block"), [(8, 0), (4, 32)])
@pytest.mark.parametrize("name", SAMPLES)
def test_exported_models_quantized(
    name: str, bits: int, block: int, shared: Path, tmp_path: Path
) -> None:
    """The quantized model computes what its own weights mean in float."""
    model = ir.load(shared / "models" / name / "model.onnx")
    feeds = [language_feeds(model, batch) for batch in (1, 4)]
    report = Report()
    quantize = moe_to_qmoe_rules(bits=bits, block_size=block, report=report, target="cpu")
    apply_rules(model, [*fuse_experts_rules(report=report), *quantize])
    assert [row.status for row in report.rows] == [CONVERTED] * SAMPLES[name]
    save(model, tmp_path / "quantized.onnx")
    found = outputs_of(tmp_path / "quantized.onnx", feeds)
    back = ir.load(tmp_path / "quantized.onnx")
    apply_rules(back, qmoe_to_moe_rules())
    assert len(nodes_of(back, "MoE")) == SAMPLES[name]
    save(back, tmp_path / "float.onnx")
    assert max(errors(found, outputs_of(tmp_path / "float.onnx", feeds))) < 1e-5


def test_an_invalid_export_is_left_alone(shared: Path) -> None:
    model = ir.load(shared / "models" / "mobius-gptoss-fp16-cuda" / "model.onnx")
    count = sum(1 for _ in model.graph)
    report = fused(model)
    reason = "expert 0 has FLOAT16 weights and a FLOAT mask"
    assert [row.reason for row in report.rows] == [reason] * 2
    assert sum(1 for _ in model.graph) == count
