"""`ExpertWeights`: a constant 3-D weight, read one expert at a time.

The array behind an external tensor is a view of the memory-mapped file; `release` gives the pages
of an expert back to the system after use, so that a sweep over a large model stays small.
"""

from __future__ import annotations

import mmap
import threading

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import SCALE_DTYPES

__all__ = ["ExpertWeights"]

# onnx-ir's ExternalTensor must not be mapped by two threads at once.
_loading = threading.Lock()


class ExpertWeights:
    """A view of a constant weight [E, N, K] that hands out one expert at a time.

    Attributes:
        tensor: The tensor that holds the weight.
        name: Its name, for messages.
        shape: (E, N, K).
        dtype: float32, float16 or bfloat16.
    """

    def __init__(self, tensor: ir.TensorProtocol, name: str) -> None:
        self.tensor = tensor
        self.name = name
        experts, rows, columns = (int(size) for size in tensor.shape.numpy())
        self.shape = (experts, rows, columns)
        self.dtype = SCALE_DTYPES[tensor.dtype.numpy().name]
        self._stacked: npt.NDArray[np.generic] | None = None
        self._released = 0

    @classmethod
    def of(cls, value: ir.Value) -> ExpertWeights | str:
        """Returns the view of a constant value, or the reason why there is none."""
        if value.is_graph_input():
            return f"{value.name} is a graph input, so its default may be overridden at run time"
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None:
            return f"{value.name} is not a constant"
        if tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            return f"{value.name} is {tensor.dtype.name}, not FLOAT, FLOAT16 or BFLOAT16"
        if len(tensor.shape) != 3:
            return f"{value.name} has shape {list(tensor.shape.numpy())}, not [E, N, K]"
        return cls(tensor, value.name or "weight")

    @property
    def nbytes(self) -> int:
        """Size of the weight in bytes."""
        experts, rows, columns = self.shape
        return experts * rows * columns * self.dtype.itemsize

    def expert(self, index: int) -> npt.NDArray[np.generic]:
        """Returns the weights [N, K] of one expert; a view where the storage allows it.

        Raises:
            SourceError: The data behind the tensor is missing or too short.
        """
        with _loading:
            if self._stacked is None:
                self._stacked = self._load()
            weight: npt.NDArray[np.generic] = self._stacked[index]
        return weight

    def release(self, index: int) -> None:
        """Says that an expert has been used, so that its memory can go.

        The mapped pages that hold only this expert go back to the system; an array that was made
        for the purpose goes after all E experts.
        """
        with _loading:
            self._released += 1
            if self._released % self.shape[0] == 0:
                self._stacked = None
        if isinstance(self.tensor, ir.ExternalTensor) and self.tensor.raw is not None:
            size = self.nbytes // self.shape[0]
            start = (self.tensor.offset or 0) + index * size
            _drop_pages(self.tensor.raw, start, start + size)

    def _load(self) -> npt.NDArray[np.generic]:
        try:
            array = np.asarray(self.tensor.numpy())
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read weight {self.name!r}: {error}") from error
        stacked: npt.NDArray[np.generic] = array.reshape(self.shape).view(self.dtype)
        return stacked


def _drop_pages(mapped: mmap.mmap, start: int, stop: int) -> None:
    """Drops the pages of a byte range, but the last one where the next expert begins in it."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    last = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED, first, last - first)
