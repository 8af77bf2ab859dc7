"""Where the tensors of a model go: the byte ranges of its data files, known before any work.

The order and the packing of tensors are those of `onnx_ir.save`, with and without shards, and so
are the data files, byte for byte.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qmoe_rules import files, ops
from qmoe_rules.lazy import PlannedTensor

__all__ = ["Extent", "data_names", "is_data_name", "lay_out", "standing_in", "undisturbed"]

undisturbed = threading.RLock()
"""Held while tensors stand for others, and by whoever must not see that: two threads may save."""

# Smaller tensors stay in the .onnx file, as `onnx_ir.save` does it.
_THRESHOLD_BYTES = 256


@dataclass(frozen=True)
class Extent:
    """The byte range of one tensor.

    Attributes:
        value: The initializer.
        tensor: What it holds.
        shard: Which data file it goes to, from 0.
        offset: Of the first byte in that file.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    shard: int
    offset: int

    @property
    def file(self) -> str:
        """The name of the data file while it is written, whatever its final name will be."""
        return f"shard-{self.shard}"

    @property
    def end(self) -> int:
        """The offset behind the last byte."""
        return self.offset + self.tensor.nbytes


def lay_out(model: ir.Model, max_shard_size: int | None = None) -> list[Extent]:
    """Returns the byte range of every initializer that goes to a data file, packed densely.

    Args:
        model: Any model.
        max_shard_size: Bytes after which another file begins; a larger tensor has one alone.
    """
    extents: list[Extent] = []
    shard = offset = 0
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.dtype == ir.DataType.STRING:
                continue
            if tensor.nbytes <= _THRESHOLD_BYTES:
                continue
            if max_shard_size and offset and offset + tensor.nbytes > max_shard_size:
                shard, offset = shard + 1, 0
            extents.append(Extent(value, tensor, shard, offset))
            offset += tensor.nbytes
    return extents


def data_names(name: str, count: int, taken: Callable[[str], bool]) -> list[str]:
    """Returns the names of the data files of the model `name`, none of them taken.

    One file is model.onnx.data, several are model-00001-of-00003.onnx.data and so on, as
    `onnx_ir.save` names them; a number follows the name where such a file exists.
    """
    numbered = (f"{name}.{number}" for number in itertools.count(1))
    for stem in itertools.chain([name], numbered):
        names = [f"{stem}.data"]
        if count > 1:
            head, suffixes = _split(names[0])
            names = [f"{head}-{i:05d}-of-{count:05d}{suffixes}" for i in range(1, count + 1)]
        if not any(taken(each) for each in names):
            return names
    raise AssertionError("there are more numbers than files")


def is_data_name(data_name: str, name: str) -> bool:
    """Returns whether `data_names` may give a file this name for the model `name`."""
    head, suffixes = _split(f"{name}.data")
    number, shard = r"\.[0-9]+", r"-[0-9]{5,}-of-[0-9]{5,}"
    patterns = (
        rf"{re.escape(name)}({number})?\.data",
        rf"{re.escape(name)}{number}{shard}\.data",
        rf"{re.escape(head)}{shard}{re.escape(suffixes)}",
    )
    return any(re.fullmatch(pattern, data_name) for pattern in patterns)


def _split(data_name: str) -> tuple[str, str]:
    """Returns a name without the suffixes that begin with a letter, and those suffixes."""
    found = re.fullmatch(r"(.+?)((?:\.[A-Za-z][A-Za-z0-9_]*)*)", data_name, re.DOTALL)
    if found is None:
        raise AssertionError(f"{data_name!r} is no name of a file")
    return found[1], found[2]


@contextlib.contextmanager
def standing_in(
    model: ir.Model, extents: Sequence[Extent], names: Sequence[str], *, compute: bool = True
) -> Iterator[None]:
    """Lets every tensor of the model stand for its place in the new files, for a while.

    Large initializers stand for their byte ranges of the files `names`; small ones, and the
    tensors of attributes, are in memory, wherever they lay. Without `compute` planned ones are
    zeros.
    """
    places: dict[ir.Value, ir.TensorProtocol] = {
        extent.value: ir.ExternalTensor(
            names[extent.shard],
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
