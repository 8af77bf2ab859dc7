"""`calibrate` within bounded memory, and a run that is interrupted and goes on."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qmoe_rules import calibrate
from tests.calibrations import SMALL, residual, several
from tests.moe_models import Experts, layers, single


def test_memory_does_not_grow_with_the_data() -> None:
    """80 more feeds hold 10.5 MB; of each token only its experts and their weights are kept."""
    experts = Experts(experts=4, hidden=512, inter=64)

    def peak(count: int) -> int:
        feeds = (Experts(**{**vars(experts), "seed": s}).feeds((64,)) for s in range(count))
        tracemalloc.start()
        calibrate(single(experts), feeds, hessian=True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # imports and the like
    assert peak(160) - peak(80) < 2 << 20


class _StopError(BaseException):
    """As an interruption from outside."""


def stopping(after: int | None) -> tuple[list[int], Any]:
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        if len(told) - 1 == after:
            raise _StopError
        assert done <= total

    return told, progress


def test_a_run_can_be_interrupted_anywhere_and_goes_on(tmp_path: Path) -> None:
    model, feeds = residual(), [{"x": SMALL.feeds((2, 6))["x"]}, {"x": SMALL.feeds((1, 9))["x"]}]
    whole = tmp_path / "whole"
    told, progress = stopping(None)
    calibrate(model, feeds, whole, hessian=True, progress=progress)
    steps = 2 * (2 + 4)  # of both stages: two feeds, four experts
    assert told == list(range(steps + 1))
    path = tmp_path / "folder" / "calibration"
    for after in range(steps + 1):
        _, progress = stopping(after)
        with pytest.raises(_StopError):
            calibrate(model, feeds, path, hessian=True, progress=progress)
        assert not path.exists()
        told, progress = stopping(None)
        calibrate(model, feeds, path, hessian=True, progress=progress)
        assert told[0] == (6 if after > 6 else 0)
        assert told[-1] == steps
        assert path.read_bytes() == whole.read_bytes()
        assert list(path.parent.iterdir()) == [path]
        path.unlink()


@pytest.mark.parametrize("change", ["data", "hessian", "model", "resume", "broken", "cut"])
def test_what_was_interrupted_is_not_used_for_something_else(change: str, tmp_path: Path) -> None:
    model, feeds, path = layers(3, SMALL), several(SMALL, 2), tmp_path / "calibration"
    _, progress = stopping(9)
    with pytest.raises(_StopError):
        calibrate(model, feeds, path, progress=progress)
    options: dict[str, Any] = {"hessian": change == "hessian", "resume": change != "resume"}
    if change == "data":
        feeds = feeds[::-1]
    elif change == "model":
        model = layers(3, SMALL, k=2)
    elif change == "broken":
        (state,) = tmp_path.rglob("state.json")
        state.write_text(state.read_text()[:-9])
    elif change == "cut":
        (statistics,) = tmp_path.rglob("statistics")
        statistics.write_bytes(statistics.read_bytes()[:-9])
    told, progress = stopping(None)
    calibrate(model, feeds, path, progress=progress, **options)
    assert told[0] == 0
    calibrate(model, feeds, tmp_path / "fresh", **options)
    assert path.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_a_tape_that_is_gone_is_run_again(tmp_path: Path) -> None:
    model, feeds, path = layers(3, SMALL), several(SMALL, 2), tmp_path / "calibration"
    _, progress = stopping(9)
    with pytest.raises(_StopError):
        calibrate(model, feeds, path, progress=progress)
    for tape in tmp_path.rglob("tape-*"):
        tape.unlink()
    told, progress = stopping(None)
    calibrate(model, feeds, path, progress=progress)
    assert told[0] == 0


def test_what_a_killed_run_leaves_is_removed(tmp_path: Path) -> None:
    model, feeds, path = layers(3, SMALL), several(SMALL, 2), tmp_path / "calibration"
    kept = set()
    for after in (9, 1):  # in the third of three layers
        _, progress = stopping(after)
        with pytest.raises(_StopError):
            calibrate(model, feeds, path, progress=progress)
        (state,) = tmp_path.rglob("state.json")
        assert not (state.parent / "segment-killed").exists()
        kept.add(len(list(state.parent.iterdir())))
        (state.parent / "segment-killed").mkdir()
        (state.parent / "tape-killed").touch()
    assert len(kept) == 1
