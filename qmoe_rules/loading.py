"""Finding and loading a model, with one clear word for everything that can be wrong with it."""

from __future__ import annotations

import itertools
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir

from qmoe_rules import files, ops
from qmoe_rules.errors import SourceError
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.slices import SlicedTensor
from qmoe_rules.soundness import defects

__all__ = ["Files", "Source", "data_files", "data_files_at", "load", "locate"]

_FILES = "qmoe_rules.files"
_LARGEST = 1 << 31  # bytes of an .onnx file, which protobuf cannot exceed
_filtering = threading.Lock()


@dataclass(frozen=True)
class Source:
    """Where a model lies.

    Attributes:
        model: The .onnx file.
        folder: The folder that was named instead of the file, or None.
    """

    model: Path
    folder: Path | None = None


@dataclass(frozen=True)
class Files:
    """The data files of a model, as they were when it was loaded.

    Attributes:
        states: Size, time of the last change and number of every file, by its resolved path; None
            for one that is not there.
    """

    states: Mapping[Path, tuple[int, int, int] | None]

    @classmethod
    def of(cls, model: ir.Model) -> Files:
        """Returns the files that the model's tensors still read from.

        Those of a model that `load` did not load are taken as they are now.
        """
        known = model.meta.get(_FILES, cls({})).states
        return cls(
            {file: known[file] if file in known else _state(file) for file in data_files(model)}
        )

    def refuse_changes(self) -> None:
        """Raises SourceError where a file is not what it was: what was read may be of both."""
        for file, state in self.states.items():
            if _state(file) != state:
                raise SourceError(f"{file} has changed while it was read; nothing was written")


def _state(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ino


def locate(path: str | os.PathLike[str]) -> Source:
    """Finds the model that a path means: an .onnx file, or a folder that holds one.

    Raises:
        SourceError: Nothing is there, or the folder holds no model or several.
        TypeError: It is no path, but a model in memory, say.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"expected the path of a model, not {type(path).__name__}; a model in memory is "
            "quantized by QuantizeMoEPass, or by rewriting it, and written by save"
        )
    given = Path(path)
    try:
        given.stat()
    except FileNotFoundError:
        raise SourceError(f"{given} does not exist") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {given}: {_reason(error)}") from error
    if not given.is_dir():
        return Source(given)
    if (given / "model.onnx").is_file():
        return Source(given / "model.onnx", given)
    found = sorted(given.glob("*.onnx"))
    if len(found) != 1:
        deeper = (found, given.glob("*/*.onnx"), given.glob("*/*/*.onnx"))
        named = itertools.islice(itertools.chain.from_iterable(deeper), 5)
        nested = ", ".join(sorted(str(path.relative_to(given)) for path in named))
        hint = f"name one of {nested}" if nested else "name a folder that holds an .onnx file"
        held = f"{len(found)} .onnx files, not one" if found else "no .onnx file itself"
        raise SourceError(f"{given} holds {held}; {hint}")
    return Source(found[0], given)


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Loads a model without reading its weights, and checks that they are all there.

    Args:
        path: The .onnx file. Its external data stay where they are, mapped on demand.

    Raises:
        SourceError: The file is missing, is not a sound ONNX model, or its external data are
            missing, outside the model's folder or too short.
    """
    path = Path(path)
    proto = _parsed(path)
    if not proto.graph.output:
        raise SourceError(f"{path} is not an ONNX model: its graph has no outputs")
    for defect in defects(proto):
        raise SourceError(f"{path} is not an ONNX model: {defect}")
    try:
        # What the parser ignores is not the reader's business. Filters are those of all threads.
        with _filtering, warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            model = ir.serde.deserialize_model(proto)
        model.graph.sort()  # which keeps the order of a model that is in order, as it should be
    except Exception as error:  # whatever a parser says about what is no model
        raise SourceError(f"{path} is not an ONNX model: {_reason(error)}") from error
    if _has_sparse_initializer(proto.graph):
        raise SourceError(f"{path} has sparse initializers, which onnx-ir would lose")
    # onnx-ir takes an empty folder for "no folder" and would not check where data lie.
    for graph in ops.graphs(model):
        ir.external_data.set_base_dir(graph, path.absolute().parent)
    for tensor in _external_tensors(model):
        files.resolved_file(tensor)
        _check_extent(tensor)
    model.meta[_FILES] = Files.of(model)
    return model


def _parsed(path: Path) -> onnx.ModelProto:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe or a device may never end
            raise SourceError(f"cannot read {path}: it is no regular file")
        if status.st_size > _LARGEST:
            raise SourceError(f"{path} is not an ONNX model: it is larger than 2 GB")
        return onnx.load(path, load_external_data=False)
    except SourceError:
        raise
    except OSError as error:
        raise SourceError(f"cannot read {path}: {_reason(error)}") from error
    except Exception as error:  # whatever a parser says about bytes that are no model
        raise SourceError(f"{path} is not an ONNX model: {_reason(error)}") from error


def data_files(model: ir.Model) -> set[Path]:
    """Returns the resolved paths of every file that the model's tensors still read from."""
    paths = {tensor.path for tensor in _external_tensors(model)}
    return {Path(path).resolve() for path in paths}


def data_files_at(path: Path) -> set[Path]:
    """Returns the resolved data files of a model on disk; whatever else lies there has none."""
    try:
        return data_files(ir.load(path))
    except Exception:  # whatever a parser says about what is no model
        return set()


def _external_tensors(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    """Yields the external tensors of all graphs, those that planned tensors read from included."""
    found: list[object] = []
    for graph in ops.graphs(model):
        found += [value.const_value for value in graph.initializers.values()]
        for attribute in (attribute for node in graph for attribute in node.attributes.values()):
            many = attribute.type == ir.AttributeType.TENSORS and not attribute.is_ref()
            found += attribute.as_tensors() if many else [attribute.value]
    for tensor in found:
        sources: tuple[object, ...] = (tensor,)
        if isinstance(tensor, PlannedTensor):
            sources = tensor.projection.weights.slices.tensors
        elif isinstance(tensor, SlicedTensor):
            sources = tensor.slices.tensors
        yield from (source for source in sources if isinstance(source, ir.ExternalTensor))


def _has_sparse_initializer(graph: onnx.GraphProto) -> bool:
    if graph.sparse_initializer:
        return True
    attributes = (attribute for node in graph.node for attribute in node.attribute)
    return any(
        _has_sparse_initializer(body)
        for attribute in attributes
        for body in (attribute.g, *attribute.graphs)
        if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
    )


def _check_extent(tensor: ir.ExternalTensor) -> None:
    """Raises SourceError unless the tensor's bytes are inside its file."""
    try:
        size = os.stat(tensor.path).st_size
    except OSError as error:
        raise SourceError(
            f"tensor {tensor.name!r}: cannot read its external data {tensor.path}: {_reason(error)}"
        ) from error
    offset, length = tensor.offset or 0, tensor.length or tensor.nbytes
    if offset < 0 or length < tensor.nbytes:
        raise SourceError(
            f"tensor {tensor.name!r}: external data of {length} bytes at offset {offset} cannot "
            f"hold {tensor.nbytes} bytes"
        )
    if offset + length > size:
        raise SourceError(
            f"tensor {tensor.name!r}: external data {tensor.path} is truncated: it ends at byte "
            f"{size}, and the tensor at byte {offset + length}"
        )


def _reason(error: BaseException) -> str:
    """Returns the first line of what went wrong first: parsers wrap their errors in layers."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
