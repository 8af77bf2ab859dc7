"""Layouts: packed codes <-> the bytes an execution provider reads, as invertible pairs.

A layout permutes codes and never changes one. `raw` is the packed array as it stands, uint8
[N, K*bits/8]. The CUTLASS layouts are what ONNX Runtime's CUDA kernels read after prepacking,
uint8 [K, N*bits/8]; the bytes equal those of ONNX Runtime's own packer. 4-bit floating-point codes
have two layouts of their own: `k_packed`, the packed array as it stands, which the CPU kernel
reads, and `n_packed`, uint8 [K, N/2], the low half of a byte for the even n, which the CUDA kernel
reads (the order of ONNX Runtime's `pack_fp4_weights_for_cuda_moe_gemm`).

The CUTLASS order, per expert, with I = 16 / bits and groups of R = 8*I columns: inside a group,
column k = (c, g, p) of sizes (I, 4, 2) is stored in the order (g, p, c), which is what a warp's
lanes load for one tensor-core fragment.
`cutlass_sm80` also interleaves I rows: [N/I, I, K/64, 64] is stored as [N/I, K/64, I, 64].

The orders are defined in numpy, and compiled where numba can be used: byte-equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Format, pack, unpack
from qmoe_rules.quantizers.engine import kernels, patterns

__all__ = ["LAYOUTS", "Layout"]

Bytes = npt.NDArray[np.uint8]

# How a group of R columns splits into (c, g, p), by width.
_GROUP = {bits: (16 // bits, 4, 2) for bits in (2, 4, 8)}
_TILE = 64


@dataclass(frozen=True)
class Layout:
    """One order of stored bytes.

    Attributes:
        name: The public name, a value of the recipe's `layout`.
        prepacked: QMoE's `weights_prepacked` that says so.
        quant_types: The values of `quant_type` that have it.
        transposed: Whether the stored bytes are [K, N*bits/8], not [N, K*bits/8].
        permute: (packed [N, K*bits/8], bits) -> stored bytes, in numpy.
        restore: (stored bytes, bits) -> packed [N, K*bits/8], in numpy; the inverse of `permute`.
        refuse_shape: (N, K, bits) -> why such a weight cannot be stored so, or None.
        compiled: Names of the kernels that do what `permute` and `restore` do.
    """

    name: str
    prepacked: int
    quant_types: frozenset[str]
    transposed: bool
    permute: Callable[[Bytes, int], Bytes]
    restore: Callable[[Bytes, int], Bytes]
    refuse_shape: Callable[[int, int, int], str | None]
    compiled: tuple[str, str] | None = None

    def store(self, packed: Bytes, bits: int) -> Bytes:
        """Returns the stored bytes of packed codes, uint8 [N, K*bits/8]."""
        rows, columns = packed.shape[0], packed.shape[1] * 8 // bits
        kernel = self._kernel(0, rows, columns, bits)
        if kernel is None:
            return self.permute(packed, bits)
        stored = np.empty(self.stored_shape(rows, columns, bits), np.uint8)
        kernel(patterns(packed), bits, stored)
        return stored

    def load(self, stored: Bytes, bits: int) -> Bytes:
        """Returns the packed codes, uint8 [N, K*bits/8], of stored bytes: undoes `store`."""
        columns, rows = stored.shape[0], stored.shape[1] * 8 // bits
        kernel = self._kernel(1, rows, columns, bits)
        if kernel is None:
            return self.restore(stored, bits)
        packed = np.empty((rows, columns * bits // 8), np.uint8)
        kernel(patterns(stored), bits, packed)
        return packed

    def _kernel(self, which: int, rows: int, columns: int, bits: int) -> Any:
        """Returns a kernel for this shape, None where there is none: numpy says what is wrong."""
        engine = kernels() if self.compiled else None
        if engine is None or self.compiled is None or self.refuse_shape(rows, columns, bits):
            return None
        return getattr(engine, self.compiled[which])

    def refuse(self, rows: int, columns: int, format: Format) -> str | None:
        """Returns why a [rows, columns] weight of this format cannot be stored so, or None."""
        return self.refuse_format(format) or self.refuse_shape(rows, columns, format.bits)

    def refuse_format(self, format: Format) -> str | None:
        """Returns why no weight of this format is stored so, or None."""
        if format.quant_type in self.quant_types:
            return None
        takers = [each.name for each in LAYOUTS.values() if format.quant_type in each.quant_types]
        return f"layout {self.name} is not one of {format.name}'s ({', '.join(takers)})"

    def stored_shape(self, rows: int, columns: int, bits: int) -> tuple[int, int]:
        """Returns the shape of one expert's stored bytes."""
        if self.transposed:
            return columns, rows * bits // 8
        return rows, columns * bits // 8


def _as_it_stands(packed: Bytes, bits: int) -> Bytes:
    return packed


def _refuse_nothing(rows: int, columns: int, bits: int) -> str | None:
    return None


def _refuse_cutlass_sm80(rows: int, columns: int, bits: int) -> str | None:
    if bits not in _GROUP:
        return f"layout cutlass_sm80 holds 2-bit, 4-bit and 8-bit codes, not {bits}-bit ones"
    if columns % _TILE:
        return f"layout cutlass_sm80 needs K divisible by {_TILE}, and K={columns}"
    step = 64 // bits
    if rows % step:
        return f"layout cutlass_sm80 needs N divisible by {step} at {bits} bits, and N={rows}"
    return None


def _refuse_cutlass_sm90(rows: int, columns: int, bits: int) -> str | None:
    return (
        "layout cutlass_sm90 is never read by QMoE: every GPU, Hopper and later too, reads "
        "cutlass_sm80 (measured with onnxruntime-gpu 1.31.1 on an H200)"
    )


def _refuse_n_packed(rows: int, columns: int, bits: int) -> str | None:
    if bits != 4:
        return f"layout n_packed holds 4-bit codes, not {bits}-bit ones"
    if rows % 2:
        return f"layout n_packed holds two rows per byte, and N={rows} is odd"
    return None


def _transpose(packed: Bytes, bits: int) -> Bytes:
    """Packs along the other axis; its own inverse."""
    return pack(np.ascontiguousarray(unpack(packed, bits).T), bits)


def _store_cutlass_sm80(packed: Bytes, bits: int) -> Bytes:
    rows, row_bytes = packed.shape
    columns = row_bytes * 8 // bits
    step = 16 // bits
    codes = unpack(packed, bits).reshape(rows // step, step, columns // _TILE, -1, *_GROUP[bits])
    # axes: (row group, row, tile, group in tile, c, g, p) -> tile before row, c last
    return _repack(codes.transpose(0, 2, 1, 3, 5, 6, 4), columns, bits)


def _load_cutlass_sm80(stored: Bytes, bits: int) -> Bytes:
    columns, column_bytes = stored.shape
    rows = column_bytes * 8 // bits
    step = 16 // bits
    c, g, p = _GROUP[bits]
    codes = unpack(stored, bits).reshape(rows // step, columns // _TILE, step, -1, g, p, c)
    return _repack(codes.transpose(0, 2, 1, 3, 6, 4, 5), rows, bits)


def _store_cutlass_sm90(packed: Bytes, bits: int) -> Bytes:
    rows, row_bytes = packed.shape
    codes = unpack(packed, bits).reshape(rows, -1, *_GROUP[bits])
    return _repack(codes.transpose(0, 1, 3, 4, 2), row_bytes * 8 // bits, bits)


def _load_cutlass_sm90(stored: Bytes, bits: int) -> Bytes:
    rows = stored.shape[1] * 8 // bits
    c, g, p = _GROUP[bits]
    codes = unpack(stored, bits).reshape(rows, -1, g, p, c)
    return _repack(codes.transpose(0, 1, 4, 2, 3), rows, bits)


def _repack(codes: Bytes, leading: int, bits: int) -> Bytes:
    """Packs codes in their present order into `leading` rows of bytes."""
    return pack(np.ascontiguousarray(codes).reshape(leading, -1), bits)


_INT, _FP4 = frozenset({"int"}), frozenset({"fp4", "nvfp4"})

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("raw", 0, _INT | {"fp8"}, False, _as_it_stands, _as_it_stands, _refuse_nothing),
        Layout(
            "cutlass_sm80",
            1,
            _INT,
            True,
            _store_cutlass_sm80,
            _load_cutlass_sm80,
            _refuse_cutlass_sm80,
            ("store_tiles", "load_tiles"),
        ),
        Layout(
            "cutlass_sm90",
            1,
            _INT,
            True,
            _store_cutlass_sm90,
            _load_cutlass_sm90,
            _refuse_cutlass_sm90,
        ),
        Layout(
            "n_packed",
            0,
            _FP4,
            True,
            _transpose,
            _transpose,
            _refuse_n_packed,
            ("transpose_nibbles", "transpose_nibbles"),
        ),
        Layout("k_packed", 1, _FP4, False, _as_it_stands, _as_it_stands, _refuse_nothing),
    )
}
