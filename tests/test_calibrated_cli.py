"""`qmoe calibrate`, and `qmoe quantize` by what it wrote."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import Calibration, calibrate, plan, quantize
from qmoe_rules.cli import main
from qmoe_rules.feeds import inputs_of, read_feeds
from tests.calibrated import Call


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_fp32.parent, tmp_path / "model")
    return tmp_path / "model"


def test_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[Call]
) -> None:
    out = tmp_path / "calibration"
    data = [str(source), __file__, str(out)]
    assert main(["calibrate", *data, "--window", "100", "--windows", "9", "--hessian"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split()[:5] == ["node", "E", "fewest", "median", "most"]
    assert lines[-1].startswith(f"{out}: Hessians of 900 tokens; ")
    assert main(["calibrate", *data, "--window", "100", "--windows", "9", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    calibration = Calibration.load(out)
    assert (summary["file"], summary["tokens"], summary["hessian"]) == (str(out), 900, False)
    for row, node in zip(summary["nodes"], calibration.nodes, strict=True):
        assert row["node"] == node
        assert row["tokens"] == calibration.counts(node, "fc1").tolist()
        assert row["never"] == [e for e, n in enumerate(row["tokens"]) if not n]
        assert row["few"]["fc1"] == {
            "enough": 64,
            "experts": [e for e, n in enumerate(row["tokens"]) if n < 64],
        }
    inputs = inputs_of(ir.load(source / "model.onnx"))
    same = calibrate(source, read_feeds(__file__, inputs, window=100, windows=9))
    assert same == calibration


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ""])
def test_the_command_reads_any_kind_of_data(
    suffix: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    tokens = np.frombuffer(Path(__file__).read_bytes()[:320], np.uint8).reshape(5, 64)
    path = tmp_path / f"data{suffix}"
    if suffix == ".npy":
        np.save(path, tokens)
    elif suffix == ".npz":
        np.savez(path, input_ids=tokens)
    elif suffix == ".safetensors":
        save_file({"input_ids": tokens.copy()}, path)
    else:
        path.write_bytes(tokens.astype("<u2").tobytes())
    more = ["--window", "64", "--dtype", "uint16"] if not suffix else []
    assert main(["calibrate", str(source), str(path), str(tmp_path / "out"), *more]) == 0
    capsys.readouterr()
    feeds_ = [{"input_ids": row[None].astype(np.int64)} for row in tokens]
    assert Calibration.load(tmp_path / "out") == calibrate(source, feeds_)


def test_the_command_quantizes_by_a_calibration(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[Call]
) -> None:
    out = tmp_path / "calibration"
    assert main(["calibrate", str(source), __file__, str(out), "--hessian", "--windows", "2"]) == 0
    quantized = ["quantize", str(source), str(tmp_path / "int4"), "--block-size", "32"]
    assert main([*quantized, "--method", "gptq", "--calibration", str(out)]) == 0
    assert "experts saw fewer than 256 tokens and falls back" in capsys.readouterr().out
    assert len(calls) == 2 * 2 * 8
    assert all(known is not None for _, known in calls)
    assert main([*quantized, "--method", "gptq"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qmoe: method='gptq' needs calibration=...; make one with: qmoe cal")
    by_path = quantize(source, tmp_path / "again", method="gptq", calibration=out, block_size=32)
    assert plan(source, method="gptq", calibration=out, block_size=32).rows == by_path.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x"], "the model has no input 'x'; it has input_ids"),
        (["--window", "300"], "ONNX Runtime cannot run the model"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "folder" / "calibration"
    assert main(["calibrate", str(source), __file__, str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.parent.exists()


def test_an_interrupted_command_says_that_it_can_go_on(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("qmoe_rules.calibration._run.observe", interrupted)
    command = ["calibrate", str(source), __file__, str(tmp_path / "out")]
    assert main(command) == 130
    assert "the same command goes on from them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
