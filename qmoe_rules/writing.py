"""Writing the data files: every slab computed once and written to its own byte ranges.

Sizes and offsets are known before anything is computed. So the files are laid out first, and then
slabs are computed in any order, by threads or by any executor's workers: the bytes are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import (
    FIRST_COMPLETED,
    BrokenExecutor,
    Executor,
    Future,
    ThreadPoolExecutor,
    wait,
)
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import onnx_ir as ir

from qmoe_rules import files
from qmoe_rules.errors import QMoEError, SaveError, SourceError
from qmoe_rules.extents import Extent
from qmoe_rules.journal import Journal
from qmoe_rules.lazy import PlannedTensor, Projection
from qmoe_rules.slabs import Place, write_slab

__all__ = ["Progress", "processors", "write_data"]

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all) as a save goes on, by the thread that saves."""

# Slabs under way per worker: enough to keep it busy, few enough to hold in memory.
_AHEAD = 2


def write_data(
    extents: Sequence[Extent],
    names: Sequence[str],
    folder: Path,
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    journal: Journal | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes every byte range of the data files.

    Args:
        extents: Where every tensor goes.
        names: Names of the data files.
        folder: Where they are written.
        workers: Threads, or the slabs under way in the executor; all processors where it is left
            out.
        executor: Who computes and writes slabs, in place of threads of this process. Its workers
            see the same `folder`.
        journal: Knows which slabs are written already, and is told of every other.
        progress: Called as bytes are written.

    Raises:
        SourceError: A weight cannot be read, or is not finite.
        SaveError: A worker died.
    """
    for name, size in _sizes(extents, names).items():
        with (folder / name).open("r+b" if journal and (folder / name).exists() else "wb") as file:
            file.truncate(size)
    total, done = sum(extent.tensor.nbytes for extent in extents), 0
    workers = workers or processors()
    with ExitStack() as stack:
        stack.callback(files.forget)
        threads = ThreadPoolExecutor(workers)
        stack.callback(threads.shutdown, cancel_futures=True)
        tasks = _tasks(extents, names, folder, threads, executor, journal)
        for written in _in_flight(tasks, workers * _AHEAD):
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
    """A piece of work: how it begins, how many bytes it writes, and what to do when it is done."""

    begin: Callable[[], Future[int]] | None
    nbytes: int
    finish: Callable[[int], None]


def _tasks(
    extents: Sequence[Extent],
    names: Sequence[str],
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
            copy = _Copy(extent, folder / names[extent.shard])
            yield _Work(partial(threads.submit, copy), extent.tensor.nbytes, _ignore)
    for projection, parts in planned.items():
        for expert in range(projection.experts):
            places = _places(projection, expert, parts, names)
            nbytes = sum(place.nbytes for place in places)
            if journal is not None and journal.has(places):
                yield _Work(None, nbytes, _ignore)
                continue
            finish = _ignore if journal is None else _recorder(journal, places)
            begin = _beginning(projection, expert, folder, places, threads, executor)
            yield _Work(begin, nbytes, finish)


def _beginning(
    projection: Projection,
    expert: int,
    folder: Path,
    places: tuple[Place, ...],
    threads: ThreadPoolExecutor,
    executor: Executor | None,
) -> Callable[[], Future[int]]:
    if executor is None:
        return partial(threads.submit, _write_here, projection, expert, folder, places)
    return lambda: executor.submit(projection.portable_work(expert), folder, places)


def _write_here(
    projection: Projection, expert: int, folder: Path, places: tuple[Place, ...]
) -> int:
    return write_slab(projection.slab(expert), folder, places)


def _in_flight(tasks: Iterable[_Work], limit: int) -> Iterator[int]:
    """Runs the work, at most `limit` pieces at a time, and yields the bytes of what is done."""
    pending: dict[Future[int], _Work] = {}
    try:
        for work in tasks:
            if work.begin is None:
                yield work.nbytes
                continue
            if len(pending) >= limit:
                yield from _finished(pending)
            pending[_begun(work)] = work
        while pending:
            yield from _finished(pending)
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def _begun(work: _Work) -> Future[int]:
    if work.begin is None:
        raise AssertionError("there is nothing to begin")
    try:
        return work.begin()
    except BrokenExecutor as error:
        raise _dead_worker(error) from error


def _finished(pending: dict[Future[int], _Work]) -> Iterator[int]:
    """Yields the bytes of the work that is done, after waiting for some."""
    for future in wait(pending, return_when=FIRST_COMPLETED).done:
        work = pending.pop(future)
        try:
            work.finish(future.result())
        except BrokenExecutor as error:
            raise _dead_worker(error) from error
        except (QMoEError, OSError):
            raise
        except Exception as error:
            if type(error).__module__.partition(".")[0] == "distributed":
                raise _dead_worker(error) from error
            raise
        yield work.nbytes


def _dead_worker(error: BaseException) -> SaveError:
    return SaveError(f"a worker died or was lost while it computed a slab: {error}")


def _places(
    projection: Projection, expert: int, parts: Sequence[Extent], names: Sequence[str]
) -> tuple[Place, ...]:
    places = []
    for extent in parts:
        if not isinstance(extent.tensor, PlannedTensor):
            raise AssertionError(f"{extent.value.name} is not planned")
        part = extent.tensor.part
        nbytes = projection.slab_nbytes(part)
        offset = extent.offset + expert * nbytes
        places.append(Place(part, names[extent.shard], offset, nbytes))
    return tuple(places)


def _recorder(journal: Journal, places: tuple[Place, ...]) -> Callable[[int], None]:
    return lambda crc: journal.record(places, crc)


def _ignore(_result: int) -> None:
    pass


def _sizes(extents: Sequence[Extent], names: Sequence[str]) -> dict[str, int]:
    return {names[extent.shard]: extent.offset + extent.tensor.nbytes for extent in extents}


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
