"""Number formats: what a code means and how codes lie in bytes.

A weight is stored as an unsigned code `q` of `bits` bits and means `(q - zero_point) * scale`.
Codes are packed along the last axis (K), least significant bits first: the low bits of a byte
hold the lower k. This is the raw storage of ONNX Runtime's `com.microsoft::QMoE` with
`quant_type="int"` and of its `quantize_matmul_{2,4,8}bits` tools.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["FORMATS", "SCALE_DTYPES", "Format", "Spec", "pack", "unpack"]

# The activation types of MoE and QMoE; scales share the activation's type.
SCALE_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Format:
    """An unsigned integer code of `bits` bits with a default zero point in the middle.

    Attributes:
        name: The public name, such as `"int4"`.
        bits: The width of one code.
    """

    name: str
    bits: int

    @property
    def zero_point(self) -> int:
        """The zero point of symmetric weights, 2^(bits-1), as QMoE assumes when none is given."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def codes_per_byte(self) -> int:
        """How many codes share one byte."""
        return 8 // self.bits


FORMATS: dict[str, Format] = {f"int{bits}": Format(f"int{bits}", bits) for bits in (4, 8)}


@dataclass(frozen=True)
class Spec:
    """How one projection is stored: the format of its codes and the reach of a scale.

    Attributes:
        format: The format of the codes.
        block_size: Columns that share a scale; 0 means one scale for the whole row.
    """

    format: Format
    block_size: int = 0

    def blocks(self, columns: int) -> int:
        """Returns the scales per row of `columns` weights."""
        return columns // self.block_size if self.block_size else 1

    def packed_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the shape of the packed bytes of one expert, uint8 [N, K*bits/8]."""
        return rows, columns * self.format.bits // 8

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Returns the shape of the scales of one expert: [N], or [N, K/block_size]."""
        return (rows, self.blocks(columns)) if self.block_size else (rows,)

    def refuse_shape(self, rows: int, columns: int) -> str | None:
        """Returns why a [rows, columns] weight cannot be stored this way, or None when it can."""
        if rows < 1 or columns < 1:
            return f"weight [N={rows}, K={columns}] is empty"
        if columns % self.format.codes_per_byte:
            return (
                f"K={columns} does not fill whole bytes of {self.format.bits}-bit codes "
                f"(a multiple of {self.format.codes_per_byte} would)"
            )
        if self.block_size and columns % self.block_size:
            return f"K={columns} is not divisible by block_size={self.block_size}"
        return None

    def __str__(self) -> str:
        reach = f"block {self.block_size}" if self.block_size else "row"
        return f"{self.format.name} {reach}"


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs codes along the last axis, least significant bits first.

    Args:
        codes: uint8 [..., K], each below 2^bits; K fills whole bytes.
        bits: Width of a code: 1, 2, 4 or 8.

    Returns:
        uint8 [..., K*bits/8]. `unpack` is the inverse.

    Example:
        >>> pack(np.array([0x1, 0x2, 0x3, 0xF], np.uint8), 4)
        array([ 33, 243], dtype=uint8)
    """
    per_byte = 8 // bits
    packed = codes[..., ::per_byte].copy()
    for position in range(1, per_byte):
        packed |= codes[..., position::per_byte] << np.uint8(position * bits)
    return packed


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Unpacks the bytes that `pack` wrote.

    Args:
        packed: uint8 [..., K*bits/8].
        bits: Width of a code: 1, 2, 4 or 8.

    Returns:
        uint8 [..., K].
    """
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for position in range(per_byte):
        codes[..., position::per_byte] = (packed >> np.uint8(position * bits)) & mask
    return codes
