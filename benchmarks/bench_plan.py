"""Planning: start-up, many nodes, many experts, and a model much larger than memory.

    python benchmarks/bench_plan.py [--nodes 1000 2000 5000 10000] [--experts 384]
                                    [--layers 15 30 61] [--sparse-gb 40] [--rounds 7]
                                    [--folder FOLDER]

How long `qmoe plan` takes on a small model in a process of its own, and how much processor time,
which a busy machine disturbs less; how long it takes to plan models of more and more
MoE nodes, and of more and more layers whose experts are all spelled out, each computing every
token, as exporters without a fused operator write them: both should grow with the graph, not
faster. And how long a sparse file, whose weights take no room and read as zero but for the last
expert's, takes to be planned and quantized into shards; ONNX Runtime must open these, and the last
expert's bytes must be right.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_files
import numpy as np
import onnx_ir as ir
import onnxruntime
from rich.console import Console
from rich.table import Table

from qmoe_rules import QuantizeMoEPass, plan, quantize
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantizers.rtn import rtn
from qmoe_rules.report import human_bytes
from tests import expert_graphs
from tests.moe_models import Graph

Row = tuple[str, str, str]
SHARD = 2_000_000_000


def seconds(run: Callable[[], object]) -> float:
    """Returns how long a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def start_up(folder: Path, rounds: int) -> Row:
    """Times `qmoe plan` on one small layer, in a process of its own."""
    model = moe_files.write(folder, moe_files.SMALL, 1)
    command = [sys.executable, "-m", "qmoe_rules.cli", "plan", str(model)]
    # A package that is installed has its bytecode on disk.
    environment = {key: os.environ[key] for key in os.environ if key != "PYTHONDONTWRITEBYTECODE"}

    def spent() -> tuple[float, float]:
        before = os.times()
        taken = seconds(
            lambda: subprocess.run(command, env=environment, check=True, capture_output=True)
        )
        after = os.times()
        return taken, sum(after[2:4]) - sum(before[2:4])  # user and system time of children

    wall, processor = (min(own) for own in zip(*(spent() for _ in range(rounds)), strict=True))
    told = f"processor time {processor:.2f} s, best of {rounds} processes"
    return "qmoe plan, one small layer", f"{wall:.2f} s", told


def many_nodes(folder: Path, count: int) -> Row:
    """Times planning a model of `count` nodes, each with weights of its own."""
    model = moe_files.write(folder, moe_files.SMALL, count, sparse=True)
    taken = seconds(lambda: plan(model, bits=4, block_size=32))
    return f"{count} MoE nodes", f"{taken:.2f} s", f"{1e3 * taken / count:.2f} ms per node"


def spelled_out(layers: int, experts: int) -> Row:
    """Times fusing and planning layers of experts that are spelled out."""
    layer = expert_graphs.Layer(experts=experts, hidden=32, inter=32, k=8)
    graph = Graph()
    x = total = expert_graphs.source(graph, layer)
    for index in range(layers):
        moe = expert_graphs.Builder(layer, graph, f"l{index}.").experts(total)
        moe.type, moe.shape = x.type, x.shape
        total = graph.op("Add", total, moe, out=f"residual_{index}", like=x)
    model, nodes = graph.model(total), len(graph.nodes)
    quantize_moe = QuantizeMoEPass(bits=4, block_size=32)
    taken = seconds(lambda: quantize_moe(model))
    converted = sum(row.status == "converted" for row in quantize_moe.report.rows)
    what = f"{layers} layers of {experts} experts spelled out"
    return what, f"{taken:.2f} s", f"{nodes} nodes, {converted} layers converted"


def much_larger(folder: Path, gb: float) -> list[Row]:
    """Times planning and quantizing a sparse file into shards, and ONNX Runtime opening them."""
    layers = moe_files.LAYER.count_for(gb * 1e9)
    model = moe_files.write(folder, moe_files.LAYER, layers, sparse=True)
    weight = last_expert(model.with_name("model.onnx.data"))
    size = moe_files.LAYER.nbytes * layers
    what = f"sparse model of {human_bytes(size)}"
    planned = seconds(lambda: plan(model, bits=4, block_size=32))
    start = time.perf_counter()
    report = quantize(model, folder / "out", bits=4, block_size=32, max_shard_size=SHARD)
    taken = time.perf_counter() - start
    written = human_bytes(report.file_bytes_after or 0)
    shards = len(list(folder.glob("out/*.data")))
    quantized = folder / "out" / "model.onnx"
    check_last_expert(quantized, weight)
    rate = f"{size / taken / 1e9:.2f} GB/s, {written} in {shards} shards"
    return [
        (f"{what}: plan", f"{planned:.2f} s", f"{layers} layers"),
        (f"{what}: quantize", f"{taken:.1f} s", rate),
        ("the same: open and run", f"{seconds(lambda: run(quantized)):.2f} s", "ONNX Runtime"),
    ]


def last_expert(data: Path) -> np.ndarray[Any, Any]:
    """Gives the last expert of fc2 weights, which end the file, and returns them."""
    _, rows, columns = moe_files.LAYER.fc2
    weight = np.random.default_rng(0).standard_normal((rows, columns), np.float32)
    halves = weight.astype(np.float16)
    with data.open("r+b") as file:
        file.seek(-halves.nbytes, os.SEEK_END)
        file.write(halves.data)
    return halves


def check_last_expert(model: Path, weight: np.ndarray[Any, Any]) -> None:
    """Raises AssertionError where the last expert is stored as anything but its own codes."""
    *_, node = ir.load(model).graph
    fc2 = node.inputs[5]
    tensor = ir.convenience.get_const_tensor(fc2) if fc2 is not None else None
    assert tensor is not None
    expected = rtn(weight, Spec(FORMATS["int4"], 32)).packed
    assert expected.any()
    np.testing.assert_array_equal(tensor.numpy()[-1], expected)


def run(model: Path) -> None:
    """Opens a model in ONNX Runtime, its weights mapped and not copied, and runs one token."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    shapes = {each.name: (1, each.shape[1]) for each in session.get_inputs()}
    session.run(None, {name: np.ones(shape, np.float16) for name, shape in shapes.items()})


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=[1000, 2000, 5000, 10_000])
    parser.add_argument("--experts", type=int, default=384)
    parser.add_argument("--layers", type=int, nargs="*", default=[15, 30, 61])
    parser.add_argument("--sparse-gb", type=float, default=40)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary one)")
    arguments = parser.parse_args()
    table = Table("what", "time", "", box=None)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        folder = Path(scratch)
        table.add_row(*start_up(folder / "small", arguments.rounds))
        for count in arguments.nodes:
            table.add_row(*many_nodes(folder / f"nodes{count}", count))
        for count in arguments.layers:
            table.add_row(*spelled_out(count, arguments.experts))
        for row in much_larger(folder / "large", arguments.sparse_gb):
            table.add_row(*row)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
