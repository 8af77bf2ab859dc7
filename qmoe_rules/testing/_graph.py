"""`Graph`: an ONNX graph or body under construction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops

__all__ = ["OPSETS", "SLOTS", "Graph"]

Array = npt.NDArray[Any]

OPSETS = {"": 21, "com.microsoft": 1}
"""The opset imports of a model, where nothing else is said."""

SLOTS = {
    f"{name}{ending}": f"{name}_experts_{part}"
    for name in ("fc1", "fc2", "fc3")
    for ending, part in (("", "weights"), ("_bias", "bias"))
}
"""The inputs of a MoE by their short names: fc1, fc1_bias, fc2, ..."""


@dataclass
class Graph:
    """A graph under construction; nodes are appended in order.

    Attributes:
        inputs: The graph inputs.
        initializers: The initializers.
        nodes: The nodes.
    """

    inputs: list[ir.Value] = field(default_factory=list)
    initializers: list[ir.Value] = field(default_factory=list)
    nodes: list[ir.Node] = field(default_factory=list)

    def input(self, name: str, dtype: npt.DTypeLike, shape: Sequence[int | str]) -> ir.Value:
        """Adds a graph input."""
        value = ir.val(name, ir.DataType.from_numpy(np.dtype(dtype)), shape)
        self.inputs.append(value)
        return value

    def weight(self, name: str, array: Array, home: str = "initializer") -> ir.Value:
        """Adds an array.

        Args:
            name: Name of the value.
            array: Its value.
            home: Where it lives: `"initializer"`, `"constant"` (a Constant node), `"overridable"`
                (a graph input with a default), `"input"` (one without) or `"computed"`.
        """
        tensor = ir.tensor(array, name=name)
        if home == "constant":
            return self.op("Constant", out=name, like=array, value=tensor)
        if home == "computed":
            stored = self.weight(f"{name}_stored", array)
            return self.op("Abs", stored, out=name, like=array)
        value = ir.val(name, tensor.dtype, array.shape)
        if home in ("overridable", "input"):
            self.inputs.append(value)
        if home in ("overridable", "initializer"):
            value.const_value = tensor
            self.initializers.append(value)
        return value

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        out: str,
        like: Array | ir.Value | None = None,
        name: str | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> ir.Value:
        """Appends a node with one output `out`, of the type and shape of `like`."""
        node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
        value = node.outputs[0]
        value.name = out
        if isinstance(like, ir.Value):
            value.type, value.shape = like.type, like.shape
        elif like is not None:
            value.type = ir.TensorType(ir.DataType.from_numpy(like.dtype))
            value.shape = ir.Shape(like.shape)
        self.nodes.append(node)
        return value

    def weights(
        self, arrays: Mapping[str, Array], prefix: str = "", homes: Mapping[str, str] | None = None
    ) -> dict[str, ir.Value]:
        """Adds the arrays of one node as `prefix` + their name."""
        homes = homes or {}
        return {
            name: self.weight(f"{prefix}{name}", array, homes.get(name, "initializer"))
            for name, array in arrays.items()
        }

    def moe(
        self,
        x: ir.Value,
        router_probs: ir.Value,
        weights: Mapping[str, ir.Value],
        *,
        out: str = "y",
        name: str | None = "moe",
        domain: str = ops.DOMAIN,
        **attributes: Any,
    ) -> ir.Value:
        """Appends a MoE node; attributes that are not given are absent."""
        given = {SLOTS[name]: value for name, value in weights.items()}
        inputs = [x, router_probs, *(given.get(slot) for slot in ops.MOE_INPUTS[2:])]
        while inputs[-1] is None:
            inputs.pop()
        return self.op("MoE", *inputs, out=out, like=x, name=name, domain=domain, **attributes)

    def done(self, *outputs: ir.Value, opsets: Mapping[str, int] | None = None) -> ir.Graph:
        """Returns the graph; without `opsets` it is a body."""
        return ir.Graph(
            self.inputs,
            outputs,
            nodes=self.nodes,
            initializers=self.initializers,
            opset_imports=dict(opsets) if opsets is not None else None,
            name="graph",
        )

    def model(
        self,
        *outputs: ir.Value,
        opsets: Mapping[str, int] = OPSETS,
        functions: Sequence[ir.Function] = (),
    ) -> ir.Model:
        """Returns a model with this graph."""
        return ir.Model(self.done(*outputs, opsets=opsets), ir_version=10, functions=functions)
