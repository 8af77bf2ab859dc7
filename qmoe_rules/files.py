"""Reading tensors: one mapping per file, however many tensors it holds.

onnx-ir maps a file anew for every external tensor and keeps a descriptor for each, which runs out
on models of many experts.
"""

from __future__ import annotations

import mmap
import os
import stat
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qmoe_rules.errors import SourceError

__all__ = [
    "array",
    "chunks",
    "drop_pages",
    "forget",
    "in_memory",
    "keeping",
    "lose",
    "made",
    "resolved_file",
]

Array = npt.NDArray[np.generic]

_lock = threading.RLock()  # a tensor that is made may read others
_maps: weakref.WeakValueDictionary[tuple[object, ...], mmap.mmap] = weakref.WeakValueDictionary()
_ranges: dict[int, int] = {}  # of addresses, of every mapping that somebody looks at
_recent: deque[mmap.mmap] = deque(maxlen=16)
_keepers: set[object] = set()
_CHUNK_BYTES = 16 << 20
_MADE_KEPT = 4
_made: OrderedDict[int, tuple[ir.TensorProtocol, Array]] = OrderedDict()


def array(tensor: ir.ExternalTensor) -> Array:
    """Returns a view of an external tensor in its mapped file, one axis.

    Raises:
        SourceError: The file lies outside the model's folder.
        OSError: The file cannot be read.
        ValueError: The file ends before the tensor does.
    """
    dtype = tensor.dtype.numpy().newbyteorder("<")
    return np.frombuffer(_map(tensor), dtype, tensor.size, tensor.offset or 0)


def resolved_file(tensor: ir.ExternalTensor) -> Path:
    """Returns the file of an external tensor, which is in the model's folder and only there.

    Raises:
        SourceError: It lies elsewhere, is no regular file, or has several hard links, which may
            lead elsewhere.
    """
    try:
        file = Path(tensor.path).resolve()
        status = file.stat() if file.exists() else None
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links, a name of no file
        raise SourceError(
            f"tensor {tensor.name!r}: its external data {tensor.location!r} can be in no file: "
            f"{error}"
        ) from error
    if tensor.base_dir and Path(tensor.base_dir).resolve() not in file.parents:
        raise SourceError(
            f"tensor {tensor.name!r}: its external data {tensor.location} lie outside the model's "
            "folder; copy them into it"
        )
    if status is not None and not stat.S_ISREG(status.st_mode):  # a pipe may never end
        raise SourceError(f"tensor {tensor.name!r}: its external data {file} are no regular file")
    if status is not None and status.st_nlink > 1:
        raise SourceError(
            f"tensor {tensor.name!r}: its external data {file} have several hard links, which may "
            "lead outside the model's folder; copy the file"
        )
    return file


def chunks(tensor: ir.ExternalTensor) -> Iterator[bytes]:
    """Yields the bytes of an external tensor, and no others, in pieces of bounded size."""
    left = tensor.nbytes
    with resolved_file(tensor).open("rb") as file:
        file.seek(tensor.offset or 0)
        while left:
            chunk = file.read(min(left, _CHUNK_BYTES))
            if not chunk:
                raise ValueError(f"{tensor.path} ends {left} bytes before the tensor does")
            left -= len(chunk)
            yield chunk


def in_memory(tensor: ir.ExternalTensor) -> ir.TensorProtocol:
    """Returns an external tensor as one in memory.

    Raises:
        SourceError: Its data cannot be read.
    """
    try:
        data = b"".join(chunks(tensor))
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read tensor {tensor.name!r}: {error}") from error
    proto = onnx.TensorProto(name=tensor.name, data_type=tensor.dtype.value, raw_data=data)
    proto.dims.extend(tensor.shape.numpy())
    return ir.serde.TensorProtoTensor(proto)


def drop_pages(tensor: ir.ExternalTensor, start: int, stop: int) -> None:
    """Drops the pages of a byte range, but the last one where the next range begins in it."""
    first = start // mmap.PAGESIZE * mmap.PAGESIZE
    last = stop // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and hasattr(mmap, "MADV_DONTNEED"):
        _map(tensor).madvise(mmap.MADV_DONTNEED, first, last - first)


def made(tensor: ir.TensorProtocol) -> Array:
    """Returns the array of a tensor that makes a new one each time, one of the last few kept."""
    with _lock:
        kept = _made.pop(id(tensor), None)
        if kept is None:
            kept = (tensor, np.asarray(tensor.numpy()))
        _made[id(tensor)] = kept
        while len(_made) > _MADE_KEPT:
            _made.popitem(last=False)
    return kept[1]


def forget() -> None:
    """Lets go of the arrays that `made` keeps."""
    with _lock:
        _made.clear()


@contextmanager
def keeping() -> Iterator[None]:
    """Keeps files mapped from one read to the next, the last few, and lets go of all in the end.

    Without it a file is mapped as long as somebody looks at an array of it.
    """
    keeper = object()
    _keepers.add(keeper)
    try:
        yield
    finally:
        _keepers.remove(keeper)
        if not _keepers:
            _recent.clear()
        forget()


def lose(address: int) -> bool:
    """Has files mapped anew at the next read where one of them is mapped at an address.

    It takes no lock: a thread that holds it may be the one whose reading has failed.

    Returns:
        Whether one is.
    """
    found = any(start <= address < stop for start, stop in list(_ranges.items()))
    if found:
        _maps.clear()
        _recent.clear()
    return found


def _map(tensor: ir.ExternalTensor) -> mmap.mmap:
    # Another file may have taken the name since: the old mapping is not of that one.
    mapped = _maps.get(_identity(tensor, os.stat(tensor.path)))
    if mapped is None:
        with _lock, resolved_file(tensor).open("rb") as file:
            key = _identity(tensor, os.fstat(file.fileno()))
            mapped = _maps.get(key)
            if mapped is None:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                _maps[key] = mapped
                start = np.frombuffer(mapped, np.uint8).ctypes.data
                _ranges[start] = start + len(mapped)
                weakref.finalize(mapped, _ranges.pop, start, None).atexit = False
    if _keepers:
        with _lock:
            if mapped not in _recent:
                _recent.append(mapped)
    return mapped


def _identity(tensor: ir.ExternalTensor, status: os.stat_result) -> tuple[object, ...]:
    """Returns what tells a file, and the way that a tensor names it, from all others."""
    place = tensor.base_dir, tensor.location, status.st_dev, status.st_ino
    return *place, status.st_size, status.st_mtime_ns
