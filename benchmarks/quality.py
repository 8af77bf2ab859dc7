"""Quality of quantized byte-level language models: how far they are from the float model.

    python benchmarks/quality.py MODEL TEXT [--windows 48]

MODEL is a model of bytes, `input_ids` int64 [batch, time] to `logits` [batch, time, 256]; TEXT is
any file. Each recipe is quantized to a temporary folder and run with ONNX Runtime on the CPU over
evenly spaced windows of the text. Printed per recipe: mean KL(float || quantized) per byte in
nats, change of the cross entropy in nats per byte, how often both models rank the same byte
first, and the size of the whole file.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from rich.console import Console
from rich.table import Table

from qmoe_rules import Recipe, quantize
from qmoe_rules.loading import locate

Floats = npt.NDArray[np.float64]

WINDOW = 256
RECIPES = {
    "int4 row, rtn": Recipe(bits=4),
    "int4 block 128, rtn": Recipe(bits=4, block_size=128),
    "int4 block 64, rtn": Recipe(bits=4, block_size=64),
    "int4 block 32, rtn": Recipe(bits=4, block_size=32),
    "int8 row, rtn": Recipe(bits=8),
    "int8 block 32, rtn": Recipe(bits=8, block_size=32),
}


@dataclass(frozen=True)
class Quality:
    """How far a model is from the float model on the same windows."""

    divergence: float
    loss_change: float
    agreement: float


def windows_of(text: bytes, count: int) -> npt.NDArray[np.int64]:
    """Returns `count` evenly spaced windows of token ids, int64 [count, WINDOW]."""
    ids = np.frombuffer(text, np.uint8).astype(np.int64)
    starts = np.linspace(0, len(ids) - WINDOW, count).astype(np.int64)
    return np.stack([ids[start : start + WINDOW] for start in starts])


def log_probabilities(model: Path, windows: npt.NDArray[np.int64]) -> Floats:
    """Runs a model on the CPU, window by window; float64 [windows, time, 256]."""
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    rows: list[npt.NDArray[Any]] = [session.run(None, {name: row[None]})[0] for row in windows]
    logits = np.concatenate(rows).astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    normalized: Floats = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return normalized


def compare(before: Floats, after: Floats, windows: npt.NDArray[np.int64]) -> Quality:
    """Compares log probabilities of two models over the same windows."""
    divergence = (np.exp(before) * (before - after)).sum(-1).mean()
    truth = windows[:, 1:, None]
    losses = [-np.take_along_axis(p[:, :-1], truth, -1).mean() for p in (before, after)]
    agreement = (before.argmax(-1) == after.argmax(-1)).mean()
    return Quality(float(divergence), float(losses[1] - losses[0]), float(agreement))


def main() -> None:
    """Prints one row per recipe."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--windows", type=int, default=48)
    arguments = parser.parse_args()
    windows = windows_of(arguments.text.read_bytes(), arguments.windows)
    before = log_probabilities(locate(arguments.model).model, windows)
    table = Table("recipe", "KL, nats/byte", "change of loss", "same top byte", "smaller", box=None)
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(arguments.model, folder, recipe)
            after = log_probabilities(locate(folder).model, windows)
        quality = compare(before, after, windows)
        table.add_row(
            name,
            f"{quality.divergence:.5f}",
            f"{quality.loss_change:+.5f}",
            f"{quality.agreement:.2%}",
            f"{report.ratio or 1:.2f}x",
        )
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
