"""`QuantizedWeights`, the one noun that flows from quantizers to layouts to stored bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack, unpack

__all__ = ["QuantizedWeights", "pack_zero_points", "unpack_zero_points"]


@dataclass(frozen=True)
class QuantizedWeights:
    """Quantized weights of one expert, or of a stack of experts.

    The codes are kept packed, in the raw storage of the file: that is what quantizers write and
    what layouts permute, so no unpacked copy exists unless someone asks for it.

    Attributes:
        packed: uint8 [..., N, K*bits/8], least significant bits first (see `formats.pack`).
        scales: `[..., *Spec.scales_shape]`, already rounded to the type that is stored.
        spec: The format, the block size and whether there are zero points.
        zero_points: uint8 of the scales' shape, unpacked; None means the format's zero point.
        global_scale: float32 [...], a second scale of every expert; None where there is none.
    """

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.generic]
    spec: Spec
    zero_points: npt.NDArray[np.uint8] | None = None
    global_scale: npt.NDArray[np.float32] | None = None

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """The unpacked codes, uint8 [..., N, K]."""
        return unpack(self.packed, self.spec.format.bits)

    def parts(self) -> dict[str, npt.NDArray[Any]]:
        """Returns the arrays that are stored, as `Spec.parts` lists them, the weights raw."""
        element = self.spec.format.element if self.spec.format.bits == 8 else None
        parts: dict[str, npt.NDArray[Any]] = {
            "weights": self.packed.view(element) if element is not None else self.packed
        }
        parts["scales" if self.spec.has_scales else "global_scale"] = self.scales
        if self.zero_points is not None:
            parts["zero_points"] = pack_zero_points(self.zero_points, self.spec.format.bits)
        if self.global_scale is not None:
            parts["global_scale"] = self.global_scale
        return parts

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Returns what the codes mean, float32 [..., N, K].

        That is `(code - zero_point) * scale` for integers, exact for float16 and bfloat16 scales:
        an 8-bit integer times an 11-bit significand fits in float32's 24 bits. Floating-point
        codes mean `value * (scale * global_scale)`.
        """
        values = self.spec.format.decode(self.codes)
        rows, columns = values.shape[-2:]
        if self.spec.format.element is None:
            points: npt.NDArray[Any] | int = self.spec.format.zero_point
            if self.zero_points is not None:
                points = self._spread(self.zero_points, rows, columns)
            values = values - np.asarray(points, np.float32)
        factor = self._spread(self.scales.astype(np.float32), rows, columns)
        if self.global_scale is not None:
            factor = factor * self.global_scale[..., None, None]
        real: npt.NDArray[np.float32] = values * factor
        return real

    def _spread(self, array: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[Any]:
        """Returns one value per weight, [..., N, K], or [..., N, 1], of one per scale."""
        size = self.spec.block_size
        if not size:
            return array[..., None, None] if self.spec.format.square else array[..., None]
        wide = np.repeat(array, size, axis=-1)[..., :columns]
        return np.repeat(wide, size, axis=-2)[..., :rows, :] if self.spec.format.square else wide


def pack_zero_points(points: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs zero points along their last axis, which is filled up to whole bytes with zeros."""
    *leading, count = points.shape
    whole = np.zeros((*leading, -(-count // 8) * 8), np.uint8)  # 8 codes of any width fill bytes
    whole[..., :count] = points
    return pack(whole, bits)[..., : -(-count * bits // 8)]


def unpack_zero_points(
    packed: npt.NDArray[np.uint8], bits: int, count: int
) -> npt.NDArray[np.uint8]:
    """Returns the first `count` zero points along the last axis; undoes `pack_zero_points`."""
    return unpack(packed, bits)[..., :count]
