"""LLVM instructions that numba does not offer, on one value or on vectors of `LANES` or `WIDE`.

Vectors are written by hand because LLVM's own vectorizer gives up on loops as short as a block.
LLVM makes of them what a processor has: AVX-512, AVX2, SSE or NEON.

A pattern is the bits of a float as an integer, whose type says which float it is: uint16 is
float16, int16 is bfloat16, uint32 is float32.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

__all__ = [
    "LANES",
    "ROUNDER",
    "ROUNDER_BITS",
    "WIDE",
    "address_of",
    "as_bits",
    "by_negated",
    "by_size",
    "by_value",
    "e2m1_codes",
    "e4m3_codes",
    "float_of",
    "from_size",
    "from_value",
    "greatest_by_size",
    "greatest_by_value",
    "greatest_negated",
    "integer_codes",
    "nearest",
    "prefetch",
    "put",
]

LANES, WIDE = 16, 32
# 1.5 * 2^23: adding it to |x| < 2^22 rounds x to the nearest integer, ties to even, and leaves
# that integer in the low bits of the sum's pattern.
ROUNDER, ROUNDER_BITS = np.float32(12582912.0), np.int32(0x4B400000)

_FLOAT, _I8, _I16, _I32 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32)
_MANTISSA, _BIAS = 23, 127  # of float32
# (bits of the mantissa, bias of the exponent) of the narrower floats.
_NARROW = {types.uint16: (10, 15), types.int16: (7, 127)}
_E2M1, _E4M3 = (1, 1), (3, 7)

_HAS_NATIVE_HALF = bool(llvm.get_host_cpu_features().get("f16c")) or platform.machine() in (
    "aarch64",
    "arm64",
)


def _shaped(value: Any, element: ir.Type) -> ir.Type:
    """Returns the type of as many elements as `value` has."""
    vector = value.type
    return ir.VectorType(element, vector.count) if isinstance(vector, ir.VectorType) else element


def _width(bits: Any) -> int:
    """Returns the width of an integer, or of every integer of a vector."""
    element = bits.type.element if isinstance(bits.type, ir.VectorType) else bits.type
    return int(element.width)


def _constant(like: Any, number: float) -> ir.Constant:
    """Returns a number as a constant of the type of `like`."""
    if isinstance(like.type, ir.VectorType):
        return ir.Constant(like.type, [ir.Constant(like.type.element, number)] * like.type.count)
    return ir.Constant(like.type, number)


def _splat(builder: Any, value: Any, lanes: int = LANES) -> Any:
    """Returns a vector of copies of one value."""
    nothing = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    zeros = ir.Constant(ir.VectorType(_I32, lanes), [ir.Constant(_I32, 0)] * lanes)
    return builder.shuffle_vector(first, nothing, zeros)


def address_of(context: Any, builder: Any, array_type: Any, array: Any, start: Any) -> Any:
    """Returns the address of `array[start]`."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [start])


def _load(
    context: Any, builder: Any, array_type: Any, array: Any, start: Any, lanes: int = LANES
) -> Any:
    """Returns the vector `array[start : start + lanes]`."""
    address = address_of(context, builder, array_type, array, start)
    element = context.get_value_type(array_type.dtype)
    vector = ir.VectorType(element, lanes)
    return builder.load(builder.bitcast(address, vector.as_pointer()), align=element.width // 8)


def _store(builder: Any, value: Any, address: Any) -> None:
    """Writes a value, or a vector, at an address that need not be aligned."""
    builder.store(value, builder.bitcast(address, value.type.as_pointer()), align=1)


def _widened(builder: Any, bits: Any, pattern: Any) -> Any:
    """Returns what patterns mean, as float32: exact."""
    floats, integers = _shaped(bits, _FLOAT), _shaped(bits, _I32)
    if pattern == types.uint32:
        return builder.bitcast(bits, floats)
    if pattern == types.uint16 and _HAS_NATIVE_HALF:
        return builder.fpext(builder.bitcast(bits, _shaped(bits, ir.HalfType())), floats)
    wide = builder.zext(bits, integers)
    if pattern == types.int16:
        return builder.bitcast(builder.shl(wide, _constant(wide, 16)), floats)
    # Widening the exponent field by a multiplication also normalizes the subnormals.
    magnitude = builder.shl(builder.and_(wide, _constant(wide, 0x7FFF)), _constant(wide, 13))
    small = builder.bitcast(magnitude, floats)
    scaled = builder.bitcast(builder.fmul(small, _constant(small, 2.0**112)), integers)
    sign = builder.shl(builder.and_(wide, _constant(wide, 0x8000)), _constant(wide, 16))
    return builder.bitcast(builder.or_(scaled, sign), floats)


def _narrowed(builder: Any, magnitude: Any, mantissa: int, bias: int) -> Any:
    """Returns the nearest narrower floats, ties to even: patterns without a sign, as i32.

    Args:
        builder: Of the function.
        magnitude: Patterns of float32 without a sign, i32.
        mantissa: Bits of the narrower float's mantissa.
        bias: Of the narrower float's exponent.
    """
    shift = _MANTISSA - mantissa
    odd = builder.and_(
        builder.lshr(magnitude, _constant(magnitude, shift)), _constant(magnitude, 1)
    )
    half = builder.add(odd, _constant(magnitude, (1 << (shift - 1)) - 1))
    normal = builder.lshr(builder.add(magnitude, half), _constant(magnitude, shift))
    if bias == _BIAS:
        return normal
    normal = builder.sub(normal, _constant(magnitude, (_BIAS - bias) << mantissa))
    # A subnormal is a multiple of 2^(1 - bias - mantissa).
    value = builder.bitcast(magnitude, _shaped(magnitude, _FLOAT))
    steps = builder.fmul(value, _constant(value, 2.0 ** (mantissa + bias - 1)))
    subnormal = _rounded(builder, steps)
    smallest_normal = _constant(magnitude, (_BIAS + 1 - bias) << _MANTISSA)
    is_small = builder.icmp_unsigned("<", magnitude, smallest_normal)
    return builder.select(is_small, subnormal, normal)


def _rounded(builder: Any, value: Any) -> Any:
    """Returns the nearest integers to float32 values below 2^22, ties to even, as i32."""
    shifted = builder.fadd(value, _constant(value, float(ROUNDER)))
    bits = builder.bitcast(shifted, _shaped(value, _I32))
    return builder.sub(bits, _constant(bits, int(ROUNDER_BITS)))


def _clipped(builder: Any, value: Any, least: Any, greatest: Any) -> Any:
    """Returns signed integers clipped to a range."""
    value = builder.select(builder.icmp_signed("<", value, least), least, value)
    return builder.select(builder.icmp_signed(">", value, greatest), greatest, value)


@intrinsic
def as_bits(_context: Any, _value: Any) -> Any:
    """Reinterprets a float32 as uint32."""

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I32)

    return types.uint32(types.float32), codegen


@intrinsic
def float_of(_context: Any, pattern: Any) -> Any:
    """Returns the float32 that a pattern means."""

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return _widened(builder, arguments[0], pattern)

    return types.float32(pattern), codegen


def _same_bits(build: Callable[[Any, Any], Any]) -> Any:
    """Returns an intrinsic that makes an integer of the type of `like` of one of equal width."""

    @intrinsic
    def same_bits(_context: Any, bits: Any, like: Any) -> Any:
        def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            return build(builder, arguments[0])

        return like(bits, like), codegen

    return same_bits


# Keys: unsigned integers that order as floats do. By size: magnitude first and sign last, so that
# of a tie the negative one is greater. By value: a negated float has the complement for its key.


def _to_size(builder: Any, bits: Any) -> Any:
    one, rest = _constant(bits, 1), _constant(bits, _width(bits) - 1)
    return builder.or_(builder.shl(bits, one), builder.lshr(bits, rest))


def _from_size(builder: Any, bits: Any) -> Any:
    one, rest = _constant(bits, 1), _constant(bits, _width(bits) - 1)
    return builder.or_(builder.lshr(bits, one), builder.shl(bits, rest))


def _to_value(builder: Any, bits: Any) -> Any:
    negative = builder.ashr(bits, _constant(bits, _width(bits) - 1))
    return builder.xor(bits, builder.or_(negative, _constant(bits, 1 << (_width(bits) - 1))))


def _from_value(builder: Any, bits: Any) -> Any:
    positive = builder.ashr(bits, _constant(bits, _width(bits) - 1))
    other = builder.not_(positive)
    return builder.xor(bits, builder.or_(other, _constant(bits, 1 << (_width(bits) - 1))))


def _to_negated(builder: Any, bits: Any) -> Any:
    return builder.not_(_to_value(builder, bits))


by_size, from_size = _same_bits(_to_size), _same_bits(_from_size)
by_value, from_value = _same_bits(_to_value), _same_bits(_from_value)
by_negated = _same_bits(_to_negated)


def _greatest(key_of: Callable[[Any, Any], Any]) -> Any:
    """Returns an intrinsic that finds the greatest key of `row[start:stop]`."""

    @intrinsic
    def greatest(_context: Any, row: Any, _start: Any, _stop: Any, like: Any) -> Any:
        """Returns the greatest key of at least `LANES` patterns, of the type of `like`."""

        def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            patterns, start, stop, _ = arguments

            def keys_at(index: Any) -> Any:
                return key_of(builder, _load(context, builder, row, patterns, index))

            # The last vector may begin before the one before it ends: a maximum may see a value
            # twice.
            step = ir.Constant(start.type, LANES)
            last = builder.sub(stop, step)
            found = cgutils.alloca_once_value(builder, keys_at(last))
            with cgutils.for_range_slice(builder, start, last, step) as (index, _count):
                keys, best = keys_at(index), builder.load(found)
                is_greater = builder.icmp_unsigned(">", keys, best)
                builder.store(builder.select(is_greater, keys, best), found)
            best = builder.load(found)
            vector = best.type
            reduce = cgutils.get_or_insert_function(
                builder.module,
                ir.FunctionType(vector.element, [vector]),
                f"llvm.vector.reduce.umax.v{LANES}i{vector.element.width}",
            )
            return builder.call(reduce, [best])

        return like(row, types.intp, types.intp, like), codegen

    return greatest


greatest_by_size = _greatest(_to_size)
greatest_by_value = _greatest(_to_value)
greatest_negated = _greatest(_to_negated)


@intrinsic
def nearest(_context: Any, _value: Any, least: Any) -> Any:
    """Returns the pattern nearest to a float32, ties to even, and none smaller than `least`.

    The sign is the value's, even where the pattern nearest to it is a zero. `least` is a pattern,
    whose type is the result's.
    """

    def codegen(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        value, floor = arguments
        bits = builder.bitcast(value, _I32)
        magnitude = builder.and_(bits, _constant(bits, 0x7FFFFFFF))
        sign = builder.and_(bits, _constant(bits, 0x80000000))
        if least in _NARROW:
            magnitude = _narrowed(builder, magnitude, *_NARROW[least])
            sign, floor = builder.lshr(sign, _constant(sign, 16)), builder.zext(floor, _I32)
        is_less = builder.icmp_unsigned("<", magnitude, floor)
        pattern = builder.or_(builder.select(is_less, floor, magnitude), sign)
        return builder.trunc(pattern, _I16) if least in _NARROW else pattern

    return least(types.float32, least), codegen


@intrinsic
def prefetch(_context: Any, array: Any, start: Any) -> Any:
    """Asks for `array[start]`, which may lie beyond the end, to be brought into the cache."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, array, *arguments)
        address = builder.bitcast(address, _I8.as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [address.type, _I32, _I32, _I32])
        ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        read, keep, data = (ir.Constant(_I32, number) for number in (0, 3, 1))
        builder.call(ask, [address, read, keep, data])
        return context.get_dummy_value()

    return types.none(array, types.intp), codegen


@intrinsic
def put(_context: Any, array: Any, start: Any, value: Any) -> Any:
    """Stores all bytes of an integer from `array[start]` on, aligned or not."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = address_of(context, builder, array, arguments[0], arguments[1])
        _store(builder, arguments[2], address)
        return context.get_dummy_value()

    return types.none(array, types.intp, value), codegen


@intrinsic
def integer_codes(
    _context: Any, row: Any, _start: Any, _inverse: Any, _offset: Any, _top: Any, codes: Any
) -> Any:
    """codes[i] = clip(round(row[i] * inverse) + point, 0, top) for `WIDE` columns from start.

    `row` holds patterns, `inverse` is float32, `top` and `codes` are uint8. `offset` is the zero
    point less `ROUNDER_BITS`, which saves an addition.
    """

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        patterns, start, inverse, offset, top, out = arguments
        bits = _load(context, builder, row, patterns, start, WIDE)
        steps = builder.fmul(_widened(builder, bits, row.dtype), _splat(builder, inverse, WIDE))
        shifted = builder.fadd(steps, _constant(steps, float(ROUNDER)))
        code = builder.bitcast(shifted, _shaped(shifted, _I32))
        code = builder.add(code, _splat(builder, offset, WIDE))
        # First to what fits in a byte, which is how processors narrow integers.
        code = _clipped(builder, code, _constant(code, 0), _constant(code, 255))
        narrow, most = builder.trunc(code, _shaped(code, _I8)), _splat(builder, top, WIDE)
        is_less = builder.icmp_unsigned("<", narrow, most)
        narrow = builder.select(is_less, narrow, most)
        _store(builder, narrow, address_of(context, builder, codes, out, start))
        return context.get_dummy_value()

    arguments = (row, types.intp, types.float32, types.int32, types.uint8, codes)
    return types.none(*arguments), codegen


def _float_codes(mantissa: int, bias: int, width: int, greatest: int) -> Callable[..., Any]:
    """Returns an intrinsic that encodes `LANES` columns as floats of `width` bits.

    `greatest` is the code of the greatest finite number, at which the magnitude is clipped.
    """

    @intrinsic
    def codes_of(_context: Any, row: Any, _start: Any, _step: Any, codes: Any) -> Any:
        """codes[i] = the float nearest to row[i] / step for `LANES` columns from start."""

        def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
            patterns, start, step, out = arguments
            values = _widened(builder, _load(context, builder, row, patterns, start), row.dtype)
            quotient = builder.fdiv(values, _splat(builder, step))
            bits = builder.bitcast(quotient, _shaped(quotient, _I32))
            magnitude = builder.and_(bits, _constant(bits, 0x7FFFFFFF))
            code = _narrowed(builder, magnitude, mantissa, bias)
            code = _clipped(builder, code, _constant(code, 0), _constant(code, greatest))
            sign = builder.lshr(bits, _constant(bits, 32 - width))
            sign = builder.and_(sign, _constant(bits, 1 << (width - 1)))
            narrow = builder.trunc(builder.or_(code, sign), _shaped(code, _I8))
            _store(builder, narrow, address_of(context, builder, codes, out, start))
            return context.get_dummy_value()

        return types.none(row, types.intp, types.float32, codes), codegen

    return codes_of


e2m1_codes = _float_codes(*_E2M1, width=4, greatest=0x7)
e4m3_codes = _float_codes(*_E4M3, width=8, greatest=0x7E)
