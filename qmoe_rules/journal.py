"""`Journal`: which slabs of an interrupted save are written, each proven by its checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import onnx_ir as ir

from qmoe_rules.errors import SaveError
from qmoe_rules.extents import Extent
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.slabs import Place, checksum

try:
    import fcntl
except ImportError:  # no file locks of this kind, as on Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["Journal", "fingerprint"]


class Journal:
    """A file of one line per slab, beside the folder of the data files that it speaks of.

    A slab counts as written when its line is there and the bytes in its places have the checksum
    of the line: whatever a crash has left half done is computed again.
    """

    def __init__(self, folder: Path, wanted: str) -> None:
        """Opens the journal of a folder, or begins one.

        Args:
            folder: Holds the data files.
            wanted: The fingerprint of the work; a journal of other work is begun anew.

        Raises:
            SaveError: Another process works in this folder.
        """
        self._folder = folder
        self._known: dict[str, int] = {}
        self._file: IO[str] = folder.with_name("journal").open("a+", encoding="utf-8")
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                self._file.close()
                raise SaveError(f"another process is saving in {folder}") from error
        if not self._read(wanted):
            self._file.truncate(0)
            self._write(wanted)

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
        self._write(f"{_key(places)} {crc}")

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_error: object) -> None:
        self._file.close()

    def _read(self, wanted: str) -> bool:
        self._file.seek(0)
        lines = self._file.read().split("\n")
        if lines[0] != wanted:
            return False
        for line in lines[1:-1]:  # behind the last line feed there is a broken line, or nothing
            key, _, crc = line.rpartition(" ")
            if crc.isdigit():
                self._known[key] = int(crc)
        return True

    def _write(self, line: str) -> None:
        self._file.write(f"{line}\n")
        self._file.flush()


def fingerprint(extents: Sequence[Extent], names: Sequence[str], version: str) -> str:
    """Returns a hash of what a save would write: equal where the bytes are.

    It covers the places of all tensors, what every planned one is made of and how, the size and
    the modification time of the files that are read, and the version of this library.
    """
    digest = hashlib.blake2b(digest_size=16)
    for extent in extents:
        place = (names[extent.shard], extent.offset, extent.tensor.nbytes, extent.value.name)
        digest.update(json.dumps([version, place, *_sources(extent.tensor)]).encode())
    return digest.hexdigest()


def _sources(tensor: ir.TensorProtocol) -> Iterator[object]:
    tensors: tuple[ir.TensorProtocol, ...] = (tensor,)
    if isinstance(tensor, PlannedTensor):
        yield repr(tensor.projection)
        tensors = tensor.projection.weights.slices.tensors
    for source in tensors:
        if isinstance(source, ir.ExternalTensor):
            status = os.stat(source.path)
            yield [str(source.path), source.offset, source.length]
            yield [status.st_size, status.st_mtime_ns]
        else:
            yield hashlib.blake2b(source.tobytes(), digest_size=16).hexdigest()


def _key(places: tuple[Place, ...]) -> str:
    return json.dumps([[place.file, place.offset, place.nbytes] for place in places])
