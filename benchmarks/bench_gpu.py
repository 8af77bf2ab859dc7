"""How long one MoE layer takes on a GPU: float MoE against QMoE, by format and number of tokens.

    python benchmarks/bench_gpu.py --out FOLDER [--layers NAME ...] [--stored NAME ...]
    python benchmarks/bench_gpu.py --out FOLDER --provider cpu --small      (a dry run)

Needs numpy, onnx and onnxruntime-gpu, and torch for the CUDA libraries and events; not this
library. Layers have the sizes of real models and random weights (`layer_models.py`). Every model
runs in float16 with inputs and outputs bound on the device; a time is the median over batches of
runs, between two events on the stream that the runtime was given, with other inputs by turns where
the tokens are few. Each layer is measured twice: run by run, where a few tokens wait for the host
to launch kernels, and replayed as a CUDA graph, which is the device alone. Each runs in a process
of its own. Writes FOLDER/bench.json and prints tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gpu_tables import speed_tables, versions
from layer_models import LAYERS, STORED, Layer, Stored, write_model

Array = npt.NDArray[Any]
Row = dict[str, Any]
Feeds = dict[str, Array]
Run = Callable[[], Any]

TOKENS = (1, 8, 32, 128, 512, 2048)


class OnCpu:
    """Runs a session on the CPU."""

    memory = 0

    def __init__(self) -> None:
        import onnxruntime as ort

        ort.set_default_logger_severity(4)
        self.ort: Any = ort
        self.session: Any = None

    def load(self, model: Path, graphs: bool) -> None:
        """Makes the session."""
        self.session = self.ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])

    def bind(self, feeds: Feeds, mode: str) -> tuple[Run, Callable[[], Array]]:
        """Returns what runs the session once, and what reads the output."""
        return (lambda: self.session.run(None, feeds)), lambda: self.session.run(None, feeds)[0]

    def timed(self, runs: Sequence[Run], count: int) -> float:
        """Returns the seconds that `count` runs take, by turns."""
        start = time.perf_counter()
        for index in range(count):
            runs[index % len(runs)]()
        return time.perf_counter() - start


class OnCuda(OnCpu):
    """Runs a session on a CUDA device, on a stream of our own; also as CUDA graphs."""

    def __init__(self) -> None:
        import torch  # before onnxruntime: it brings the CUDA libraries

        super().__init__()
        self.torch: Any = torch
        self.ort.preload_dlls()
        self.stream = torch.cuda.Stream()
        self.graphs = 0

    def load(self, model: Path, graphs: bool) -> None:
        """Makes the session."""
        free = self.torch.cuda.mem_get_info()[0]
        options = self.ort.SessionOptions()
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        stream = str(self.stream.cuda_stream)
        device = {"user_compute_stream": stream, "enable_cuda_graph": str(int(graphs))}
        providers = [("CUDAExecutionProvider", device)]
        self.session = self.ort.InferenceSession(
            str(model), options, providers=providers, enable_fallback=0
        )
        self.memory = (free - self.torch.cuda.mem_get_info()[0]) >> 20

    def bind(self, feeds: Feeds, mode: str) -> tuple[Run, Callable[[], Array]]:
        """Returns what runs the session once on the device, and what reads the output."""
        binding = self.session.io_binding()
        tensors = {name: self.torch.from_numpy(a).cuda() for name, a in feeds.items()}
        tensors["y"] = self.torch.full_like(tensors["x"], float("nan"))
        for name, tensor in tensors.items():
            bind = binding.bind_output if name == "y" else binding.bind_input
            bind(name, "cuda", 0, np.float16, tuple(tensor.shape), tensor.data_ptr())
        self.graphs += mode == "graph"
        options = self.ort.RunOptions()
        options.add_run_config_entry("disable_synchronize_execution_providers", "1")
        # Every binding has a graph of its own, captured in its first runs; -1 is none.
        graph = str(self.graphs) if mode == "graph" else "-1"
        options.add_run_config_entry("gpu_graph_id", graph)
        self.torch.cuda.synchronize()
        kept = binding, tensors  # the binding knows addresses only

        def output() -> Array:
            self.torch.cuda.synchronize()
            return np.asarray(kept[1]["y"].cpu().numpy())

        return (lambda: self.session.run_with_iobinding(kept[0], options)), output

    def timed(self, runs: Sequence[Run], count: int) -> float:
        """Returns the seconds between two events on the stream."""
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record(self.stream)
        for index in range(count):
            runs[index % len(runs)]()
        end.record(self.stream)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3


def measure(
    layer: Layer,
    stored: Stored,
    provider: str,
    modes: Sequence[str],
    tokens: Sequence[int],
    batches: int,
) -> Iterator[Row]:
    """Yields one row per mode and number of tokens, and one for everything that failed."""
    row: Row = {"layer": layer.name, "stored": stored.name}
    with tempfile.TemporaryDirectory() as scratch:
        try:
            device = OnCuda() if provider == "cuda" else OnCpu()
            model = write_model(layer, stored, Path(scratch))
            row["file_mib"] = sum(file.stat().st_size for file in Path(scratch).iterdir()) >> 20
            start = time.perf_counter()
            device.load(model, "graph" in modes)
            row |= {"load_s": time.perf_counter() - start, "device_mib": device.memory}
            for mode in modes:
                row["mode"] = mode
                for count in tokens:
                    yield row | {"tokens": count, **_timed(device, layer, count, batches, mode)}
        except Exception as error:  # the table says what the runtime says
            yield row | {"error": " ".join(str(error).split())[-300:]}


def _timed(device: OnCpu, layer: Layer, tokens: int, batches: int, mode: str) -> Row:
    rng = np.random.default_rng(1)
    runs = []
    # Other experts every time, where they are few: the cache would hold the same ones.
    for _ in range(8 if tokens <= 8 else 1):
        shapes = {"x": (tokens, layer.hidden), "router_probs": (tokens, layer.experts)}
        feeds = {n: rng.standard_normal(shape).astype(np.float16) for n, shape in shapes.items()}
        run, output = device.bind(feeds, mode)
        for _ in range(3):
            run()
        if not np.isfinite(output().astype(np.float32)).all():
            raise ValueError(f"{tokens} tokens: the output is not finite")
        runs.append(run)
    once = device.timed(runs, 8) / 8
    per_batch = max(len(runs), min(40, int(0.02 / once)))
    times = [device.timed(runs, per_batch) / per_batch for _ in range(batches)]
    return {"ms": 1e3 * statistics.median(times), "least_ms": 1e3 * min(times)}


def small(layer: Layer) -> Layer:
    """Returns a layer with few and small experts, for a dry run."""
    return replace(layer, experts=4, hidden=256, inter=192, k=2)


def main() -> None:
    """Measures, writes bench.json and prints tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--layers", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--stored", nargs="+", default=list(STORED), choices=STORED)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--provider", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--modes", nargs="+", choices=["run", "graph"], help="run, and graph on CUDA"
    )
    parser.add_argument("--batches", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=480, help="nothing is begun after that")
    parser.add_argument("--small", action="store_true", help="small layers and few tokens")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.modes = arguments.modes or ["run", "graph"][: 1 + (arguments.provider == "cuda")]
    if arguments.one:
        _measure_here(arguments)
        return
    started, rows = time.monotonic(), []
    for layer in arguments.layers:
        for stored in arguments.stored:
            left = arguments.seconds - (time.monotonic() - started)
            rows += _measure_apart(layer, stored, left) if left > 0 else []
            written = {"versions": versions(), "rows": rows}
            text = json.dumps(written, indent=1) + "\n"
            (arguments.out / "bench.json").write_text(text, encoding="utf-8")
    print(speed_tables(rows))


def _measure_here(arguments: argparse.Namespace) -> None:
    for name in arguments.layers:
        layer = small(LAYERS[name]) if arguments.small else LAYERS[name]
        for stored in arguments.stored:
            options = arguments.provider, arguments.modes, arguments.tokens, arguments.batches
            for row in measure(layer, STORED[stored], *options):
                print(json.dumps(row), flush=True)


def _measure_apart(layer: str, stored: str, seconds: float) -> list[Row]:
    """Measures in a process of its own, so that one that dies leaves the others."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--one", "--layers", layer, "--stored", stored]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=max(60, seconds))
        output, why = done.stdout, f"exit {done.returncode}: {done.stderr.strip()[-300:]}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        why = "took too long"
    rows: list[Row] = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    for row in rows:
        said = row.get("error") or f"{row['mode']:5} {row['tokens']:5} tokens {row['ms']:8.3f} ms"
        print(f"{layer:16} {stored:28} {said}", file=sys.stderr, flush=True)
    return rows or [{"layer": layer, "stored": stored, "error": why}]


if __name__ == "__main__":
    main()
