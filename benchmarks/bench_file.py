"""From file to file: how near `quantize` comes to bare reading and writing.

    python benchmarks/bench_file.py [--gb 6] [--rounds 3] [--workers N] [--cpu] [--folder FOLDER]

A model of random float16 experts is written once and quantized to int4 with one scale per 32
weights, in every round raw and packed for CUDA. In every round too, the floor: as many threads
read the same weights expert by expert, and write as many bytes as the quantized expert has,
without any work in between. What the floor does is done once more, untimed, before anything is
timed: so everybody finds the weights in the page cache, and memory that has just been used, which
a virtual machine gives several times faster than other memory. Everything is deleted in the end.

Prints the best time of each, its rate in bytes of float16, and its ratio to the floor: of the best
times, and of the times of one round, the median and the range of all rounds. `--cpu` counts the
processor time of all threads, which a busy machine disturbs less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import moe_files
import numpy as np
from rich.console import Console
from rich.table import Table

from qmoe_rules import quantize
from qmoe_rules.extents import lay_out
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.loading import load
from qmoe_rules.passes import QuantizeMoEPass
from qmoe_rules.slabs import FileSlice
from qmoe_rules.writing import processors

FLOOR = "reading and writing"
RECIPES: dict[str, dict[str, Any]] = {
    "raw": {"bits": 4, "block_size": 32},
    "cutlass_sm80": {"bits": 4, "block_size": 32, "layout": "cutlass_sm80", "target": "cuda"},
}


def floor(source: Path, folder: Path, workers: int) -> None:
    """Reads every expert and writes as many bytes as it has when it is quantized."""
    model = QuantizeMoEPass(**RECIPES["raw"])(load(source)).model
    extents = lay_out(model)
    planned = [each.tensor for each in extents if isinstance(each.tensor, PlannedTensor)]
    projections = dict.fromkeys(tensor.projection for tensor in planned)
    folder.mkdir()
    data = folder / "floor"
    with data.open("wb") as file:
        file.truncate(sum(projection.nbytes for projection in projections))

    def move(source: FileSlice, offset: int, nbytes: int) -> None:
        weights = source.read().reshape(-1).view(np.uint8)
        with data.open("r+b", buffering=0) as file:
            file.seek(offset)
            file.write(weights[:nbytes].data)

    futures, offset = [], 0
    with ThreadPoolExecutor(workers) as threads:
        for projection in projections:
            nbytes = projection.nbytes // projection.experts
            for expert in range(projection.experts):
                weights = projection.weights.file_slice(expert)
                assert weights is not None
                futures.append(threads.submit(move, weights, offset, nbytes))
                offset += nbytes
        for future in futures:
            future.result()


def seconds(run: Callable[[], object], folder: Path, clock: Callable[[], float]) -> float:
    """Returns how long a call takes that writes to a folder, which goes afterwards."""
    start = clock()
    run()
    elapsed = clock() - start
    shutil.rmtree(folder)
    return elapsed


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, default=6, help="of float16 weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=processors())
    parser.add_argument("--cpu", action="store_true", help="processor time, not wall time")
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu else time.perf_counter
    layers = moe_files.LAYER.count_for(arguments.gb * 1e9)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        out = folder / "out"
        warm = moe_files.write(folder / "warm", moe_files.SMALL, 1)
        source = moe_files.write(folder / "source", moe_files.LAYER, layers)
        size = source.with_name("model.onnx.data").stat().st_size
        runs: dict[str, Callable[[], object]] = {
            FLOOR: lambda: floor(source, out, arguments.workers)
        }
        for name, recipe in RECIPES.items():
            quantize(warm, folder / f"warm-{name}", **recipe)
            runs[name] = lambda recipe=recipe: quantize(  # type: ignore[misc]
                source, out, workers=arguments.workers, **recipe
            )
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                seconds(runs[FLOOR], out, clock)
                times[name].append(seconds(run, out, clock))
    title = f"{size / 1e9:.1f} GB, {arguments.workers} threads, {arguments.rounds} rounds"
    columns = ("int4 block 32", "best", "GB/s", "of the floor", "round by round")
    table = Table(*columns, title=title, box=None)
    for name, taken in times.items():
        best, lowest = min(taken), min(times[FLOOR])
        ratios = [one / least for one, least in zip(taken, times[FLOOR], strict=True)]
        spread = f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})"
        rate, ratio = f"{size / best / 1e9:.2f}", f"{best / lowest:.2f}x"
        table.add_row(name, f"{best:.2f} s", rate, ratio, "" if name == FLOOR else spread)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
