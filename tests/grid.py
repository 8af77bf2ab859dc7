"""The grid: every way to store a node times everything that it may compute, on the CPU provider.

A cell either runs as the float64 reference says, within the tolerance of its kernel's path, or the
target refuses it with a reason. `takes` says which, from docs/providers.md and not from the tables
of the library, so that neither can move without the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort

from qmoe_rules.kernels import GATED
from tests.contract import Cell, serialized
from tests.moe_models import Array, relative_error

BLOCKS = (0, 16, 32, 64, 128, 256)
STORAGES = (
    *itertools.product(("int2", "int3", "int4", "int8"), BLOCKS, (True, False)),
    ("mxfp4", 32, True),
    ("nvfp4", 16, True),
)
DTYPES = ("float32", "float16", "bfloat16")
PLAIN = ("relu", "gelu", "silu", "identity")
ACTIVATIONS = (*((name, 0) for name in PLAIN), ("swiglu", 1), ("swiglu", 2), ("geglu", 1))
# (H, I) by block size. K / block is odd, then even; the third has N and K of the lookup kernels
# for int2, multiples of 128.
SIZES = {
    0: ((96, 80), (64, 48), (128, 64)),
    16: ((48, 80), (64, 96), (128, 64)),
    32: ((96, 160), (64, 128), (128, 64)),
    64: ((192, 320), (128, 192), (256, 128)),
    128: ((128, 384), (256, 256), (384, 128)),
    256: ((256, 256), (512, 512), (512, 256)),
}
FACTORS: Mapping[str, tuple[Any, ...]] = {
    "bias": (True, False),
    "normalize": (1, 0),
    "k": (1, 2, 4),
    "size": (0, 1, 2),
}


def takes(cell: Cell) -> bool:
    """Returns whether the CPU provider of onnxruntime 1.32 computes a cell right."""
    plain = cell.activation in PLAIN
    if not plain and (cell.activation, cell.fusion) != ("swiglu", 1):
        return False
    if cell.format == "int3":
        known = cell.block_size in (32, 64, 128) and cell.symmetric and not plain
        return known and cell.dtype != "float32"
    if cell.format in ("mxfp4", "nvfp4"):
        return not plain
    return cell.dtype != "bfloat16"


def tolerance(cell: Cell) -> float:
    """Returns the largest relative error that the cell's kernel may have; a misread code gives 1.

    Blocks of int8 weights are multiplied with activations rounded to int8, int2 goes through
    lookup tables of int8 from blocks of 32 on. nvfp4 weights are rounded to bfloat16, or to
    float16 where that is the activation type. The rest is exact up to the activation type.
    """
    if cell.format == "nvfp4" and cell.dtype == "float32":
        return 8e-3
    if (cell.format == "int8" and cell.block_size) or (
        cell.format == "int2" and cell.block_size > 16
    ):
        return 3e-2
    shared = cell.format not in ("int2", "int4", "int8")  # one kernel for what is packed, or odd
    return {"float32": 2e-6, "float16": 1.5e-3 if shared else 5e-4, "bfloat16": 1e-2}[cell.dtype]


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Attributes:
        cell: The cell.
        reason: Why the target refuses it, None where the rules converted it.
        error: The relative error in ONNX Runtime, NaN where an output was not finite; None where
            it was not run.
        raised: What ONNX Runtime said where it did not load or run the model.
    """

    cell: Cell
    reason: str | None
    error: float | None = None
    raised: str = ""

    @property
    def complaint(self) -> str | None:
        """What is wrong with it, or None."""
        if takes(self.cell) != (self.reason is None):
            return f"{self.cell}: {self.reason or 'converted'}"
        if self.reason is not None:
            return None if self.reason.strip() else f"{self.cell}: refused without a reason"
        if self.raised:
            return f"{self.cell}: {self.raised}"
        if self.error is None or not self.error <= tolerance(self.cell):
            return f"{self.cell}: error {self.error}, {tolerance(self.cell)} is allowed"
        return None


def measure(cell: Cell) -> Outcome:
    """Converts a cell for the CPU and runs what the rules made of it."""
    found = cell.convert("cpu")
    if isinstance(found, str):
        return Outcome(cell, found)
    expected = cell.expected(cell.quantized(cell.recipe("cpu").specs))
    try:
        actual = run(serialized(found), cell)
    except Exception as raised:  # onnxruntime's errors have no class of their own
        return Outcome(cell, None, raised=str(raised))
    return Outcome(cell, None, relative_error(actual, expected))


def run(model: bytes, cell: Cell) -> Array:
    """Returns what ONNX Runtime computes on the CPU."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, cell.feeds())[0])


def bases(format: str, block: int, symmetric: bool) -> Iterator[Cell]:
    """Yields the cells of one storage that differ in type and activation."""
    for dtype, (activation, fusion) in itertools.product(DTYPES, ACTIVATIONS):
        yield Cell(format, None, block, symmetric, None, dtype, activation, fusion, tokens=5)


def with_factors(base: Cell, bias: bool, normalize: int, k: int, size: int) -> Cell:
    """Returns a cell with the other factors set."""
    # The kernel of nvfp4 wants multiples of 32, twice its block.
    hidden, inter = SIZES[32 if base.format == "nvfp4" else base.block_size][size]
    # alpha, beta and limit belong to swiglu: two of its cells have others than the default.
    clamped = (
        {"alpha": 1.702, "beta": 1.0, "limit": 0.7} if base.activation in GATED and size else {}
    )
    return base.but(bias=bias, normalize=normalize, k=k, hidden=hidden, inter=inter, **clamped)


def full(format: str, block: int, symmetric: bool) -> Iterator[Cell]:
    """Yields every cell of one storage; a type and activation that is refused, only twice."""
    combinations = list(itertools.product(*FACTORS.values()))
    for base in bases(format, block, symmetric):
        some = combinations if takes(with_factors(base, *combinations[0])) else combinations[::35]
        yield from (with_factors(base, *values) for values in some)


def reduced(format: str, block: int, symmetric: bool) -> Iterator[Cell]:
    """Yields every type and activation of one storage, with the other factors by turns.

    Every pair of values of two factors comes up among the cells that are run, of integers; formats
    that take few cells run each six times.
    """
    combinations = list(itertools.product(*FACTORS.values()))
    order = np.random.default_rng([BLOCKS.index(block), symmetric]).permutation(len(combinations))
    turns = itertools.cycle(order)
    for base in bases(format, block, symmetric):
        often = 6 if format in ("int3", "mxfp4", "nvfp4") and takes(base) else 1
        for _ in range(often):
            yield with_factors(base, *combinations[next(turns)])
