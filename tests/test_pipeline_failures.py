"""A `quantize` that fails writes nothing, and `strict` fails before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qmoe_rules import (
    ConfigError,
    SourceError,
    UnsupportedNodeError,
    pipeline,
    plan,
    quantize,
    quantizers,
)
from tests.saves import RECIPE, snapshot


def test_recipe_errors_come_before_anything_is_read_or_written(tmp_path: Path) -> None:
    for fields in ({"bits": 5}, {"bitz": 4}, {"block_size": 24}):
        with pytest.raises(ConfigError):
            plan(tmp_path / "absent.onnx", **fields)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            quantize(tmp_path / "absent.onnx", tmp_path / "out", **fields)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == {}


def test_source_errors_come_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        quantize(tmp_path / "absent.onnx", tmp_path / "out")
    assert snapshot(tmp_path) == {}


def test_strict_raises_before_writing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "stage_for", None)
    before = snapshot(tmp_path)
    with pytest.raises(UnsupportedNodeError, match=r"1 MoE .*excluded by the rec.*layers\.1\.moe"):
        quantize(model_folder, tmp_path / "out", strict=True, nodes_to_exclude=["layers.1.*"])
    assert snapshot(tmp_path) == before


def test_strict_writes_when_every_node_is_converted(model_folder: Path, tmp_path: Path) -> None:
    report = quantize(model_folder, tmp_path / "out", strict=True, **RECIPE)
    assert report.count("converted") == 2
    assert (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_failed_quantization_leaves_no_side_file_behind(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        (tmp_path / "new" / "out").mkdir(parents=True)
        (tmp_path / "new" / "out" / "mine.txt").write_text("old")

    def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setitem(quantizers.METHODS, "rtn", broken)
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        quantize(model_folder, tmp_path / "new" / "out", **RECIPE)
    assert snapshot(tmp_path) == before
