"""`save`: a planned model to disk, one expert slab at a time, whole or not at all.

Sizes and offsets are known before anything is computed. So the data file is laid out first, and
then every slab (one expert of one projection, all its parts) is computed once and written to its
own byte ranges, in any order and by any number of threads: the bytes are the same. The order and
the packing of tensors are those of `onnx_ir.save`, and so is the data file, byte for byte.

Everything is written to a hidden folder beside the destination and moved into place at the end,
the .onnx file last, under a data file name that no other model uses: at every moment the
destination is absent, the complete old model, or the complete new one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules.errors import SaveError
from qmoe_rules.lazy import PlannedTensor, Projection
from qmoe_rules.loading import data_files
from qmoe_rules.report import human_bytes

__all__ = ["Progress", "Staging", "save", "saved_bytes", "write_model"]

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all) as a save goes on, never by two threads at once."""

# Smaller tensors stay in the .onnx file, as `onnx_ir.save` does it.
_THRESHOLD_BYTES = 256


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Saves a planned model as `path` and, beside it, `path` + ".data".

    The model object stays as it was: planned tensors stay planned. Where a file of the data
    file's name exists already, a numbered name is used, and the model that is replaced loses its
    own data file only after the new model is in place.

    Args:
        model: Any model; planned tensors are computed as they are written.
        path: The .onnx file to write. An existing one is replaced.
        workers: Threads that compute and write; all processors where it is left out.
        progress: Called as bytes are written.

    Raises:
        SaveError: The destination is a file that the model still reads from, cannot be written,
            or the disk is full. Nothing has changed then.
        SourceError: A weight cannot be read, or holds an infinity or a NaN.

    Example:
        >>> import onnx_ir as ir
        >>> # save(rewriter.rewrite(ir.load("model.onnx"), rules), "quantized/model.onnx")
    """
    path = Path(path).resolve()
    guard(model, path)
    with Staging(path.parent) as stage:
        write_model(model, stage, path.name, workers=workers, progress=progress)
        stage.commit(path.name)


def guard(model: ir.Model, path: Path, sources: frozenset[Path] = frozenset()) -> None:
    """Raises SaveError where saving to `path` would replace a file that the model reads from.

    Args:
        model: The model to save.
        path: The resolved .onnx file to write.
        sources: Further resolved files that must not be touched.
    """
    touched = {path, *_own_data_files(path)}
    for source in sorted(touched & (data_files(model) | sources)):
        raise SaveError(f"refusing to overwrite {source}: the model still reads from it")


def write_model(
    model: ir.Model,
    stage: Staging,
    name: str,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a model's .onnx and data file into a staging folder.

    Args:
        model: Any model.
        stage: Where to write.
        name: Name of the .onnx file.
        workers: Threads that compute and write.
        progress: Called as bytes are written.
    """
    extents = _lay_out(model)
    data_name = _fresh_data_name(stage.destination, name)
    total = _end(extents)
    proto = _serialize(model, extents, data_name)
    stage.require_space(total + len(proto))
    with _naming_errors(stage.destination):
        if extents:
            _write_data(extents, stage.path / data_name, workers or os.cpu_count() or 1, progress)
        (stage.path / name).write_bytes(proto)
    stage.obsolete.extend(_own_data_files(stage.destination / name))


def saved_bytes(model: ir.Model) -> int:
    """Returns how many bytes `save` would write, without computing anything."""
    extents = _lay_out(model)
    return _end(extents) + len(_serialize(model, extents, "model.onnx.data"))


class Staging:
    """A hidden folder whose files appear in the destination folder all at once, or not at all.

    Attributes:
        destination: The folder that the files are for; it need not exist yet.
        path: The hidden folder.
        obsolete: Files of the destination that `commit` deletes in the end.
    """

    def __init__(self, destination: Path) -> None:
        self.destination = destination
        self.obsolete: list[Path] = []

    def __enter__(self) -> Staging:
        with _naming_errors(self.destination):
            # Beside a folder that does not exist yet, so that it can appear in one rename.
            parent = self.destination if self.destination.exists() else self.destination.parent
            self._made = _make_folders(parent)
            self.path = Path(tempfile.mkdtemp(dir=parent, prefix=f".{self.destination.name}.qmoe-"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        if error is not None:
            for folder in reversed(self._made):
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def require_space(self, needed: int) -> None:
        """Raises SaveError where the disk has less than `needed` bytes left."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise SaveError(
                f"no space on the disk of {self.destination}: {human_bytes(needed)} needed, "
                f"{human_bytes(free)} free"
            )

    def commit(self, last: str) -> None:
        """Moves every file into the destination, the one named `last` at the very end."""
        with _naming_errors(self.destination):
            if not self.destination.exists():
                umask = os.umask(0)
                os.umask(umask)
                self.path.chmod(0o777 & ~umask)
                self.path.rename(self.destination)
                return
            files = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
            files.sort(key=lambda file: file == self.path / last)
            for file in files:
                target = self.destination / file.relative_to(self.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
        for file in self.obsolete:
            with contextlib.suppress(OSError):
                file.unlink()


@dataclass(frozen=True)
class _Extent:
    """The byte range of one tensor in the data file."""

    value: ir.Value
    tensor: ir.TensorProtocol
    offset: int


def _lay_out(model: ir.Model) -> list[_Extent]:
    """Returns the byte range of every initializer that goes to the data file, packed densely."""
    extents = []
    offset = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            if tensor.nbytes > _THRESHOLD_BYTES:
                extents.append(_Extent(value, tensor, offset))
                offset += tensor.nbytes
    return extents


def _end(extents: Sequence[_Extent]) -> int:
    return extents[-1].offset + extents[-1].tensor.nbytes if extents else 0


def _serialize(model: ir.Model, extents: Sequence[_Extent], data_name: str) -> bytes:
    """Returns the .onnx file: the graph with its tensors in `data_name`; the model stays as is."""
    original = {extent.value: extent.tensor for extent in extents}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor) and value not in original:
                # A small tensor moves into the .onnx file: its old data file stays behind.
                original[value] = value.const_value
                value.const_value = ir.Tensor(
                    value.const_value.numpy().copy(), dtype=value.const_value.dtype, name=value.name
                )
    try:
        for extent in extents:
            extent.value.const_value = ir.ExternalTensor(
                data_name,
                extent.offset,
                extent.tensor.nbytes,
                extent.tensor.dtype,
                shape=ir.Shape(extent.tensor.shape.numpy()),
                name=extent.value.name or "",
            )
        proto: bytes = ir.serde.serialize_model(model).SerializeToString()
        return proto
    except ValueError as error:
        raise SaveError(f"the graph cannot be stored as an .onnx file: {error}") from error
    finally:
        for value, tensor in original.items():
            value.const_value = tensor


def _write_data(
    extents: Sequence[_Extent], path: Path, workers: int, progress: Progress | None
) -> None:
    """Writes every byte range of the data file, with `workers` threads."""
    total = _end(extents)
    counter = _Counter(total, progress)
    with path.open("wb") as file:
        file.truncate(total)
    with path.open("r+b", buffering=0) as file, ThreadPoolExecutor(workers) as executor:
        futures = [executor.submit(task, path, file.fileno(), counter) for task in _tasks(extents)]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        except BaseException:
            executor.shutdown(wait=True, cancel_futures=True)
            raise
        if any(future.exception() for future in done):
            executor.shutdown(wait=True, cancel_futures=True)
        for future in done:
            future.result()


_Task = Callable[[Path, int, "_Counter"], None]


def _tasks(extents: Sequence[_Extent]) -> Iterator[_Task]:
    """Yields the pieces of work: one per ordinary tensor, one per expert of a projection."""
    planned: dict[Projection, dict[str, list[int]]] = {}
    for extent in extents:
        if isinstance(extent.tensor, PlannedTensor):
            parts = planned.setdefault(extent.tensor.projection, {})
            parts.setdefault(extent.tensor.part, []).append(extent.offset)
        else:
            yield _copy_task(extent)
    for projection, offsets in planned.items():
        for expert in range(projection.experts):
            yield _slab_task(projection, expert, offsets)


def _copy_task(extent: _Extent) -> _Task:
    def copy(path: Path, descriptor: int, counter: _Counter) -> None:
        with path.open("r+b") as file:
            file.seek(extent.offset)
            extent.tensor.tofile(file)  # type: ignore[attr-defined]
        counter.add(extent.tensor.nbytes)

    return copy


def _slab_task(projection: Projection, expert: int, offsets: dict[str, list[int]]) -> _Task:
    def write(path: Path, descriptor: int, counter: _Counter) -> None:
        slab = projection.slab(expert)
        for part, starts in offsets.items():
            size = projection.slab_nbytes(part)
            for start in starts:
                _write_at(descriptor, slab[part], start + expert * size)
                counter.add(size)

    return write


def _write_at(descriptor: int, array: np.ndarray[Any, Any], offset: int) -> None:
    data = memoryview(array.tobytes())
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


class _Counter:
    """Adds up the bytes written and tells the progress callback, one thread at a time."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total = total
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def add(self, count: int) -> None:
        if self._progress is None:
            return
        with self._lock:
            self._done += count
            self._progress(self._done, self._total)


def _own_data_files(path: Path) -> list[Path]:
    """Returns the existing data files that belong to the model at `path` by their name."""
    numbered = (file for file in path.parent.glob("*.data") if _is_numbered(file.name, path.name))
    first = path.with_name(f"{path.name}.data")
    return [*([first] if first.exists() else []), *sorted(numbered)]


def _is_numbered(data_name: str, name: str) -> bool:
    prefix, suffix = f"{name}.", ".data"
    middle = data_name[len(prefix) : -len(suffix)]
    return data_name.startswith(prefix) and data_name.endswith(suffix) and middle.isdigit()


def _fresh_data_name(folder: Path, name: str) -> str:
    candidate, number = f"{name}.data", 1
    while (folder / candidate).exists():
        candidate, number = f"{name}.{number}.data", number + 1
    return candidate


def _make_folders(folder: Path) -> list[Path]:
    """Creates a folder with its parents and returns those that were missing, outermost first."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


@contextlib.contextmanager
def _naming_errors(destination: Path) -> Iterator[None]:
    """Turns an operating system error into one that names the destination."""
    try:
        yield
    except SaveError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write to {destination}: {reason}") from error
