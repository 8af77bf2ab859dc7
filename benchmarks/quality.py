"""Quality of quantized byte-level language models: how far they are from the float model.

    python benchmarks/quality.py MODEL ... --text TEXT --calibration TEXT [--windows 48 | --all]
                                 [--bits 2 4 8] [--blocks 32 0] [--budget 3.5] [--json FILE]

A MODEL has bytes as its input, `input_ids` int64 [batch, time], and `logits` [batch, time, 256] as
its output; a TEXT is any file. Every method is measured with every width, with blocks of 32 and
rows, with and without zero points, wherever the CPU target takes the model so: `calibrate` on the
second text, `quantize`, and ONNX Runtime on the CPU over windows of the first.

Measured are the mean KL(float || quantized) per byte in nats, the change of the cross entropy in
nats per byte, and how often both models rank the same byte first. With `--budget` the same for a
budget of bits per weight, and for all uniform recipes that fit into it. `quality_tables.py` makes
tables and a plot of the JSON.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import logging
import math
import os
import platform
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from qmoe_rules import Calibration, ConfigError, Recipe, calibrate, ops, plan, quantize
from qmoe_rules.feeds import Feed, complete, inputs_of, read_feeds
from qmoe_rules.loading import load, locate
from qmoe_rules.providers import CPU, TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import WIDTHS
from qmoe_rules.report import SKIPPED
from qmoe_rules.targets import Target
from qmoe_rules.writing import processors

WINDOW = 256
CALIBRATION_WINDOWS = 64
BATCH = 16
BLOCKS = (16, 32, 64, 128, 256, 0)

PLAIN = "plain"
"""Round to nearest with scales max|w| / 2^(bits-1), never negative: what everything is held to."""
UNSEEN = "search, no calibration"

_positive = {name: replace(kernel, signed=False) for name, kernel in CPU.kernels.items()}
TARGETS[PLAIN] = Target(PLAIN, (replace(CPU, kernels=_positive),))


@dataclass(frozen=True)
class Quality:
    """How far a model is from the float model on the same windows.

    Attributes:
        divergence: Mean KL(float || quantized) per byte in nats.
        loss_change: Change of the mean cross entropy in nats per byte.
        agreement: The share of bytes before which both rank the same byte first.
    """

    divergence: float
    loss_change: float
    agreement: float


@dataclass(frozen=True)
class Result:
    """One recipe on one model.

    Attributes:
        model: Name of the model's folder.
        method: The method, `PLAIN` or `UNSEEN`.
        storage: How the experts are stored, as in a report.
        bits: Bits per expert weight, scales and zero points included.
        ratio: How many times smaller the whole file is.
        quality: What was measured.
        budget: The budget that the recipe meets, where one was asked for.
        uniform: Whether all nodes are stored alike.
    """

    model: str
    method: str
    storage: str
    bits: float
    ratio: float
    quality: Quality
    budget: float | None = None
    uniform: bool = True


class Subject:
    """A float model, what it says to the windows, and its calibration."""

    def __init__(self, path: Path, text: Path, calibration: Path, windows: int) -> None:
        self.path = locate(path).model
        self.name = self.path.parent.name
        model = load(self.path)
        inputs = inputs_of(model)
        self.weights = sum(map(_expert_weights, ops.nodes(model, "MoE")))
        read = read_feeds(text, inputs, window=WINDOW, windows=windows)
        self.windows = [complete(feed, inputs, inputs) for feed in together(read)]
        self.count = sum(len(next(iter(feed.values()))) for feed in self.windows)
        known = read_feeds(calibration, inputs, window=WINDOW, windows=CALIBRATION_WINDOWS)
        self.calibration: Calibration = calibrate(self.path, known, hessian=True)
        self._float = [log_softmax(logits) for logits in logits_of(self.path, self.windows)]

    def fits(self, recipe: Recipe) -> bool:
        """Returns whether the target takes every MoE so."""
        return not plan(self.path, recipe).count(SKIPPED)

    def bits(self, recipe: Recipe) -> float:
        """Returns the bits per weight of a recipe."""
        return 8 * sum(row.bytes_after for row in plan(self.path, recipe).rows) / self.weights

    def measure(self, recipe: Recipe, method: str, budget: float | None = None) -> Result:
        """Quantizes the model, runs it and compares."""
        with tempfile.TemporaryDirectory() as folder:
            report = quantize(self.path, folder, recipe)
            quality = self._compare(logits_of(locate(folder).model, self.windows))
        stored = " + ".join(row.stored.removesuffix(", raw") for row in report.rows)
        kinds = dict.fromkeys(row.stored.split(",")[0] for row in report.rows)
        uniform = len(kinds) == 1
        return Result(
            self.name,
            method,
            next(iter(kinds)) if uniform else stored,
            8 * sum(row.bytes_after for row in report.rows) / self.weights,
            report.ratio or 1.0,
            quality,
            budget,
            uniform,
        )

    def _compare(self, logits: Iterable[npt.NDArray[np.float32]]) -> Quality:
        """Compares a model's logits, window by window, with the float model's."""
        rows = []
        texts = (text for feed in self.windows for text in next(iter(feed.values())))
        for text, p, after in zip(texts, self._float, logits, strict=True):
            q = log_softmax(after)
            change = np.take_along_axis(p[:-1] - q[:-1], text[1:, None], -1).mean(dtype=np.float64)
            same = (p.argmax(-1) == q.argmax(-1)).mean()
            divergence = (np.exp(p) * (p - q)).sum(-1, dtype=np.float64).mean()
            rows.append((divergence, change, same))
        return Quality(*map(float, np.mean(rows, axis=0)))


def logits_of(model: Path, windows: Iterable[Feed]) -> Iterator[npt.NDArray[np.float32]]:
    """Runs a model on the CPU and yields the logits of every window, [time, 256]."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1  # threads that wait for each other are slow where others run
    session = ort.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    with ThreadPoolExecutor(processors()) as threads:
        for outputs in threads.map(lambda feed: session.run(None, feed), windows):
            yield from outputs[0].astype(np.float32)


def together(feeds: Iterable[Feed]) -> Iterator[Feed]:
    """Puts windows together: a kernel that unpacks experts does so once per run."""
    left = iter(feeds)
    while some := list(itertools.islice(left, BATCH)):
        yield {name: np.concatenate([feed[name] for feed in some]) for name in some[0]}


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Returns log probabilities, each as float32, the sum below them as float64."""
    shifted = logits - logits.max(-1, keepdims=True)
    total = np.log(np.exp(shifted).sum(-1, keepdims=True, dtype=np.float64))
    normalized: npt.NDArray[np.float32] = (shifted - total).astype(np.float32)
    return normalized


def _expert_weights(node: ir.Node) -> int:
    given = ops.inputs(node)
    shapes = [given[f"{name}_experts_weights"].shape for name in ("fc1", "fc2")]  # type: ignore[union-attr]
    return sum(math.prod(shape.numpy()) for shape in shapes if shape)


def recipes(**fields: Any) -> Iterator[Recipe]:
    """Yields the uniform recipes of integers that the CPU target might take."""
    for bits, size, symmetric in itertools.product(WIDTHS, BLOCKS, (True, False)):
        storage = {"bits": bits, "block_size": size, "symmetric": symmetric}
        try:
            yield Recipe(**{"target": "cpu", **storage, **fields})
        except ConfigError:
            continue


def methods(calibration: Calibration) -> dict[str, dict[str, Any]]:
    """Returns the fields of a recipe by what the tables call the method."""
    known = {name: {"method": name, "calibration": calibration} for name in METHODS}
    unseen = {UNSEEN: {"method": "search"}} if "search" in METHODS else {}
    return {PLAIN: {"target": PLAIN}, "rtn": {}, **unseen, **(known | {"rtn": {}})}


def uniform(subject: Subject, bits: Collection[int], blocks: Collection[int]) -> Iterator[Result]:
    """Measures every method with some widths in blocks of some sizes, and 4-bit floats."""
    known = methods(subject.calibration)
    for name, fields in known.items():
        for recipe in recipes(**fields):
            needless = name == PLAIN and not recipe.symmetric  # has no scales that could be signed
            wanted = recipe.bits in bits and recipe.block_size in blocks and not needless
            if wanted and subject.fits(recipe):
                yield subject.measure(recipe, name)
    for format in ("mxfp4", "nvfp4"):
        recipe = Recipe(format=format, target="cpu")
        if subject.fits(recipe):
            yield subject.measure(recipe, "rtn")


def within(subject: Subject, budget: float) -> Iterator[Result]:
    """Measures a budget, and all uniform recipes within it, method by method."""
    for name, fields in methods(subject.calibration).items():
        if name in (PLAIN, UNSEEN):
            continue
        yield subject.measure(Recipe(target="cpu", budget=budget, **fields), name, budget)
        for recipe in recipes(**fields):
            if subject.fits(recipe) and subject.bits(recipe) <= budget:
                yield subject.measure(recipe, name, budget)


def machine() -> dict[str, str]:
    """Returns where and when this is measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "onnxruntime": ort.__version__,
        "machine": f"{os.cpu_count()} x {names[0] if names else platform.processor()}",
    }


def row(result: Result) -> str:
    """Returns a result as a line."""
    quality = result.quality
    return (
        f"{result.method:24}{result.storage[:40]:42}{result.bits:6.3f}{quality.divergence:10.5f}"
        f"{quality.loss_change:+10.5f}{quality.agreement:8.2%}{result.ratio:7.2f}x"
    )


def main() -> None:
    """Prints a line per recipe, and writes what it measured."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, required=True, help="what the models are judged by")
    parser.add_argument("--calibration", type=Path, required=True, help="other text, to calibrate")
    parser.add_argument("--windows", type=int, default=48, help="of 256 bytes, evenly spaced")
    parser.add_argument("--all", action="store_true", help="the whole text")
    parser.add_argument("--bits", type=int, nargs="*", default=WIDTHS, help="of integers")
    parser.add_argument("--blocks", type=int, nargs="*", default=[32, 0], help="0: rows")
    parser.add_argument("--budget", type=float, nargs="*", default=[], help="bits per weight")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    logging.getLogger("qmoe_rules").setLevel(logging.ERROR)  # it says which nodes stay in float
    windows = arguments.text.stat().st_size if arguments.all else arguments.windows
    results: list[Result] = []
    seconds = {}
    for model in arguments.models:
        start = time.perf_counter()
        subject = Subject(model, arguments.text, arguments.calibration, windows)
        print(f"\n{subject.name}, {subject.count} windows")
        budgets = (within(subject, budget) for budget in arguments.budget)
        same = uniform(subject, arguments.bits, arguments.blocks)
        for result in itertools.chain(same, *budgets):
            print(row(result), flush=True)
            results.append(result)
            seconds[subject.name] = round(time.perf_counter() - start)
            facts = {**machine(), "windows": subject.count, "seconds": seconds}
            if arguments.json:  # at once: the next one may take long
                found = [asdict(result) for result in results]
                arguments.json.write_text(json.dumps({**facts, "results": found}, indent=1))


if __name__ == "__main__":
    main()
