"""`QuantizedWeights`, the one noun that flows from quantizers to layouts to stored bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, unpack

__all__ = ["QuantizedWeights"]


@dataclass(frozen=True)
class QuantizedWeights:
    """Quantized weights of one expert, or of a stack of experts.

    The codes are kept packed, in the raw storage of the file: that is what quantizers write and
    what layouts permute, so no unpacked copy exists unless someone asks for it.

    Attributes:
        packed: uint8 [..., N, K*bits/8], least significant bits first (see `formats.pack`).
        scales: [..., N] for one scale per row, [..., N, K/block_size] for blocks. float32,
            float16 or bfloat16, already rounded to the type that is stored.
        spec: The format and the block size.
        zero_points: uint8 of the scales' shape, unpacked; None means the format's zero point.
    """

    packed: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.generic]
    spec: Spec
    zero_points: npt.NDArray[np.uint8] | None = None

    @property
    def codes(self) -> npt.NDArray[np.uint8]:
        """The unpacked codes, uint8 [..., N, K]."""
        return unpack(self.packed, self.spec.format.bits)

    def dequantize(self) -> npt.NDArray[np.float32]:
        """Returns what the codes mean, `(code - zero_point) * scale`, float32 [..., N, K].

        Exact for float16 and bfloat16 scales: an 8-bit integer times an 11-bit significand fits
        in float32's 24 bits.
        """
        codes = self.codes.astype(np.float32)
        rows = codes.shape[:-1]
        scales = self.scales.astype(np.float32).reshape(*rows, -1, 1)
        blocks = codes.reshape(*rows, scales.shape[-2], -1)
        if self.zero_points is None:
            blocks = blocks - np.float32(self.spec.format.zero_point)
        else:
            blocks = blocks - self.zero_points.astype(np.float32).reshape(scales.shape)
        return (blocks * scales).reshape(codes.shape)
