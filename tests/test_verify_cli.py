"""`qmoe verify`: exit status, and what it prints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qmoe_rules import quantize, verify
from qmoe_rules.cli import main


@pytest.fixture
def after(tiny_fp32: Path, tmp_path: Path) -> Path:
    quantize(tiny_fp32, tmp_path / "after", block_size=32)
    return tmp_path / "after"


def qmoe(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["verify", *map(str, arguments)])
    out, err = capsys.readouterr()
    return status, out, err


def reroute(after: Path) -> None:
    """Makes the first QMoE choose one expert, not two."""
    proto = onnx.load(after / "model.onnx", load_external_data=False)
    node = next(node for node in proto.graph.node if node.op_type == "QMoE")
    next(each for each in node.attribute if each.name == "k").i = 1
    (after / "model.onnx").write_bytes(proto.SerializeToString())


def test_a_good_model(tiny_fp32: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = qmoe(capsys, tiny_fp32, after)
    assert (status, err) == (0, "")
    header, first, second, told, logits, closest, summary = out.splitlines()
    titles = ["node", "stored", "weights", "output", "execution", "allowed", "result"]
    assert header.split() == titles
    for index, line in enumerate((first, second)):
        words = line.split()
        assert words[:4] == [f"layers.{index}.moe", "int4", "block", "32"]
        assert words[-2:] == ["1e-05", "passed"]
    assert told == "whole model: ran on random inputs"
    assert logits.startswith("    logits: ")
    assert closest.startswith("weights closest to their bound: layers.")
    assert summary == "2 converted; all checks passed"


def test_a_broken_model(tiny_fp32: Path, after: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reroute(after)
    status, out, err = qmoe(capsys, tiny_fp32, after, "--nodes-only")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[1].rstrip().endswith("failed: routing")
    assert lines[2].rstrip().endswith("passed")
    assert "failed: routing: layers.0.moe: k=1, and 2 in the float model" in lines
    assert lines[-1] == "1 check failed"
    assert "whole model: not asked for" in lines


def test_json_is_the_report(
    tiny_fp32: Path, after: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reroute(after)
    status, out, _ = qmoe(capsys, tiny_fp32, after, "--json", "--seed", 3, "--tokens", 16)
    assert status == 1
    found = json.loads(out)
    assert found == json.loads(verify(tiny_fp32, after, seed=3, tokens=16).to_json())
    assert found["passed"] is False
    assert found["nodes"][0]["failures"][0]["check"] == "routing"


def test_inputs_from_a_file(
    tiny_fp32: Path, after: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = np.frombuffer(b"In the beginning was the Word, and the Word was with God", np.uint8)
    np.savez(tmp_path / "feeds.npz", input_ids=text.astype(np.int64)[None])
    status, out, _ = qmoe(capsys, tiny_fp32, after, "--inputs", tmp_path / "feeds.npz")
    assert status == 0
    assert "whole model: ran on the given inputs" in out
    status, out, _ = qmoe(capsys, tiny_fp32, after, "--inputs", tmp_path / "feeds.npz", "--json")
    assert {node["inputs"] for node in json.loads(out)["nodes"]} == {"captured"}


def test_text_as_it_is(
    tiny_fp32: Path, after: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file that calibrate takes, and the same as its first tokens by name."""
    (tmp_path / "text.bin").write_bytes(b"In the beginning was the Word, and the Word was with God")
    tokens = np.fromfile(tmp_path / "text.bin", np.uint8)
    np.savez(tmp_path / "feeds.npz", input_ids=tokens.astype(np.int64)[None, :20])
    np.save(tmp_path / "tokens.npy", tokens.astype(np.int32))
    shown = {
        qmoe(capsys, tiny_fp32, after, "--inputs", tmp_path / name, "--window", 20)
        for name in ("text.bin", "feeds.npz", "tokens.npy")
    }
    ((status, out, err),) = shown
    assert (status, err) == (0, "")
    assert "whole model: ran on the given inputs" in out


def test_what_was_not_run_is_noted_once(
    tiny_fp16: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize(tiny_fp16, tmp_path / "out", target="webgpu", format="fp8")
    status, out, _ = qmoe(capsys, tiny_fp16, tmp_path / "out")
    assert status == 0
    assert out.count("passed, not run") == 2
    notes = [line for line in out.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: layers.0.moe and 1 more: checked with the reference alone: "
        "the CPU provider has no kernel for fp8"
    ]


BAD_INPUT: list[tuple[list[Any], str]] = [
    (["--inputs", "nothing.npz"], "nothing.npz does not exist"),
    (["--inputs", "."], "cannot read .: it is a folder; name a file of data"),
    (["--provider", "Other"], "provider='Other'; this build of ONNX Runtime has "),
    (["--tokens", "0"], "tokens=0; it is at least 1"),
]


@pytest.mark.parametrize(("options", "reason"), BAD_INPUT, ids=lambda value: str(value)[:30])
def test_bad_input(
    options: list[str],
    reason: str,
    tiny_fp32: Path,
    after: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, out, err = qmoe(capsys, tiny_fp32, after, *options)
    assert (status, out) == (2, "")
    assert err.startswith("qmoe: ")
    assert reason in err
    assert len(err.splitlines()) == 1


def test_a_model_that_is_not_there(
    tiny_fp32: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = qmoe(capsys, tiny_fp32, tmp_path / "nothing")
    assert (status, "does not exist" in err) == (2, True)
