"""`Journal`: which slabs of an interrupted save are written, each proven by its checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qmoe_rules.errors import SourceError
from qmoe_rules.extents import Extent
from qmoe_rules.lazy import PlannedTensor, Projection
from qmoe_rules.slabs import Place, checksum
from qmoe_rules.slices import SlicedTensor, Slices

__all__ = ["Journal", "fingerprint"]


class Journal:
    """A file of one line per slab, in the folder of the data files that it speaks of.

    A slab counts as written when its line is there and the bytes in its places have the checksum
    of the line: whatever a crash has left half done is computed again.
    """

    def __init__(self, folder: Path) -> None:
        """Opens the journal of a folder, or begins one.

        Args:
            folder: Holds the data files.
        """
        self._folder = folder
        self._file = (folder / "journal").open("a+b")
        self._file.seek(0)
        whole, _, _ = self._file.read().rpartition(b"\n")
        self._file.truncate(len(whole) + 1 if whole else 0)  # a line that a crash has torn goes
        self._known = dict(filter(None, map(_read_line, whole.split(b"\n"))))

    def has(self, places: tuple[Place, ...]) -> bool:
        """Returns whether a slab lies in its places already."""
        known = self._known.get(_key(places))
        if known is None:
            return False
        with contextlib.suppress(OSError):
            return checksum(self._folder, places) == known
        return False

    def record(self, places: tuple[Place, ...], crc: int) -> None:
        """Says that a slab is written."""
        self._file.write(b"%s %d\n" % (_key(places), crc))
        self._file.flush()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()


def fingerprint(extents: Sequence[Extent], version: str) -> str:
    """Returns a hash of what a save would write: equal where the bytes are.

    It covers the places of all tensors, everything that planned ones are made of, and the version
    of this library. Files that are read go in by their size and modification time, and by what a
    weight's first expert holds: how a graph rearranges weights is in no file's status.

    Raises:
        SourceError: A tensor cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    projections: dict[Projection, None] = {}
    for extent in extents:
        tensor = extent.tensor
        place = [version, extent.file, extent.offset, tensor.nbytes, tensor.dtype.name]
        if isinstance(tensor, PlannedTensor):
            projections[tensor.projection] = None
            place.append(tensor.part)
            found: Iterator[object] = iter(())
        elif isinstance(tensor, SlicedTensor):
            found = _slices_identity(tensor.slices)
        else:
            found = _identity(tensor)
        digest.update(json.dumps([*place, *found]).encode())
    for projection in projections:
        made_of = vars(projection) | {"weights": None, "serial": None}
        found = _slices_identity(projection.weights.slices)
        digest.update(json.dumps([*found, repr(made_of)]).encode())
    return digest.hexdigest()


def _slices_identity(slices: Slices) -> Iterator[object]:
    yield [*slices.shape, slices.dtype.name]
    for tensor in slices.tensors:
        yield from _identity(tensor)
    if slices.shape[0]:
        yield _hash(np.ascontiguousarray(slices.read(0, 1)).view(np.uint8).data)
        slices.release(0, 1)


def _identity(tensor: ir.TensorProtocol) -> Iterator[object]:
    if not isinstance(tensor, ir.ExternalTensor):
        yield _hash(tensor.tobytes())
        return
    try:
        status = os.stat(tensor.path)
    except OSError as error:
        raise SourceError(f"cannot read tensor {tensor.name!r}: {error}") from error
    yield [str(tensor.path), tensor.offset, status.st_size, status.st_mtime_ns, status.st_ino]


def _hash(data: bytes | memoryview) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _read_line(line: bytes) -> tuple[bytes, int] | None:
    key, _, crc = line.rpartition(b" ")
    return (key, int(crc)) if crc.isdigit() else None


def _key(places: tuple[Place, ...]) -> bytes:
    return json.dumps([[place.file, place.offset, place.nbytes] for place in places]).encode()
