"""`inspect`: what MoE and QMoE nodes a file holds, and what would become of them on a target."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from qmoe_rules import ConfigError, SourceError, quantize
from qmoe_rules.cli import main
from qmoe_rules.inspection import NodeSummary, inspect
from qmoe_rules.providers import TARGETS


@pytest.fixture
def source(tiny_fp16: Path, tmp_path: Path) -> Path:
    """A copy of the float16 model that a test may alter."""
    shutil.copytree(tiny_fp16.parent, tmp_path / "source")
    return tmp_path / "source" / "model.onnx"


def set_attributes(path: Path, **values: Any) -> None:
    """Sets attributes of every QMoE node of a file; None removes one."""
    proto = onnx.load(path, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "QMoE":
            kept = [attribute for attribute in node.attribute if attribute.name not in values]
            del node.attribute[:]
            node.attribute.extend(kept)
            for name, value in values.items():
                if value is not None:
                    node.attribute.append(helper.make_attribute(name, value))
    path.write_bytes(proto.SerializeToString())


def test_float_nodes(tiny_fp16: Path) -> None:
    first, second = inspect(tiny_fp16.parent)
    assert first == NodeSummary(
        node="layers.0.moe",
        op="MoE",
        dtype="float16",
        experts=8,
        hidden=128,
        inter=128,
        k=2,
        activation="swiglu",
        stored="float",
        nbytes=2 * 8 * (256 + 128) * 128,
    )
    assert second.node == "layers.1.moe"


@pytest.mark.parametrize(
    ("recipe", "stored", "scales_per_row"),
    [
        ({"bits": 4, "block_size": 32}, "int4 block 32, raw", 4),
        ({"bits": 4}, "int4 row, raw", 1),
        ({"bits": 8, "block_size": 128}, "int8 block 128, raw", 1),
        (
            {"bits": 4, "layout": "cutlass_sm80", "target": "cuda"},
            "int4 row, packed (weights_prepacked=1)",
            1,
        ),
    ],
)
def test_quantized_nodes(
    source: Path, tmp_path: Path, recipe: dict[str, Any], stored: str, scales_per_row: int
) -> None:
    report = quantize(source, tmp_path / "out.onnx", **recipe)
    nodes = inspect(tmp_path / "out.onnx")
    assert [(node.op, node.dtype, node.stored) for node in nodes] == [
        ("QMoE", "float16", stored)
    ] * 2
    assert [(node.experts, node.hidden, node.inter, node.k) for node in nodes] == [
        (8, 128, 128, 2)
    ] * 2
    assert [node.nbytes for node in nodes] == [row.bytes_after for row in report.rows]
    rows = 8 * (256 + 128)
    assert nodes[0].nbytes == rows * 128 * recipe["bits"] // 8 + 2 * rows * scales_per_row


@pytest.mark.parametrize(
    ("attributes", "stored"),
    [
        ({"weights_prepacked": None}, "int4 row, not stated (weights_prepacked=-1)"),
        ({"expert_weight_bits": None}, "int4 row, raw"),
        ({"block_size": -1}, "int4 row, raw"),
        ({"fc1_expert_weight_bits": 8}, "int8/4 row, raw"),
        ({"quant_type": "fp"}, "fp4 row, raw"),
    ],
)
def test_quantized_nodes_of_other_tools(
    source: Path, tmp_path: Path, attributes: dict[str, Any], stored: str
) -> None:
    path = tmp_path / "out.onnx"
    quantize(source, path, bits=4)
    set_attributes(path, **attributes)
    assert [node.stored for node in inspect(path)] == [stored] * 2


@pytest.mark.parametrize(
    "attributes",
    [
        {"weights_prepacked": 2},
        {"expert_weight_bits": 0},
        {"block_size": 7},
        {"activation_type": "unheard_of"},
    ],
)
def test_nonsense_in_a_file_is_shown_and_breaks_nothing(
    source: Path, tmp_path: Path, attributes: dict[str, Any]
) -> None:
    path = tmp_path / "out.onnx"
    quantize(source, path, bits=4)
    set_attributes(path, **attributes)
    (value,) = attributes.values()
    for node in inspect(path):
        assert str(value) in f"{node.stored} {node.activation}"


def test_nodes_in_functions_are_listed_with_what_is_known(source: Path) -> None:
    proto = onnx.load(source, load_external_data=False)
    graph = proto.graph
    place, moe = next((i, node) for i, node in enumerate(graph.node) if node.op_type == "MoE")
    call = helper.make_node("Experts", [name for name in moe.input if name], moe.output, domain="f")
    body = onnx.NodeProto()
    body.CopyFrom(moe)
    proto.functions.append(
        helper.make_function(
            "f",
            "Experts",
            list(call.input),
            list(call.output),
            [body],
            [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)],
        )
    )
    proto.opset_import.append(helper.make_opsetid("f", 1))
    graph.node.remove(moe)
    graph.node.insert(place, call)
    source.write_bytes(proto.SerializeToString())
    # The main graph comes first.
    in_graph, in_function = inspect(source)
    assert (in_graph.node, in_graph.stored, in_graph.experts) == ("layers.1.moe", "float", 8)
    assert in_function.node == "layers.0.moe"
    assert in_function.stored == "float, computed by other nodes"
    assert (in_function.experts, in_function.hidden, in_function.dtype) == (0, 0, "?")
    assert in_function.k == 2


def test_weights_that_other_nodes_compute_are_not_called_constant(source: Path) -> None:
    proto = onnx.load(source, load_external_data=False)
    for node in list(proto.graph.node):
        if node.op_type == "MoE":
            copy = helper.make_node("Abs", [node.input[2]], [f"{node.name}_copy"])
            node.input[2] = copy.output[0]
            proto.graph.node.insert(0, copy)
    source.write_bytes(proto.SerializeToString())
    nodes = inspect(source)
    assert [node.stored for node in nodes] == ["float, computed by other nodes"] * 2
    assert [node.nbytes for node in nodes] == [2 * 8 * 128 * 128] * 2


def test_unnamed_node_is_called_by_its_output(source: Path) -> None:
    proto = onnx.load(source, load_external_data=False)
    (first, _) = [node for node in proto.graph.node if node.op_type == "MoE"]
    first.name = ""
    source.write_bytes(proto.SerializeToString())
    assert inspect(source)[0].node == first.output[0]


def test_model_without_any_gives_an_empty_list(source: Path) -> None:
    proto = onnx.load(source, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MoE":
            node.domain = "somewhere.else"
    source.write_bytes(proto.SerializeToString())
    assert inspect(source) == []


def test_model_that_cannot_be_used_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        inspect(tmp_path / "absent.onnx")


# --- The audit -----------------------------------------------------------------------------------

PACKED: dict[str, Any] = {"bits": 8, "layout": "cutlass_sm80", "target": "cuda"}
REASON = (
    "the CPU provider takes the bytes for raw ones, as weights_prepacked=1; their shape says "
    "cutlass_sm80"
)


def test_without_a_target_nothing_is_judged(tiny_fp16: Path) -> None:
    for node in inspect(tiny_fp16):
        assert (node.verdict, node.reason, node.remedy, node.notes) == (None, None, None, None)


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_made_for_a_target_is_right_there(
    target: str, source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "out.onnx", target=target, block_size=128)
    for node in inspect(tmp_path / "out.onnx", target):
        assert (node.op, node.verdict, node.reason, node.remedy) == ("QMoE", "right", "", "")


def test_a_verdict_comes_with_its_reason_and_what_mends_it(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out.onnx", nodes_to_exclude=["layers.1.*"], **PACKED)
    quantized, kept = inspect(tmp_path / "out.onnx", "portable")
    assert (quantized.verdict, quantized.reason) == ("computes garbage", REASON)
    assert quantized.remedy == ("relayout_qmoe_rules('raw'); or it is right as it stands for cuda")
    assert quantized.notes == ()
    assert (kept.op, kept.verdict, kept.reason) == ("MoE", "right", "")


def test_an_unknown_target(tiny_fp16: Path) -> None:
    with pytest.raises(ConfigError, match="target='rocm'; it may be 'portable', 'cpu', 'cuda'"):
        inspect(tiny_fp16, "rocm")


def test_the_command_prints_verdicts_and_exits_1_for_garbage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "out.onnx")
    quantize(source, path, **PACKED)
    assert main(["inspect", path, "--target", "cpu"]) == 1
    title, *rows, reason, remedy = capsys.readouterr().out.splitlines()
    assert title.split()[-1] == "verdict"
    assert [row.rstrip().endswith("computes garbage") for row in rows] == [True, True]
    assert reason == f"layers.0.moe and 1 more computes garbage: {REASON}"
    assert remedy == (
        "    to mend it: relayout_qmoe_rules('raw'); or it is right as it stands for cuda"
    )
    assert main(["inspect", path, "--target", "cuda"]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert [row.split()[-1] for row in rows] == ["right", "right"]
    assert main(["inspect", path]) == 0
    assert "verdict" not in capsys.readouterr().out


def test_what_is_refused_is_no_garbage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "out.onnx")
    quantize(source, path, block_size=16, target="cpu")
    assert main(["inspect", path, "--target", "cuda"]) == 0
    out = capsys.readouterr().out
    assert "layers.0.moe and 1 more refuses to run: the CUDA provider does not take" in out


def test_the_command_prints_notes_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "out.onnx")
    quantize(source, path, bits=8, block_size=32)
    assert main(["inspect", path, "--target", "cpu"]) == 0
    assert capsys.readouterr().out.count("note: the CPU provider rounds activations") == 1


def test_json_has_the_verdicts(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "out.onnx")
    quantize(source, path, **PACKED)
    assert main(["inspect", path, "--target", "cpu", "--json"]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["verdict"], first["reason"]) == ("computes garbage", REASON)
    assert first["remedy"].startswith("relayout_qmoe_rules('raw')")
    assert second["notes"] == []
    assert main(["inspect", path, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["verdict"] is None


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_floating_point_codes_are_named_and_right_where_they_were_made_for(
    tiny_fp16: Path, tmp_path: Path, format: str
) -> None:
    """Their scales do not tell the activation type, and the model states no other."""
    quantize(tiny_fp16, tmp_path / "out", format=format, target="cpu")
    for summary in inspect(tmp_path / "out", "cpu"):
        size = {"mxfp4": 32, "nvfp4": 16}[format]
        assert summary.stored.startswith(f"{format} block {size}, packed")
        assert summary.verdict == "right"
