"""`save`: a planned model to disk, one expert slab at a time, whole or not at all.

Everything is written to a hidden folder beside the destination and moved into place at the end,
the .onnx file last, under data file names that no other model uses: at every moment the
destination is absent, the complete old model, or the complete new one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError, SaveError, SourceError
from qmoe_rules.extents import Extent, data_names, is_data_name, lay_out, standing_in, undisturbed
from qmoe_rules.journal import Journal, fingerprint
from qmoe_rules.loading import Files, data_files, data_files_at
from qmoe_rules.mappings import told_when_lost
from qmoe_rules.staging import Staging, naming_errors, resolved
from qmoe_rules.writing import Progress, write_data

__all__ = ["Progress", "SaveOptions", "guard", "save", "saved_bytes", "stage_for", "write_model"]


@dataclass(frozen=True)
class SaveOptions:
    """How a model is written; the bytes of its tensors are the same whatever these are.

    Attributes:
        workers: Threads that compute and write, or slabs under way in the executor.
        executor: Who computes and writes the slabs, in place of threads of this process.
        max_shard_size: Bytes after which another data file begins.
        resume: Keep what is written where a save is interrupted, and go on from there.
        progress: Called as bytes are written.
    """

    workers: int | None = None
    executor: Executor | None = None
    max_shard_size: int | None = None
    resume: bool = False
    progress: Progress | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "max_shard_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"{name}={value!r}; it may be any whole number from 1")


def save(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    max_shard_size: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> None:
    """Saves a planned model as `path` and, beside it, `path` + ".data".

    The model object stays as it was: planned tensors stay planned. Where a file of the data
    file's name exists already, a numbered name is used, and the model that is replaced loses its
    own data files only after the new model is in place.

    Args:
        model: Any model; planned tensors are computed as they are written.
        path: The .onnx file to write. An existing one is replaced.
        workers: Threads that compute and write; all processors where it is left out.
        executor: Any `concurrent.futures.Executor` that computes and writes the slabs in place of
            threads of this process, such as a `ProcessPoolExecutor` or what Dask's
            `Client.get_executor()` returns. Its workers must see the destination's folder.
        max_shard_size: Bytes after which another data file begins, `onnx_ir.save`'s
            `max_shard_size_bytes`; one file where it is left out.
        resume: Where the save is interrupted, keep the slabs that are written in a hidden folder
            beside the destination, and go on from them when the same save is asked for again.
        progress: Called as bytes are written.

    Raises:
        SaveError: The destination is a file that the model still reads from, cannot be written,
            the disk is full, or a worker died. Nothing has changed then.
        SourceError: A weight cannot be read, or holds an infinity or a NaN, or its file has changed
            since the model was loaded.
        ConfigError: `workers` or `max_shard_size` is not positive.
        TypeError: `model` is no `onnx_ir.Model`.

    Example:
        >>> import onnx_ir as ir
        >>> # save(rewriter.rewrite(ir.load("model.onnx"), rules), "quantized/model.onnx")
    """
    ops.require_model(model)
    options = SaveOptions(workers, executor, max_shard_size, resume, progress)
    path = resolved(Path(path))
    guard(model, path)
    with stage_for(path, options) as stage:
        write_model(model, stage, path.name, options)
        stage.commit(path.name)


def stage_for(path: Path, options: SaveOptions) -> Staging:
    """Returns the staging folder of a save to `path`."""
    return Staging(path.parent, kept_as=path.name if options.resume else None)


def guard(model: ir.Model, path: Path, sources: frozenset[Path] = frozenset()) -> None:
    """Raises SaveError where `path` is a folder, or saving there would touch a source.

    Args:
        model: The model to save.
        path: The resolved .onnx file to write.
        sources: Further resolved files that must not be touched.
    """
    if path.is_dir():
        raise SaveError(f"cannot write {path}: it is a folder")
    with undisturbed:
        read = data_files(model)
    for source in sorted(read | sources):
        beside = source.parent == path.parent and is_data_name(source.name, path.name)
        if source == path or beside:
            raise SaveError(f"refusing to overwrite {source}: the model still reads from it")


@told_when_lost()
def write_model(
    model: ir.Model, stage: Staging, name: str, options: SaveOptions | None = None
) -> int:
    """Writes a model's .onnx and data files into a staging folder.

    Args:
        model: Any model.
        stage: Where to write.
        name: Name of the .onnx file.
        options: How.

    Returns:
        How many bytes were written.
    """
    options = options or SaveOptions()
    with undisturbed:
        sources = Files.of(model)
        extents = lay_out(model, options.max_shard_size)
        data = list(dict.fromkeys(extent.file for extent in extents))
        with naming_errors(stage.destination):
            names = data_names(name, len(data), stage.has)
        with standing_in(model, extents, names):
            proto = _serialize(model)
    size = sum(extent.tensor.nbytes for extent in extents) + len(proto)
    work = fingerprint(extents, version("qmoe-rules")) if options.resume else "new"
    folder = stage.unfinished(work)
    stage.require_space(size - _allocated(folder))
    with naming_errors(stage.destination):
        # Before the data, so that between these and their being in place there is nothing to do.
        (stage.path / name).write_bytes(proto)
        _write_data(extents, folder, options, sources)
    stage.exclusive.update({names[i]: folder / file for i, file in enumerate(data)})
    stage.obsolete = partial(_own_data_files, stage.destination / name)
    return size


def _write_data(extents: list[Extent], folder: Path, options: SaveOptions, sources: Files) -> None:
    journals = Journal(folder) if options.resume else nullcontext()
    with told_when_lost() as refuse_losses:
        checks = (refuse_losses, sources.refuse_changes)
        try:
            with journals as journal:
                write_data(
                    extents,
                    folder,
                    workers=options.workers,
                    executor=options.executor,
                    journal=journal,
                    progress=options.progress,
                    check=refuse_losses,
                )
            for check in checks:
                check()
        except BaseException:
            if any(map(_fails, checks)):  # what lies there may be of two sources
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _fails(check: Callable[[], None]) -> bool:
    try:
        check()
    except SourceError:
        return True
    return False


def saved_bytes(model: ir.Model) -> int:
    """Returns how many bytes `save` writes as model.onnx, without computing anything."""
    with undisturbed:
        extents = lay_out(model)
        with standing_in(model, extents, ["model.onnx.data"], compute=False):
            return sum(extent.tensor.nbytes for extent in extents) + len(_serialize(model))


def _allocated(folder: Path) -> int:
    """Returns the bytes of disk that the files in a folder take already, holes left out."""
    found = (file.stat() for file in folder.iterdir())
    return sum(512 * getattr(status, "st_blocks", 0) for status in found)


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


def _own_data_files(path: Path) -> list[Path]:
    """Returns the data files that the model at `path`, and no other beside it, reads from.

    They are named after it: others are not for a save to delete.
    """
    own = {
        file
        for file in data_files_at(path)
        if file.parent == path.parent and is_data_name(file.name, path.name) and file.is_file()
    }
    if own:
        models = path.parent.glob("*.onnx")
        others = (other for other in models if os.path.realpath(other) != str(path))
        own = own.difference(*map(data_files_at, others))
    return sorted(own)
