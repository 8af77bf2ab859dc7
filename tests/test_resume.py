"""A save that is interrupted goes on to the same bytes, and computes only what is missing."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import QuantizeMoEPass, SaveError, SourceError, quantize, save, saving
from qmoe_rules.extents import lay_out
from qmoe_rules.journal import Journal, fingerprint
from qmoe_rules.slabs import Place, SlabWork
from qmoe_rules.writing import write_data
from tests.moe_models import Experts, Graph, inputs_of
from tests.saves import (
    OPTIONS,
    RECIPE,
    SLABS,
    copied,
    planned,
    snapshot,
    tensors,
    with_quantizer,
)


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    return copied(tiny_fp32, tmp_path / "source")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.onnx"


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


def test_nothing_is_kept_of_a_source_that_was_cut_off(
    source: Path, path: Path, tmp_path: Path
) -> None:
    """Slabs of lost pages have checksums too; the source may come back as if nothing had been."""
    data, number = source.with_name("model.onnx.data"), SLABS // 2
    content, status = data.read_bytes(), data.stat()

    def cut_off(now: int) -> None:
        if now == number:
            os.truncate(data, 5000)

    with pytest.MonkeyPatch.context() as patch:
        with_quantizer(patch, cut_off)
        with pytest.raises(SourceError):
            save(planned(source), path, workers=2, resume=True)
    assert not list(tmp_path.rglob(".qmoe-*"))
    with data.open("r+b") as file:
        file.write(content)
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
    save(planned(source), path, resume=True)
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_slab_that_may_be_wrong_is_not_in_the_journal(source: Path, tmp_path: Path) -> None:
    def lost() -> None:
        raise SourceError("lost")

    with Journal(tmp_path) as journal, pytest.raises(SourceError, match="lost"):
        write_data(lay_out(planned(source)), tmp_path, workers=2, journal=journal, check=lost)
    assert (tmp_path / "journal").read_bytes() == b""


# It goes on.


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


# What is kept is proven.


@pytest.mark.parametrize("part", range(8))
def test_byte_that_has_changed_is_written_again(
    source: Path, path: Path, tmp_path: Path, part: int
) -> None:
    """One byte of the weights or of the scales of the first or the last expert of a layer."""
    interrupt(planned(source), path, SLABS - 1)
    planned_ones = [each for each in lay_out(planned(source)) if "moe" in str(each.value.name)]
    extent = planned_ones[part]
    file = kept(tmp_path) / extent.file
    content = bytearray(file.read_bytes())
    content[extent.offset + part] ^= 1
    file.write_bytes(content)
    assert resumed(planned(source), path) == 2
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_data_file_that_is_gone_is_written_again(source: Path, path: Path, tmp_path: Path) -> None:
    interrupt(planned(source), path, 20, max_shard_size=300_000)
    for file in list(kept(tmp_path).glob("shard-*"))[1:]:
        file.unlink()
    assert SLABS - 20 <= resumed(planned(source), path, max_shard_size=300_000) <= SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected", max_shard_size=300_000)


def _torn(journal: bytes) -> bytes:
    return journal[:-5]


def _torn_at_the_line(journal: bytes) -> bytes:
    return journal[:-1]


def _garbage_behind(journal: bytes) -> bytes:
    return journal + b"\xff\x00\xfe [[1, 2"


def _garbage_before(journal: bytes) -> bytes:
    return b"\xff\x00 \n \n1\n x\n" + journal


def _wrong_sum(journal: bytes) -> bytes:
    lines = journal.split(b"\n")
    return b"\n".join([lines[0] + b"1", *lines[1:]])


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (_torn, 1),
        (_torn_at_the_line, 1),
        (_garbage_behind, 0),
        (_garbage_before, 0),
        (_wrong_sum, 1),
        (lambda journal: journal * 2, 0),
        (lambda journal: b"", 20),
        (lambda journal: bytes(len(journal)), 20),
    ],
)
def test_damaged_journal_costs_work_and_no_more(
    source: Path, path: Path, tmp_path: Path, damage: Callable[[bytes], bytes], lost: int
) -> None:
    interrupt(planned(source), path, 20)
    journal = kept(tmp_path) / "journal"
    journal.write_bytes(damage(journal.read_bytes()))
    interrupt(planned(source), path, 5)  # what is written behind the damage counts
    assert resumed(planned(source), path) == SLABS - 25 + lost
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_journal_without_a_file_begins_anew(source: Path, path: Path, tmp_path: Path) -> None:
    interrupt(planned(source), path, 20)
    (kept(tmp_path) / "journal").unlink()
    assert resumed(planned(source), path) == SLABS
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")


def test_journal_knows_places_by_their_bytes(tmp_path: Path) -> None:
    places = (Place("weights", "shard-0", 4, 4), Place("scales", "shard-0", 0, 2))
    (tmp_path / "shard-0").write_bytes(b"ab..cdef")
    with Journal(tmp_path) as journal:
        assert not journal.has(places)
        journal.record(places, zlib.crc32(b"abcdef"))  # in the wrong order
    with Journal(tmp_path) as journal:
        assert not journal.has(places)
        journal.record(places, zlib.crc32(b"cdefab"))
    with Journal(tmp_path) as journal:
        assert journal.has(places)
        assert not journal.has(places[:1])
    (tmp_path / "shard-0").write_bytes(b"ab..cdeg")
    with Journal(tmp_path) as journal:
        assert not journal.has(places)


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


# What is left behind.


def test_without_resume_nothing_is_left(source: Path, path: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    stopped(20, save, planned(source), path)
    assert snapshot(tmp_path) == before


def test_what_is_kept_is_left_alone_by_other_saves(
    source: Path, path: Path, tmp_path: Path
) -> None:
    """Of other names, of other folders, and those that do not go on."""
    interrupt(planned(source), path, 20)
    for other in (path.with_name("other.onnx"), tmp_path / "out2" / "model.onnx"):
        assert resumed(planned(source), other) == SLABS
    shutil.rmtree(path.parent)
    save(planned(source), path)
    shutil.rmtree(path.parent)
    assert resumed(planned(source), path) == SLABS - 20


def test_two_names_in_a_folder_go_on_apart(source: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "a.onnx", tmp_path / "b.onnx"
    interrupt(planned(source), one, 20)
    interrupt(planned(source), two, 10)
    assert resumed(planned(source), two) == SLABS - 10
    assert resumed(planned(source), one) == SLABS - 20
    assert not list(tmp_path.glob(".qmoe-*"))


def test_longest_possible_names_can_be_resumed(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / ("x" * 255) / ("y" * 235 + ".onnx")
    interrupt(planned(source), path, 20)
    assert resumed(planned(source), path) == SLABS - 20


def test_data_are_kept_where_they_cannot_be_put_in_place(source: Path, path: Path) -> None:
    """Another save takes the name while this one computes; this one need not compute again."""
    path.parent.mkdir()

    def take_the_name(done: int, total: int) -> None:
        if done == total:
            path.with_name("model.onnx.data").write_bytes(b"of another")

    with pytest.raises(SaveError, match=r"model\.onnx\.data: another save has written it"):
        save(planned(source), path, resume=True, progress=take_the_name)
    assert not path.exists()
    assert resumed(planned(source), path) == 0
    assert path.with_name("model.onnx.data").read_bytes() == b"of another"
    assert path.with_name("model.onnx.1.data").is_file()


def test_space_that_is_used_already_is_not_asked_for_again(
    source: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    interrupt(planned(source), path, SLABS - 1)
    size = sum(extent.tensor.nbytes for extent in lay_out(planned(source)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(size // 10))
    with pytest.raises(SaveError, match="no space"):
        save(planned(source), path)
    assert resumed(planned(source), path) == 1


# Two at a time.


def test_second_save_of_the_same_model_is_refused_while_the_first_goes_on(
    source: Path, path: Path, tmp_path: Path
) -> None:
    refusals: list[str] = []

    def save_again(done: int, total: int) -> None:
        if done < total / 2 or refusals:
            return
        with pytest.raises(SaveError, match=r"another process is saving .*model\.onnx") as caught:
            save(planned(source), path, resume=True)
        command = [sys.executable, "-m", "qmoe_rules.cli", "quantize", "--resume", *OPTIONS]
        found = subprocess.run(
            [*command, str(source), str(path)], capture_output=True, text=True, check=False
        )
        assert (found.returncode, found.stderr) == (2, f"qmoe: {caught.value}\n")
        refusals.append(found.stderr)

    save(planned(source), path, resume=True, workers=1, progress=save_again)
    assert refusals
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
    path.with_name("model.onnx.data").unlink()
    path.unlink()
    assert resumed(planned(source), path) == SLABS


# The command.

SIGNALLED = """
import os, signal, sys
from qmoe_rules import quantizers
from qmoe_rules.cli import main
rtn, calls = quantizers.METHODS["rtn"], iter(range(100))
def kill(*arguments):
    if next(calls) == 20:
        os.kill(os.getpid(), signal.SIGTERM)
    return rtn(*arguments)
quantizers.METHODS["rtn"] = kill
sys.exit(main(sys.argv[1:]))
"""


def test_command_that_is_stopped_goes_on(source: Path, path: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(source), str(path), *OPTIONS, "--workers", "1", "--resume"]
    stopped = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments], capture_output=True, text=True, check=False
    )
    assert stopped.stderr == "qmoe: interrupted; the same command goes on from here\n"
    assert stopped.returncode == 128 + signal.SIGINT
    assert not path.parent.exists()
    assert 0 < resumed(planned(source), path) <= SLABS - 20
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
