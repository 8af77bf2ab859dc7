"""Planned tensors: the quantized bytes of a weight, computed when somebody asks for them.

A `Projection` knows how to turn one expert of a constant weight into stored bytes; its parts (the
weights, the scales) are `PlannedTensor`s that share it. Sizes and shapes are known from the start,
so a planned model can be inspected, cloned, laid out and saved like any other.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.formats import Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.slabs import FileStatistics, Slab, SlabWork
from qmoe_rules.statistics import ProjectionStatistics
from qmoe_rules.weights import ExpertWeights

__all__ = ["PlannedTensor", "Projection", "plan_values", "register_beside"]

_MEMO = "qmoe_rules.planned"
_CACHE_BYTES = 64 << 20


class Projection:
    """The planned quantization of one constant weight [E, N, K].

    Attributes:
        weights: The source, read one expert at a time.
        spec: The format and block size.
        layout: Name of the order of the stored bytes.
        method: Name of the quantizer.
        statistics: What is known of an expert's inputs, where the method asks for it; equal ones
            know the same.
    """

    _serials = itertools.count()

    def __init__(
        self,
        weights: ExpertWeights,
        spec: Spec,
        layout: str,
        method: str,
        statistics: ProjectionStatistics | None = None,
    ) -> None:
        self.weights = weights
        self.spec = spec
        self.layout = layout
        self.method = method
        self.statistics = statistics
        self.serial = next(self._serials)

    @property
    def experts(self) -> int:
        """E, the number of experts and of slabs."""
        return self.weights.shape[0]

    @functools.cached_property
    def parts(self) -> Mapping[str, tuple[tuple[int, ...], np.dtype]]:
        """Shape and type of what is stored of one expert, by part, the weights laid out."""
        _, rows, columns = self.weights.shape
        parts = dict(self.spec.parts(rows, columns, self.weights.dtype))
        _, dtype = parts["weights"]
        stored = LAYOUTS[self.layout].stored_shape(rows, columns, self.spec.format.bits)
        return {**parts, "weights": (stored, dtype)}

    @property
    def nbytes(self) -> int:
        """Size of all parts of all experts in bytes."""
        return self.experts * sum(self.slab_nbytes(part) for part in self.parts)

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes, with its share of everything else that is stored."""
        return 8 * self.nbytes / (math.prod(self.weights.shape) or 1)

    def slab_nbytes(self, part: str) -> int:
        """Returns the size of one expert's share of a part in bytes."""
        shape, dtype = self.parts[part]
        return math.prod(shape) * dtype.itemsize

    def work(self, expert: int) -> SlabWork:
        """Returns what it takes to compute one expert."""
        weight = self.weights.expert(expert)
        known = self.statistics(expert) if self.statistics else None
        return SlabWork(weight, self.spec, self.layout, self.method, known, self._label(expert))

    def portable_work(self, expert: int) -> SlabWork:
        """Returns the same for another process, which reads what lies in files itself."""
        source = self.weights.file_slice(expert) or self.weights.expert(expert)
        known = FileStatistics.of(self.statistics, expert) if self.statistics else None
        return SlabWork(source, self.spec, self.layout, self.method, known, self._label(expert))

    def _label(self, expert: int) -> str:
        return f"weight {self.weights.name!r}, expert {expert}"

    def slab(self, expert: int) -> Slab:
        """Computes every part of one expert.

        Raises:
            SourceError: The weights cannot be read, or hold an infinity or a NaN.
        """
        slab = self.work(expert).compute()
        found = {part: (array.shape, array.dtype) for part, array in slab.items()}
        if found != self.parts:
            raise AssertionError(f"{self!r}: {found}, not {self.parts}")
        self.weights.release(expert)
        return slab

    def part(self, name: str, expert: int) -> npt.NDArray[Any]:
        """Returns one part of one expert, from the cache where it is there."""
        cached = _cache.get((self.serial, expert), name)
        if cached is not None:
            return cached
        slab = self.slab(expert)
        _cache.put((self.serial, expert), {key: slab[key] for key in slab if key != "weights"})
        return slab[name]

    def __repr__(self) -> str:
        known = f", {self.statistics!r}" if self.statistics else ""
        how = f"{self.spec}, {self.layout}, {self.method}{known}"
        return f"Projection({self.weights.name!r}, {how})"


class PlannedTensor(ir.LazyTensor):
    """One part of a projection as a tensor [E, ...] that is computed on demand and never kept."""

    def __init__(self, projection: Projection, part: str, name: str) -> None:
        slab_shape, dtype = projection.parts[part]
        shape = ir.Shape((projection.experts, *slab_shape))
        super().__init__(self._materialize, ir.DataType.from_numpy(dtype), shape, name=name)
        self.projection = projection
        self.part = part

    def tofile(self, file: BinaryIO) -> None:
        """Writes the bytes, one expert at a time."""
        for expert in range(self.projection.experts):
            file.write(self.projection.part(self.part, expert).tobytes())

    def __repr__(self) -> str:
        # The inherited one shows the bound method that computes it, and with it itself again.
        what = f"{self.part!r} of {self.projection!r}"
        return f"PlannedTensor<{self.dtype},{self.shape}>({what}, name={self.name!r})"

    def _materialize(self) -> ir.TensorProtocol:
        array = np.empty(self.shape.numpy(), self.dtype.numpy())
        for expert in range(self.projection.experts):
            array[expert] = self.projection.part(self.part, expert)
        return ir.Tensor(array, dtype=self.dtype, name=self.name)


class _Cache:
    """The small parts of the slabs computed last, at most `limit` bytes whatever the order.

    A projection's parts come from one computation but are asked for as whole tensors, one after
    the other. Keeping the small ones lets the scales follow the weights for free; what has been
    dropped is computed again, to the same bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._size = 0
        self._slabs: OrderedDict[tuple[int, int], Slab] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int], part: str) -> npt.NDArray[Any] | None:
        with self._lock:
            slab = self._slabs.get(key)
            if slab is None:
                return None
            self._slabs.move_to_end(key)
            return slab.get(part)

    def put(self, key: tuple[int, int], slab: Slab) -> None:
        with self._lock:
            if key in self._slabs:
                return
            # A sweep over more than fits must not drop what it will come back to: other
            # projections make room, its own slabs do not.
            while self._size + _nbytes(slab) > self._limit:
                oldest = next(iter(self._slabs), None)
                if oldest is None or oldest[0] == key[0]:
                    return
                self._size -= _nbytes(self._slabs.pop(oldest))
            self._slabs[key] = slab
            self._size += _nbytes(slab)


def _nbytes(slab: Slab) -> int:
    return sum(array.nbytes for array in slab.values())


_cache = _Cache(_CACHE_BYTES)


def plan_values(source: ir.Value, projection: Projection) -> dict[str, ir.Value]:
    """Registers the planned parts of a weight as initializers beside the weight, once.

    Args:
        source: The constant weight, an initializer or the output of a Constant node.
        projection: What becomes of it.

    Returns:
        The initializers by part, owned by the graph that owns `source`.
    """
    key = (projection.spec, projection.layout, projection.method, projection.statistics)
    tensors = {
        part: PlannedTensor(
            projection, part, f"{source.name}_{'quantized' if part == 'weights' else part}"
        )
        for part in projection.parts
    }
    return register_beside(source, key, tensors)


def register_beside(
    source: ir.Value, key: Hashable, tensors: Mapping[str, ir.TensorProtocol]
) -> dict[str, ir.Value]:
    """Registers what is made of a constant as initializers beside it, once.

    A constant that several nodes share is registered once: the values are remembered with it.

    Args:
        source: The constant, an initializer or the output of a node.
        key: What is made of it: equal keys mean equal tensors.
        tensors: The tensors by part. Their names are wishes, which may be taken.

    Returns:
        The initializers by part, owned by the graph that owns `source`.
    """
    graph = source.graph
    if graph is None:
        raise AssertionError(f"{source.name} belongs to no graph")
    memo = source.meta.setdefault(_MEMO, {})
    # A clone of the graph carries the memo of the original: believe it only here.
    known: dict[str, ir.Value] = memo.get(key, {})
    if known and all(value.graph is graph or value.graph is None for value in known.values()):
        for value in known.values():
            if value.graph is None:  # nothing used it for a while
                value.name = _fresh_name(str(value.name), graph)
                graph.register_initializer(value)
        return known
    values = {}
    for part, tensor in tensors.items():
        tensor.name = _fresh_name(tensor.name or part, graph)
        value = ir.Value(
            name=tensor.name,
            type=ir.TensorType(tensor.dtype),
            shape=ir.Shape(tensor.shape.numpy()),
            const_value=tensor,
        )
        graph.register_initializer(value)
        values[part] = value
    source.meta[_MEMO] = {**memo, key: values}
    return values


def _fresh_name(wanted: str, graph: ir.Graph) -> str:
    """Returns a name that no initializer of the graph has.

    A node's output of that name is renamed by the rewriter's own name pass.
    """
    numbered = (f"{wanted}_{number}" for number in itertools.count(1))
    names = itertools.chain([wanted], numbered)
    return next(name for name in names if name not in graph.initializers)
