"""Memory of a save: it should not grow with the model.

    python benchmarks/bench_memory.py [--gb 1 2 4] [--workers 2] [--folder FOLDER]

Quantizes models of more and more layers, and one of a single layer of 1.5 GB, each in a process of
its own, and prints the peak of anonymous memory above what the process had before: pages of mapped
files are not counted, which the system takes back when it likes. The smallest model is quantized
in every way; the larger ones with round to nearest alone. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import moe_files
from rich.console import Console
from rich.table import Table

WIDE = moe_files.Shape(128, 2816, 704)
"""A layer of 1.5 GB."""

RECIPES: dict[str, dict[str, Any]] = {
    "int4 block 32": {"bits": 4, "block_size": 32},
    "the same, cutlass_sm80": {
        "bits": 4,
        "block_size": 32,
        "layout": "cutlass_sm80",
        "target": "cuda",
    },
    "int8 row": {"bits": 8},
    "int4 block 32, asymmetric": {"bits": 4, "block_size": 32, "symmetric": False},
    "int4 block 32, search": {"bits": 4, "block_size": 32, "method": "search"},
    "mxfp4": {"format": "mxfp4", "target": "cpu"},
    "nvfp4": {"format": "nvfp4", "target": "cpu"},
}
PLAIN = "int4 block 32"

# Warms up, says that it is ready, and quantizes when it is told to.
CHILD = """
import json, sys
from qmoe_rules import quantize
warm, source, out, options = sys.argv[1:]
options = json.loads(options)
quantize(warm, out + "-warm", **options)
print("ready", flush=True)
sys.stdin.readline()
quantize(source, out, **options)
"""


def anonymous(process: int) -> int:
    """Returns the anonymous memory of a process in bytes, 0 when it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def peak(source: Path, warm: Path, options: Mapping[str, Any]) -> int:
    """Returns the peak of anonymous memory of quantizing a model, above the start."""
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        command = [sys.executable, "-c", CHILD, str(warm), str(source), f"{scratch}/out"]
        with subprocess.Popen(
            [*command, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdout.readline()
            highest = start = anonymous(child.pid)
            child.stdin.write("go\n")
            child.stdin.flush()
            while child.poll() is None:
                highest = max(highest, anonymous(child.pid))
        if child.returncode:
            raise SystemExit(f"quantizing {source} failed")
    return highest - start


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gb", type=float, nargs="+", default=[1, 2, 4], help="sizes of models")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    arguments = parser.parse_args()
    models = [(moe_files.LAYER, moe_files.LAYER.count_for(gb * 1e9)) for gb in arguments.gb]
    columns = ("model", "one expert", "recipe", "peak above start")
    table = Table(*columns, title=f"{arguments.workers} workers", box=None)
    for index, (shape, layers) in enumerate([*dict.fromkeys(models), (WIDE, 1)]):
        size, expert = shape.nbytes * layers / 1e9, shape.nbytes / shape.experts / 1e6
        what = f"{size:.1f} GB, {layers} layer{'s' * (layers > 1)}"
        with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
            warm = moe_files.write(Path(scratch, "warm"), moe_files.SMALL, 1)
            source = moe_files.write(Path(scratch, "source"), shape, layers)
            for name in [PLAIN] if index else RECIPES:
                used = peak(source, warm, {**RECIPES[name], "workers": arguments.workers})
                table.add_row(what, f"{expert:.1f} MB", name, f"{used / 1e6:.0f} MB")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
