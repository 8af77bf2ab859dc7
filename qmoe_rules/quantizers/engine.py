"""The compiled engine's door: what the numbers rooms know of numba."""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from types import ModuleType

import numpy as np
import numpy.typing as npt

__all__ = ["infinity", "kernels", "patterns"]

logger = logging.getLogger(__name__)

# The type of a pattern, the bits of a weight as an integer, says which float it is.
_PATTERNS: dict[str, np.dtype] = {
    "float32": np.dtype(np.uint32),
    "float16": np.dtype(np.uint16),
    "bfloat16": np.dtype(np.int16),
    "uint8": np.dtype(np.uint8),
}


@functools.cache
def kernels() -> ModuleType | None:
    """Returns the compiled engine, or None where numba has no build: same bytes, more slowly.

    Imported on first use: numba takes half a second that a dry run need not spend.
    """
    if sys.byteorder != "little":  # kernels read several codes, or bytes, as one integer
        return None
    try:
        return importlib.import_module("qmoe_rules.quantizers._kernels")
    except ImportError as error:
        logger.warning("numba cannot be used, and numpy is several times slower: %s", error)
        return None


def patterns(array: npt.NDArray[np.generic]) -> npt.NDArray[np.integer]:
    """Returns the bit patterns of floats, or bytes as they are, in one block of memory, aligned.

    A view where it can be, and read-only, so that every source meets the same compiled code.
    """
    whole = np.require(array, requirements=("C", "A"))
    bits = whole.view(_PATTERNS[array.dtype.name])
    bits.flags.writeable = False
    return bits


def infinity(dtype: np.dtype) -> np.unsignedinteger:
    """Returns the pattern of infinity as an unsigned integer of the float's width."""
    pattern: np.unsignedinteger = np.full(1, np.inf, dtype).view(f"u{dtype.itemsize}")[0]
    return pattern
