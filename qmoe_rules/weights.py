"""`ExpertWeights`: a constant 3-D weight [E, N, K], read one expert at a time.

The constant may be an initializer, the output of a Constant node, or what Identity, Cast,
Transpose, Reshape, Squeeze, Unsqueeze, Concat, Split and Slice make of constants. Exporters leave
such chains in front of the weights, and folding them would copy every weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import files, ops
from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.slabs import FileSlice
from qmoe_rules.slices import (
    Combined,
    Joined,
    Lifted,
    Picked,
    Regrouped,
    SlicedTensor,
    Slices,
    TensorSlices,
    Unlifted,
)

__all__ = ["ExpertWeights", "resolve"]

# More than any exporter writes: three matrices for each of a thousand experts are 3072 pieces. A
# few nodes in diamonds, each reading the one before it twice, ask for as many as they like.
_MOST_PIECES = 1 << 16
_MOST_REPEATS = 64


class ExpertWeights:
    """A view of a constant weight [E, N, K] that hands out one expert at a time.

    Attributes:
        slices: Where the weight is read from.
        name: Its name, for messages.
        shape: (E, N, K).
        dtype: float32, float16 or bfloat16.
    """

    def __init__(self, slices: Slices | ir.TensorProtocol, name: str) -> None:
        self.slices = slices if isinstance(slices, Slices) else TensorSlices(slices, name)
        self.name = name
        experts, rows, columns = self.slices.shape
        self.shape = (experts, rows, columns)
        self.dtype = self.slices.dtype

    @classmethod
    def of(cls, value: ir.Value) -> ExpertWeights | str:
        """Returns the view of a constant value, or the reason why there is none."""
        slices = resolve(value)
        if isinstance(slices, str):
            return slices
        if slices.dtype.name not in SCALE_DTYPES:
            dtype = ir.DataType.from_numpy(slices.dtype).name
            return f"{value.name} is {dtype}, not FLOAT, FLOAT16 or BFLOAT16"
        if len(slices.shape) != 3:
            return f"{value.name} has shape {list(slices.shape)}, not [E, N, K]"
        return cls(slices, value.name or "weight")

    @property
    def nbytes(self) -> int:
        """Size of the weight in bytes."""
        return self.slices.nbytes

    def expert(self, index: int) -> npt.NDArray[np.generic]:
        """Returns the weights [N, K] of one expert; a view where the storage allows it.

        Raises:
            SourceError: The data behind the weight is missing or too short.
        """
        weight: npt.NDArray[np.generic] = self.slices.read(index, index + 1)[0]
        return weight

    def file_slice(self, index: int) -> FileSlice | None:
        """Returns where one expert lies in a file, None where it is not read as it stands.

        Raises:
            SourceError: The file lies outside the model's folder.
        """
        tensor = self.slices.external
        if tensor is None:
            return None
        _, rows, columns = self.shape
        start = (tensor.offset or 0) + index * rows * columns * self.dtype.itemsize
        return FileSlice(str(files.resolved_file(tensor)), start, (rows, columns), self.dtype)

    def release(self, index: int) -> None:
        """Says that an expert has been used, so that its memory can go."""
        self.slices.release(index, index + 1)


def resolve(value: ir.Value) -> Slices | str:
    """Returns how a constant value is read, through the nodes that rearrange it.

    Returns:
        The slices, or the reason why the value is not such a constant.
    """
    slices = _resolved(value, {})
    if isinstance(slices, str) or value.producer() is None:
        return slices
    stored = sum({id(tensor): tensor.nbytes for tensor in slices.tensors}.values())
    if slices.nbytes > _MOST_REPEATS * stored:
        return f"{value.name} repeats its constants more than {_MOST_REPEATS} times"
    return slices


_Known = dict[ir.Value, Slices | str]
"""What has been found out about values on the way to another."""


def _resolved(value: ir.Value, known: _Known) -> Slices | str:
    """Returns the same for a value on the way, once however many ways lead there."""
    if value not in known:
        known[value] = f"{value.name} is computed from itself"  # unless this comes to an end
        known[value] = _read_through(value, known)
    return known[value]


def _read_through(value: ir.Value, known: _Known) -> Slices | str:
    if value.is_graph_input():
        return f"{value.name} is a graph input, so its default may be overridden at run time"
    tensor = ir.convenience.get_const_tensor(value)
    if isinstance(tensor, SlicedTensor):
        return tensor.slices
    if tensor is not None:
        return TensorSlices(tensor, value.name or "weight")
    node = value.producer()
    rearrange = _NODES.get(node.op_type) if node is not None and node.domain == "" else None
    if node is None or rearrange is None:
        return f"{value.name} is not a constant"
    try:
        slices = rearrange(node, value, partial(_source, node, known))
    except _NotReadableError as reason:
        return str(reason)
    except RecursionError:
        return f"{value.name} is too many nodes away from a constant"
    except (IndexError, OverflowError, TypeError, ValueError, ZeroDivisionError) as error:
        return f"{value.name}: {node.op_type} cannot be read: {error}"
    shape = ops.static_shape(value)
    if shape is not None and not ops.agree(shape, slices.shape):
        return f"{value.name} is {list(slices.shape)} where the model says {list(shape)}"
    if slices.pieces > _MOST_PIECES:
        return f"{value.name} is put together from more than {_MOST_PIECES} pieces"
    return slices


class _NotReadableError(Exception):
    """Why a value cannot be read slice by slice."""


_Source = Callable[..., Slices]
"""Returns an input of the node by its index, the first one where it is left out."""


def _source(node: ir.Node, known: _Known, index: int = 0) -> Slices:
    value = node.inputs[index]
    slices = "an input is missing" if value is None else _resolved(value, known)
    if isinstance(slices, str):
        raise _NotReadableError(slices)
    return slices


def _constant(node: ir.Node, index: int) -> list[int] | None:
    """Returns a small integer input as a list, None where it is left out."""
    value = node.inputs[index] if index < len(node.inputs) else None
    if value is None or value.name == "":
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or value.is_graph_input():
        raise _NotReadableError(f"{value.name}, which {node.op_type} reads, is not a constant")
    return [int(number) for number in tensor.numpy().reshape(-1)]


def _axis(node: ir.Node, rank: int, default: int = 0) -> int:
    return node.attributes.get_int("axis", default) % rank


def _axes(node: ir.Node) -> list[int]:
    """Returns the axes of Squeeze and Unsqueeze: an input, or an attribute before opset 13."""
    return _constant(node, 1) or list(node.attributes.get_ints("axes", ()))


def _whole(source: Slices, shape: Sequence[int], view: Callable[[Any], Any]) -> Slices:
    """Rearranges the array as a whole, which is free where both it and the result are views."""
    if not source.is_view:
        raise _NotReadableError("the experts' axis moves after other changes; fold them first")
    lifted = Combined(
        [Lifted(source)],
        (1, *shape),
        source.dtype,
        lambda block: view(block[0])[None],
        is_view=True,
    )
    return Unlifted(lifted)


def _identity(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    return source_of()


def _cast(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    target = ops.cast_type(node)
    if target is None:
        raise _NotReadableError(f"{value.name} is cast to an unknown type")
    dtype = target.numpy()
    if dtype == source.dtype:
        return source
    if target.bitwidth < 16:  # numpy does not saturate as the operator does
        raise _NotReadableError(f"{value.name} is cast to {target.name}")

    def cast(block: npt.NDArray[Any]) -> npt.NDArray[Any]:
        with np.errstate(over="ignore"):
            return block.astype(dtype)

    return Combined([source], source.shape, dtype, cast)


def _transpose(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    order = list(node.attributes.get_ints("perm", ()) or range(len(source.shape))[::-1])
    shape = [source.shape[axis] for axis in order]
    if order[0] == 0:
        return Combined(
            [source],
            shape,
            source.dtype,
            lambda block: block.transpose(order),
            is_view=source.is_view,
        )
    return _whole(source, shape, lambda array: array.transpose(order))


def _reshaped(source: Slices, shape: Sequence[int]) -> Slices:
    if math.prod(shape) != math.prod(source.shape):
        raise _NotReadableError(f"{list(source.shape)} cannot be reshaped to {list(shape)}")
    if shape and source.shape and shape[0] == source.shape[0]:
        return Combined([source], shape, source.dtype, lambda b: b.reshape(len(b), *shape[1:]))
    if shape and source.shape and shape[0] and source.shape[0] % shape[0] == 0:
        return _reshaped(Regrouped(source, shape[0]), shape)
    if not isinstance(source, TensorSlices):
        raise _NotReadableError("a reshape spreads the experts' axis after other changes")
    return _whole(source, shape, lambda array: array.reshape(shape))


def _reshape(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    wanted = _constant(node, 1) or []
    if not node.attributes.get_int("allowzero", 0):
        wanted = [source.shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    known = math.prod(size for size in wanted if size >= 0)
    total = math.prod(source.shape)
    return _reshaped(source, [total // max(known, 1) if size < 0 else size for size in wanted])


def _squeeze(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    rank = len(source.shape)
    axes = {axis % rank for axis in _axes(node)} or {
        i for i, size in enumerate(source.shape) if size == 1
    }
    return _reshaped(source, [size for i, size in enumerate(source.shape) if i not in axes])


def _unsqueeze(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    given = _axes(node)
    rank = len(source.shape) + len(given)
    axes = {axis % rank for axis in given}
    if axes == {0}:
        return Lifted(source)
    sizes = iter(source.shape)
    return _reshaped(source, [1 if axis in axes else next(sizes) for axis in range(rank)])


def _concat(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    sources = [source_of(index) for index in range(len(node.inputs))]
    axis = _axis(node, len(sources[0].shape))
    if axis == 0:
        return Joined(sources)
    shape = list(sources[0].shape)
    shape[axis] = sum(source.shape[axis] for source in sources)
    return Combined(sources, shape, sources[0].dtype, lambda *b: np.concatenate(b, axis))


def _split(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    axis = _axis(node, len(source.shape))
    count = len(node.outputs)
    sizes = _constant(node, 1) or node.attributes.get_ints("split", None)
    if not sizes:
        size = -(-source.shape[axis] // count)
        sizes = [min(size, source.shape[axis] - i * size) for i in range(count)]
    index = value.index() or 0
    start = sum(sizes[:index])
    return _sliced(source, axis, slice(start, start + sizes[index]))


def _slice(node: ir.Node, value: ir.Value, source_of: _Source) -> Slices:
    source = source_of()
    if len(node.inputs) < 3:
        raise _NotReadableError(f"{value.name} is cut by a Slice of before opset 10")
    starts, ends = _constant(node, 1) or [], _constant(node, 2) or []
    axes = _constant(node, 3) or list(range(len(starts)))
    steps = _constant(node, 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 1:
            raise _NotReadableError(f"{value.name} is cut out backwards")
        axis %= len(source.shape)
        source = _sliced(source, axis, slice(*slice(start, end, step).indices(source.shape[axis])))
    return source


def _sliced(source: Slices, axis: int, cut: slice) -> Slices:
    shape = list(source.shape)
    shape[axis] = len(range(*cut.indices(shape[axis])))
    if axis == 0 and cut.step in (None, 1):
        return Picked(source, cut.start, cut.start + shape[0])
    if axis == 0:
        return _whole(source, shape, lambda array: array[cut])
    where = (slice(None),) * axis + (cut,)
    return Combined(
        [source], shape, source.dtype, lambda block: block[where], is_view=source.is_view
    )


_NODES: dict[str, Callable[[ir.Node, ir.Value, _Source], Slices]] = {
    "Cast": _cast,
    "Concat": _concat,
    "Identity": _identity,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
