"""Bad sources and destinations: the `qmoe` command exits 2, in one line, with nothing written."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.command import Run
from tests.saves import snapshot


def _second_model(source: Path) -> None:
    shutil.copy(source, source.with_name("a.onnx"))
    source.rename(source.with_name("b.onnx"))


def _spoil_inf(source: Path) -> None:
    tensor = ir.load(source).graph.initializers["layers.1.moe.fc2"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(np.float32(np.inf).tobytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.unlink(), "holds no .onnx file"),
        (lambda s: shutil.rmtree(s.parent), "does not exist"),
        (_second_model, "holds 2 .onnx files"),
        (lambda s: s.write_text("a\nb\nc\n"), "ONNX model: "),
        (lambda s: s.write_bytes(b""), "ONNX model: "),
        (lambda s: s.with_name("model.onnx.data").unlink(), "No such file or directory"),
        (lambda s: s.with_name("model.onnx.data").write_bytes(b"short"), "truncated"),
        (_spoil_inf, "'layers.1.moe.fc2', expert 0: row 0 holds an infinity or a NaN"),
    ],
    ids=["no model", "no folder", "two models", "text", "empty", "no data", "short data", "inf"],
)
def test_bad_source_exits_2_with_one_line(
    qmoe: Run, source: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    spoil(source)
    before = snapshot(tmp_path)
    commands: list[list[str | Path]] = [["quantize", tmp_path / "new" / "out"]]
    if spoil is not _spoil_inf:  # only computing finds it
        commands += [["plan"], ["inspect"]]
    for command, *destination in commands:
        status, out, err = qmoe(command, source.parent, *destination)
        assert (status, out) == (2, "")
        assert err.startswith("qmoe: ")
        assert message in err
        assert err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_error_about_a_name_of_two_lines_is_one_line(qmoe: Run, tmp_path: Path) -> None:
    status, out, err = qmoe("plan", tmp_path / "two\nlines.onnx")
    assert (status, out) == (2, "")
    assert "lines.onnx does not exist" in err
    assert err.count("\n") == 1


def test_bad_destination_exits_2_with_one_line(qmoe: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    before = snapshot(tmp_path)
    for destination in ("file", "file/out", "file/out/model.onnx", "source", "source/model.onnx"):
        status, out, err = qmoe("quantize", source, tmp_path / destination)
        assert (status, out) == (2, ""), destination
        assert err.startswith("qmoe: "), destination
        assert err.count("\n") == 1, destination
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "place",
    [
        "source",
        "destination",
    ],
)
def test_name_that_is_too_long_exits_2(qmoe: Run, source: Path, tmp_path: Path, place: str) -> None:
    long = tmp_path / ("x" * 300 + ".onnx")
    arguments = (long, tmp_path / "out") if place == "source" else (source, long)
    status, _, err = qmoe("quantize", *arguments)
    assert status == 2
    assert err.count("\n") == 1
