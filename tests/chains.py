"""Chains of nodes on constants, the arrays that numpy makes of them, and how slices are read."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.reference
import onnx_ir as ir

from qmoe_rules.slices import Slices
from qmoe_rules.weights import resolve
from tests.moe_models import Array, Graph

SPREAD = "a reshape spreads the experts' axis after other changes"
MOVED = "the experts' axis moves after other changes; fold them first"
HOMES = ("memory", "file", "made")


def array_of(*shape: int, dtype: npt.DTypeLike = np.float32) -> Array:
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(dtype)


def tensor_of(array: Array, home: str, folder: Path, name: str = "w") -> ir.TensorProtocol:
    """Returns a tensor in memory, in a file, or one that is made anew whenever it is asked."""
    dtype = ir.DataType.from_numpy(array.dtype)
    if home == "file":
        path = folder / f"{name}{len(list(folder.iterdir()))}"
        path.write_bytes(b"\xa5" * 4 + array.tobytes() + b"\xa5")
        return ir.ExternalTensor(
            path.name,
            4,
            array.nbytes,
            dtype,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=folder,
        )
    if home == "made":
        return ir.LazyTensor(lambda: ir.Tensor(array.copy()), dtype, ir.Shape(array.shape))
    return ir.Tensor(array, name=name)


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """Yields every range of a first axis, the empty ones too."""
    return itertools.combinations_with_replacement(range(size + 1), 2)


def assert_reads(slices: Slices, array: Array) -> None:
    """Checks every range, then again after everything has been released."""
    assert (slices.shape, slices.dtype) == (array.shape, array.dtype)
    assert slices.nbytes == array.nbytes
    for _ in range(2):
        for start, stop in ranges(array.shape[0]):
            block = slices.read(start, stop)
            assert block.dtype == array.dtype
            assert block.shape == (stop - start, *array.shape[1:])
            assert block.tobytes() == array[start:stop].tobytes()
            slices.release(start, stop)


class Recorder(Slices):
    """Notes which slices are read and released."""

    def __init__(self, array: Array) -> None:
        self.shape = array.shape
        self.dtype = array.dtype
        self.array = array
        self.reads = list[tuple[int, int]]()
        self.releases = list[tuple[int, int]]()

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        return (ir.tensor(self.array),)

    def read(self, start: int, stop: int) -> Array:
        self.reads.append((start, stop))
        block: Array = self.array[start:stop]
        return block

    def release(self, start: int, stop: int) -> None:
        self.releases.append((start, stop))


class Chain:
    """A chain of nodes on a constant, and the array that numpy makes of it."""

    def __init__(self, array: Array, home: str = "memory", folder: Path = Path(), opset: int = 21):
        self.graph = Graph()
        self.array = array
        self.opset = opset
        self._names = (f"v{index}" for index in itertools.count())
        self.value = self._weight = self.graph.weight("w", array)
        self._stored = array
        self.value.const_value = tensor_of(array, home, folder)

    def constant(self, numbers: Sequence[int], dtype: npt.DTypeLike = np.int64) -> ir.Value:
        home = "constant" if len(numbers) % 2 else "initializer"
        return self.graph.weight(next(self._names), np.array(numbers, dtype), home)

    def then(
        self,
        op_type: str,
        result: Array,
        *inputs: ir.Value | None,
        before: Sequence[ir.Value] = (),
        output: int = 0,
        outputs: int = 1,
        **attributes: Any,
    ) -> Chain:
        """Appends a node, of which one output goes on as `result`."""
        given = [*before, self.value, *inputs]
        node = ir.node(op_type, given, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = next(self._names)
        self.graph.nodes.append(node)
        self.value, self.array = node.outputs[output], result
        return self

    def evaluated(self) -> Array:
        """Returns what the ONNX reference makes of the graph."""
        self.value.type = ir.TensorType(ir.DataType.from_numpy(self.array.dtype))
        self._weight.const_value = ir.Tensor(self._stored)  # the reference reads no files
        model = self.graph.model(self.value, opsets={"": self.opset})
        (result,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {})
        return np.asarray(result)

    def assert_right(self) -> None:
        slices = resolve(self.value)
        assert isinstance(slices, Slices), slices
        assert_reads(slices, self.array)
        evaluated = self.evaluated()
        assert evaluated.shape == self.array.shape
        assert evaluated.tobytes() == self.array.tobytes()
