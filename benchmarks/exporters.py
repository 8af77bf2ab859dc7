"""What the rules make of exporters' models: found, fused, quantized, and how close.

    python benchmarks/exporters.py FOLDER [FOLDER ...] [--batch 2] [--length 7] [--size NAME=SIZE]

Each FOLDER holds one model. It is fused and normalized (still float), and quantized to int8 per row
and int4 block 32. Where ONNX Runtime runs it on the CPU, with random tokens and no past, the table
gives the relative error of all outputs but caches: of the fused model against the original, and of
each quantized model against the same weights dequantized to a float MoE. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qmoe_rules import (
    Recipe,
    fuse_experts_rules,
    normalize_moe_rules,
    ops,
    qmoe_to_moe_rules,
    quantize,
    save,
)
from qmoe_rules.errors import QMoEError
from qmoe_rules.loading import load, locate
from qmoe_rules.report import CONVERTED, KEPT, SKIPPED, Report
from qmoe_rules.rules import apply_rules

Array = npt.NDArray[Any]
RECIPES = {"int8 row": Recipe(bits=8), "int4 block 32": Recipe(bits=4, block_size=32)}
TITLES = ["model", "MoE", "experts found", "fused float", *RECIPES, "smaller (int4)"]


def feeds_of(model: ir.Model, sizes: Mapping[str, int]) -> dict[str, Array]:
    """Returns random inputs: tokens without a past, or hidden states."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [_size(size, sizes) for size in value.shape or ()]
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
        name = str(value.name)
        if "mask" in name:
            array: Array = np.ones(shape)
        elif "position" in name:
            array = np.broadcast_to(np.arange(sizes["length"]), shape)
        elif dtype.kind == "i":
            array = rng.integers(0, 200, shape)
        else:
            array = rng.standard_normal(shape)
        feeds[name] = array.astype(dtype)
    return feeds


def _size(size: int | ir.SymbolicDim, sizes: Mapping[str, int]) -> int:
    if isinstance(size, int):
        return size
    name = str(size.value)
    if name in sizes:
        return sizes[name]
    if name.startswith("past") and "+" not in name:
        return 0
    return sizes["batch" if name.startswith("batch") else "length"]


def run(path: Path, feeds: Mapping[str, Array]) -> list[Array] | None:
    """Returns the outputs, or None where ONNX Runtime has no CPU kernel for some node."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        # A sliding cache is not written where there was no token, and holds anything there.
        names = [out.name for out in session.get_outputs() if not out.name.startswith("present")]
        return [np.asarray(output) for output in session.run(names, dict(feeds))]
    except Exception:  # whatever the runtime says, the table says that it does not run
        return None


def relative_error(actual: Sequence[Array] | None, expected: Sequence[Array] | None) -> str:
    """Returns the largest relative error of an output, as text."""
    if actual is None or expected is None:
        return "does not run"
    pairs = zip(actual, expected, strict=True)
    errors = [_norm(a.astype(np.float64) - b) / max(_norm(b), 1e-30) for a, b in pairs if b.size]
    return f"{max(errors):.1e}"


def _norm(array: Array) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def row_of(folder: Path, sizes: Mapping[str, int]) -> list[str]:
    """Returns the table's row of one model."""
    source = locate(folder).model
    model = load(source)
    feeds = feeds_of(model, sizes)
    original = run(source, feeds)
    moe_before = sum(1 for _ in ops.nodes(model, "MoE", "QMoE"))
    with tempfile.TemporaryDirectory() as scratch:
        fused_report = Report()
        rules = [
            *fuse_experts_rules(report=fused_report),
            *normalize_moe_rules(report=fused_report),
        ]
        changed = apply_rules(model, rules)
        save(model, Path(scratch, "fused", "model.onnx"))
        fused = relative_error(run(Path(scratch, "fused", "model.onnx"), feeds), original)
        cells, ratio = [], ""
        for name, recipe in RECIPES.items():
            report = quantize(source, Path(scratch, name, "model.onnx"), recipe)
            cells.append(_quantized_cell(Path(scratch, name), report, feeds))
            ratio = f"{report.ratio or 1:.2f}x"
    found = f"{len(report.rows)}"
    return [folder.name, str(moe_before), found, fused if changed else "as it was", *cells, ratio]


def _quantized_cell(folder: Path, report: Report, feeds: Mapping[str, Array]) -> str:
    if report.count(CONVERTED) == 0:
        kept = f"{report.count(KEPT)} QMoE already" if report.count(KEPT) else ""
        reasons = {row.reason for row in report.rows if row.status == SKIPPED}
        return (
            kept or "; ".join(f"skipped: {reason}" for reason in sorted(reasons)) or "nothing found"
        )
    model = load(folder / "model.onnx")
    apply_rules(model, qmoe_to_moe_rules())
    save(model, folder / "float" / "model.onnx")
    actual, expected = (
        run(path, feeds) for path in (folder / "model.onnx", folder / "float/model.onnx")
    )
    return relative_error(actual, expected)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=7)
    parser.add_argument("--size", action="append", default=[], help="of a symbolic dimension")
    arguments = parser.parse_args()
    sizes = {"batch": arguments.batch, "length": arguments.length}
    sizes |= {name: int(size) for name, _, size in (text.partition("=") for text in arguments.size)}
    print("| " + " | ".join(TITLES) + " |")
    print("|" + "---|" * len(TITLES))
    for folder in arguments.folders:
        try:
            print("| " + " | ".join(row_of(folder, sizes)) + " |")
        except QMoEError as error:
            print(f"| {folder.name} | {error} |", file=sys.stderr)


if __name__ == "__main__":
    main()
