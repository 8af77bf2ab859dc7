"""`StatisticsWriter`: a safetensors file written tensor by tensor, never held in memory.

The header of such a file comes first and says where everything is; which experts will have a
Hessian is known at the end. So room is left for the longest header that can be, and the rest of it
is filled with blanks, as the format allows.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

__all__ = ["Entry", "StatisticsWriter"]

_DTYPES = {"int64": "I64", "float32": "F32"}
_LONGEST = 10**18

Entry = tuple[str, str, tuple[int, ...]]
"""Name, type and shape of a tensor."""


class StatisticsWriter:
    """Writes tensors one after the other.

    Attributes:
        entries: The tensors that are written.
    """

    def __init__(
        self,
        path: Path,
        metadata: Mapping[str, str],
        possible: Sequence[Entry],
        written: Iterable[Entry] = (),
    ) -> None:
        """Begins a file, or goes on with one.

        Args:
            path: The file.
            metadata: What its header may say beside the tensors, at its longest.
            possible: Every tensor that may come.
            written: Those that are in the file already; whatever lies behind them is dropped.
        """
        self.path = path
        self.entries = [(name, dtype, tuple(shape)) for name, dtype, shape in written]
        self._room = len(_header(metadata, possible, _LONGEST)) // 8 * 8 + 8
        self._end = sum(_nbytes(entry) for entry in self.entries)
        with path.open("r+b" if self.entries else "wb") as file:
            file.truncate(8 + self._room + self._end)

    def put(self, name: str, array: npt.NDArray[np.float32] | npt.NDArray[np.int64]) -> None:
        """Writes a tensor behind the others."""
        with self.path.open("r+b") as file:
            file.seek(8 + self._room + self._end)
            file.write(np.ascontiguousarray(array).data)
        self.entries.append((name, array.dtype.name, array.shape))
        self._end += array.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header."""
        header = _header(metadata, self.entries, 0)
        if len(header) > self._room:
            raise AssertionError(f"a header of {len(header)} bytes, where {self._room} are left")
        with self.path.open("r+b") as file:
            file.write(struct.pack("<Q", self._room) + header.ljust(self._room))


def _header(metadata: Mapping[str, str], entries: Sequence[Entry], start: int) -> bytes:
    """Returns the header of tensors that lie one after the other from `start` on."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    for entry in entries:
        name, dtype, shape = entry
        stop = start + _nbytes(entry)
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    return json.dumps(header).encode()


def _nbytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * np.dtype(dtype).itemsize
