"""Models of MoE layers on disk, as large as one likes: random weights, or holes, read as zero."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

_POOL_VALUES = 1 << 24


@dataclass(frozen=True)
class Shape:
    """The sizes of one layer of float16 experts, gate and up interleaved in fc1.

    Attributes:
        experts: E.
        hidden: H.
        inter: I.
    """

    experts: int
    hidden: int
    inter: int

    @property
    def fc1(self) -> tuple[int, int, int]:
        """[E, 2*I, H]."""
        return self.experts, 2 * self.inter, self.hidden

    @property
    def fc2(self) -> tuple[int, int, int]:
        """[E, H, I]."""
        return self.experts, self.hidden, self.inter

    @property
    def nbytes(self) -> int:
        """Bytes of the layer."""
        return 2 * 3 * self.experts * self.inter * self.hidden

    def count_for(self, nbytes: float) -> int:
        """Returns how many layers it takes to hold so many bytes, at least one."""
        return max(1, round(nbytes / self.nbytes))


SMALL = Shape(8, 64, 64)
"""A layer to warm up with."""
LAYER = Shape(128, 2048, 768)
"""A layer of 1.2 GB, the sizes of Qwen3-30B-A3B."""


def write(folder: Path, shape: Shape, layers: int, *, sparse: bool = False) -> Path:
    """Writes a model of some layers in a row, x and router_probs -> y.

    Args:
        folder: Where; it is made.
        shape: Of every layer.
        layers: How many.
        sparse: Leaves holes in place of weights, which take no room and read as zero.

    Returns:
        The .onnx file; its weights lie beside it in `model.onnx.data`.
    """
    folder.mkdir(parents=True)
    nodes, initializers, offset = [], [], 0
    name = "x"
    for layer in range(layers):
        weights = []
        for slot, dims in (("fc1", shape.fc1), ("fc2", shape.fc2)):
            tensor = TensorProto(
                name=f"layers.{layer}.{slot}",
                dims=dims,
                data_type=TensorProto.FLOAT16,
                data_location=TensorProto.EXTERNAL,
            )
            length = 2 * int(np.prod(dims))
            place = {"location": "model.onnx.data", "offset": offset, "length": length}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            offset += length
            initializers.append(tensor)
            weights.append(tensor.name)
        fc1, fc2 = weights
        node = helper.make_node(
            "MoE",
            [name, "router_probs", fc1, "", fc2],
            [f"y{layer}"],
            name=f"layers.{layer}.moe",
            domain="com.microsoft",
            k=1,
            activation_type="swiglu",
            swiglu_fusion=1,
        )
        nodes.append(node)
        name = f"y{layer}"
    sizes = {"x": shape.hidden, "router_probs": shape.experts, name: shape.hidden}
    values = [
        helper.make_tensor_value_info(value, TensorProto.FLOAT16, ["tokens", size])
        for value, size in sizes.items()
    ]
    graph = helper.make_graph(nodes, "layers", values[:2], values[2:], initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.save(model, folder / "model.onnx")
    with (folder / "model.onnx.data").open("wb") as file:
        if sparse:
            file.truncate(offset)
        else:
            _write_random(file.fileno(), offset // 2, shape.hidden)
    return folder / "model.onnx"


def _write_random(descriptor: int, count: int, columns: int) -> None:
    """Writes normal float16 values: one pool of them again and again, each time begun elsewhere."""
    rng = np.random.default_rng(0)
    pool = (rng.standard_normal(_POOL_VALUES, np.float32) / columns**0.5).astype(np.float16)
    while count:
        chunk = np.roll(pool, int(rng.integers(_POOL_VALUES)))[:count]
        with open(descriptor, "wb", closefd=False) as file:
            file.write(chunk.data)
        count -= chunk.size
