"""Orders of stored codes, compiled: `layouts` defines them in numpy, byte-equal.

In the CUTLASS order of any width the columns of a row move within 16 bytes. Such a unit is one
shuffle of a processor's vector unit per field of a byte; a tile of 64 columns, 2, 4 or 8 bytes per
bit of a code, is read, shuffled in registers and written to its place.
"""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.extending import intrinsic

from qmoe_rules.quantizers._kernels.compiling import jit
from qmoe_rules.quantizers._kernels.instructions import address_of

__all__ = ["load_tiles", "store_tiles", "transpose_nibbles"]

_UNIT = 16  # bytes within which codes move
_TILE = 64  # columns


def _constant(vector: Any, number: int) -> ir.Constant:
    """Returns a vector of copies of one number."""
    return ir.Constant(vector, [ir.Constant(vector.element, number)] * vector.count)


def _shuffled(builder: Any, one: Any, other: Any, places: list[int]) -> Any:
    """Returns the elements of two vectors that stand at `places`."""
    wanted = ir.VectorType(ir.IntType(32), len(places))
    mask = ir.Constant(wanted, [ir.Constant(wanted.element, place) for place in places])
    return builder.shuffle_vector(one, other, mask)


def _moved(bits: int, order: Any) -> Any:
    """Returns an intrinsic that copies 64 codes and brings those of every unit into an order.

    Args:
        bits: Width of a code.
        order: For every place of a unit, the place from which its code comes.
    """
    per_byte = 8 // bits
    size = _TILE // per_byte
    vector = ir.VectorType(ir.IntType(8), size)

    @intrinsic
    def move(_context: Any, source: Any, _start: Any, target: Any, _to: Any) -> Any:
        """Reads 64 codes from byte `start` of one array and writes them at `to` of another."""

        def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            array, start, out, to = arguments
            address = address_of(context, builder, source, array, start)
            stored = builder.load(builder.bitcast(address, vector.as_pointer()), align=1)
            fields = [
                builder.and_(
                    builder.lshr(stored, _constant(vector, f * bits)),
                    _constant(vector, (1 << bits) - 1),
                )
                for f in range(per_byte)
            ]
            whole = _joined(builder, fields)
            moved = None
            for f in range(per_byte):
                places = [
                    order[(byte % _UNIT) * per_byte + f] % per_byte * size
                    + byte // _UNIT * _UNIT
                    + order[(byte % _UNIT) * per_byte + f] // per_byte
                    for byte in range(size)
                ]
                field = builder.shl(
                    _shuffled(builder, whole, whole, places), _constant(vector, f * bits)
                )
                moved = field if moved is None else builder.or_(moved, field)
            address = address_of(context, builder, target, out, to)
            builder.store(moved, builder.bitcast(address, vector.as_pointer()), align=1)
            return context.get_dummy_value()

        return types.none(source, types.intp, target, types.intp), codegen

    return move


def _joined(builder: Any, vectors: list[Any]) -> Any:
    """Returns vectors as one long vector."""
    while len(vectors) > 1:
        places = list(range(2 * vectors[0].type.count))
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_shuffled(builder, one, other, places) for one, other in pairs]
    return vectors[0]


def _orders(bits: int) -> tuple[list[int], list[int]]:
    """Returns where the codes of a stored unit come from, and those of a loaded one."""
    raw = np.arange(8 * _UNIT // bits).reshape(16 // bits, 4, 2)
    stored = raw.transpose(1, 2, 0).ravel()
    return stored.tolist(), np.argsort(stored).tolist()


_store2, _load2 = (_moved(2, order) for order in _orders(2))
_store4, _load4 = (_moved(4, order) for order in _orders(4))
_store8, _load8 = (_moved(8, order) for order in _orders(8))


@jit
def store_tiles(packed: Any, bits: int, stored: Any) -> None:
    """Stores raw bytes [N, K*bits/8] in the order of cutlass_sm80, uint8 [K, N*bits/8]."""
    rows, row_bytes = packed.shape
    raw, flat = packed.reshape(-1), stored.reshape(-1)
    together, tile = 16 // bits, 8 * bits
    for n in range(rows):
        first = n // together * together * row_bytes + n % together * tile
        for t in range(row_bytes // tile):
            start, to = n * row_bytes + t * tile, first + t * together * tile
            if bits == 8:
                _store8(raw, start, flat, to)
            elif bits == 4:
                _store4(raw, start, flat, to)
            else:
                _store2(raw, start, flat, to)


@jit
def load_tiles(stored: Any, bits: int, packed: Any) -> None:
    """Undoes `store_tiles`."""
    rows, row_bytes = packed.shape
    raw, flat = packed.reshape(-1), stored.reshape(-1)
    together, tile = 16 // bits, 8 * bits
    for n in range(rows):
        first = n // together * together * row_bytes + n % together * tile
        for t in range(row_bytes // tile):
            start, to = first + t * together * tile, n * row_bytes + t * tile
            if bits == 8:
                _load8(flat, start, raw, to)
            elif bits == 4:
                _load4(flat, start, raw, to)
            else:
                _load2(flat, start, raw, to)


@intrinsic
def _transpose_square(
    _context: Any, source: Any, _start: Any, _stride: Any, target: Any, _to: Any, _step: Any
) -> Any:
    """Transposes 16 x 16 codes of 4 bits, from byte `start` of flat rows of `stride` bytes.

    They are written from byte `to` of flat rows of `step` bytes.
    """
    word = ir.IntType(64)
    words, square = ir.VectorType(word, 8), ir.VectorType(ir.IntType(8), 64)
    columns = [8 * (place % 8) + place // 8 for place in range(64)]

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        array, start, stride, out, to, step = arguments

        def address(type: Any, array: Any, start: Any, stride: Any, row: int) -> Any:
            place = builder.add(start, builder.mul(stride, ir.Constant(stride.type, row)))
            found = address_of(context, builder, type, array, place)
            return builder.bitcast(found, word.as_pointer())

        def rows(first: int) -> Any:
            found = ir.Constant(words, ir.Undefined)
            for i in range(8):
                row = builder.load(address(source, array, start, stride, 2 * i + first), align=1)
                found = builder.insert_element(found, row, ir.Constant(ir.IntType(32), i))
            return builder.bitcast(found, square)

        even, odd = rows(0), rows(1)
        four, low = _constant(square, 4), _constant(square, 0x0F)
        lows = builder.or_(builder.and_(even, low), builder.shl(odd, four))
        highs = builder.or_(builder.lshr(even, four), builder.and_(odd, builder.not_(low)))
        for first, mixed in enumerate((lows, highs)):
            turned = builder.bitcast(_shuffled(builder, mixed, mixed, columns), words)
            for i in range(8):
                row = builder.extract_element(turned, ir.Constant(ir.IntType(32), i))
                builder.store(row, address(target, out, to, step, 2 * i + first), align=1)
        return context.get_dummy_value()

    arguments = (source, types.intp, types.intp, target, types.intp, types.intp)
    return types.none(*arguments), codegen


@jit
def transpose_nibbles(packed: Any, _bits: int, transposed: Any) -> None:
    """Packs 4-bit codes [N, K] along N: uint8 [N, K/2] becomes uint8 [K, N/2].

    Squares of 16 x 16 codes, in bands of 128 rows, so that the lines of memory that are read and
    written stay in the first-level cache; what they leave over code by code.
    """
    rows, row_bytes = packed.shape
    raw, flat, step = packed.reshape(-1), transposed.reshape(-1), rows // 2
    whole_rows, whole_bytes = rows // 16 * 16, row_bytes // 8 * 8
    for band in range(0, whole_rows, 128):
        for left in range(0, whole_bytes, 8):
            for top in range(band, min(band + 128, whole_rows), 16):
                start, to = top * row_bytes + left, 2 * left * step + top // 2
                _transpose_square(raw, start, row_bytes, flat, to, step)
    for m in range(rows // 2):
        for j in range(whole_bytes if 2 * m < whole_rows else 0, row_bytes):
            one, other = packed[2 * m, j], packed[2 * m + 1, j]
            transposed[2 * j, m] = (one & 0x0F) | ((other & 0x0F) << 4)
            transposed[2 * j + 1, m] = (one >> 4) | (other & 0xF0)
