"""Runs every benchmark that needs no GPU and no model from elsewhere, one after the other.

    python benchmarks/run_all.py [--small] [--only NAME ...] [--folder FOLDER]

With `--small` each takes seconds: that shows that it runs, and its figures mean little. Without, it
takes the better part of an hour on two processors, 20 GB of disk, and a quiet machine. The rest:
`bench_gpu.py` needs a GPU, and `exporters.py` and `quality.py` need models.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Bench:
    """A benchmark: its arguments, and those with which it takes seconds."""

    full: tuple[str, ...] = ()
    small: tuple[str, ...] = ()
    writes: bool = False


BENCHES = {
    "bench_engine": Bench(small=("--quick", "--repeats", "1")),
    "bench_methods": Bench(small=("--experts", "2", "--hidden", "256", "--inter", "128")),
    "bench_file": Bench(small=("--gb", "1.2", "--rounds", "1"), writes=True),
    "bench_memory": Bench(small=("--gb", "1.2"), writes=True),
    "bench_plan": Bench(
        small=(
            *("--nodes", "100", "200", "--layers", "2", "--experts", "64"),
            *("--sparse-gb", "1.2", "--rounds", "2"),
        ),
        writes=True,
    ),
    "bench_fuse": Bench(full=("128",), small=("8",)),
}


def main() -> int:
    """Runs them; returns 1 where one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--folder", help="where to write (default: the temporary one)")
    arguments = parser.parse_args()
    # Some build their models with what the tests have.
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    failed = []
    for name in arguments.only:
        bench = BENCHES[name]
        given = [*(bench.small if arguments.small else bench.full)]
        if bench.writes and arguments.folder:
            given += ["--folder", arguments.folder]
        print(f"\n{name} {' '.join(given)}", flush=True)
        command = [sys.executable, str(HERE / f"{name}.py"), *given]
        if subprocess.run(command, env=environment, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
