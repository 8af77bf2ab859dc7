"""Runs every benchmark that needs no GPU and no model from elsewhere, one after the other.

    python benchmarks/run_all.py [--small] [--only NAME ...] [--folder FOLDER] [--out docs/speed.md]

With `--small` each takes seconds: that shows that it runs, and its figures mean little. Without, it
takes half an hour on two processors, 20 GB of disk, and a quiet machine. `--out` writes what they
print as a page. The rest: `bench_gpu.py` needs a GPU, and `exporters.py` and `quality.py` need
models.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import os
import platform
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
PACKAGES = ("numpy", "numba", "onnx-ir", "onnxscript", "onnxruntime", "torch", "gguf")


@dataclass(frozen=True)
class Bench:
    """A benchmark: the arguments with which it takes seconds, and whether it writes files."""

    small: tuple[str, ...]
    writes: bool = True


BENCHES = {
    "bench_engine": Bench(("--quick", "--repeats", "1"), writes=False),
    "bench_methods": Bench(("--experts", "2", "--hidden", "256", "--inter", "128"), writes=False),
    "bench_file": Bench(("--gb", "1.2", "--rounds", "1")),
    "bench_memory": Bench(("--gb", "1.2")),
    "bench_plan": Bench(
        (
            *("--nodes", "100", "200", "--layers", "1", "2", "--experts", "64"),
            *("--sparse-gb", "1.2", "--rounds", "2"),
        )
    ),
}

INTRODUCTION = """\
# Speed and memory

Every table is of one run on one machine: ratios inside a table mean something, absolute times only
there. `python benchmarks/run_all.py --out docs/speed.md` measures and writes this page.
"""


def machine() -> str:
    """Returns a sentence on when, where and with what."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    memory = ""
    if hasattr(os, "sysconf"):
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        memory = f", {size / 1e9:.0f} GB of memory"
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    sentence = (
        f"Measured {datetime.datetime.now(tz=datetime.UTC).date()}, "
        f"{next(named, platform.processor())}, "
        f"{os.cpu_count()} processors{memory}, {platform.system()} {platform.release()}; Python "
        f"{platform.python_version()}, {', '.join(packages())}. Load before it began: {busy}."
    )
    return textwrap.fill(sentence, 100, break_on_hyphens=False)


def packages() -> Iterator[str]:
    """Yields the versions of what has a part in the figures."""
    for name in PACKAGES:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"


def section(script: Path, given: Sequence[str], printed: str) -> str:
    """Returns what a benchmark says of itself, its arguments, and what it has printed."""
    about = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or script.stem
    title, _, rest = about.partition("\n")
    lines = "\n".join(line.rstrip() for line in printed.strip("\n").splitlines())
    command = " ".join(["$ python", f"benchmarks/{script.name}", *given])
    paragraphs = rest.strip("\n").split("\n\n")
    told = "\n\n".join(each for each in paragraphs if not each.startswith("    "))  # its usage
    about = f"## {title.rstrip('.')}\n\n{told}\n"
    return f"{about}\n<!-- not run: measured -->\n```text\n{command}\n{lines}\n```\n"


def main() -> int:
    """Runs them; returns 1 where one has failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="sizes that take seconds")
    parser.add_argument("--only", nargs="+", choices=BENCHES, default=list(BENCHES))
    parser.add_argument("--folder", help="where to write (default: the temporary one)")
    parser.add_argument("--out", type=Path, help="the page to write")
    arguments = parser.parse_args()
    # Some build their models with what the tests have.
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    page, failed = [INTRODUCTION, f"{machine()}\n"], []
    for name in arguments.only:
        bench, script = BENCHES[name], HERE / f"{name}.py"
        given = bench.small if arguments.small else ()
        where = ["--folder", arguments.folder] if bench.writes and arguments.folder else []
        print(f"\n{name} {' '.join(given)}", flush=True)
        command = [sys.executable, str(script), *given, *where]
        run = subprocess.run(
            command, env=environment, check=False, stdout=subprocess.PIPE, encoding="utf-8"
        )
        print(run.stdout, flush=True)
        page.append(section(script, given, run.stdout))
        if run.returncode:
            failed.append(name)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    elif arguments.out:
        arguments.out.write_text("\n".join(page), encoding="utf-8")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
