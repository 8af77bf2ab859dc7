"""Other work begins anew, and workers or executors of the old work spoil nothing."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import QuantizeMoEPass, SourceError, save, saving
from qmoe_rules.extents import lay_out
from qmoe_rules.journal import fingerprint
from qmoe_rules.slabs import SlabWork
from tests.interruptions import expected, interrupt, kept, resumed
from tests.moe_models import Experts, Graph, inputs_of
from tests.saves import RECIPE, SLABS, planned, snapshot

# Other work begins anew.


def _source_is_newer(source: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    status = source.with_name("model.onnx.data").stat()
    os.utime(source.with_name("model.onnx.data"), ns=(0, status.st_mtime_ns + 1))


def _source_is_another(source: Path, _monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ir.load(source).graph.initializers["layers.0.moe.fc1"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.seek(weight.offset or 0)
        file.write(np.ones(1000, np.float32).tobytes())


def _library_is_another(_source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "version", lambda _name: "9.9.9")


@pytest.mark.parametrize("change", [_source_is_newer, _source_is_another, _library_is_another])
def test_other_source_or_library_begins_anew(
    source: Path,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[Path, pytest.MonkeyPatch], None],
) -> None:
    interrupt(planned(source), path, 20)
    change(source, monkeypatch)
    assert resumed(planned(source), path) == SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


@pytest.mark.parametrize(
    "recipe",
    [
        {"bits": 8, "block_size": 32},
        {"bits": 4, "block_size": 32, "symmetric": False},
        {"bits": 4, "block_size": 32, "layout": "cutlass_sm80", "target": "cuda"},
        {"bits": 4, "block_size": 64},
    ],
    ids=str,
)
def test_other_recipe_begins_anew(
    tiny_fp16: Path, path: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    interrupt(planned(tiny_fp16), path, 20)
    before = kept(tmp_path)
    interrupt(planned(tiny_fp16, **recipe), path, 10)
    assert kept(tmp_path) != before
    assert resumed(planned(tiny_fp16, **recipe), path) == SLABS - 10
    save(planned(tiny_fp16, **recipe), tmp_path / "expected" / "model.onnx")
    assert snapshot(path.parent) == snapshot(tmp_path / "expected")


def test_other_shards_begin_anew(source: Path, path: Path, tmp_path: Path) -> None:
    interrupt(planned(source), path, 20)
    assert resumed(planned(source), path, max_shard_size=300_000) == SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected", max_shard_size=300_000)


def print_of(*transposes: int) -> str:
    """Returns the fingerprint of a MoE whose first weight [E, N, N] has Transposes before it."""
    experts, graph = Experts(hidden=64, inter=64, activation="silu", bias=False), Graph()
    x, router_probs = inputs_of(graph, experts)
    arrays = experts.arrays()
    weights = graph.weights(arrays)
    for number in transposes:
        fc1, perm = weights["fc1"], [0, 2, 1]
        weights["fc1"] = graph.op("Transpose", fc1, out=f"t{number}", like=fc1, perm=perm)
    y = graph.moe(x, router_probs, weights, **experts.attributes)
    return fingerprint(lay_out(QuantizeMoEPass(**RECIPE)(graph.model(y)).model), "1")


def test_other_way_of_reading_the_same_tensors_is_other_work() -> None:
    assert print_of() == print_of()
    assert print_of() == print_of(1, 2)
    assert print_of() != print_of(1)


def test_source_that_is_gone_is_a_source_error(source: Path, path: Path, tmp_path: Path) -> None:
    model = planned(source)
    shutil.rmtree(source.parent)
    before = snapshot(tmp_path)
    with pytest.raises(SourceError, match="cannot read tensor"):
        save(model, path, resume=True)
    assert snapshot(tmp_path) == before


# Workers that outlive their save, and executors that remember.


class Recording(Executor):
    """Computes at once, and remembers what it was given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def submit(self, call: Any, /, *arguments: Any, **_named: Any) -> Future[Any]:
        self.calls.append((call, arguments))
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def test_worker_of_an_interrupted_save_does_not_write_into_the_next(
    source: Path, path: Path, tmp_path: Path
) -> None:
    """A slow worker may go on after its save has failed: it finds no file of other work."""
    recording = Recording()
    interrupt(planned(source, bits=8), path, 20, executor=recording)
    late = [(call, arguments) for call, arguments in recording.calls if isinstance(call, SlabWork)]

    def write_late(_done: int, _total: int) -> None:
        for call, arguments in late:
            with pytest.raises(FileNotFoundError):
                call(*arguments)

    save(planned(source), path, resume=True, progress=write_late)
    assert late
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


class Remembering(Recording):
    """Answers from memory what it has been asked before, as Dask does."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[bytes, Future[Any]] = {}

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        key = pickle.dumps((call, arguments))
        if key not in self._known:
            self._known[key] = super().submit(call, *arguments, **named)
        return self._known[key]


def test_executor_that_remembers_does_not_answer_for_bytes_that_are_gone(
    source: Path, path: Path, tmp_path: Path
) -> None:
    executor = Remembering()
    interrupt(planned(source), path, 20, executor=executor)
    for file in kept(tmp_path).glob("shard-*"):
        file.write_bytes(bytes(file.stat().st_size))
    assert resumed(planned(source), path, executor=executor) == SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
