"""`Slices`: an array that is read slice by slice along its first axis, and never as a whole.

A leaf reads a tensor, memory-mapped where it is external. The other classes are what a graph, or
a rewrite, does to constants: they compose without reading anything, so a weight that is stored
transposed, split, concatenated or one matrix per expert is still read one expert at a time.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import files
from qmoe_rules.errors import SourceError

__all__ = [
    "Combined",
    "Joined",
    "Lifted",
    "Picked",
    "Regrouped",
    "SlicedTensor",
    "Slices",
    "TensorSlices",
    "Unlifted",
]

Array = npt.NDArray[np.generic]


class Slices(ABC):
    """An array of known shape and type whose first axis can be read in ranges.

    Attributes:
        shape: The sizes of all axes.
        dtype: The element type, as numpy has it.
        is_view: Whether reading costs nothing, however much is read.
        pieces: How many reads of tensors it takes to read everything.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    is_view: bool = False
    pieces: int = 1

    @abstractmethod
    def read(self, start: int, stop: int) -> Array:
        """Returns the slices [stop - start, ...], a view where the storage allows it.

        Raises:
            SourceError: The data behind a tensor is missing or too short.
        """

    @abstractmethod
    def release(self, start: int, stop: int) -> None:
        """Says that these slices have been used, so that their memory can go."""

    @property
    def nbytes(self) -> int:
        """Size of the whole array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def external(self) -> ir.ExternalTensor | None:
        """The tensor of a file whose bytes are the array's, None where something is in between."""
        return None

    @property
    @abstractmethod
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors that the slices are read from."""


class TensorSlices(Slices):
    """The slices of one tensor, views of it where it is in a file or in memory."""

    def __init__(self, tensor: ir.TensorProtocol, name: str) -> None:
        self.shape = tuple(int(size) for size in tensor.shape.numpy())
        self.dtype = tensor.dtype.numpy()
        self.is_view = True
        self._tensor = tensor
        self._name = name

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensor itself."""
        return (self._tensor,)

    @property
    def external(self) -> ir.ExternalTensor | None:
        """The tensor itself, where it is in a file."""
        return self._tensor if isinstance(self._tensor, ir.ExternalTensor) else None

    def read(self, start: int, stop: int) -> Array:
        """Returns a view of the mapped file, or of an array that is kept for a while."""
        try:
            block: Array = self._array()[start:stop]
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read weight {self._name!r}: {error}") from error
        return block

    def release(self, start: int, stop: int) -> None:
        """Gives the mapped pages of the slices back to the system."""
        if isinstance(self._tensor, ir.ExternalTensor):
            size = self._tensor.nbytes // max(self.shape[0], 1)
            offset = self._tensor.offset or 0
            with contextlib.suppress(OSError, ValueError):  # what is gone has no pages
                files.drop_pages(self._tensor, offset + start * size, offset + stop * size)

    def _array(self) -> Array:
        if isinstance(self._tensor, ir.ExternalTensor):
            return files.array(self._tensor).reshape(self.shape)
        if isinstance(self._tensor, ir.Tensor):
            return np.asarray(self._tensor.numpy()).reshape(self.shape).view(self.dtype)
        return files.made(self._tensor).reshape(self.shape).view(self.dtype)


class Combined(Slices):
    """Slice i is a function of slice i of every source.

    The function takes blocks [n, ...] of all sources and returns the block [n, *shape[1:]].
    """

    def __init__(
        self,
        sources: Sequence[Slices],
        shape: Sequence[int],
        dtype: np.dtype,
        function: Callable[..., Array],
        *,
        is_view: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.is_view = is_view
        self.pieces = sum(source.pieces for source in sources)
        self._sources = tuple(sources)
        self._function = function

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of every source."""
        return tuple(tensor for source in self._sources for tensor in source.tensors)

    def read(self, start: int, stop: int) -> Array:
        """Returns the function's value of the sources' slices."""
        return self._function(*(source.read(start, stop) for source in self._sources))

    def release(self, start: int, stop: int) -> None:
        """Releases the same slices of every source."""
        for source in self._sources:
            source.release(start, stop)


class Joined(Slices):
    """Sources one after the other along the first axis."""

    def __init__(self, sources: Sequence[Slices]) -> None:
        self._sources = tuple(sources)
        self.shape = (sum(source.shape[0] for source in sources), *sources[0].shape[1:])
        self.dtype = sources[0].dtype
        self.pieces = sum(source.pieces for source in sources)

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of every source."""
        return tuple(tensor for source in self._sources for tensor in source.tensors)

    def read(self, start: int, stop: int) -> Array:
        """Returns the slices, copied only where they come from several sources."""
        blocks = [source.read(first, last) for source, first, last in self._split(start, stop)]
        if not blocks:
            return self._sources[0].read(0, 0)
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    def release(self, start: int, stop: int) -> None:
        """Releases the slices of the sources that hold them."""
        for source, first, last in self._split(start, stop):
            source.release(first, last)

    def _split(self, start: int, stop: int) -> list[tuple[Slices, int, int]]:
        parts = []
        offset = 0
        for source in self._sources:
            size = source.shape[0]
            first, last = max(start - offset, 0), min(stop - offset, size)
            if first < last:
                parts.append((source, first, last))
            offset += size
        return parts


class Picked(Slices):
    """A range of a source's first axis."""

    def __init__(self, source: Slices, start: int, stop: int) -> None:
        self._source = source
        self._start = start
        self.shape = (stop - start, *source.shape[1:])
        self.dtype = source.dtype
        self.is_view = source.is_view
        self.pieces = source.pieces

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of the source."""
        return self._source.tensors

    def read(self, start: int, stop: int) -> Array:
        """Returns the source's slices, further on."""
        return self._source.read(self._start + start, self._start + stop)

    def release(self, start: int, stop: int) -> None:
        """Releases the source's slices, further on."""
        self._source.release(self._start + start, self._start + stop)


class Lifted(Slices):
    """A whole source as the one slice of an array with one axis more."""

    def __init__(self, source: Slices) -> None:
        self._source = source
        self.shape = (1, *source.shape)
        self.dtype = source.dtype
        self.is_view = source.is_view
        self.pieces = source.pieces

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of the source."""
        return self._source.tensors

    def read(self, start: int, stop: int) -> Array:
        """Returns the whole source."""
        return self._source.read(0, self._source.shape[0])[None][start:stop]

    def release(self, start: int, stop: int) -> None:
        """Releases the whole source."""
        if start < stop:
            self._source.release(0, self._source.shape[0])


class Unlifted(Slices):
    """The one slice of a source, by its own first axis."""

    def __init__(self, source: Slices) -> None:
        self._source = source
        self.shape = source.shape[1:]
        self.dtype = source.dtype
        self.is_view = source.is_view
        self.pieces = source.pieces

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of the source."""
        return self._source.tensors

    def read(self, start: int, stop: int) -> Array:
        """Returns a range of the source's slice, which stays a view where the source is one."""
        block: Array = self._source.read(0, 1)[0][start:stop]
        return block

    def release(self, start: int, stop: int) -> None:
        """Does nothing: the slices may share the source's memory."""


class Regrouped(Slices):
    """A source [A*B, ...] as [A, B, ...]: each slice is B slices of the source."""

    def __init__(self, source: Slices, groups: int) -> None:
        self._source = source
        self._size = source.shape[0] // groups
        self.shape = (groups, self._size, *source.shape[1:])
        self.dtype = source.dtype
        self.is_view = source.is_view
        self.pieces = source.pieces

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of the source."""
        return self._source.tensors

    def read(self, start: int, stop: int) -> Array:
        """Returns the source's slices in groups."""
        block = self._source.read(start * self._size, stop * self._size)
        return block.reshape(stop - start, *self.shape[1:])

    def release(self, start: int, stop: int) -> None:
        """Releases the source's slices of these groups."""
        self._source.release(start * self._size, stop * self._size)


class SlicedTensor(ir.LazyTensor):
    """Slices as a tensor that is read when somebody asks for it and never kept."""

    def __init__(self, slices: Slices, name: str) -> None:
        dtype = ir.DataType.from_numpy(slices.dtype)
        super().__init__(self._materialize, dtype, ir.Shape(slices.shape), name=name)
        self.slices = slices

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes, one slice at a time."""
        for index in range(self.slices.shape[0]):
            file.write(self.slices.read(index, index + 1).tobytes())
            self.slices.release(index, index + 1)

    def __repr__(self) -> str:
        # The inherited one shows the bound method that reads it, and with it itself again.
        what = type(self.slices).__name__
        return f"SlicedTensor<{self.dtype},{self.shape}>({what}, name={self.name!r})"

    def _materialize(self) -> ir.TensorProtocol:
        array = np.ascontiguousarray(self.slices.read(0, self.slices.shape[0]))
        return ir.Tensor(array, dtype=self.dtype, name=self.name)
