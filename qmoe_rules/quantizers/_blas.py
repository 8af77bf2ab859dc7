"""Matrix products on one thread, while there are any."""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

__all__ = ["one_thread"]

_lock = threading.Lock()
_running = 0
_keeper: ThreadPoolExecutor
_limit: Any


@contextmanager
def one_thread() -> Iterator[None]:
    """Keeps numpy's BLAS on the calling thread until the last caller is done.

    Experts are what runs side by side. And what a BLAS adds up in which order, and so the last bit
    of a sum, may depend on how many threads it has.
    """
    global _running, _keeper, _limit
    with _lock:
        if not _running:
            # threadpoolctl heeds one thread as long as it lives: neither the first of the callers
            # nor the last one.
            _keeper = ThreadPoolExecutor(1)
            _limit = _keeper.submit(_controller().limit, limits=1, user_api="blas").result()
        _running += 1
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            if not _running:
                _keeper.submit(_limit.restore_original_limits).result()
                _keeper.shutdown()


@functools.cache
def _controller() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()
