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
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from qmoe_rules import files, ops
from qmoe_rules.errors import ConfigError, SaveError, SourceError
from qmoe_rules.lazy import PlannedTensor, Projection
from qmoe_rules.loading import data_files
from qmoe_rules.staging import Staging, naming_errors, resolved

__all__ = ["Progress", "guard", "save", "saved_bytes", "write_model"]

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all) as a save goes on, by the thread that saves."""

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
        ConfigError: `workers` is not positive.

    Example:
        >>> import onnx_ir as ir
        >>> # save(rewriter.rewrite(ir.load("model.onnx"), rules), "quantized/model.onnx")
    """
    path = resolved(Path(path))
    guard(model, path)
    with Staging(path.parent) as stage:
        write_model(model, stage, path.name, workers=workers, progress=progress)
        stage.commit(path.name)


def guard(model: ir.Model, path: Path, sources: frozenset[Path] = frozenset()) -> None:
    """Raises SaveError where `path` is a folder, or saving there would touch a source.

    Args:
        model: The model to save.
        path: The resolved .onnx file to write.
        sources: Further resolved files that must not be touched.
    """
    if path.is_dir():
        raise SaveError(f"cannot write {path}: it is a folder")
    for source in sorted(data_files(model) | sources):
        beside = source.parent == path.parent and _is_data_name(source.name, path.name)
        if source == path or beside:
            raise SaveError(f"refusing to overwrite {source}: the model still reads from it")


def write_model(
    model: ir.Model,
    stage: Staging,
    name: str,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Writes a model's .onnx and data file into a staging folder.

    Args:
        model: Any model.
        stage: Where to write.
        name: Name of the .onnx file.
        workers: Threads that compute and write; all processors where it is left out.
        progress: Called as bytes are written.

    Returns:
        How many bytes were written.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}; it may be any number from 1")
    extents = _lay_out(model)
    with naming_errors(stage.destination):
        data_name = _fresh_data_name((stage.destination, stage.path), name)
    with _standing_in(model, extents, data_name):
        proto = _serialize(model)
    size = _end(extents) + len(proto)
    stage.require_space(size)
    with naming_errors(stage.destination):
        if extents:
            _write_data(extents, stage.path / data_name, workers or _processors(), progress)
        (stage.path / name).write_bytes(proto)
    stage.exclusive.add(data_name)
    stage.obsolete.extend(_own_data_files(stage.destination / name))
    return size


def saved_bytes(model: ir.Model) -> int:
    """Returns how many bytes `save` writes as model.onnx, without computing anything."""
    extents = _lay_out(model)
    with _standing_in(model, extents, "model.onnx.data", compute=False):
        return _end(extents) + len(_serialize(model))


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


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _end(extents: Sequence[_Extent]) -> int:
    return extents[-1].offset + extents[-1].tensor.nbytes if extents else 0


def _serialize(model: ir.Model) -> bytes:
    try:
        proto: bytes = ir.serde.serialize_model(model).SerializeToString()
    except ir.serde.SerdeError as error:
        cause: BaseException = error
        while (inner := cause.__cause__ or cause.__context__) is not None:
            cause = inner
        if isinstance(cause, SourceError):
            raise cause from None
        raise SaveError(f"the graph cannot be stored as an .onnx file: {cause}") from error
    except ValueError as error:
        raise SaveError(f"the graph cannot be stored as an .onnx file: {error}") from error
    return proto


@contextlib.contextmanager
def _standing_in(
    model: ir.Model, extents: Sequence[_Extent], data_name: str, *, compute: bool = True
) -> Iterator[None]:
    """Lets every tensor of the model stand for its place in the new files, for a while.

    Large initializers stand for their byte ranges of `data_name`; small ones, and the tensors of
    attributes, are in memory, wherever they lay. Without `compute` planned ones are zeros.
    """
    places: dict[ir.Value, ir.TensorProtocol] = {
        extent.value: ir.ExternalTensor(
            data_name,
            extent.offset,
            extent.tensor.nbytes,
            extent.tensor.dtype,
            shape=ir.Shape(extent.tensor.shape.numpy()),
            name=extent.value.name or "",
        )
        for extent in extents
    }
    constants: list[tuple[ir.Node, ir.Attr]] = []
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if value not in places and isinstance(tensor, (ir.ExternalTensor, PlannedTensor)):
                places[value] = _in_memory(tensor, compute)
    for node in itertools.chain.from_iterable(ops.graphs(model)):
        for attribute in node.attributes.values():
            if isinstance(attribute.value, ir.ExternalTensor):
                constants.append((node, attribute))
    originals = {value: value.const_value for value in places}
    try:
        for value, place in places.items():
            value.const_value = place
        for node, attribute in constants:
            node.attributes.add(ir.AttrTensor(attribute.name, _in_memory(attribute.value, True)))
        yield
    finally:
        for value, original in originals.items():
            value.const_value = original
        for node, attribute in constants:
            node.attributes.add(attribute)


def _in_memory(tensor: ir.TensorProtocol, compute: bool) -> ir.TensorProtocol:
    """Returns the same tensor in memory; a planned one as zeros, unless it may be computed."""
    if isinstance(tensor, ir.ExternalTensor):
        return files.in_memory(tensor)
    shape = tensor.shape.numpy()
    array = tensor.numpy() if compute else np.zeros(shape, tensor.dtype.numpy())
    return ir.Tensor(array, dtype=tensor.dtype, name=tensor.name)


def _write_data(
    extents: Sequence[_Extent], path: Path, workers: int, progress: Progress | None
) -> None:
    """Writes every byte range of the data file, with `workers` threads."""
    total, done = _end(extents), 0
    with path.open("wb") as file:
        file.truncate(total)
    executor = ThreadPoolExecutor(workers)
    try:
        futures = [executor.submit(write, path) for write in _writes(extents)]
        for future in as_completed(futures):
            done += future.result()
            if progress is not None:
                progress(done, total)
    finally:
        executor.shutdown(cancel_futures=True)
        files.forget()


def _writes(extents: Sequence[_Extent]) -> Iterator[_TensorWrite | _SlabWrite]:
    """Yields the pieces of work: one per ordinary tensor, one per expert of a projection."""
    planned: dict[Projection, list[tuple[str, int]]] = {}
    for extent in extents:
        if isinstance(extent.tensor, PlannedTensor):
            place = (extent.tensor.part, extent.offset)
            planned.setdefault(extent.tensor.projection, []).append(place)
        else:
            yield _TensorWrite(extent.tensor, str(extent.value.name), extent.offset)
    for projection, places in planned.items():
        for expert in range(projection.experts):
            yield _SlabWrite(projection, expert, tuple(places))


@dataclass(frozen=True)
class _TensorWrite:
    """Copies one tensor to its byte range."""

    tensor: ir.TensorProtocol
    name: str
    offset: int

    def __call__(self, path: Path) -> int:
        """Writes to the file and returns how many bytes."""
        with path.open("r+b") as file:
            file.seek(self.offset)
            sized = _SizedWriter(file, self.name, self.tensor.nbytes)
            self._copy_to(sized)
            return sized.finish()

    def _copy_to(self, file: _SizedWriter) -> None:
        try:
            if isinstance(self.tensor, ir.ExternalTensor):
                # Not its own tofile: a stated length beyond the tensor would spill into the next.
                for chunk in files.chunks(self.tensor):
                    file.write(chunk)
            else:
                self.tensor.tofile(file)  # type: ignore[attr-defined]
        except _WriteError as error:
            raise error.cause from None
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read tensor {self.name!r}: {error}") from error


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

    def finish(self) -> int:
        """Returns how many bytes were written: all of them."""
        if self._written != self._size:
            raise self._wrong_size()
        return self._written

    def _wrong_size(self) -> SourceError:
        return SourceError(
            f"tensor {self._name!r} holds {self._written} bytes or more, and its shape asks for "
            f"{self._size}"
        )


@dataclass(frozen=True)
class _SlabWrite:
    """Computes one expert of one projection and writes its parts, each to its own byte range."""

    projection: Projection
    expert: int
    places: tuple[tuple[str, int], ...]

    def __call__(self, path: Path) -> int:
        """Writes to the file and returns how many bytes."""
        slab, written = self.projection.slab(self.expert), 0
        with path.open("r+b", buffering=0) as file:
            for part, start in self.places:
                size = self.projection.slab_nbytes(part)
                file.seek(start + self.expert * size)
                data = np.ascontiguousarray(slab[part]).view(np.uint8).reshape(-1).data
                while data:
                    count = file.write(data) or 0
                    data, written = data[count:], written + count
        return written


def _own_data_files(path: Path) -> list[Path]:
    """Returns the data files that the model at `path` reads from and that are named after it."""
    try:
        old = ir.load(path)
    except Exception:  # whatever lies there is no model, and has no data files
        return []
    own = (file for file in data_files(old) if file.parent == path.parent)
    return sorted(file for file in own if _is_data_name(file.name, path.name) and file.is_file())


def _is_data_name(data_name: str, name: str) -> bool:
    number = data_name.removeprefix(f"{name}.").removesuffix(".data")
    return data_name == f"{name}.data" or (
        data_name == f"{name}.{number}.data" and number.isdigit()
    )


def _fresh_data_name(folders: Sequence[Path], name: str) -> str:
    candidate, number = f"{name}.data", 1
    while any((folder / candidate).exists() for folder in folders):
        candidate, number = f"{name}.{number}.data", number + 1
    return candidate
