"""Mapped files that somebody cuts off, or a disk loses, while they are read.

Where a mapped page cannot be read the system sends a signal that ends the process without a word.
Here such a page of a file that `files` has mapped becomes one of zeros, what is being computed
comes to its end, and an error is raised. Pages that others have mapped are left to the system.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from qmoe_rules import files
from qmoe_rules.errors import SourceError

__all__ = ["told_when_lost"]

_lock = threading.Lock()
_guards = 0
_lost: list[int] = []


@contextlib.contextmanager
def told_when_lost() -> Iterator[Callable[[], None]]:
    """Keeps the process alive where mapped pages are lost, as far as the system is known.

    Yields:
        What raises as soon as pages are lost: nothing that was computed since may be kept.

    Raises:
        SourceError: Pages were lost meanwhile, and no other error has told of it.
    """
    before = len(_lost)

    def refuse_losses() -> None:
        if len(_lost) > before:
            raise SourceError("a file became shorter, or could not be read, while it was read")

    _guard(1)
    try:
        yield refuse_losses
    finally:
        _guard(-1)
    refuse_losses()


def _guard(change: int) -> None:
    """Installs the handler with the first guard, and what was there before with the last."""
    global _guards
    with _lock:
        _guards += change
        if _guards == max(change, 0):
            _install(bool(_guards))


if sys.platform == "linux" and sys.maxsize > 1 << 32:
    _ADDRESS = 16  # where a fault's address is in siginfo_t
    _libc = ctypes.CDLL(None, use_errno=True)
    _libc.mmap.restype = ctypes.c_void_p
    _libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    class _Action(ctypes.Structure):
        """`struct sigaction`, of all C libraries of Linux."""

        _fields_ = (
            ("handler", ctypes.c_void_p),
            ("mask", ctypes.c_byte * 128),
            ("flags", ctypes.c_int),
            ("restorer", ctypes.c_void_p),
        )

    _previous = _Action()

    # The signal strikes in the middle of a loop over numbers, in the thread that reads: there it
    # is safe to run Python, unlike in handlers of signals that come from elsewhere.
    def _replace_page(number: int, info: int, _context: int) -> None:
        address = ctypes.c_void_p.from_address(info + _ADDRESS).value or 0
        if not files.lose(address):  # it fails once more, as it would have without a guard
            _libc.sigaction(number, ctypes.byref(_previous), None)
            return
        start = address // mmap.PAGESIZE * mmap.PAGESIZE
        _lost.append(start)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
        if _libc.mmap(start, mmap.PAGESIZE, mmap.PROT_READ, flags, -1, 0) != start:
            signal.signal(number, signal.SIG_DFL)

    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(_replace_page)

    def _install(guarded: bool) -> None:
        if not guarded:
            _libc.sigaction(signal.SIGBUS, ctypes.byref(_previous), None)
            return
        action = _Action(
            ctypes.cast(_handler, ctypes.c_void_p).value, flags=0x40000004
        )  # SA_SIGINFO, SA_NODEFER
        _libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(_previous))

else:

    def _install(guarded: bool) -> None:
        pass
