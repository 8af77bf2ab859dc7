"""Tapes: the arrays that a value of a graph takes, one per feed, kept in a file.

What the feeds have become so far lies on disk, so that memory does not grow with their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Tape"]

Array = npt.NDArray[Any]


class Tape:
    """Arrays of one type, one after the other in a file.

    Attributes:
        path: The file.
        dtype: The type of all arrays.
        shapes: The shape of each.
    """

    def __init__(self, path: Path, dtype: np.dtype, shapes: Sequence[Sequence[int]] = ()) -> None:
        self.path = path
        self.dtype = dtype
        self.shapes = [tuple(shape) for shape in shapes]
        self._starts = [0]
        for shape in self.shapes:
            self._starts.append(self._starts[-1] + math.prod(shape))

    def append(self, array: Array) -> None:
        """Adds an array; the file is made with the first one."""
        with self.path.open("ab" if self.shapes else "wb") as file:
            file.write(np.ascontiguousarray(array, self.dtype).data)
        self.shapes.append(array.shape)
        self._starts.append(self._starts[-1] + array.size)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: int) -> Array:
        """Returns the array of one feed."""
        start, stop = self._starts[index], self._starts[index + 1]
        return self._map("r")[start:stop].reshape(self.shapes[index])

    def rows(self) -> Array:
        """Returns all arrays as one [rows, columns], read-only; their last axes are alike."""
        return self._map("r").reshape(-1, self._columns)

    def new_rows(self) -> Array:
        """Makes the file of a tape of known shapes, all zeros, and returns `rows` to write to."""
        with self.path.open("wb") as file:
            file.truncate(self._starts[-1] * self.dtype.itemsize)
        return self._map("r+").reshape(-1, self._columns)

    def is_whole(self) -> bool:
        """Returns whether the file is there, with all arrays in it."""
        size = self.path.stat().st_size if self.path.exists() else 0
        return size == self._starts[-1] * self.dtype.itemsize

    def feed_of(self, row: int) -> int:
        """Returns the index of the feed that a row belongs to."""
        return int(np.searchsorted(self._starts, row * self._columns, side="right")) - 1

    @property
    def _columns(self) -> int:
        return self.shapes[0][-1] if self.shapes and self.shapes[0] else 1

    def _map(self, mode: Any) -> Array:
        if not self._starts[-1]:  # nothing cannot be mapped
            return np.empty(0, self.dtype)
        return np.memmap(self.path, self.dtype, mode, shape=(self._starts[-1],))
