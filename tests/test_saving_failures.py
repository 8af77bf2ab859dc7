"""A `save` that fails changes nothing, and says in one line what is wrong."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import SaveError, SourceError, quantizers, save, slabs, writing
from tests.saves import SLABS, planned, snapshot

Failure = Callable[[pytest.MonkeyPatch, Path], type[BaseException]]
"""Arranges that a save of the source fails midway, and returns with which error."""


def _nth_slab_fails(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    countdown = iter(range(SLABS - 5, -1, -1))
    rtn = quantizers.METHODS["rtn"]

    def broken(weight: np.ndarray[Any, Any], spec: Any, statistics: Any) -> Any:
        if next(countdown, 0) == 0:
            raise RuntimeError("broken quantizer")
        return rtn(weight, spec, statistics)

    monkeypatch.setitem(quantizers.METHODS, "rtn", broken)
    return RuntimeError


def _last_expert_has_a_nan(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    weight = ir.load(source).graph.initializers["layers.1.moe.fc2"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.seek((weight.offset or 0) + weight.nbytes - 4)
        file.write(np.float32(np.nan).tobytes())
    return SourceError


def _disk_is_full(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    countdown = iter(range(SLABS // 2, -1, -1))
    write = slabs.write_slab

    def full(*arguments: Any) -> int:
        if next(countdown, 0) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(writing, "write_slab", full)
    return SaveError


def _interrupted(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    return KeyboardInterrupt


def _interrupt_late(done: int, total: int) -> None:
    if done > 0.8 * total:
        raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("overwrites", [True, False])
@pytest.mark.parametrize(
    "arrange", [_nth_slab_fails, _last_expert_has_a_nan, _disk_is_full, _interrupted]
)
def test_failed_save_changes_nothing(
    source: Path,
    tiny_fp16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Failure,
    overwrites: bool,
    workers: int,
) -> None:
    destination = tmp_path / "new" / "folders" / "model.onnx"
    if overwrites:
        save(planned(tiny_fp16), destination)
    error = arrange(monkeypatch, source)
    before = snapshot(tmp_path)
    with pytest.raises(error):
        save(
            planned(source),
            destination,
            workers=workers,
            progress=_interrupt_late if error is KeyboardInterrupt else None,
        )
    assert snapshot(tmp_path) == before


def test_nan_is_reported_with_the_weight_and_the_expert(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _last_expert_has_a_nan(monkeypatch, source)
    with pytest.raises(SourceError, match=r"'layers\.1\.moe\.fc2', expert 7: .*NaN"):
        save(planned(source), tmp_path / "out.onnx")


def test_weight_that_disappears_after_planning_is_a_source_error(
    source: Path, tmp_path: Path
) -> None:
    model = planned(source)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    source.with_name("model.onnx.data").unlink()
    with pytest.raises(SourceError, match=r"cannot read weight 'layers\..\.moe\.fc"):
        save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_full_disk_is_noticed_before_anything_is_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2000, 1000, 1000))
    monkeypatch.delitem(quantizers.METHODS, "rtn")
    before = snapshot(tmp_path)
    model = ir.load(source)
    with pytest.raises(SaveError, match=r"4\.09 MB needed, 1 kB free"):
        save(model, tmp_path / "new" / "out" / "model.onnx")
    assert snapshot(tmp_path) == before


def test_destination_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    before = snapshot(tmp_path)
    for destination in ("file/model.onnx", "file/deep/model.onnx"):
        with pytest.raises(SaveError, match=r"cannot write to .*/file(/deep)?: "):
            save(planned(source), tmp_path / destination)
    assert snapshot(tmp_path) == before


def test_destination_that_is_a_folder_is_refused_without_a_trace(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "model.onnx").mkdir(parents=True)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError):
        save(planned(source), tmp_path / "out" / "model.onnx")
    assert snapshot(tmp_path) == before


def test_longest_possible_folder_name_is_a_destination(source: Path, tmp_path: Path) -> None:
    save(planned(source), tmp_path / "new" / ("x" * 255) / "model.onnx")
    assert set(snapshot(tmp_path / "new" / ("x" * 255))) == {"model.onnx", "model.onnx.data"}


def test_file_name_that_is_too_long_is_a_save_error(source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match="File name too long"):
        save(planned(source), tmp_path / "out" / f"{'x' * 250}.onnx")
    assert snapshot(tmp_path) == before


def test_parents_go_again_when_the_folder_cannot_be_made(source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(SaveError):
        save(planned(source), tmp_path / "new" / ("x" * 256) / "model.onnx")
    assert snapshot(tmp_path) == before


def test_loop_of_symlinks_is_a_save_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SaveError):
        save(planned(source), tmp_path / "loop" / "model.onnx")
