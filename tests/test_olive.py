"""The Olive pass, through Olive's own ways of running it."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qmoe_rules import ConfigError, UnsupportedNodeError
from tests.test_exporters import clone, count, example, load_session

__all__ = ["clone"]  # a fixture

pytestmark = pytest.mark.filterwarnings("ignore")

MODULE = "qmoe_rules.integrations.olive"
QUANTIZATION = "OnnxMoEQuantization"


@pytest.fixture
def olive(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module with the pass; skips the test where Olive is not installed."""
    monkeypatch.setenv("OLIVE_DISABLE_TELEMETRY", "1")
    pytest.importorskip("olive")
    return importlib.import_module(MODULE)


def run(olive: Any, model: Path, out: Path, attributes: Any = None, **config: Any) -> Any:
    """Runs the pass as Olive's engine does and returns the handler of its output."""
    from olive.model import ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    quantization = create_pass_from_dict(olive.OnnxMoEQuantization, config, disable_search=True)
    handler = ONNXModelHandler(model_path=model, model_attributes=attributes)
    return quantization.run(handler, str(out))


def without_experts(path: Path) -> Path:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "graph", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def test_without_olive_the_module_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "olive", None)
    monkeypatch.setitem(sys.modules, "olive.hardware", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'qmoe-rules\[olive\]'"):
        importlib.import_module(MODULE)


def test_the_experts_are_quantized(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    out = run(olive, tiny_fp32, tmp_path / "out", block_size=32)
    path = Path(out.model_path)
    assert path == tmp_path / "out" / "model.onnx"
    assert path.with_name("model.onnx.data").is_file()
    assert count(path) == 2
    assert count(path, "MoE") == 0
    assert out.load_model().graph.node


def test_the_output_runs(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    out = run(olive, tiny_fp32, tmp_path / "out", bits=8)
    session = load_session(Path(out.model_path))
    feeds = {given.name: zeros(given) for given in session.get_inputs()}
    before = load_session(tiny_fp32).run(None, feeds)
    np.testing.assert_allclose(session.run(None, feeds)[0], before[0], atol=0.1)


def zeros(given: onnxruntime.NodeArg) -> Any:
    dtype = np.int64 if given.type == "tensor(int64)" else np.float32
    return np.zeros([size if isinstance(size, int) else 1 for size in given.shape], dtype)


def test_the_recipe_is_handed_on(olive: Any, tiny_fp16: Path, tmp_path: Path) -> None:
    out = run(
        olive,
        tiny_fp16,
        tmp_path / "out",
        layout="cutlass_sm80",
        target="cuda",
        nodes_to_exclude=["layers.0*"],
        overrides=["*:bits=8"],
    )
    nodes = [node for node in out.load_model().graph.node if node.op_type in ("MoE", "QMoE")]
    assert [node.op_type for node in nodes] == ["MoE", "QMoE"]
    attributes = {a.name: helper.get_attribute_value(a) for a in nodes[1].attribute}
    assert attributes["expert_weight_bits"] == 8
    assert attributes["weights_prepacked"] == 1


@pytest.mark.parametrize(
    ("fields", "quant_type", "bits", "zero_points"),
    [
        ({"format": "nvfp4", "target": "cpu"}, b"nvfp4", 4, False),
        ({"bits": 8, "block_size": 32, "symmetric": False}, b"int", 8, True),
    ],
)
def test_formats_and_zero_points_are_handed_on(
    olive: Any,
    tiny_fp16: Path,
    tmp_path: Path,
    fields: dict[str, Any],
    quant_type: bytes,
    bits: int,
    zero_points: bool,
) -> None:
    out = run(olive, tiny_fp16, tmp_path / "out", **fields)
    for node in out.load_model().graph.node:
        if node.op_type == "QMoE":
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            assert (attributes["quant_type"], attributes["expert_weight_bits"]) == (
                quant_type,
                bits,
            )
            assert any(name.endswith("zero_points") for name in node.input) == zero_points
    assert count(Path(out.model_path)) == 2


def test_null_stands_for_the_default(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    out = run(olive, tiny_fp32, tmp_path / "out", bits=None, overrides=None, force_arch=None)
    assert count(Path(out.model_path)) == 2


def test_arch_90_is_refused_with_the_reason(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"force_arch=90; .* never read by QMoE: .*cutlass_sm80"):
        run(olive, tiny_fp32, tmp_path / "out", force_arch=90)
    assert not list(tmp_path.rglob("*.onnx"))


def test_a_wrong_recipe_is_refused(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="bits=5"):
        run(olive, tiny_fp32, tmp_path / "out", bits=5)


def test_additional_files_come_along(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    attributes = {"additional_files": [str(tmp_path / "tokenizer.json")]}
    out = run(olive, tiny_fp32, tmp_path / "out", attributes)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert out.model_attributes["additional_files"] == [str(tmp_path / "out" / "tokenizer.json")]


def test_a_model_without_experts_passes_through(
    olive: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = logging.getLogger("olive.qmoe_rules")
    logger.addHandler(caplog.handler)  # Olive's own logger need not propagate
    try:
        out = run(olive, without_experts(tmp_path / "relu.onnx"), tmp_path / "out")
    finally:
        logger.removeHandler(caplog.handler)
    assert [node.op_type for node in out.load_model().graph.node] == ["Relu"]
    assert "nothing to quantize" in caplog.text


def test_nothing_converted_is_an_error(olive: Any, tiny_fp32: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedNodeError, match="2 MoE nodes were not converted"):
        run(olive, tiny_fp32, tmp_path / "out", nodes_to_exclude=["*"])


def test_every_component_of_a_composite_model_is_run(
    olive: Any, tiny_fp32: Path, tmp_path: Path
) -> None:
    from olive.model import CompositeModelHandler, ONNXModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    parts = [tiny_fp32, without_experts(tmp_path / "vision.onnx")]
    handler = CompositeModelHandler(
        [ONNXModelHandler(model_path=path) for path in parts], ["decoder", "vision"]
    )
    quantization = create_pass_from_dict(olive.OnnxMoEQuantization, {}, disable_search=True)
    out = quantization.run(handler, str(tmp_path / "out"))
    assert {name: count(Path(part.model_path)) for name, part in out.get_model_components()} == {
        "decoder": 2,
        "vision": 0,
    }


def test_the_package_configuration_leads_to_the_pass(olive: Any) -> None:
    from olive.package_config import OlivePackageConfig

    package = OlivePackageConfig.parse_file_or_obj(olive.package_config())
    assert package.import_pass_module(QUANTIZATION) is olive.OnnxMoEQuantization
    assert package.get_pass_module_config("OnnxConversion")  # Olive's own passes stay


def test_the_documented_workflow_runs(olive: Any, clone: Path) -> None:
    (clone / "olive.json").write_text(example("Olive", "json"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["sh", "-e"],
        input=example("Olive", "sh"),
        cwd=clone,
        env={**os.environ, "PATH": path},
        text=True,
        check=True,
        timeout=300,
    )
    out = clone / "olive-int4"
    assert json.loads((out / "model_config.json").read_text())["type"].lower() == "onnxmodel"
    assert count(out / "model.onnx") == 2
    load_session(out / "model.onnx")
