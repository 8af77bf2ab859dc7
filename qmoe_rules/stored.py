"""`StoredProjection`: what a QMoE node holds, read back one expert at a time.

The bytes alone do not tell their layout: [E, N, K*bits/8] and [E, K, N*bits/8] coincide where N
equals K. So the layout comes from `weights_prepacked` or from the caller, never from a guess, and
the scales, whose rows are N in every layout, must bear it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import SCALE_DTYPES, Format, Spec, unpack
from qmoe_rules.layouts import LAYOUTS, Layout
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.slices import Combined, Slices
from qmoe_rules.weights import resolve

__all__ = ["STORED_LAYOUTS", "StoredProjection", "layout_of", "stored_projections"]

STORED_LAYOUTS = ("raw", "cutlass_sm80")
"""The layouts that QMoE reads, by the value of `weights_prepacked` that says so."""

_BITS = (2, 4, 8)


@dataclass(frozen=True)
class StoredProjection:
    """One projection of a QMoE node with `quant_type="int"`, as its constants hold it.

    Attributes:
        spec: The width of the codes and the block size.
        shape: (E, N, K).
        layout: The order of the stored bytes.
        sources: The node's inputs that it is read from: weights, scales, and zero points where
            they are given.
        slices: How each of them is read: uint8 [E, ...] in the layout, scales [E, N] or
            [E, N, K/block_size], packed zero points [E, N*bits/8] or [E, N, K/block_size*bits/8],
            rounded up to whole bytes.
    """

    spec: Spec
    shape: tuple[int, int, int]
    layout: Layout
    sources: tuple[ir.Value, ...]
    slices: tuple[Slices, ...]

    @classmethod
    def of(
        cls, node: ir.Node, name: str, source_layout: str | None = None
    ) -> StoredProjection | str:
        """Returns a projection of a QMoE node, or the reason why it cannot be read.

        Args:
            node: A QMoE node.
            name: `"fc1"`, `"fc2"` or `"fc3"`.
            source_layout: The layout where the node does not state it: `"raw"` as CPU builds
                write, or `"cutlass_sm80"` as CUDA builds write.
        """
        try:
            return _projection(node, name, source_layout)
        except _NotReadableError as reason:
            return str(reason)

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.spec.format.bits

    @property
    def dtype(self) -> np.dtype:
        """The type of the scales, which is the activation type."""
        return self.slices[1].dtype

    def expert(self, index: int) -> QuantizedWeights:
        """Returns one expert, packed [N, K*bits/8].

        Raises:
            SourceError: The data behind the node are missing or too short.
        """
        packed, scales, *zeros = (source.read(index, index + 1) for source in self.slices)
        stack = self._stack(packed, scales, *zeros)
        points = None if stack.zero_points is None else stack.zero_points[0]
        return QuantizedWeights(stack.packed[0], stack.scales[0], self.spec, points)

    def release(self, index: int) -> None:
        """Says that an expert has been used, so that its memory can go."""
        for source in self.slices:
            source.release(index, index + 1)

    def dequantized(self) -> Slices:
        """Returns the weights [E, N, K] that are meant, in float32 rounded to the scales' type."""

        def dequantize(*blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return self._stack(*blocks).dequantize().astype(self.dtype, copy=False)

        return Combined(self.slices, self.shape, self.dtype, dequantize)

    def relaid(self, layout: Layout) -> Slices:
        """Returns the same codes as uint8 [E, ...] in another layout."""
        experts, rows, columns = self.shape

        def move(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
            return np.stack([layout.store(packed, self.bits) for packed in self._packed(stored)])

        shape = (experts, *layout.stored_shape(rows, columns, self.bits))
        return Combined(self.slices[:1], shape, np.dtype(np.uint8), move)

    def _packed(self, stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        return np.stack([self.layout.load(expert, self.bits) for expert in stored])

    def _stack(
        self, stored: npt.NDArray[Any], scales: npt.NDArray[Any], *zeros: npt.NDArray[Any]
    ) -> QuantizedWeights:
        points = None
        if zeros:
            # They are packed along their last axis, which may end inside a byte.
            points = unpack(zeros[0], self.bits)[..., : scales.shape[-1]]
        return QuantizedWeights(self._packed(stored), scales, self.spec, points)


def stored_projections(
    node: ir.Node, source_layout: str | None = None
) -> dict[str, StoredProjection] | str:
    """Returns the projections of a QMoE node by name, or the reason why they cannot be read.

    They are fc1 and fc2, and fc3 where the node has it; their shapes agree with each other and
    with the node's other inputs.

    Args:
        node: A QMoE node.
        source_layout: As in `StoredProjection.of`.
    """
    given, values = ops.inputs(node), ops.attributes(node)
    names = ["fc1", "fc2"]
    if any(value is not None for slot, value in given.items() if slot.startswith("fc3_")):
        names.append("fc3")
    found = {}
    for name in names:
        projection = StoredProjection.of(node, name, source_layout)
        if isinstance(projection, str):
            return projection
        found[name] = projection
    fc3 = found["fc3"].shape if "fc3" in found else None
    return ops.refuse_shapes(found["fc1"].shape, found["fc2"].shape, given, values, fc3) or found


def layout_of(node: ir.Node, source_layout: str | None = None) -> Layout | str:
    """Returns the layout of a QMoE node's bytes, or the reason why it is not known.

    Args:
        node: A QMoE node.
        source_layout: The layout where the node does not state it.
    """
    prepacked = ops.attributes(node)["weights_prepacked"]
    if prepacked not in (-1, 0, 1):
        return f"weights_prepacked={prepacked} is unknown"
    if prepacked == -1 and source_layout is None:
        return (
            "weights_prepacked is not stated, so the layout of its bytes is unknown; "
            "source_layout='raw' says that a CPU build wrote them, 'cutlass_sm80' a CUDA build"
        )
    stated = source_layout if prepacked == -1 else STORED_LAYOUTS[prepacked]
    if source_layout not in (None, stated):
        return f"weights_prepacked={prepacked} says {stated}, and source_layout={source_layout!r}"
    return LAYOUTS[str(stated)]


class _PlannedSlices(Slices):
    """The experts of a planned tensor, computed one by one."""

    def __init__(self, tensor: PlannedTensor) -> None:
        self.shape = tuple(tensor.shape.numpy())
        self.dtype = tensor.dtype.numpy()
        self._projection = tensor.projection
        self._part = tensor.part

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        """The tensors of the float weight."""
        return self._projection.weights.slices.tensors

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Returns a part of some experts."""
        return np.stack([self._projection.part(self._part, e) for e in range(start, stop)])

    def release(self, start: int, stop: int) -> None:
        """Does nothing: the projection releases what it has used."""


class _NotReadableError(Exception):
    """Why a projection cannot be read."""


def _projection(node: ir.Node, name: str, source_layout: str | None) -> StoredProjection:
    given, values = ops.inputs(node), ops.attributes(node)
    if values["quant_type"] != "int":
        raise _NotReadableError(f"quant_type={values['quant_type']!r} is not 'int'")
    layout = layout_of(node, source_layout)
    if isinstance(layout, str):
        raise _NotReadableError(layout)
    spec = _spec(name, values)
    slots = [f"{name}_experts_weights", f"{name}_scales"]
    if given[f"{name}_zero_points"] is not None:
        slots.append(f"{name}_zero_points")
    slices = {slot: _constant(slot, given[slot]) for slot in slots}
    shape = _shape(name, slices, spec, layout)
    return StoredProjection(
        spec,
        shape,
        layout,
        tuple(value for slot in slots if (value := given[slot]) is not None),
        tuple(slices.values()),
    )


def _spec(name: str, values: Mapping[str, Any]) -> Spec:
    own = values[f"{name}_expert_weight_bits"]
    bits = values["expert_weight_bits"] if own is None else own
    if bits not in _BITS:
        raise _NotReadableError(f"{name} has {bits}-bit codes; 2, 4 and 8 bits are known")
    # -1 is another way to say one scale per row.
    return Spec(Format(f"int{bits}", bits), max(values["block_size"] or 0, 0))


def _constant(slot: str, value: ir.Value | None) -> Slices:
    slices = "it is missing" if value is None else _slices(value)
    if isinstance(slices, str):
        raise _NotReadableError(f"{slot}: {slices}")
    known = set(SCALE_DTYPES) if slot.endswith("scales") else {"uint8"}
    if slices.dtype.name not in known:
        listed = ", ".join(sorted(known))
        raise _NotReadableError(f"{slot} is {slices.dtype.name} (it may be {listed})")
    return slices


def _slices(value: ir.Value) -> Slices | str:
    tensor = ir.convenience.get_const_tensor(value)
    if isinstance(tensor, PlannedTensor) and not value.is_graph_input():
        return _PlannedSlices(tensor)
    return resolve(value)


def _shape(
    name: str, slices: Mapping[str, Slices], spec: Spec, layout: Layout
) -> tuple[int, int, int]:
    """Returns (E, N, K) after checking every shape: N and E are the scales', K the bytes'."""
    weights, scales = (slices[f"{name}_{part}"].shape for part in ("experts_weights", "scales"))
    bits = spec.format.bits
    if len(weights) != 3 or len(scales) < 2:
        raise _NotReadableError(
            f"{name}_experts_weights is {list(weights)} and {name}_scales {list(scales)}; they "
            "have three axes, and two or three"
        )
    experts, rows = scales[:2]
    columns = weights[1] if layout.prepacked else weights[2] * 8 // bits
    # A layout that was claimed wrongly shows here, in the rows, wherever N is not K.
    wanted = (experts, *layout.stored_shape(rows, columns, bits))
    if weights != wanted:
        raise _NotReadableError(
            f"{name}_experts_weights is {list(weights)}; {rows} rows of {name}_scales in layout "
            f"{layout.name} ask for {list(wanted)}"
        )
    if reason := spec.refuse_shape(rows, columns) or layout.refuse(rows, columns, bits):
        raise _NotReadableError(f"{name}_experts_weights: {reason}")
    scales_wanted = (experts, *spec.scales_shape(rows, columns))
    *leading, last = scales_wanted
    expected = {
        f"{name}_scales": scales_wanted,
        f"{name}_zero_points": (*leading, -(-last * bits // 8)),
    }
    for slot, shape in expected.items():
        if slot in slices and slices[slot].shape != shape:
            raise _NotReadableError(
                f"{slot} is {list(slices[slot].shape)}; weights [N={rows}, K={columns}] stored as "
                f"{spec} ask for {list(shape)}"
            )
    return experts, rows, columns
