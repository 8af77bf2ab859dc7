"""`jit`: how every kernel is compiled."""

from __future__ import annotations

import functools
import logging
from typing import Any

from numba import config, njit

__all__ = ["jit"]

logger = logging.getLogger(__name__)

if config.DISABLE_JIT:
    raise ImportError("NUMBA_DISABLE_JIT is set")


def jit(function: Any) -> Any:
    """Compiles a function when it is first called, and keeps the result on disk where it can.

    Without the GIL, so that threads run side by side; a division by zero gives an infinity, as in
    numpy. No fastmath: every operation is rounded once, or the bytes would differ from numpy's.

    numba notices a change in the file that holds a kernel, not in those that it imports: after a
    change in `instructions` the kernels that were kept, *.nbi and *.nbc, must go.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written
        _warn_once()
        return njit(**options)(function)


@functools.cache
def _warn_once() -> None:
    logger.warning(
        "compiled kernels cannot be kept, and are compiled in every process: neither the package's "
        "folder nor the user's cache can be written (NUMBA_CACHE_DIR may name another)"
    )
