"""Saves that are interrupted and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qmoe_rules import save
from tests.saves import planned, snapshot, with_quantizer


class BrokenError(Exception):
    """What an interrupted save raises."""


def stopped(after: int, call: Callable[..., object], *arguments: Any, **named: Any) -> None:
    """Calls something that is stopped when some slabs have been computed."""

    def stop(number: int) -> None:
        if number >= after:
            raise BrokenError

    with pytest.MonkeyPatch.context() as patch:
        with_quantizer(patch, stop)
        with pytest.raises(BrokenError):
            call(*arguments, **named)


def interrupt(model: ir.Model, path: Path, after: int, **options: Any) -> None:
    """Saves a model until some slabs have been computed."""
    stopped(after, save, model, path, workers=1, resume=True, **options)


def hidden(folder: Path) -> Path:
    """Returns the folder that an interrupted save has left."""
    (found,) = folder.glob(".qmoe-resume-*")
    return found


def kept(folder: Path) -> Path:
    """Returns the folder with what it has written."""
    (found,) = (hidden(folder) / "unfinished").iterdir()
    return found


def resumed(model: ir.Model, path: Path, **options: Any) -> int:
    """Saves a model, going on, and returns how many slabs were computed."""
    with pytest.MonkeyPatch.context() as patch:
        calls = with_quantizer(patch, lambda _: None)
        save(model, path, resume=True, **options)
        return calls()


def expected(source: Path, folder: Path, **options: Any) -> dict[str, bytes | None]:
    """Returns what an uninterrupted save writes."""
    save(planned(source), folder / "model.onnx", **options)
    return snapshot(folder)
