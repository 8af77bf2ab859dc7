"""A save that is interrupted goes on to the same bytes, and computes only what is missing."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import QuantizeMoEPass, quantize, save
from tests.interruptions import expected, hidden, interrupt, resumed, stopped
from tests.saves import RECIPE, SLABS, planned, snapshot, tensors, with_quantizer


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("after", [0, 1, 7, 16, SLABS - 1])
def test_interrupted_save_goes_on_to_the_same_bytes(
    source: Path, path: Path, tmp_path: Path, after: int, workers: int
) -> None:
    interrupt(planned(source), path, after)
    assert not path.parent.exists()
    assert resumed(planned(source), path, workers=workers) == SLABS - after
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
    assert not list(tmp_path.rglob(".qmoe-*"))


def test_interrupts_add_up(source: Path, path: Path, tmp_path: Path) -> None:
    for after in (3, 5, 0, 9):
        interrupt(planned(source), path, after, max_shard_size=300_000)
    assert resumed(planned(source), path, max_shard_size=300_000) == SLABS - 17
    assert snapshot(path.parent) == expected(source, tmp_path / "expected", max_shard_size=300_000)


@pytest.mark.parametrize("workers", [1, 4])
def test_no_finished_slab_is_lost_when_the_caller_is_interrupted(
    source: Path, path: Path, workers: int
) -> None:
    done = 0

    def count(number: int) -> None:
        nonlocal done
        done = number + 1

    def stop(written: int, total: int) -> None:
        if written > 0.8 * total:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        with_quantizer(patch, count)
        with pytest.raises(KeyboardInterrupt):
            save(planned(source), path, workers=workers, resume=True, progress=stop)
    assert 0 < done < SLABS
    assert resumed(planned(source), path) == SLABS - done


def test_progress_counts_what_was_written_before(source: Path, path: Path) -> None:
    interrupt(planned(source), path, 20)
    calls: list[tuple[int, int]] = []
    save(planned(source), path, resume=True, progress=lambda *call: calls.append(call))
    done = [count for count, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == (path.with_name("model.onnx.data").stat().st_size,) * 2


def test_old_model_stays_until_the_end(source: Path, path: Path, tmp_path: Path) -> None:
    save(planned(source, bits=8), path)
    old = snapshot(path.parent)
    interrupt(planned(source), path, 9)
    now = snapshot(path.parent)
    assert {name: now[name] for name in old} == old
    assert resumed(planned(source), path) == SLABS - 9
    assert set(snapshot(path.parent)) == {"model.onnx", "model.onnx.1.data"}
    save(planned(source), tmp_path / "expected.onnx")
    assert tensors(path) == tensors(tmp_path / "expected.onnx")


def test_destination_may_come_to_exist_meanwhile(source: Path, path: Path, tmp_path: Path) -> None:
    interrupt(planned(source), path, 9)
    path.parent.mkdir()
    assert resumed(planned(source), path) == SLABS - 9
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
    assert not list(tmp_path.rglob(".qmoe-*"))


def test_old_model_may_go_meanwhile(source: Path, path: Path, tmp_path: Path) -> None:
    """The names of the data files are another matter than their bytes."""
    save(planned(source, bits=8), path)
    interrupt(planned(source), path, 9)
    path.with_name("model.onnx.data").unlink()
    path.unlink()
    assert resumed(planned(source), path) == SLABS - 9
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_model_in_memory_goes_on_too(source: Path, path: Path, tmp_path: Path) -> None:
    def in_memory() -> ir.Model:
        model: ir.Model = ir.from_proto(onnx.load(source))
        return QuantizeMoEPass(**RECIPE)(model).model

    interrupt(in_memory(), path, 11)
    assert resumed(in_memory(), path) == SLABS - 11
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_quantize_goes_on_with_side_files(source: Path, tmp_path: Path) -> None:
    source.with_name("tokenizer.json").write_bytes(b"{}")
    source.with_name("gone.json").write_bytes(b"{}")
    stopped(10, quantize, source.parent, tmp_path / "out", resume=True, workers=1, **RECIPE)
    source.with_name("gone.json").unlink()
    with pytest.MonkeyPatch.context() as patch:
        calls = with_quantizer(patch, lambda _: None)
        quantize(source.parent, tmp_path / "out", resume=True, **RECIPE)
        assert calls() == SLABS - 10
    quantize(source.parent, tmp_path / "expected", **RECIPE)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    assert set(snapshot(tmp_path / "out")) == {"model.onnx", "model.onnx.data", "tokenizer.json"}


def test_what_is_kept_is_no_side_file(source: Path, tmp_path: Path) -> None:
    """A save of the model into its own folder was interrupted; another one is of that folder."""
    stopped(10, quantize, source, source.parent / "int4", resume=True, workers=1, **RECIPE)
    assert list(hidden(source.parent).rglob("journal"))
    quantize(source.parent, tmp_path / "out", resume=True, **RECIPE)
    assert set(snapshot(tmp_path / "out")) == {"model.onnx", "model.onnx.data"}
