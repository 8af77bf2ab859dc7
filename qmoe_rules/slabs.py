"""From one expert's weights to the bytes that are stored of it: a slab.

A slab's work needs numbers only, so that it can be handed to another process.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_rules.errors import SourceError
from qmoe_rules.formats import Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.statistics import Calibration, ProjectionStatistics, Statistics

__all__ = [
    "FileSlice",
    "FileStatistics",
    "Place",
    "Slab",
    "SlabWork",
    "checksum",
    "quantized_slab",
    "write_slab",
]

_CHUNK_BYTES = 4 << 20

Slab = dict[str, npt.NDArray[Any]]
"""The stored bytes of one expert of one projection, by part."""


def quantized_slab(
    weight: npt.NDArray[np.generic],
    spec: Spec,
    layout: str,
    method: str,
    statistics: Statistics | None = None,
) -> Slab:
    """Quantizes one expert's weights and lays them out.

    Args:
        weight: [N, K] float32, float16 or bfloat16.
        spec: The format of the codes and the block size.
        layout: Name of the order of the stored bytes.
        method: Name of the quantizer.
        statistics: What the expert has seen of its inputs, where the method asks for it.

    Returns:
        Every part of `Spec.parts`, the weights in the layout.

    Raises:
        SourceError: The weights hold an infinity or a NaN.
    """
    quantized = METHODS[method](weight, spec, statistics)
    slab = quantized.parts()
    packed = LAYOUTS[layout].store(quantized.packed, spec.format.bits)
    slab["weights"] = packed.view(slab["weights"].dtype)
    return slab


@dataclass(frozen=True)
class FileSlice:
    """Where one expert's weights lie in a file.

    Attributes:
        path: The file.
        offset: Of the first byte.
        shape: (N, K).
        dtype: Of the weights.
    """

    path: str
    offset: int
    shape: tuple[int, int]
    dtype: np.dtype

    def read(self) -> npt.NDArray[np.generic]:
        """Returns the weights [N, K].

        Raises:
            OSError: The file cannot be read.
            ValueError: The file ends before the weights do.
        """
        count = self.shape[0] * self.shape[1]
        weight: npt.NDArray[np.generic] = np.fromfile(
            self.path, self.dtype, count, offset=self.offset
        )
        if weight.size != count:
            raise ValueError(f"{self.path} ends before the weights do")
        return weight.reshape(self.shape)


@dataclass(frozen=True)
class FileStatistics:
    """Where the statistics of one expert lie: a Hessian [K, K] is larger than the weights.

    Attributes:
        path: The file of the calibration.
        identity: Of the calibration.
        node: Name of the MoE node.
        projection: `"fc1"` or `"fc2"`.
        hessian: Whether the quantizer wants a Hessian.
        expert: Index of the expert.
    """

    path: str
    identity: tuple[object, ...]
    node: str
    projection: str
    hessian: bool
    expert: int

    @classmethod
    def of(cls, known: ProjectionStatistics, expert: int) -> FileStatistics:
        """Returns where `known(expert)` is read from."""
        path, identity = str(known.calibration.path), known.calibration.identity
        return cls(path, identity, known.node, known.projection, known.hessian, expert)

    def read(self) -> Statistics | None:
        """Returns what a quantizer should go by.

        Raises:
            SourceError: The file cannot be read, is broken, or is another calibration by now.
        """
        calibration = _calibration(self.path, self.identity)
        return ProjectionStatistics(calibration, self.node, self.projection, self.hessian)(
            self.expert
        )


@functools.lru_cache(maxsize=4)  # a process has one slab after the other of the same file
def _calibration(path: str, identity: tuple[object, ...]) -> Calibration:
    calibration = Calibration.load(path)
    if calibration.identity != identity:
        raise SourceError(f"{path} is another calibration than the one that was planned with")
    return calibration


@dataclass(frozen=True)
class Place:
    """Where one part of a slab goes.

    Attributes:
        part: The part.
        file: Name of the data file.
        offset: Of the first byte.
        nbytes: Size.
    """

    part: str
    file: str
    offset: int
    nbytes: int

    def moved(self, slabs: int) -> Place:
        """Returns the same part's place so many slabs further on."""
        return Place(self.part, self.file, self.offset + slabs * self.nbytes, self.nbytes)


@dataclass(frozen=True)
class SlabWork:
    """One slab to compute and write, with everything that it takes.

    Attributes:
        source: The weights, or where they lie.
        spec: The format of the codes and the block size.
        layout: Name of the order of the stored bytes.
        method: Name of the quantizer.
        statistics: What the expert has seen of its inputs, or where that lies, or None.
        label: What to call the weights in an error.
    """

    source: npt.NDArray[np.generic] | FileSlice
    spec: Spec
    layout: str
    method: str
    statistics: Statistics | FileStatistics | None
    label: str

    def compute(self) -> Slab:
        """Computes every part.

        Raises:
            SourceError: The weights or the statistics cannot be read, the weights hold an
                infinity or a NaN, or the statistics are of no inputs that there can be.
        """
        source, known = self.source, self.statistics
        if isinstance(known, FileStatistics):
            known = known.read()
        try:
            weight = source.read() if isinstance(source, FileSlice) else source
        except (OSError, ValueError) as error:
            raise SourceError(f"{self.label}: cannot be read: {error}") from error
        try:
            return quantized_slab(weight, self.spec, self.layout, self.method, known)
        except SourceError as error:
            raise SourceError(f"{self.label}: {error}; quantization needs finite weights") from None
        except ValueError as error:
            if known is None:
                raise
            raise SourceError(f"{self.label}: the calibration does not fit: {error}") from error

    def __call__(self, folder: Path, places: tuple[Place, ...], prove: bool, save: str = "") -> int:
        """Computes the slab and writes its parts.

        Args:
            folder: Where the data files lie.
            places: Where in them the parts go.
            prove: Whether the checksum is wanted.
            save: A name of the save that asks, so that no two calls are alike.

        Returns:
            The checksum of the bytes, 0 where it is not wanted.
        """
        return write_slab(self.compute(), folder, places, prove)


def write_slab(slab: Slab, folder: Path, places: tuple[Place, ...], prove: bool) -> int:
    """Writes the parts of a slab, each to its own byte range of a file that is there already.

    Args:
        slab: The parts.
        folder: Where the data files lie.
        places: Where in them the parts go.
        prove: Whether the checksum is wanted: it takes a third as long as quantizing does.

    Returns:
        The checksum of the bytes, as `checksum` computes it of the files; 0 where it is not
        wanted.
    """
    crc = 0
    for name, group in itertools.groupby(places, lambda place: place.file):
        with open(folder / name, "r+b", buffering=0) as file:
            for place in group:
                data = np.ascontiguousarray(slab[place.part]).view(np.uint8).reshape(-1).data
                if data.nbytes != place.nbytes:
                    raise AssertionError(f"{place} is given {data.nbytes} bytes")
                if prove:
                    crc = zlib.crc32(data, crc)
                file.seek(place.offset)
                while data:
                    data = data[file.write(data) or 0 :]
    return crc


def checksum(folder: Path, places: tuple[Place, ...]) -> int:
    """Returns the CRC-32 of the bytes that lie in some places, one after the other."""
    crc = 0
    for place in places:
        with (folder / place.file).open("rb") as file:
            file.seek(place.offset)
            for start in range(0, place.nbytes, _CHUNK_BYTES):
                crc = zlib.crc32(file.read(min(_CHUNK_BYTES, place.nbytes - start)), crc)
    return crc
