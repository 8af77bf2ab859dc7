"""Layouts: packed codes <-> the bytes an execution provider reads, as invertible pairs.

A layout permutes codes and never changes one. `raw` is the packed array as it stands, uint8
[N, K*bits/8]. The CUTLASS layouts are what ONNX Runtime's CUDA kernels read after prepacking,
uint8 [K, N*bits/8]; the bytes equal those of ONNX Runtime's own packer.

The CUTLASS order, per expert, with I = 16 / bits and groups of R = 8*I columns: inside a group,
column k = (c, g, p) for int4 of sizes (4, 4, 2), or (c, g) for int8 of sizes (2, 8), is stored in
the order (g, p, c), or (g, c), which is what a warp's lanes load for one tensor-core fragment.
`cutlass_sm80` also interleaves I rows: [N/I, I, K/64, 64] is stored as [N/I, K/64, I, 64].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import pack, unpack

__all__ = ["LAYOUTS", "Layout"]

Bytes = npt.NDArray[np.uint8]

# How a group of R columns splits into (c, g, p), by width.
_GROUP = {4: (4, 4, 2), 8: (2, 8, 1)}
_TILE = 64


@dataclass(frozen=True)
class Layout:
    """One order of stored bytes.

    Attributes:
        name: The public name, a value of the recipe's `layout`.
        prepacked: QMoE's `weights_prepacked` for it: 0 raw, 1 packed.
        store: (packed [N, K*bits/8], bits) -> stored bytes.
        load: (stored bytes, bits) -> packed [N, K*bits/8]; the inverse of `store`.
        refuse: (N, K, bits) -> why such a weight cannot be stored so, or None.
    """

    name: str
    prepacked: int
    store: Callable[[Bytes, int], Bytes]
    load: Callable[[Bytes, int], Bytes]
    refuse: Callable[[int, int, int], str | None]

    def stored_shape(self, rows: int, columns: int, bits: int) -> tuple[int, int]:
        """Returns the shape of one expert's stored bytes."""
        if self.prepacked:
            return columns, rows * bits // 8
        return rows, columns * bits // 8


def _store_raw(packed: Bytes, bits: int) -> Bytes:
    return packed


def _refuse_raw(rows: int, columns: int, bits: int) -> str | None:
    return None


def _refuse_cutlass_sm80(rows: int, columns: int, bits: int) -> str | None:
    if bits not in _GROUP:
        return f"layout cutlass_sm80 holds 4-bit and 8-bit codes, not {bits}-bit ones"
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


LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("raw", 0, _store_raw, _store_raw, _refuse_raw),
        Layout("cutlass_sm80", 1, _store_cutlass_sm80, _load_cutlass_sm80, _refuse_cutlass_sm80),
        Layout("cutlass_sm90", 1, _store_cutlass_sm90, _load_cutlass_sm90, _refuse_cutlass_sm90),
    )
}
