"""Matrix products on one thread, while there are any."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["one_thread"]

_lock = threading.Lock()
_running = 0
_limit: Any = None


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps numpy's BLAS on the calling thread until the last caller is done.

    Experts are what runs side by side. And what a BLAS adds up in which order, and so the last bit
    of a sum, may depend on how many threads it has.
    """
    global _running, _limit
    with _lock:
        if not _running:
            _limit = _controller().limit(limits=1, user_api="blas")
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                _limit.restore_original_limits()


@functools.cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
