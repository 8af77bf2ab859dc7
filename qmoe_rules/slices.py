"""`Slices`: an array that is read slice by slice along its first axis, and never as a whole.

A leaf reads a tensor, memory-mapped where it is external. The other classes are what a graph, or
a rewrite, does to constants: they compose without reading anything, so a weight that is stored
transposed, split, concatenated or one matrix per expert is still read one expert at a time.
"""

from __future__ import annotations

import mmap
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.errors import SourceError

__all__ = [
    "Combined",
    "Joined",
    "Lifted",
    "Picked",
    "SlicedTensor",
    "Slices",
    "TensorSlices",
    "Unlifted",
]

Array = npt.NDArray[np.generic]

# onnx-ir's ExternalTensor must not be mapped by two threads at once.
_loading = threading.Lock()


class Slices(ABC):
    """An array of known shape and type whose first axis can be read in ranges.

    Attributes:
        shape: The sizes of all axes.
        dtype: The element type, as numpy has it.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

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
    @abstractmethod
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors that the slices are read from."""


class TensorSlices(Slices):
    """The slices of one tensor."""

    def __init__(self, tensor: ir.TensorProtocol, name: str) -> None:
        self.shape = tuple(int(size) for size in tensor.shape.numpy())
        self.dtype = tensor.dtype.numpy()
        self._tensor = tensor
        self._name = name
        self._stacked: Array | None = None
        self._released = 0

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensor itself."""
        return (self._tensor,)

    def read(self, start: int, stop: int) -> Array:
        """Returns a view of the mapped file, or of an array that is kept for one sweep."""
        with _loading:
            if self._stacked is None:
                self._stacked = self._load()
            block: Array = self._stacked[start:stop]
        return block

    def release(self, start: int, stop: int) -> None:
        """Gives the mapped pages of the slices back to the system.

        An array that was made for the purpose goes after as many slices as there are.
        """
        with _loading:
            self._released += stop - start
            if self._released >= self.shape[0]:
                self._released = 0
                self._stacked = None
        if isinstance(self._tensor, ir.ExternalTensor) and self._tensor.raw is not None:
            size = self._tensor.nbytes // max(self.shape[0], 1)
            offset = self._tensor.offset or 0
            _drop_pages(self._tensor.raw, offset + start * size, offset + stop * size)

    def _load(self) -> Array:
        try:
            array = np.asarray(self._tensor.numpy())
            stacked: Array = array.reshape(self.shape).view(self.dtype)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read weight {self._name!r}: {error}") from error
        return stacked


def _drop_pages(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Drops the pages of a byte range, but the last one where the next slice begins in it."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    last = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)


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
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
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

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of every source."""
        return tuple(tensor for source in self._sources for tensor in source.tensors)

    def read(self, start: int, stop: int) -> Array:
        """Returns the slices, copied only where they come from several sources."""
        blocks = [source.read(first, last) for source, first, last in self._split(start, stop)]
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
        self._released = 0

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of the source."""
        return self._source.tensors

    def read(self, start: int, stop: int) -> Array:
        """Returns a range of the source's slice, which stays a view where the source is one."""
        block: Array = self._source.read(0, 1)[0][start:stop]
        return block

    def release(self, start: int, stop: int) -> None:
        """Releases the source after as many slices as there are: they may share its memory."""
        self._released += stop - start
        if self._released >= self.shape[0]:
            self._released = 0
            self._source.release(0, 1)


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

    def _materialize(self) -> ir.TensorProtocol:
        array = np.ascontiguousarray(self.slices.read(0, self.slices.shape[0]))
        return ir.Tensor(array, dtype=self.dtype, name=self.name)
