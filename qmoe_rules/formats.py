"""Number formats: what a code means and how codes lie in bytes.

A weight is stored as an unsigned code `q` of `bits` bits. An integer code means
`(q - zero_point) * scale`; a floating-point code means `value(q) * scale * global_scale`. Codes are
packed along the last axis (K) as one stream of bits, least significant bits first: the low bits of
a byte hold the lower k. This is the raw storage of ONNX Runtime's `com.microsoft::QMoE`, whose
schema is the source of every shape here, and of its `quantize_matmul_{2,4,8}bits` tools.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["FORMATS", "SCALE_DTYPES", "Format", "Spec", "format_of", "pack", "unpack"]

# The activation types of MoE and QMoE; the scales of integer codes share the activation's type.
SCALE_DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Format:
    """What the codes of a weight are.

    Attributes:
        name: The public name, such as `"int4"`.
        bits: The width of one code.
        quant_type: QMoE's `quant_type`.
        element: The type of floating-point codes; None for integers.
        scale: The type of the scales; None for the activation type.
        block_size: The only block size, where the format fixes one.
        square: Whether a block reaches over `block_size` rows too.
        global_scale: Whether every expert has one more float32 scale.
    """

    name: str
    bits: int
    quant_type: str = "int"
    element: np.dtype | None = None
    scale: np.dtype | None = None
    block_size: int | None = None
    square: bool = False
    global_scale: bool = False

    @property
    def zero_point(self) -> int:
        """The zero point of symmetric integers, 2^(bits-1), as QMoE assumes when none is given."""
        return 1 << (self.bits - 1)

    @property
    def max_code(self) -> int:
        """The largest code, 2^bits - 1."""
        return (1 << self.bits) - 1

    @property
    def codes_per_group(self) -> int:
        """The fewest codes that fill whole bytes."""
        return 8 // math.gcd(8, self.bits)

    @property
    def max_value(self) -> float:
        """The largest value of a floating-point code."""
        return {_E2M1: 6.0, _E4M3: 448.0}[self._element]

    def decode(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Returns what codes mean before any scale; integers without their zero point."""
        if self.element is None:
            return codes.astype(np.float32)
        return codes.view(self.element).astype(np.float32)

    def encode(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Returns the codes nearest to values, ties to even, clipped to the format.

        The inverse of `decode` for every finite code. Integers have their zero point in them.
        """
        if self.element is None:
            return np.asarray(np.clip(np.rint(values), 0, self.max_code), np.uint8)
        clipped = np.clip(values, -self.max_value, self.max_value).astype(self.element)
        return np.asarray(clipped.view(np.uint8))

    @property
    def _element(self) -> np.dtype:
        if self.element is None:
            raise ValueError(f"{self.name} has integer codes")
        return self.element


_E2M1, _E4M3 = np.dtype(ml_dtypes.float4_e2m1fn), np.dtype(ml_dtypes.float8_e4m3fn)
_E8M0, _FLOAT32 = np.dtype(ml_dtypes.float8_e8m0fnu), np.dtype(np.float32)

FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        *(Format(f"int{bits}", bits) for bits in (2, 3, 4, 8)),
        Format("mxfp4", 4, "fp4", _E2M1, _E8M0, block_size=32, global_scale=True),
        Format("nvfp4", 4, "nvfp4", _E2M1, _E4M3, block_size=16, global_scale=True),
        Format("fp8", 8, "fp8", _E4M3, _FLOAT32, square=True),
    )
}


def format_of(quant_type: str, bits: int) -> Format | None:
    """Returns the format of a QMoE's `quant_type` and width, None where it is not known."""
    for format in FORMATS.values():
        if format.quant_type == quant_type and (format.bits == bits or quant_type != "int"):
            return format
    return None


@dataclass(frozen=True)
class Spec:
    """How one projection is stored: the format of its codes and the reach of a scale.

    Attributes:
        format: The format of the codes.
        block_size: Columns that share a scale; 0 means one scale for the whole row, or for the
            whole expert where blocks are square.
        symmetric: Whether integers have the format's zero point, and none is stored.
        signed: Whether the scales of blocks of symmetric integers may be negative.
    """

    format: Format
    block_size: int = 0
    symmetric: bool = True
    signed: bool = True

    @property
    def has_scales(self) -> bool:
        """Whether the scales are not one per expert, which is stored as the global scale."""
        return bool(self.block_size) or not self.format.square

    @property
    def has_global_scale(self) -> bool:
        """Whether every expert has a float32 scale of its own."""
        return self.format.global_scale or not self.has_scales

    def blocks(self, columns: int) -> int:
        """Returns the scales per row of `columns` weights."""
        return -(-columns // self.block_size) if self.block_size else 1

    def packed_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Returns the shape of the packed bytes of one expert, uint8 [N, K*bits/8]."""
        return rows, columns * self.format.bits // 8

    def scales_shape(self, rows: int, columns: int) -> tuple[int, ...]:
        """Returns the shape of the scales of one expert.

        That is [N] for rows, [N, K/block_size] for blocks, [N/block_size, K/block_size], rounded
        up, for square blocks, and [] for one scale per expert.
        """
        if not self.block_size:
            return () if self.format.square else (rows,)
        return (self.blocks(rows) if self.format.square else rows, self.blocks(columns))

    def parts(
        self, rows: int, columns: int, dtype: np.dtype
    ) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
        """Returns shape and type of what is stored of one expert, by part, the weights raw.

        Args:
            rows: N.
            columns: K.
            dtype: The activation type.
        """
        weights = self.format.element if self.format.bits == 8 else None
        parts: dict[str, tuple[tuple[int, ...], np.dtype]] = {
            "weights": (self.packed_shape(rows, columns), weights or np.dtype(np.uint8))
        }
        if self.has_scales:
            parts["scales"] = (self.scales_shape(rows, columns), self.format.scale or dtype)
        if not self.symmetric:
            *leading, last = self.scales_shape(rows, columns)
            packed = (*leading, -(-last * self.format.bits // 8))
            parts["zero_points"] = (packed, np.dtype(np.uint8))
        if self.has_global_scale:
            parts["global_scale"] = ((), np.dtype(np.float32))
        return parts

    def refuse(self) -> str | None:
        """Returns why nothing can be stored this way, or None."""
        name, fixed = self.format.name, self.format.block_size
        if fixed is not None and self.block_size != fixed:
            return f"{name} has blocks of {fixed} columns, not block_size={self.block_size}"
        if not self.symmetric and self.format.element is not None:
            return f"{name} has floating-point codes, which have no zero points"
        return None

    def refuse_shape(self, rows: int, columns: int) -> str | None:
        """Returns why a [rows, columns] weight cannot be stored this way, or None when it can."""
        if rows < 1 or columns < 1:
            return f"weight [N={rows}, K={columns}] is empty"
        if columns % self.format.codes_per_group:
            return (
                f"K={columns} does not fill whole bytes of {self.format.bits}-bit codes "
                f"(a multiple of {self.format.codes_per_group} would)"
            )
        if self.block_size and columns % self.block_size and not self.format.square:
            return f"K={columns} is not divisible by block_size={self.block_size}"
        return None

    def __str__(self) -> str:
        reach = f"block {self.block_size}" if self.block_size else "row"
        if self.format.square and not self.block_size:
            reach = "expert"
        return f"{self.format.name}{'' if self.symmetric else ' asymmetric'} {reach}"


def pack(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Packs codes along the last axis, least significant bits first.

    Args:
        codes: uint8 [..., K], each below 2^bits; K fills whole bytes.
        bits: Width of a code: 1, 2, 3, 4 or 8.

    Returns:
        uint8 [..., K*bits/8]. `unpack` is the inverse.

    Example:
        >>> pack(np.array([0x1, 0x2, 0x3, 0xF], np.uint8), 4)
        array([ 33, 243], dtype=uint8)
    """
    if 8 % bits:  # a code may lie across two bytes
        stream = np.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
        *leading, columns = codes.shape
        stream = stream.reshape(*leading, columns * bits)
        return np.packbits(stream, axis=-1, bitorder="little")
    per_byte = 8 // bits
    packed = codes[..., ::per_byte].copy()
    for position in range(1, per_byte):
        packed |= codes[..., position::per_byte] << np.uint8(position * bits)
    return packed


def unpack(packed: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Unpacks the bytes that `pack` wrote.

    Args:
        packed: uint8 [..., K*bits/8].
        bits: Width of a code: 1, 2, 3, 4 or 8.

    Returns:
        uint8 [..., K]. Bits that do not fill a code are left out.
    """
    if 8 % bits:
        columns = packed.shape[-1] * 8 // bits
        stream = np.unpackbits(packed, axis=-1, count=columns * bits, bitorder="little")
        fields = stream.reshape(*packed.shape[:-1], columns, bits)
        return np.packbits(fields, axis=-1, bitorder="little")[..., 0]
    per_byte = 8 // bits
    codes = np.empty((*packed.shape[:-1], packed.shape[-1] * per_byte), np.uint8)
    mask = np.uint8((1 << bits) - 1)
    for position in range(per_byte):
        codes[..., position::per_byte] = (packed >> np.uint8(position * bits)) & mask
    return codes
