"""`plan` says what `quantize` will do, byte by byte, and computes and writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from qmoe_rules import Recipe, plan, quantize, quantizers
from tests.saves import RECIPE, model_bytes, snapshot


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4},
        {"bits": 4, "block_size": 32},
        {"bits": 8, "block_size": 128},
        {"nodes_to_exclude": ["layers.0.*"]},
        {"overrides": ["layers.1.*:bits=8"]},
        {"nodes_to_exclude": ["*"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tiny", ["fp32", "fp16"])
def test_plan_predicts_the_report_and_the_bytes(
    tmp_path: Path, request: pytest.FixtureRequest, tiny: str, fields: dict[str, Any]
) -> None:
    path: Path = request.getfixturevalue(f"tiny_{tiny}")
    expected = plan(path, Recipe(**fields))
    report = quantize(path, tmp_path / "out", **fields)
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert expected.to_dict() == report.to_dict()
    assert expected.file_bytes_after == written
    assert expected.file_bytes_before == model_bytes(path)


@pytest.mark.parametrize("destination", ["new/q.onnx", "again"])
def test_report_knows_the_bytes_whatever_the_names(
    model_folder: Path, tmp_path: Path, destination: str
) -> None:
    quantize(model_folder / "model.onnx", tmp_path / "again", **RECIPE)
    report = quantize(model_folder / "model.onnx", tmp_path / destination, **RECIPE)
    folder = tmp_path / destination.split("/", maxsplit=1)[0]
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert report.file_bytes_after == written


@pytest.fixture
def no_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every computation fail."""

    def computed(*_: object) -> Any:
        raise RuntimeError("a weight was quantized")

    monkeypatch.setitem(quantizers.METHODS, "rtn", computed)


@pytest.mark.usefixtures("no_quantizer")
def test_plan_computes_and_writes_nothing(model_folder: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    assert plan(model_folder, **RECIPE).count("converted") == 2
    assert snapshot(tmp_path) == before
    with pytest.raises(RuntimeError, match="was quantized"):
        quantize(model_folder, tmp_path / "out", **RECIPE)


@pytest.mark.usefixtures("no_quantizer")
def test_plan_does_not_compute_small_scales_either(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("fc1", (2, 16, 16)), ("fc2", (2, 16, 16)))
    ]
    node = helper.make_node(
        "MoE", ["x", "router", "fc1", "", "fc2"], ["y"], "moe", domain="com.microsoft", k=1
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 16]),
        helper.make_tensor_value_info("router", TensorProto.FLOAT, ["tokens", 2]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 16])
    graph = helper.make_graph([node], "small", inputs, [output], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert plan(tmp_path / "model.onnx", target="cpu").count("converted") == 1
