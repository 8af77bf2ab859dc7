"""`StoredProjection`: what a QMoE node holds, read back one expert at a time.

The bytes alone do not tell their layout: [E, N, K*bits/8] and [E, K, N*bits/8] coincide where N
equals K. So the layout comes from `weights_prepacked` or from the caller, never from a guess, and
the scales, whose rows are N in every layout, must bear it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec, format_of
from qmoe_rules.layouts import LAYOUTS, Layout
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.quantized import QuantizedWeights, unpack_zero_points
from qmoe_rules.slices import Combined, Slices
from qmoe_rules.weights import resolve

__all__ = ["STORED_LAYOUTS", "StoredProjection", "layout_of", "stored_projections"]

STORED_LAYOUTS = ("raw", "cutlass_sm80")
"""The layouts of integers that QMoE reads, by the value of `weights_prepacked` that says so."""

# What `weights_prepacked` says. Integers of -1 are raw to the CPU and packed to CUDA.
_BY_QUANT_TYPE = {
    "int": dict(enumerate(STORED_LAYOUTS)),
    "fp4": {-1: "n_packed", 0: "n_packed", 1: "k_packed"},
    "nvfp4": {-1: "n_packed", 0: "n_packed", 1: "k_packed"},
    "fp8": {-1: "raw", 0: "raw"},
}


_OPTIONAL_PARTS = ("zero_points", "global_scale")


@dataclass(frozen=True)
class StoredProjection:
    """One projection of a QMoE node, as its constants hold it.

    Attributes:
        spec: The format of the codes, the block size and whether there are zero points.
        shape: (E, N, K).
        layout: The order of the stored bytes.
        sources: The node's inputs that it is read from, by part (see `formats.Spec.parts`).
        slices: How each of them is read: [E, ...], the weights in the layout.
    """

    spec: Spec
    shape: tuple[int, int, int]
    layout: Layout
    sources: Mapping[str, ir.Value]
    slices: Mapping[str, Slices]

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
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, with its share of everything else that is stored."""
        return 8 * sum(each.nbytes for each in self.slices.values()) / (math.prod(self.shape) or 1)

    @property
    def dtype(self) -> np.dtype | None:
        """The activation type, which the scales of integers share; None where they do not tell."""
        return None if self.spec.format.scale else self.slices["scales"].dtype

    @property
    def is_rescaled(self) -> bool:
        """Whether an expert's global scale changes digits: it is there, and no power of two.

        Raises:
            SourceError: The data behind the node are missing or too short.
        """
        if not self.spec.has_scales or "global_scale" not in self.slices:
            return False
        scales = self.slices["global_scale"].read(0, self.shape[0])
        return bool((np.abs(np.frexp(scales)[0]) != 0.5).any())

    def expert(self, index: int) -> QuantizedWeights:
        """Returns one expert, packed [N, K*bits/8].

        Raises:
            SourceError: The data behind the node are missing or too short.
        """
        stack = self._stack(*(each.read(index, index + 1) for each in self.slices.values()))
        optional = (stack.zero_points, stack.global_scale)
        points, factor = (part if part is None else part[0] for part in optional)
        return QuantizedWeights(stack.packed[0], stack.scales[0], self.spec, points, factor)

    def release(self, index: int) -> None:
        """Says that an expert has been used, so that its memory can go."""
        for source in self.slices.values():
            source.release(index, index + 1)

    def dequantized(self, dtype: np.dtype) -> Slices:
        """Returns the weights [E, N, K] that are meant, in float32 rounded to `dtype`."""

        def dequantize(*blocks: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return self._stack(*blocks).dequantize().astype(dtype, copy=False)

        return Combined(tuple(self.slices.values()), self.shape, dtype, dequantize)

    def relaid(self, layout: Layout) -> Slices:
        """Returns the same codes as uint8 [E, ...] in another layout."""
        experts, rows, columns = self.shape

        def move(stored: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
            return np.stack([layout.store(packed, self.bits) for packed in self._packed(stored)])

        shape = (experts, *layout.stored_shape(rows, columns, self.bits))
        return Combined((self.slices["weights"],), shape, np.dtype(np.uint8), move)

    def _packed(self, stored: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        return np.stack([self.layout.load(each.view(np.uint8), self.bits) for each in stored])

    def _stack(self, *blocks: npt.NDArray[Any]) -> QuantizedWeights:
        """Returns what blocks of some experts hold, given in the order of `slices`."""
        parts = dict(zip(self.slices, blocks, strict=True))
        points = parts.get("zero_points")
        if points is not None:
            points = unpack_zero_points(points, self.bits, parts["scales"].shape[-1])
        return QuantizedWeights(
            self._packed(parts["weights"]),
            parts["scales" if self.spec.has_scales else "global_scale"],
            self.spec,
            points,
            parts.get("global_scale") if self.spec.has_scales else None,
        )


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
    found = {}
    for name in ops.projections(given):
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
    values = ops.attributes(node)
    prepacked, quant_type = values["weights_prepacked"], values["quant_type"]
    if prepacked not in (-1, 0, 1):
        return f"weights_prepacked={prepacked} is unknown"
    known = _BY_QUANT_TYPE.get(quant_type, {})
    if prepacked not in known and quant_type != "int":
        return f"weights_prepacked={prepacked} with quant_type={quant_type!r} is unknown"
    if prepacked not in known and source_layout is None:
        return (
            "weights_prepacked is not stated, so the layout of its bytes is unknown; "
            "source_layout='raw' says that a CPU build wrote them, 'cutlass_sm80' a CUDA build"
        )
    stated = known.get(prepacked, source_layout)
    if quant_type == "int" and source_layout not in (None, stated):
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
    spec = _spec(name, values, given)
    layout = layout_of(node, source_layout)
    if isinstance(layout, str):
        raise _NotReadableError(layout)
    if reason := spec.refuse() or layout.refuse_format(spec.format):
        raise _NotReadableError(reason)
    slots = {part: ops.slot(name, part) for part in ("weights", "scales", *_OPTIONAL_PARTS)}
    # fc3 has no slot for a global scale.
    sources = {part: value for part, slot in slots.items() if (value := given.get(slot))}
    for part in sources.keys() - spec.parts(1, 1, np.dtype(np.float32)).keys():
        raise _NotReadableError(f"{slots[part]} is present, and {spec} has none")
    slices = {part: _constant(slots[part], value) for part, value in sources.items()}
    for part in ("weights", "scales" if spec.has_scales else "global_scale"):
        if part not in slices:
            raise _NotReadableError(f"{slots[part]}: it is missing")
    shape = _shape(name, slices, spec, layout)
    return StoredProjection(spec, shape, layout, sources, slices)


def _spec(name: str, values: Mapping[str, Any], given: Mapping[str, ir.Value | None]) -> Spec:
    own = values[f"{name}_expert_weight_bits"]
    bits = values["expert_weight_bits"] if own is None else own
    format = format_of(values["quant_type"], bits)
    if format is None:
        known = ", ".join(FORMATS)
        raise _NotReadableError(
            f"{name} has {bits}-bit codes of quant_type={values['quant_type']!r}; known are {known}"
        )
    # -1 is another way to say one scale per row.
    size = format.block_size or max(values["block_size"] or 0, 0)
    return Spec(format, size, symmetric=given[f"{name}_zero_points"] is None)


def _constant(slot: str, value: ir.Value) -> Slices:
    slices = _slices(value)
    if isinstance(slices, str):
        raise _NotReadableError(f"{slot}: {slices}")
    return slices


def _slices(value: ir.Value) -> Slices | str:
    tensor = ir.convenience.get_const_tensor(value)
    if isinstance(tensor, PlannedTensor) and not value.is_graph_input():
        return _PlannedSlices(tensor)
    return resolve(value)


def _shape(
    name: str, slices: Mapping[str, Slices], spec: Spec, layout: Layout
) -> tuple[int, int, int]:
    """Returns (E, N, K) after checking every shape and type.

    A layout that was claimed wrongly shows here, in the rows of the scales, wherever N is not K.
    """
    weights = slices["weights"].shape
    if len(weights) != 3:
        raise _NotReadableError(f"{name}_experts_weights is {list(weights)}; it has three axes")
    experts, rows, columns = weights
    rows, columns = (columns, rows) if layout.transposed else (rows, columns)
    if layout.transposed:
        rows = rows * 8 // spec.format.bits
    else:
        columns = columns * 8 // spec.format.bits
    reason = spec.refuse_shape(rows, columns) or layout.refuse(rows, columns, spec.format)
    if reason:
        raise _NotReadableError(f"{name}_experts_weights: {reason}")
    parts = spec.parts(rows, columns, np.dtype(np.float32))
    stored = layout.stored_shape(rows, columns, spec.format.bits)
    for part, each in slices.items():
        shape, dtype = parts[part]
        wanted = (experts, *(stored if part == "weights" else shape))
        if each.shape != wanted:
            raise _NotReadableError(
                f"{ops.slot(name, part)} is {list(each.shape)}; weights [N={rows}, K={columns}] "
                f"stored as {spec} in layout {layout.name} ask for {list(wanted)}"
            )
        known = SCALE_DTYPES if part == "scales" and _is_plain(spec) else (dtype.name,)
        if each.dtype.name not in known:
            raise _NotReadableError(
                f"{ops.slot(name, part)} is {each.dtype.name} "
                f"(it may be {', '.join(sorted(known))})"
            )
    return experts, rows, columns


def _is_plain(spec: Spec) -> bool:
    """Returns whether the scales are ordinary floating-point numbers, of any activation type."""
    return spec.format.scale is None or spec.format.square
