"""`Case`: one model for a CUDA device and what must become of it, and how to forge wrong ones."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules.formats import FORMATS
from qmoe_rules.quantized import QuantizedWeights
from tests.contract import Cell, Weights
from tests.moe_models import Array

RIGHT, REFUSED, GARBAGE = ("right",), ("refused",), ("garbage", "crash")
# The runtime times several kernels and keeps the fastest, and they do not agree.
BY_CHANCE = (*RIGHT, *GARBAGE)

# What the device's arithmetic leaves of |difference| / |expected|; a misread code makes it 1.
TOLERANCES = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.5e-2}

Forge = Callable[[Cell], ir.Model]


@dataclass(frozen=True)
class Case:
    """One model, and what the device must make of it.

    Attributes:
        group: The table it belongs to.
        cell: What it computes.
        verdicts: What may become of it: `RIGHT`, `REFUSED`, `GARBAGE` or `BY_CHANCE`.
        message: A part of what onnxruntime says when it refuses.
        note: What the cell does not say.
        forge: Builds a model that no rule writes; None where the rules are asked.
        answer: Computes the expected output, where it is not that of the cell's weights.
        target: The target that the rules are asked for.
        differs: Whether the library does otherwise than the device: it refuses what would be
            ignored, and converts what later versions load.
        fallback: Whether nodes may go to the CPU provider.
        float: Whether it is a float MoE.
    """

    group: str
    cell: Cell
    verdicts: tuple[str, ...] = RIGHT
    message: str = ""
    note: str = ""
    forge: Forge | None = None
    answer: Callable[[Cell], Array] | None = None
    target: str = "cuda"
    differs: bool = False
    fallback: bool = False
    float: bool = False

    @property
    def title(self) -> str:
        """The case in words."""
        if self.float:
            return ", ".join([self.note, *self.cell.variations])
        return f"{self.cell}{f': {self.note}' if self.note else ''}"

    @property
    def name(self) -> str:
        """A file name."""
        return re.sub(r"[^a-z0-9.=-]+", "-", f"{self.group} {self.title}".lower()).strip("-")

    def made(self) -> tuple[ir.Model, str | None]:
        """Returns the model, and why the library would not make it, None where it made it."""
        if self.forge:
            return self.forge(self.cell), "-" if self.float else "no rule writes it"
        found = self.cell.convert(self.target)
        if isinstance(found, str):
            fp4 = FORMATS[self.cell.format].quant_type in ("fp4", "nvfp4")
            layout = self.cell.layout or ("n_packed" if fp4 else "raw")
            return self.cell.direct(layout), found
        return found, None

    def expected(self) -> Array:
        """Returns the float64 answer [T, H]."""
        return self.answer(self.cell) if self.answer else self.cell.expected()


def sized(format: str, block: int, **fields: Any) -> Cell:
    """Returns a cell whose sizes hold whole blocks, and are multiples of 64."""
    sizes = {128: (128, 256), 256: (256, 256)}.get(block, (128, 192))
    given = {"block_size": block, "hidden": sizes[0], "inter": sizes[1], **fields}
    return Cell(format, **given)


def forged(layout: str = "raw", **attributes: Any) -> Forge:
    """Returns a builder of the cell in this layout, with these attributes."""
    return lambda cell: cell.direct(layout, **attributes)


def negated(cell: Cell) -> Weights:
    def negate(weight: QuantizedWeights) -> QuantizedWeights:
        signs = np.where(np.arange(weight.scales.shape[1]) % 2, 1, -1).astype(weight.scales.dtype)
        scales = (weight.scales.swapaxes(1, -1) * signs).swapaxes(1, -1)
        return dataclasses.replace(weight, scales=scales)

    return {name: negate(weight) for name, weight in cell.quantized().items()}


def redeclared(cell: Cell) -> ir.Model:
    """K-packed bytes with the dimensions of N-packed ones."""
    model = cell.direct("k_packed")
    for name, columns in cell.columns.items():
        value = model.graph.initializers[f"{name}_experts_weights"]
        assert value.const_value is not None
        stored = value.const_value.numpy().reshape(cell.experts, columns, -1)
        value.const_value = ir.tensor(stored, name=value.name)
        value.shape = ir.Shape(stored.shape)
    return model


def rescaled(cell: Cell) -> Weights:
    factors = np.arange(1, cell.experts + 1, dtype=np.float32) / 2
    weights = cell.quantized()
    for name, weight in weights.items():
        assert weight.global_scale is not None
        scales = (weight.global_scale * factors).astype(np.float32)
        weights[name] = dataclasses.replace(weight, global_scale=scales)
    return weights


def with_router_weights(cell: Cell) -> ir.Model:
    """Returns the cell with an input 14 that differs from the softmax of the logits."""
    given = np.random.default_rng(5).uniform(0.1, 1, (cell.tokens, cell.experts))
    return cell.direct(extra={"router_weights": given.astype(cell.numpy_dtype)})


def with_fc3(cell: Cell) -> ir.Model:
    """Gate and linear rows apart, in fc1 and fc3."""
    arrays: dict[str, Array] = {}
    for part in ("experts_weights", "scales", "experts_bias"):
        initializers = cell.direct().graph.initializers
        tensor = initializers[f"fc1_{part}"].const_value
        assert tensor is not None
        arrays[f"fc1_{part}"] = tensor.numpy()[:, 0::2].copy()
        arrays[f"fc3_{part}"] = tensor.numpy()[:, 1::2].copy()
    return cell.direct(extra=arrays, swiglu_fusion=0)
