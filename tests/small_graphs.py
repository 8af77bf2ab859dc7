"""Graphs of a node or two, about which one thing is claimed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from tests.expert_graphs import Builder, Layer
from tests.moe_models import Array

TOKENS, WIDTH = 5, 6
FLOAT, HALF, INT64 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT64


class Small(Builder):
    """A graph of x [tokens, 6], other [others, 6] and cube [batch, sequence, 6]."""

    def __init__(self) -> None:
        super().__init__(Layer(homes={"given": "overridable"}))
        self.x = self.graph.input("x", np.float32, ("tokens", WIDTH))
        self.other = self.graph.input("other", np.float32, ("others", WIDTH))
        self.cube = self.graph.input("cube", np.float32, ("batch", "sequence", WIDTH))

    def bare(self, value: ir.Value) -> ir.Value:
        """Appends a node of which nothing is known."""
        return self.op("Transpose", self.op("Transpose", value))

    def half(self, value: ir.Value) -> ir.Value:
        return self.op("Cast", value, to=HALF)

    def ranked(self, value: ir.Value, k: int = 3, axis: int = -1, output: int = 0) -> ir.Value:
        made = self.top(value, k)[output]
        node = made.producer()
        assert node is not None
        node.attributes["axis"] = ir.AttrInt64("axis", axis)
        return made

    def reduced(self, value: ir.Value, axes: Any, op_type: str = "ReduceSum", **more: int) -> Any:
        return self.op(op_type, value, self.constant(axes), **more)

    def picked(self, value: ir.Value, indices: Any, **attributes: int) -> ir.Value:
        return self.op("GatherElements", value, self.constant(indices), **attributes)

    def matrix(self, *shape: int) -> ir.Value:
        return self.random(f"matrix{len(self.graph.initializers)}", *shape)

    def packed(self, value: ir.Value, **more: int) -> ir.Value:
        """Appends a MatMulNBits of 8 outputs, unless N says otherwise."""
        codes = np.full((8, 1, 16), 0x99, np.uint8)
        inputs = self.weight("codes", codes), self.weight("scales", np.ones(8, np.float32))
        attributes = {"K": WIDTH, "N": 8, "bits": 4, "block_size": 32, **more}
        return self.op("MatMulNBits", value, *inputs, domain="com.microsoft", **attributes)

    def scattered(self, value: ir.Value, update: float) -> ir.Value:
        updates = self.constant([[update]], np.float32)
        return self.op("ScatterElements", value, self.constant([[1]]), updates, axis=1)

    def text(self, value: str) -> ir.Value:
        return self.op("Constant", value_string=value)

    def run(self, value: ir.Value, dtype: ir.DataType | None = None) -> Array:
        """Returns what the graph computes: numbers of a type, or indices of TopK."""
        value.type = ir.TensorType(dtype or (FLOAT if value.index() == 0 else INT64))
        rng = np.random.default_rng(0)
        shapes = {"x": (TOKENS, WIDTH), "other": (1, WIDTH), "cube": (2, TOKENS, WIDTH)}
        arrays = {n: rng.standard_normal(shape, np.float32) for n, shape in shapes.items()}
        self.graph.inputs = [each for each in self.graph.inputs if each.uses()]
        model = ir.to_proto(self.graph.model(value)).SerializeToString()
        session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
        feeds = {each.name: arrays[each.name] for each in session.get_inputs()}
        return np.asarray(session.run(None, feeds)[0])


Write = Callable[[Small], ir.Value]
