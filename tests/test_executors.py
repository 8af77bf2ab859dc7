"""Whoever computes the slabs, the bytes are the same; a worker that dies spoils nothing."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import (
    CancelledError,
    Executor,
    Future,
    ProcessPoolExecutor,
    ThreadPoolExecutor,
)
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript import rewriter

from qmoe_rules import QuantizeMoEPass, SaveError, SourceError, moe_to_qmoe_rules, quantize, save
from qmoe_rules.cli import main
from qmoe_rules.lazy import PlannedTensor
from tests.moe_models import Experts, Graph, inputs_of
from tests.saves import (
    OPTIONS,
    RECIPE,
    SLABS,
    planned,
    saved_by_onnx_ir,
    snapshot,
    tensors,
    with_quantizer,
)
from tests.workers import dies_in_the_tenth_slab

# Dask warns of what a busy machine does to it, and of connections that a test has cut.
pytestmark = pytest.mark.filterwarnings("default")


def process_pool(workers: int = 2, initializer: Callable[..., None] | None = None) -> Executor:
    return ProcessPoolExecutor(workers, get_context("spawn"), initializer)


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with process_pool() as pool:
        yield pool


@pytest.fixture(params=["threads", "processes", "dask"])
def executor(request: pytest.FixtureRequest) -> Iterator[Executor]:
    if request.param == "threads":
        with ThreadPoolExecutor(3) as pool:
            yield pool
    elif request.param == "processes":
        yield request.getfixturevalue("processes")
    else:
        yield request.getfixturevalue("client").get_executor()


# The same bytes.


@pytest.mark.parametrize("workers", [1, None])
def test_executors_write_the_bytes_of_onnx_ir(
    tiny: Path, tmp_path: Path, executor: Executor, workers: int | None
) -> None:
    expected = saved_by_onnx_ir(planned(tiny), tmp_path / "expected" / "model.onnx")
    save(planned(tiny), tmp_path / "saved" / "model.onnx", executor=executor, workers=workers)
    assert snapshot(tmp_path / "saved") == snapshot(expected.parent)


def test_weights_in_memory_are_sent_along(tiny: Path, tmp_path: Path, executor: Executor) -> None:
    expected = saved_by_onnx_ir(planned(tiny), tmp_path / "expected" / "model.onnx")
    model = QuantizeMoEPass(**RECIPE)(ir.from_proto(onnx.load(tiny))).model
    save(model, tmp_path / "saved" / "model.onnx", executor=executor)
    assert snapshot(tmp_path / "saved") == snapshot(expected.parent)


def transposed_model(path: Path) -> Path:
    """Saves a model whose first weight lies transposed in the file."""
    experts, graph = Experts(), Graph()
    x, router_probs = inputs_of(graph, experts)
    arrays = experts.arrays()
    fc1 = arrays.pop("fc1")
    stored = graph.weight("fc1_stored", np.ascontiguousarray(fc1.swapaxes(1, 2)))
    weights = graph.weights(arrays)
    weights["fc1"] = graph.op("Transpose", stored, out="fc1", like=fc1, perm=[0, 2, 1])
    y = graph.moe(x, router_probs, weights, **experts.attributes)
    return saved_by_onnx_ir(graph.model(y), path)


def test_weights_that_are_rearranged_are_sent_along(tmp_path: Path, processes: Executor) -> None:
    path = transposed_model(tmp_path / "source" / "model.onnx")
    expected = saved_by_onnx_ir(planned(path), tmp_path / "expected" / "model.onnx")
    save(planned(path), tmp_path / "saved" / "model.onnx", executor=processes)
    assert snapshot(tmp_path / "saved") == snapshot(expected.parent)


@pytest.mark.parametrize(
    "recipe",
    [
        {"bits": 8},
        {"bits": 4, "block_size": 32, "layout": "cutlass_sm80", "target": "cuda"},
        {"bits": 4, "block_size": 32, "symmetric": False},
        {"bits": 2, "block_size": 64},
        {"format": "mxfp4", "target": "cpu"},
        {"format": "fp8", "target": "webgpu"},
    ],
    ids=str,
)
def test_work_of_every_kind_survives_the_way_to_another_process(
    tiny_fp16: Path, recipe: dict[str, Any]
) -> None:
    constants = (v.const_value for v in planned(tiny_fp16, **recipe).graph.initializers.values())
    projections = {each.projection for each in constants if isinstance(each, PlannedTensor)}
    assert len(projections) == 4
    for projection in projections:
        here, work = projection.slab(3), projection.portable_work(3)
        assert not isinstance(work.source, np.ndarray)
        there = pickle.loads(pickle.dumps(work)).compute()
        assert {part: array.tobytes() for part, array in there.items()} == {
            part: array.tobytes() for part, array in here.items()
        }


def test_every_route_writes_the_same_tensors(
    tiny: Path, tmp_path: Path, processes: Executor
) -> None:
    save(planned(tiny), tmp_path / "save.onnx", workers=1)
    expected = tensors(tmp_path / "save.onnx")
    by_onnx_ir: tuple[dict[str, Any], ...] = (
        {},
        {"max_workers": 3},
        {"max_shard_size_bytes": 300_000},
        {"max_shard_size_bytes": 1, "max_workers": 3},
    )
    for number, options in enumerate(by_onnx_ir):
        path = tmp_path / f"ir{number}" / "model.onnx"
        assert tensors(saved_by_onnx_ir(planned(tiny), path, **options)) == expected
    saves: dict[str, dict[str, Any]] = {
        "workers": {"workers": 3},
        "processes": {"executor": processes},
        "shards": {"max_shard_size": 300_000},
        "resumable": {"resume": True, "workers": 2},
        "everything": {"executor": processes, "max_shard_size": 1, "resume": True},
    }
    for name, options in saves.items():
        save(planned(tiny), tmp_path / name / "model.onnx", **options)
        quantize(tiny, tmp_path / f"quantize-{name}", **RECIPE, **options)
        assert tensors(tmp_path / name / "model.onnx") == expected
        assert snapshot(tmp_path / f"quantize-{name}") == snapshot(tmp_path / name)
    rewritten = rewriter.rewrite(ir.load(tiny), [*moe_to_qmoe_rules(**RECIPE)])
    save(rewritten, tmp_path / "rewrite.onnx", executor=processes)
    assert tensors(tmp_path / "rewrite.onnx") == expected
    options_of_all = ["--workers", "2", "--max-shard-size", "300kB", "--resume"]
    assert main(["quantize", str(tiny), str(tmp_path / "cli"), *OPTIONS, *options_of_all]) == 0
    assert snapshot(tmp_path / "cli") == snapshot(tmp_path / "shards")


def test_progress_is_told_by_the_caller_alone(
    source: Path, tmp_path: Path, executor: Executor
) -> None:
    calls: list[tuple[int, int]] = []
    save(
        planned(source),
        tmp_path / "out" / "model.onnx",
        executor=executor,
        progress=lambda done, total: calls.append((done, total)),
    )
    done = [count for count, _ in calls]
    assert done == sorted(set(done))
    assert calls[-1] == ((tmp_path / "out" / "model.onnx.data").stat().st_size,) * 2


class Counting(Executor):
    """Hands work on to threads, and counts what is under way."""

    def __init__(self) -> None:
        self.most = 0
        self._threads = ThreadPoolExecutor(1)
        self._futures: list[Future[Any]] = []

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self._futures.append(self._threads.submit(call, *arguments, **named))
        self.most = max(self.most, sum(not future.done() for future in self._futures))
        return self._futures[-1]


@pytest.mark.parametrize("workers", [1, 3])
def test_work_under_way_is_bounded(source: Path, tmp_path: Path, workers: int) -> None:
    executor = Counting()
    save(planned(source), tmp_path / "out.onnx", executor=executor, workers=workers)
    assert 1 <= executor.most <= 2 * workers


# Workers that fail.


def last_expert_is_nan(source: Path) -> None:
    weight = ir.load(source).graph.initializers["layers.1.moe.fc2"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.seek((weight.offset or 0) + weight.nbytes - 4)
        file.write(np.float32(np.nan).tobytes())


@pytest.mark.parametrize("resume", [False, True])
def test_bad_weight_is_named_whoever_reads_it(
    source: Path, tmp_path: Path, executor: Executor, resume: bool
) -> None:
    last_expert_is_nan(source)
    path = tmp_path / "out" / "model.onnx"
    with pytest.raises(SourceError, match=r"'layers\.1\.moe\.fc2', expert 7: .*NaN"):
        save(planned(source), path, executor=executor, resume=resume)
    assert not path.parent.exists()
    assert bool(list(tmp_path.glob(".qmoe-*"))) is resume


def test_weights_that_vanish_are_a_source_error(
    source: Path, tmp_path: Path, processes: Executor
) -> None:
    model = planned(source)
    data = source.with_name("model.onnx.data")

    def cut(done: int, total: int) -> None:
        if done > 0.75 * total:
            with data.open("r+b") as file:
                file.truncate(100)

    before = snapshot(tmp_path)
    with pytest.raises(SourceError, match=r"cannot (be )?read"):
        save(model, tmp_path / "out.onnx", executor=processes, progress=cut)
    assert snapshot(tmp_path).keys() == before.keys()


@pytest.mark.parametrize("overwrites", [False, True])
def test_dead_process_fails_the_save_and_changes_nothing(
    source: Path, tmp_path: Path, overwrites: bool
) -> None:
    path = tmp_path / "out" / "model.onnx"
    if overwrites:
        save(planned(source, bits=8), path)
    before = snapshot(tmp_path)
    with (
        process_pool(1, dies_in_the_tenth_slab) as pool,
        pytest.raises(SaveError, match=r"a worker was lost .*terminated abruptly"),
    ):
        save(planned(source), path, executor=pool)
    assert snapshot(tmp_path) == before


def test_what_a_dead_process_has_done_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out" / "model.onnx"
    with process_pool(1, dies_in_the_tenth_slab) as pool, pytest.raises(SaveError):
        save(planned(source), path, executor=pool, resume=True)
    calls = with_quantizer(monkeypatch, lambda _: None)
    save(planned(source), path, resume=True)
    assert calls() == SLABS - 9
    save(planned(source), tmp_path / "expected" / "model.onnx")
    assert snapshot(path.parent) == snapshot(tmp_path / "expected")


def test_broken_pool_is_a_save_error(source: Path, tmp_path: Path) -> None:
    pool = process_pool(1)
    before = snapshot(tmp_path)
    with pool:
        assert pool.submit(os._exit, 1).exception()
        with pytest.raises(SaveError, match="a worker was lost"):
            save(planned(source), tmp_path / "new" / "model.onnx", executor=pool)
    assert snapshot(tmp_path) == before


class Losing(Executor):
    """Cancels what it was given, as an executor does that is stopped."""

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.cancel()
        future.set_running_or_notify_cancel()
        return future


def test_cancelled_work_is_a_save_error(source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match=r"a worker was lost .*CancelledError") as caught:
        save(planned(source), tmp_path / "out.onnx", executor=Losing())
    assert isinstance(caught.value.__cause__, CancelledError)
    assert snapshot(tmp_path) == before


def test_worker_that_does_not_see_the_folder_is_a_save_error(source: Path, tmp_path: Path) -> None:
    class Elsewhere(ThreadPoolExecutor):
        def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            _, *others = arguments
            return super().submit(call, tmp_path / "elsewhere", *others, **named)

    before = snapshot(tmp_path)
    with Elsewhere(1) as pool, pytest.raises(SaveError, match=r"cannot write to .*No such file"):
        save(planned(source), tmp_path / "out.onnx", executor=pool)
    assert snapshot(tmp_path) == before


def test_interrupt_waits_for_the_work_under_way(source: Path, tmp_path: Path) -> None:
    """Nobody writes any more when `save` has returned."""

    def interrupt(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    executor = Counting()
    before = snapshot(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        save(planned(source), tmp_path / "out.onnx", executor=executor, progress=interrupt)
    assert all(future.done() for future in executor._futures)
    assert snapshot(tmp_path) == before
