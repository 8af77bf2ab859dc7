"""`quantize` and models with nothing to do, with nodes of several kinds, branches and functions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qmoe_rules import plan, quantize, writing
from tests.saves import RECIPE, edit, snapshot


def graph_without_locations(path: Path) -> bytes:
    """Returns the model as onnx_ir spells it, without a word about where its tensors lie."""
    proto = ir.to_proto(ir.from_proto(onnx.load(path)))
    for tensor in proto.graph.initializer:
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    found: bytes = proto.SerializeToString(deterministic=True)
    return found


def moe_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "MoE"]


def test_quantized_model_passes_through(model_folder: Path, tmp_path: Path) -> None:
    quantize(model_folder, tmp_path / "first", **RECIPE)
    report = quantize(tmp_path / "first", tmp_path / "second", bits=8, strict=True)
    assert [(row.status, row.reason) for row in report.rows] == [("kept", "it is QMoE already")] * 2
    assert snapshot(tmp_path / "second") == snapshot(tmp_path / "first")
    assert report.file_bytes_after == report.file_bytes_before


def test_model_without_moe_passes_through(model_folder: Path, tmp_path: Path) -> None:
    def hide(proto: onnx.ModelProto) -> None:
        for node in moe_nodes(proto):
            node.domain = "somewhere.else"
        proto.opset_import.append(helper.make_opsetid("somewhere.else", 1))

    edit(model_folder / "model.onnx", hide)
    report = quantize(model_folder, tmp_path / "out")
    assert report.rows == []
    assert "nothing to quantize" in report.summary()
    got, given = (
        graph_without_locations(f / "model.onnx") for f in (tmp_path / "out", model_folder)
    )
    assert got == given


def test_model_whose_nodes_are_all_excluded_passes_through(
    model_folder: Path, tmp_path: Path
) -> None:
    report = quantize(model_folder, tmp_path / "out", nodes_to_exclude=["*"])
    assert report.count("skipped") == 2
    got, given = (
        graph_without_locations(f / "model.onnx") for f in (tmp_path / "out", model_folder)
    )
    assert got == given


def test_half_converted_model_runs_and_says_which_half(model_folder: Path, tmp_path: Path) -> None:
    report = quantize(model_folder, tmp_path / "out", nodes_to_exclude=["layers.1.*"], **RECIPE)
    assert [(row.node, row.status) for row in report.rows] == [
        ("layers.0.moe", "converted"),
        ("layers.1.moe", "skipped"),
    ]
    model = ir.load(tmp_path / "out" / "model.onnx")
    assert [n.op_type for n in model.graph if n.domain == "com.microsoft"] == ["QMoE", "MoE"]
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"input_ids": np.arange(20).reshape(1, 20)})
    assert np.isfinite(logits).all()
    # The rest of the way, from what was written.
    report = quantize(tmp_path / "out", tmp_path / "rest", **RECIPE)
    assert [(row.node, row.status) for row in report.rows] == [
        ("layers.0.moe", "kept"),
        ("layers.1.moe", "converted"),
    ]


def test_branches_that_use_the_same_names_are_all_converted(
    model_folder: Path, tmp_path: Path
) -> None:
    def branch(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        moe = moe_nodes(proto)[0]
        place = list(graph.node).index(moe)
        (result,) = moe.output
        inside = helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
        moe.output[0] = "inside"
        branches = {
            f"{name}_branch": helper.make_graph([moe], name, [], [inside])
            for name in ("then", "else")
        }
        graph.node.remove(moe)
        graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        graph.node.insert(place, helper.make_node("If", ["yes"], [result], **branches))

    edit(model_folder / "model.onnx", branch)
    onnxruntime.InferenceSession(model_folder / "model.onnx", providers=["CPUExecutionProvider"])
    report = quantize(model_folder, tmp_path / "out", **RECIPE)
    assert report.count("converted") == 3


def test_progress_and_workers_are_passed_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counting(workers: int) -> Any:
        counts.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(writing, "ThreadPoolExecutor", counting)
    calls: list[tuple[int, int]] = []
    quantize(model_folder, tmp_path / "out", workers=3, progress=lambda *call: calls.append(call))
    assert counts == [3]
    assert calls[-1] == ((tmp_path / "out" / "model.onnx.data").stat().st_size,) * 2


@pytest.mark.parametrize(
    "fields",
    [{"nodes_to_exclude": ["Layers.0.moe"]}, {"overrides": [("re:nothing", {"bits": 8})]}],
    ids=str,
)
def test_a_pattern_that_matches_no_node_is_told(
    tiny_fp32: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    report = plan(tiny_fp32, **fields)
    (message,) = [record.getMessage() for record in caplog.records]
    assert report.warnings == [message]
    assert message.endswith("matches no node; they are layers.0.moe, layers.1.moe")


@pytest.mark.parametrize(
    ("overrides", "excluded", "shadowed"),
    [
        (["layers.*", "layers.0*"], [], ["layers.0*"]),
        (["layers.0*", "layers.*"], [], []),
        (["layers.0*", "layers.*"], ["layers.1*"], ["layers.*"]),
        (["layers.0*"], ["layers.0*"], ["layers.0*"]),
    ],
)
def test_an_override_that_is_never_used_is_told(
    tiny_fp32: Path, overrides: list[str], excluded: list[str], shadowed: list[str]
) -> None:
    given = [(pattern, {"bits": 8}) for pattern in overrides]
    report = plan(tiny_fp32, overrides=given, nodes_to_exclude=excluded)
    assert report.warnings == [
        f"pattern {pattern!r} is never used: earlier ones match all its nodes"
        for pattern in shadowed
    ]


def test_external_data_of_a_function_come_along(model_folder: Path, tmp_path: Path) -> None:
    """A Constant inside a function is no initializer; its bytes move into the .onnx file."""
    model = onnx.load(model_folder / "model.onnx", load_external_data=False)
    (model_folder / "fn.bin").write_bytes(np.full(128, 0.5, np.float32).tobytes())
    tensor = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[128])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="fn.bin")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor),
        helper.make_node("Mul", ["a", "c"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("local", "Halve", ["a"], ["b"], nodes, opsets))
    moe = moe_nodes(model)[0]
    model.graph.node.insert(
        list(model.graph.node).index(moe),
        helper.make_node("Halve", [moe.input[0]], ["halved"], domain="local"),
    )
    moe.input[0] = "halved"
    model.opset_import.append(helper.make_opsetid("local", 1))
    (model_folder / "model.onnx").write_bytes(model.SerializeToString())
    quantize(model_folder, tmp_path / "out", **RECIPE)
    saved = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    (constant, _) = saved.functions[0].node
    assert np.frombuffer(constant.attribute[0].t.raw_data, np.float32).tolist() == [0.5] * 128
