"""`ExpertWeights`: a constant 3-D weight, read one expert at a time.

The array behind an external tensor is a view of the memory-mapped file; `drop_pages` gives the
pages of an expert back to the system after use, so that a sweep over a large model stays small.
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
_mapping = threading.Lock()


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
        try:
            with _mapping:
                stacked = self.tensor.numpy()
            return np.asarray(stacked.reshape(self.shape)[index]).view(self.dtype)
        except (OSError, ValueError) as error:
            raise SourceError(f"cannot read weight {self.name!r}: {error}") from error

    def drop_pages(self, index: int) -> None:
        """Gives the mapped pages that hold only this expert back to the system."""
        if not isinstance(self.tensor, ir.ExternalTensor) or self.tensor.raw is None:
            return
        size = self.nbytes // self.shape[0]
        start = (self.tensor.offset or 0) + index * size
        # Whole pages only: a shared page is dropped with the neighbour that is read later.
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        last = (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self.tensor.raw.madvise(mmap.MADV_DONTNEED, first, last - first)
