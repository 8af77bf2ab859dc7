"""Measured errors: they are of what was written, expert by expert, and cost nothing unasked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import Report, plan, quantize
from qmoe_rules import measuring as module
from qmoe_rules.cli import main
from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.measuring import relative_error
from qmoe_rules.report import SKIPPED
from tests.moe_models import Experts, layers, quantized


def floats(path: Path, node: str, projection: str) -> np.ndarray[Any, Any]:
    """Returns the float weights [E, N, K] of a node."""
    found = next(each for each in ir.load(path).graph if each.name == node)
    value = found.inputs[2 if projection == "fc1" else 4]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def errors(report: Report) -> dict[tuple[str, str], tuple[float, ...]]:
    return {
        (row.node, each.projection): each.errors for row in report.rows for each in row.projections
    }


def test_the_error_of_every_expert_is_that_of_its_weights(tiny_fp16: Path, tmp_path: Path) -> None:
    report = quantize(
        tiny_fp16,
        tmp_path / "out",
        block_size=32,
        overrides=["layers.1.*:bits=8,block_size=0"],
        measured=True,
    )
    found = errors(report)
    assert len(found) == 4
    for (node, projection), measured in found.items():
        name, size = ("int4", 32) if node == "layers.0.moe" else ("int8", 0)
        weight = floats(tiny_fp16, node, projection)
        meant = quantized(weight, Spec(FORMATS[name], size))
        wide = weight.astype(np.float64)
        lost = np.linalg.norm(meant - wide, axis=(1, 2)) / np.linalg.norm(wide, axis=(1, 2))
        np.testing.assert_allclose(measured, lost, rtol=1e-5)


def test_it_is_the_written_file_that_is_measured(
    tiny_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = errors(quantize(tiny_fp16, tmp_path / "good", block_size=32, measured=True))

    def spoiled(planned: ir.Model, written: ir.Model, *rest: Any, **options: Any) -> None:
        node = next(each for each in written.graph if each.op_type == "QMoE")
        codes = node.inputs[2]
        assert codes is not None
        tensor = codes.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        with Path(tensor.path).open("r+b") as file:
            file.seek((tensor.offset or 0) + 3 * tensor.nbytes // 8)  # the fourth expert of eight
            file.write(b"\x00" * 64)
        module.measure(planned, written, *rest, **options)

    monkeypatch.setattr("qmoe_rules.pipeline.measure", spoiled)
    bad = errors(quantize(tiny_fp16, tmp_path / "bad", block_size=32, measured=True))
    first = ("layers.0.moe", "fc1")
    assert {key for key in good if good[key] != bad[key]} == {first}
    differ = [
        e for e, pair in enumerate(zip(good[first], bad[first], strict=True)) if len({*pair}) > 1
    ]
    assert differ == [3]
    assert bad[first][3] > good[first][3]


def test_nothing_is_measured_unasked(
    tiny_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmoe_rules.pipeline.measure", None)  # calling it would fail
    assert set(errors(quantize(tiny_fp16, tmp_path / "out")).values()) == {()}
    assert set(errors(plan(tiny_fp16)).values()) == {()}


def test_measuring_changes_no_byte_and_nothing_else_in_the_report(
    tiny_fp16: Path, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"block_size": 32, "nodes_to_exclude": ["layers.1.*"]}
    plain = quantize(tiny_fp16, tmp_path / "plain", **fields)
    measured = quantize(tiny_fp16, tmp_path / "measured", **fields, measured=True)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / "plain" / name).read_bytes() == (
            tmp_path / "measured" / name
        ).read_bytes()
    assert measured.rows[1].status == SKIPPED
    assert [each.errors for each in measured.rows[1].projections] == [(), ()]
    without = [
        dataclasses.replace(
            row, projections=tuple(dataclasses.replace(p, errors=()) for p in row.projections)
        )
        for row in measured.rows
    ]
    assert without == plain.rows


def test_a_weight_that_nodes_share_is_measured_for_each(tmp_path: Path) -> None:
    model = layers(2, Experts())
    first, second = (node for node in model.graph if node.op_type == "MoE")
    for index in (2, 4):
        second.replace_input_with(index, first.inputs[index])
    ir.save(model, tmp_path / "model.onnx")
    told: list[tuple[int, int]] = []
    report = quantize(
        tmp_path / "model.onnx",
        tmp_path / "out",
        bits=8,
        measured=True,
        progress=lambda done, total: told.append((done, total)),
    )
    one, two = ([each.errors for each in row.projections] for row in report.rows)
    assert one == two
    assert all(one)
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1]


def test_an_interruption_while_measuring_says_that_the_model_is_there(
    tiny_fp16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("qmoe_rules.pipeline.measure", interrupt)
    page = tmp_path / "page.html"
    command = ["quantize", str(tiny_fp16), str(tmp_path / "out"), "--resume", "--html", str(page)]
    assert main(command) == 130
    written = tmp_path / "out" / "model.onnx"
    assert capsys.readouterr().err == f"qmoe: interrupted while measuring; {written} is written\n"
    assert written.is_file()
    assert not page.exists()


def test_an_error_while_measuring_says_that_the_model_is_there(
    tiny_fp16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise SourceError("weight 'w': gone")

    monkeypatch.setattr("qmoe_rules.pipeline.measure", fail)
    written = tmp_path / "out" / "model.onnx"
    with pytest.raises(SourceError) as told:
        quantize(tiny_fp16, tmp_path / "out", measured=True)
    assert str(told.value) == f"{written} is written, but not measured: weight 'w': gone"
    assert written.is_file()


def test_relative_error_of_a_zero_weight_is_absolute() -> None:
    zero = np.zeros((2, 3), np.float16)
    assert relative_error(zero, np.zeros((2, 3), np.float32)) == 0
    assert relative_error(zero, np.full((2, 3), 2, np.float32)) == pytest.approx(24**0.5)
