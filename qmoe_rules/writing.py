"""Writing the data files: every slab computed once and written to its own byte ranges.

Sizes and offsets are known before anything is computed. So the files are laid out first, and then
slabs are computed in any order, by threads or by any executor's workers: the bytes are the same.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

import onnx_ir as ir

from qmoe_rules import files
from qmoe_rules.errors import SaveError, SourceError
from qmoe_rules.extents import Extent
from qmoe_rules.journal import Journal
from qmoe_rules.lazy import PlannedTensor, Projection
from qmoe_rules.slabs import FileSlice, Place, write_slab

__all__ = ["Progress", "processors", "write_data"]

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all) as a save goes on, by the thread that saves."""

# Slabs under way per worker: enough to keep it busy, few enough to hold in memory.
_AHEAD = 2


def write_data(
    extents: Sequence[Extent],
    folder: Path,
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
    check: Callable[[], None] = lambda: None,
) -> None:
    """Writes every byte range of the data files, which are named as `Extent.file` says.

    Args:
        extents: Where every tensor goes.
        folder: Where the files are written.
        workers: Threads, or how many of the executor's workers are kept busy; all processors where
            it is left out.
        executor: Who computes and writes slabs, in place of threads of this process. Its workers
            see the same `folder`.
        journal: Knows which slabs are written already, and is told of every other.
        progress: Called as bytes are written.
        check: Called before the journal is told; raises where what was written may be wrong.

    Raises:
        SourceError: A weight cannot be read, or is not finite.
        SaveError: A worker died.
        OSError: The files cannot be written.
    """
    for name, size in {extent.file: extent.end for extent in extents}.items():
        with (folder / name).open("ab") as file:
            file.truncate(size)
    total, done = sum(extent.tensor.nbytes for extent in extents), 0
    workers = workers or processors()
    with ExitStack() as stack:
        stack.enter_context(files.keeping())
        threads = ThreadPoolExecutor(workers)
        stack.callback(threads.shutdown, cancel_futures=True)
        tasks = _tasks(extents, folder, threads, executor, journal)
        for written in _in_flight(tasks, workers * _AHEAD, check):
            done += written
            if progress is not None:
                progress(done, total)


def processors() -> int:
    """Returns how many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _Work:
    """A piece of work: how it begins, how many bytes it writes, and what to do when it is done.

    It begins with None where it has been done before.
    """

    begin: Callable[[], Future[int]] | None
    nbytes: int
    finish: Callable[[int], None]


def _tasks(
    extents: Sequence[Extent],
    folder: Path,
    threads: ThreadPoolExecutor,
    executor: Executor | None,
    journal: Journal | None,
) -> Iterator[_Work]:
    """Yields one piece of work per ordinary tensor, and one per expert of a projection."""
    planned: dict[Projection, list[Extent]] = {}
    for extent in extents:
        if isinstance(extent.tensor, PlannedTensor):
            planned.setdefault(extent.tensor.projection, []).append(extent)
        else:
            copy = _Copy(extent, folder / extent.file)
            yield _Work(partial(threads.submit, copy), extent.tensor.nbytes, _ignore)
    save = uuid.uuid4().hex
    for projection, parts in planned.items():
        firsts = _first_places(projection, parts)
        for expert in range(projection.experts):
            places = tuple(place.moved(expert) for place in firsts)
            slab = _PlannedSlab(projection, expert, folder, places, journal is not None)
            nbytes = sum(place.nbytes for place in places)
            if journal is not None and journal.has(places):
                yield _Work(None, nbytes, _ignore)
                continue
            finish = _ignore if journal is None else partial(journal.record, places)
            if executor is None:
                yield _Work(partial(threads.submit, slab), nbytes, finish)
            else:
                yield _Work(partial(slab.send, executor, save), nbytes, finish)


@dataclass(frozen=True)
class _PlannedSlab:
    """One expert of a projection, where it goes, and whether its checksum is wanted."""

    projection: Projection
    expert: int
    folder: Path
    places: tuple[Place, ...]
    prove: bool

    def __call__(self) -> int:
        """Computes and writes the slab here; returns its checksum."""
        return write_slab(self.projection.slab(self.expert), self.folder, self.places, self.prove)

    def send(self, executor: Executor, save: str) -> Future[int]:
        """Lets an executor do it. Those that remember results, as Dask's, tell saves apart."""
        work = self.projection.portable_work(self.expert)
        future = executor.submit(work, self.folder, self.places, self.prove, save)
        if not isinstance(work.source, FileSlice):
            future.add_done_callback(lambda _: self.projection.weights.release(self.expert))
        return future


def _in_flight(tasks: Iterable[_Work], limit: int, check: Callable[[], None]) -> Iterator[int]:
    """Runs the work, at most `limit` pieces at a time, and yields the bytes of what is done."""
    pending: dict[Future[int], _Work] = {}
    done: SimpleQueue[Future[int]] = SimpleQueue()

    def finish(future: Future[int], work: _Work) -> None:
        result = future.result()
        check()
        work.finish(result)

    def finished() -> int:
        future = done.get()
        work = pending.pop(future)
        finish(future, work)
        return work.nbytes

    try:
        with _naming_lost_workers():
            for work in tasks:
                if work.begin is None:
                    yield work.nbytes
                    continue
                if len(pending) >= limit:
                    yield finished()
                future = work.begin()
                pending[future] = work
                future.add_done_callback(done.put)
            while pending:
                yield finished()
    finally:
        wait([future for future in pending if not future.cancel()])
        for future, work in pending.items():  # what is done is done, whatever has gone wrong
            if not future.cancelled() and future.done() and future.exception() is None:
                with suppress(SourceError):  # the first error is the one to tell
                    finish(future, work)


@contextmanager
def _naming_lost_workers() -> Iterator[None]:
    """Turns what executors say of a worker that is gone into an error of the save."""
    try:
        yield
    except Exception as error:
        # What Dask says of a worker that dies again and again has no base but Exception.
        lost = isinstance(error, (BrokenExecutor, CancelledError))
        if not lost and type(error).__name__ != "KilledWorker":
            raise
        reason = str(error) or type(error).__name__
        raise SaveError(f"a worker was lost before it had written a slab: {reason}") from error


def _first_places(projection: Projection, parts: Sequence[Extent]) -> list[Place]:
    """Returns where the parts of the first expert go; those of the others follow."""
    places = []
    for extent in parts:
        if not isinstance(extent.tensor, PlannedTensor):
            raise AssertionError(f"{extent.value.name} is not planned")
        part = extent.tensor.part
        places.append(Place(part, extent.file, extent.offset, projection.slab_nbytes(part)))
    return places


def _ignore(_result: int) -> None:
    pass


@dataclass(frozen=True)
class _Copy:
    """Copies one tensor to its byte range."""

    extent: Extent
    path: Path

    def __call__(self) -> int:
        """Writes to the file."""
        tensor, name = self.extent.tensor, str(self.extent.value.name)
        with self.path.open("r+b") as file:
            file.seek(self.extent.offset)
            sized = _SizedWriter(file, name, tensor.nbytes)
            _copy(tensor, name, sized)
            sized.finish()
        return 0


def _copy(tensor: ir.TensorProtocol, name: str, file: _SizedWriter) -> None:
    try:
        if isinstance(tensor, ir.ExternalTensor):
            # Not its own tofile: a stated length beyond the tensor would spill into the next.
            for chunk in files.chunks(tensor):
                file.write(chunk)
        else:
            tensor.tofile(file)  # type: ignore[attr-defined]
    except _WriteError as error:
        raise error.cause from None
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read tensor {name!r}: {error}") from error


class _WriteError(Exception):
    """An error of the destination, told apart from one of the source."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(str(cause))
        self.cause = cause


class _SizedWriter:
    """Hands bytes on to a file, and no more of them than the tensor's shape asks for."""

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self._file = file
        self._name = name
        self._size = size
        self._written = 0

    def write(self, data: Any) -> int:
        """Writes bytes, as a file does."""
        count = memoryview(data).nbytes
        self._written += count
        if self._written > self._size:
            raise self._wrong_size()
        try:
            return self._file.write(data)
        except OSError as error:
            raise _WriteError(error) from error

    def finish(self) -> None:
        """Checks that all bytes were written."""
        if self._written != self._size:
            raise self._wrong_size()

    def _wrong_size(self) -> SourceError:
        return SourceError(
            f"tensor {self._name!r} holds {self._written} bytes or more, and its shape asks for "
            f"{self._size}"
        )
