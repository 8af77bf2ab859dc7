"""What the `qmoe` command prints: tables, reasons, JSON, names, progress."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest

from qmoe_rules import plan, quantize
from qmoe_rules.inspection import inspect
from tests.command import Run, rename_first_moe
from tests.saves import snapshot


def test_plan_prints_nodes_sizes_and_total(qmoe: Run, source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    status, out, err = qmoe("plan", source, "--bits", "4", "--block-size", "32")
    assert (status, err) == (0, "")
    header, first, second, *rest = out.splitlines()
    assert header.split() == ["node", "E", "H", "I", "result", "before", "after"]
    row = ["8", "128", "128", "int4", "block", "32,", "raw", "1.57", "MB", "246", "kB"]
    assert first.split() == ["layers.0.moe", *row]
    assert second.split() == ["layers.1.moe", *row]
    report = plan(source, bits=4, block_size=32)
    notes = [f"note: {warning}" for warning in report.rows[0].warnings]
    assert rest == [*notes, report.summary()]
    assert "2 converted; model 4.08 MB -> " in out
    assert snapshot(tmp_path) == before


def test_reasons_and_notes_are_printed(qmoe: Run, source: Path) -> None:
    status, out, err = qmoe(
        "plan", source, "--bits", "8", "--block-size", "32", "--exclude", "layers.1.*"
    )
    assert (status, err) == (0, "")
    assert "skipped: excluded by the recipe" in out
    assert out.count("note: the CPU provider rounds activations to int8") == 1
    assert "1 converted, 1 skipped" in out


def test_quantize_prints_the_same_and_writes(qmoe: Run, source: Path, tmp_path: Path) -> None:
    planned = qmoe("plan", source)
    done = qmoe("quantize", source, tmp_path / "out")
    assert done == planned
    assert set(snapshot(tmp_path / "out")) == {"model.onnx", "model.onnx.data"}


def test_inspect_prints_the_nodes_of_both_kinds(qmoe: Run, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out.onnx", block_size=32, nodes_to_exclude=["layers.1.*"])
    status, out, err = qmoe("inspect", tmp_path / "out.onnx")
    assert (status, err) == (0, "")
    _, *rows = (" ".join(line.split()) for line in out.splitlines())
    assert rows == [
        "layers.0.moe QMoE float 8 128 128 2 swiglu int4 block 32, raw 246 kB",
        "layers.1.moe MoE float 8 128 128 2 swiglu float 1.57 MB",
    ]


def without_moe(source: Path) -> None:
    """Makes the MoE nodes of a model those of a domain that nobody knows."""
    proto = onnx.load(source, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MoE":
            node.domain = "somewhere.else"
    source.write_bytes(proto.SerializeToString())


def test_model_without_moe_says_so(qmoe: Run, source: Path, tmp_path: Path) -> None:
    without_moe(source)
    failed = qmoe("plan", source, "--fail-if-skipped")
    assert (failed.status, failed.err) == (1, "qmoe: the model holds no com.microsoft::MoE node\n")
    assert "nothing to quantize" in qmoe("plan", source).out
    nothing = "no com.microsoft::MoE or QMoE node found; qmoe plan fuses experts of small nodes\n"
    assert qmoe("inspect", source) == (0, nothing, "")


def test_quantize_says_last_that_nothing_was_converted(
    qmoe: Run, source: Path, tmp_path: Path
) -> None:
    """`source` is in float32, which CUDA has no kernel for."""
    out = tmp_path / "out"
    done = qmoe("quantize", source, out, "--target", "cuda")
    assert done.status == 0
    assert done.err == (
        f"qmoe: nothing was converted; {out} computes what {source} does: the CUDA provider has no "
        "float32 kernel (it has bfloat16, float16); target='portable' takes it (2 of 2 nodes); "
        "--fail-if-skipped makes that an error\n"
    )
    done = qmoe("quantize", source, out, "--exclude", "*.0.*", "--target", "cuda", "--json")
    assert "excluded by the recipe (1 of 2 nodes)" in done.err
    assert json.loads(done.out)["converted"] == 0
    assert qmoe("quantize", source, out).err == ""
    done = qmoe("quantize", out, tmp_path / "again")
    assert done.err.endswith(f" computes what {out} does: it is QMoE already (2 of 2 nodes)\n")
    without_moe(source)
    done = qmoe("quantize", source, out)
    assert ": there is no com.microsoft::MoE node, nor experts that can be fused" in done.err
    assert qmoe("plan", source).err == ""


def test_json_is_the_python_report(qmoe: Run, source: Path, tmp_path: Path) -> None:
    arguments = ("--json", "--bits", "8", "--exclude", "layers.1.*")
    expected = plan(source, bits=8, nodes_to_exclude=["layers.1.*"]).to_json()
    planned = qmoe("plan", source, *arguments)
    assert (planned.status, planned.err) == (0, "")
    assert json.loads(planned.out) == json.loads(expected)
    assert qmoe("quantize", source, tmp_path / "out", *arguments) == planned
    listed = qmoe("inspect", tmp_path / "out", "--json")
    assert (listed.status, listed.err) == (0, "")
    summaries = inspect(tmp_path / "out")
    assert json.loads(listed.out) == [dataclasses.asdict(summary) for summary in summaries]


@pytest.mark.parametrize(
    "name",
    [
        "model[0].moe[bold]x[/bold]",
        "a[link=file:///]b",
        "[/]",
        "ends with a backslash\\",
        "a\\[bold]b",
        "blk:fire:moe",
    ],
)
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_names_are_printed_as_they_are(qmoe: Run, source: Path, name: str, command: str) -> None:
    rename_first_moe(source, name)
    status, out, _ = qmoe(command, source)
    assert status == 0
    assert out.splitlines()[1].startswith(f"{name} ")


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_long_names_are_folded_and_not_cut(qmoe: Run, source: Path, command: str) -> None:
    name = "/model/" + "".join(f"layers.{index}/" for index in range(40)) + "moe"
    rename_first_moe(source, name)
    status, out, _ = qmoe(command, source)
    assert status == 0
    lines = out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("/model/"))
    last = next(index for index, line in enumerate(lines) if line.startswith("layers.1.moe"))
    assert "".join(line.split()[0] for line in lines[first:last]) == name
    node = json.loads(qmoe(command, source, "--json").out)
    rows = node["nodes"] if command == "plan" else node
    assert rows[0]["node"] == name


def test_side_file_that_is_left_out_is_told(qmoe: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("")
    (source.parent / "link.txt").symlink_to(tmp_path / "outside.txt")
    status, out, err = qmoe("quantize", source.parent, tmp_path / "out")
    assert status == 0
    assert "link.txt" in out + err


def test_progress_bar_needs_a_terminal(
    qmoe: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qmoe("quantize", source, tmp_path / "plain").err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "writing" in qmoe("quantize", source, tmp_path / "colored").err
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "colored")
