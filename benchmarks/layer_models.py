"""Models of one MoE layer in float16, with the sizes of real models and random weights.

Nothing is computed: float weights and codes are random bytes, scaled so that outputs stay near
one, and written expert by expert, so that memory does not grow with the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

Array = npt.NDArray[Any]

_ALIGNMENT = 4096
_POOL = 1 << 26
# The standard deviation of one code's value, were all codes equally likely.
_SPREAD = {2: 1.1, 4: 4.6, 8: 74.0}
_FP4_SPREAD = 2.9


@dataclass(frozen=True)
class Layer:
    """The sizes of one MoE layer; gate and linear rows are interleaved in fc1."""

    name: str
    experts: int
    hidden: int
    inter: int
    k: int
    attributes: tuple[tuple[str, float], ...] = ()
    bias: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of both projections."""
        return {"fc1": (2 * self.inter, self.hidden), "fc2": (self.hidden, self.inter)}


LAYERS = {
    layer.name: layer
    for layer in (
        Layer("Gemma-4-26B-A4B", 128, 2816, 704, 8),
        Layer(
            "gpt-oss-20b",
            32,
            2880,
            2880,
            4,
            (("activation_alpha", 1.702), ("activation_beta", 1.0), ("swiglu_limit", 7.0)),
            bias=True,
        ),
        Layer("Qwen3-30B-A3B", 128, 2048, 768, 8),
    )
}


@dataclass(frozen=True)
class Stored:
    """How the weights are stored; 16 bits are float16."""

    name: str
    bits: int = 16
    block: int = 0
    quant_type: str = "int"
    prepacked: int = 0


STORED = {
    stored.name: stored
    for stored in (
        Stored("float16"),
        Stored("int4 row", 4),
        Stored("int4 block 32", 4, 32),
        Stored("int4 block 64", 4, 64),
        Stored("int4 block 128", 4, 128),
        Stored("int4 row, cutlass_sm80", 4, 0, prepacked=1),
        Stored("int4 block 64, cutlass_sm80", 4, 64, prepacked=1),
        Stored("int8 row", 8),
        Stored("int8 block 64", 8, 64),
        Stored("int2 block 64", 2, 64),
        Stored("mxfp4", 4, 32, "fp4"),
        Stored("nvfp4", 4, 16, "nvfp4"),
    )
}


class Writer:
    """Writes a model of one node whose initializers are random bytes in one external file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.initializers: list[TensorProto] = []
        self._rng = np.random.default_rng(0)
        self._codes = np.frombuffer(self._rng.bytes(_POOL), np.uint8)
        self._end = 0
        (folder / "weights.bin").touch()

    def random(self, name: str, data_type: int, shape: Sequence[int], pool: Array) -> str:
        """Appends a tensor, expert by expert, each from another place of `pool`."""
        start = -(-self._end // _ALIGNMENT) * _ALIGNMENT
        count = math.prod(shape[1:])
        with (self.folder / "weights.bin").open("r+b") as file:
            file.seek(start)
            for _ in range(shape[0]):
                at = int(self._rng.integers(pool.size // 2))
                file.write(np.resize(pool[at:], count).data)
            self._end = file.tell()
        tensor = TensorProto(name=name, data_type=data_type, dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        where = {"location": "weights.bin", "offset": start, "length": self._end - start}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        return name

    def uniform(self, scale: float) -> Array:
        """Returns float16 numbers of standard deviation `scale`."""
        values = self._rng.uniform(-scale, scale, _POOL // 64) * math.sqrt(3)
        return values.astype(np.float16)

    def projection(self, layer: Layer, stored: Stored, name: str) -> dict[str, str]:
        """Appends weights and scales of fc1 or fc2, as QMoE's schema names them."""
        experts, (rows, columns) = layer.experts, layer.shapes[name]
        std = 1 / math.sqrt(columns)
        weights = f"{name}_experts_weights"
        if stored.bits == 16:
            shape = (experts, rows, columns)
            return {weights: self.random(weights, TensorProto.FLOAT16, shape, self.uniform(std))}
        if stored.block and columns % stored.block:
            raise ValueError(f"K={columns} of {name} does not hold whole blocks of {stored.block}")
        transposed = stored.prepacked or stored.quant_type != "int"
        lines, length = (columns, rows) if transposed else (rows, columns)
        shape = (experts, lines, length * stored.bits // 8)
        given = {weights: self.random(weights, TensorProto.UINT8, shape, self._codes)}
        blocks = (experts, rows, columns // stored.block) if stored.block else (experts, rows)
        data_type, pool = self._scales(stored, std)
        given[f"{name}_scales"] = self.random(f"{name}_scales", data_type, blocks, pool)
        if stored.quant_type != "int":
            whole = std / _FP4_SPREAD if stored.quant_type == "nvfp4" else 1.0
            tensor = helper.make_tensor(
                f"{name}_global_scale", TensorProto.FLOAT, [experts], [whole] * experts
            )
            self.initializers.append(tensor)
            given[tensor.name] = tensor.name
        return given

    def _scales(self, stored: Stored, std: float) -> tuple[int, Array]:
        if stored.quant_type == "fp4":  # powers of two
            exponent = 127 + round(math.log2(std / _FP4_SPREAD))
            return TensorProto.FLOAT8E8M0, (exponent - self._codes % 2).astype(np.uint8)
        if stored.quant_type == "nvfp4":  # 0.5 to 1.9
            return TensorProto.FLOAT8E4M3FN, 0x30 + self._codes % 16
        factors = self._rng.uniform(0.5, 1.5, _POOL // 64) * std / _SPREAD[stored.bits]
        return TensorProto.FLOAT16, factors.astype(np.float16)


_PROJECTIONS = ("fc1", "fc2", "fc3")
_QMOE = [
    f"{p}_{part}" for p in _PROJECTIONS for part in ("experts_weights", "scales", "experts_bias")
]
_INPUTS = {
    "MoE": [name for name in _QMOE if "scales" not in name],
    "QMoE": [
        *_QMOE,
        *(f"{projection}_zero_points" for projection in _PROJECTIONS),
        "router_weights",
        "fc1_global_scale",
        "fc2_global_scale",
    ],
}


def write_model(layer: Layer, stored: Stored, folder: Path) -> Path:
    """Writes the model and returns its path."""
    writer = Writer(folder)
    given: dict[str, str] = {}
    for name, (rows, _) in layer.shapes.items():
        given |= writer.projection(layer, stored, name)
        if layer.bias:
            slot, pool = f"{name}_experts_bias", writer.uniform(0.1)
            given[slot] = writer.random(slot, TensorProto.FLOAT16, (layer.experts, rows), pool)
    attributes: dict[str, Any] = {
        "k": layer.k,
        "activation_type": "swiglu",
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "swiglu_fusion": 1,
        "normalize_routing_weights": 1,
        **dict(layer.attributes),
    }
    op_type = "MoE" if stored.bits == 16 else "QMoE"
    if op_type == "QMoE":
        attributes |= {"expert_weight_bits": stored.bits, "quant_type": stored.quant_type}
        attributes |= {"weights_prepacked": stored.prepacked}
        if stored.block and stored.quant_type == "int":
            attributes["block_size"] = stored.block
    inputs = ["x", "router_probs", *(given.get(name, "") for name in _INPUTS[op_type])]
    while not inputs[-1]:
        inputs.pop()
    node = helper.make_node(op_type, inputs, ["y"], domain="com.microsoft", **attributes)
    sizes = {"x": layer.hidden, "router_probs": layer.experts, "y": layer.hidden}
    values = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["tokens", size])
        for name, size in sizes.items()
    }
    y = values.pop("y")
    graph = helper.make_graph([node], "layer", list(values.values()), [y], writer.initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path
