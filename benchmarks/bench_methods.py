"""How long the methods take that lose less: `search` and `gptq` on one layer.

    python benchmarks/bench_methods.py [--experts 128] [--hidden 2816] [--inter 704] [--workers N]
                                       [--blocks 32 0]

A layer of float16 experts, gated, is quantized to int4, one expert per thread at a time, in memory.
Weights and inputs are random; the inputs of every column differ in size and go together, and four
different experts take turns. `search` goes by means, `gptq` by Hessians. Prints the seconds of the
whole layer, and the weights per second and thread.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantizers import METHODS
from qmoe_rules.statistics import Statistics
from qmoe_rules.writing import processors

DIFFERENT = 4
SPECS = [
    Spec(FORMATS["int4"], block, symmetric) for block in (32, 0) for symmetric in (True, False)
]


@dataclass(frozen=True)
class Projection:
    """One projection of one expert: weights [N, K], and what it has seen."""

    weight: npt.NDArray[np.float16]
    statistics: Statistics

    @classmethod
    def drawn(cls, rows: int, columns: int, seed: int) -> Projection:
        """Draws one; it has seen 2 K tokens."""
        rng = np.random.default_rng(seed)
        weight = (rng.standard_normal((rows, columns)) * 0.02).astype(np.float16)
        inputs = rng.standard_normal((2 * columns, columns)).astype(np.float32)
        inputs += 0.4 * inputs[:, rng.permutation(columns)]
        inputs *= rng.lognormal(0, 0.7, columns).astype(np.float32)
        hessian = inputs.T @ inputs / np.float32(len(inputs))
        return cls(weight, Statistics(len(inputs), np.diagonal(hessian).copy(), hessian))


def seconds(experts: list[list[Projection]], method: str, spec: Spec, workers: int) -> float:
    """Returns how long all experts take."""

    def quantize(expert: list[Projection]) -> None:
        for each in expert:
            METHODS[method](each.weight, spec, each.statistics)

    start = time.perf_counter()
    with ThreadPoolExecutor(workers) as threads:
        list(threads.map(quantize, experts))
    return time.perf_counter() - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2816)
    parser.add_argument("--inter", type=int, default=704)
    parser.add_argument("--workers", type=int, default=processors())
    parser.add_argument("--blocks", type=int, nargs="*", default=[32], help="0: rows")
    arguments = parser.parse_args()
    shapes = ((2 * arguments.inter, arguments.hidden), (arguments.hidden, arguments.inter))
    drawn = [[Projection.drawn(*shape, seed) for shape in shapes] for seed in range(DIFFERENT)]
    experts = [drawn[index % DIFFERENT] for index in range(arguments.experts)]
    weights = arguments.experts * sum(rows * columns for rows, columns in shapes)
    title = f"{arguments.experts} experts, {weights / 1e9:.2f} Gparam, {arguments.workers} threads"
    table = Table("method", "storage", "seconds", "Gparam/s per thread", title=title, box=None)
    for method in ("search", "gptq"):
        for spec in (spec for spec in SPECS if spec.block_size in arguments.blocks):
            seconds(experts[:1], method, spec, 1)  # compiles
            taken = seconds(experts, method, spec, arguments.workers)
            speed = weights / taken / arguments.workers / 1e9
            table.add_row(method, str(spec), f"{taken:.1f}", f"{speed:.4f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
