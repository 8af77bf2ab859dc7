"""Dask: clusters that compute the slabs, that restart or lose workers, or are not there."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import pytest

from qmoe_rules import ConfigError, SaveError, quantize, quantizers, save
from qmoe_rules.cli import main
from qmoe_rules.integrations import dask
from tests.saves import OPTIONS, RECIPE, planned, snapshot
from tests.workers import dask_cluster, dies_in_the_tenth_slab

# Dask warns of what a busy machine does to it, and of connections that a test has cut.
pytestmark = pytest.mark.filterwarnings("default")


def _never_finishes() -> None:
    quantizers.METHODS["rtn"] = lambda *_: threading.Event().wait()  # type: ignore[assignment]


class Restarting(Executor):
    """Restarts a Dask cluster after the fourth piece of work."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._executor = client.get_executor()
        self._calls = iter(range(4))

    def submit(self, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        future: Future[Any] = self._executor.submit(call, *arguments, **named)
        if next(self._calls) == 3:
            self._client.restart()
        return future


def test_restart_of_the_cluster_fails_the_save_cleanly(
    source: Path, tmp_path: Path, client: Any
) -> None:
    client.run(_never_finishes)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match="a worker was lost"):
        save(planned(source), tmp_path / "out.onnx", executor=Restarting(client), workers=2)
    assert snapshot(tmp_path) == before


def test_slab_of_a_killed_dask_worker_is_done_again(
    source: Path, tmp_path: Path, client: Any
) -> None:
    workers = list(client.run(os.getpid).values())
    kills = iter(workers[:1])

    def kill(done: int, total: int) -> None:
        if done > total / 2 and (worker := next(kills, None)):
            os.kill(worker, signal.SIGKILL)

    save(
        planned(source),
        tmp_path / "out" / "model.onnx",
        executor=client.get_executor(),
        progress=kill,
    )
    assert next(kills, None) is None
    save(planned(source), tmp_path / "expected" / "model.onnx")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")


def test_dask_worker_that_dies_of_a_slab_fails_the_save(source: Path, tmp_path: Path) -> None:
    """In a cluster of its own, whose worker would go on dying."""
    before = snapshot(tmp_path)
    with dask_cluster(1) as cluster, cluster.get_client() as client:
        cluster.scheduler.allowed_failures = 0
        client.run(dies_in_the_tenth_slab)
        with pytest.raises(SaveError, match="a worker was lost"):
            save(planned(source), tmp_path / "out.onnx", executor=client.get_executor())
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("client")
def test_command_line_uses_the_cluster(
    tiny: Path, tmp_path: Path, cluster: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny), str(tmp_path / "out"), *OPTIONS]
    assert main([*command, "--dask", cluster.scheduler_address]) == 0
    assert capsys.readouterr().err == ""
    quantize(tiny, tmp_path / "expected", **RECIPE)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")


@pytest.mark.usefixtures("client")
def test_cluster_says_how_many_threads_it_has(cluster: Any) -> None:
    with dask.cluster(cluster.scheduler_address) as (executor, workers):
        assert workers == 2
        assert executor.submit(sum, [1, 2]).result() == 3


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://x", "no port"])
def test_address_without_a_scheduler_is_a_config_error(address: str) -> None:
    pytest.importorskip("distributed")
    with pytest.raises(ConfigError, match="no Dask scheduler at"), dask.cluster(address, 0.2):
        pass


def test_unreachable_cluster_exits_2_with_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("distributed")
    before = snapshot(tmp_path)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dask", "no port"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("qmoe: there is no Dask scheduler at no port: ")
    assert snapshot(tmp_path) == before


def test_missing_dask_says_what_to_install(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["quantize", str(source), str(tmp_path / "out"), "--dask", "tcp://x:1"]) == 2
    assert "pip install 'qmoe-rules[dask]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_cluster_without_workers_is_a_config_error() -> None:
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=0, dashboard_address=":0") as empty,
        pytest.raises(ConfigError, match="has no workers"),
        dask.cluster(empty.scheduler_address, 0.2),
    ):
        pass


class Workers:
    """A client of workers that answer as they are told."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    def wait_for_workers(self, count: int, timeout: float) -> None:
        pass

    def run(self, *_call: object, on_error: str) -> dict[str, object]:
        return {"tcp://far": self._answer}


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("0.0.1", "tcp://far has qmoe-rules 0.0.1, and here is"),
        (ModuleNotFoundError("no metadata"), "tcp://far has no qmoe-rules: no metadata"),
    ],
)
def test_workers_of_another_version_are_refused(answer: object, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        dask._check_workers(Workers(answer), "tcp://near", 1)
