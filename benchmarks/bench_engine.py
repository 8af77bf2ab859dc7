"""How fast one expert after the other is quantized, and how fast others do the same.

    python -m benchmarks.bench_engine [--quick] [--cpu] [--repeats 7] [--experts 16]

Every contender takes float16 weights [N, K] and makes quantized bytes and scales of them. All run
in one interleaved sequence, round after round, and the best round of each counts: what disturbs a
machine for a while disturbs all of them. GB/s are bytes of source per second. "of memcpy" is the
ratio to np.copyto of the same weights to as much memory; "ours is" says how many times faster
qmoe_rules is at the same format, block size and layout.

Everybody runs in one thread where no number of threads is given, torch too; ONNX Runtime's
`quantize_matmul_*bits` takes what it likes. `--cpu` counts the processor time of all threads, which
a busy machine disturbs less than the clock on the wall, and leaves out who takes several. Weights
that do not fit in the caches are the honest case: the default is 16 experts of 8 MB.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantizers.floats import float_rtn_numpy
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy

Weight = npt.NDArray[np.generic]

OURS = "qmoe_rules"


@dataclass(frozen=True)
class Contender:
    """Somebody who quantizes.

    Attributes:
        who: The tool.
        what: Format, block size and layout.
        run: Quantizes one expert, or several.
        experts: How many of the experts it is given; the slow ones get one.
        pool: Threads over the experts: those that a save keeps from its first slab to its last.
    """

    who: str
    what: str
    run: Callable[[Weight], object]
    experts: int | None = None
    pool: ThreadPoolExecutor | None = None

    def seconds(self, weights: Weight, clock: Callable[[], float]) -> float:
        """Returns how long one expert takes."""
        own = weights[: self.experts]
        start = clock()
        for _ in (self.pool.map if self.pool else map)(self.run, own):
            pass
        return (clock() - start) / len(own)


def specs(quick: bool) -> Iterator[tuple[Spec, str]]:
    """Yields what qmoe_rules is measured at: specs and layouts."""
    blocks = (32, 128, 0) if quick else (16, 32, 64, 128, 256, 0)
    for name, block in itertools.product(("int4", "int8"), blocks):
        for layout in ("raw", "cutlass_sm80"):
            yield Spec(FORMATS[name], block), layout
    for name, block in itertools.product(("int4", "int8"), blocks):
        yield Spec(FORMATS[name], block, symmetric=False), "raw"
    for name in ("int2", "int3"):
        yield Spec(FORMATS[name], 32), "raw"
        yield Spec(FORMATS[name], 32, symmetric=False), "raw"
    yield Spec(FORMATS["int2"], 32), "cutlass_sm80"
    for name, block, layout in (("mxfp4", 32, "n_packed"), ("nvfp4", 16, "n_packed")):
        yield Spec(FORMATS[name], block), "k_packed"
        yield Spec(FORMATS[name], block), layout
    yield Spec(FORMATS["fp8"], 128), "raw"
    yield Spec(FORMATS["fp8"]), "raw"


def ours(quick: bool, pool: ThreadPoolExecutor) -> Iterator[Contender]:
    """Yields the compiled engine at everything, and in two threads at what is asked for most."""
    for spec, layout in specs(quick):
        yield Contender(OURS, f"{spec}, {layout}", _stored(spec, layout))
    for layout in ("raw", "cutlass_sm80"):
        spec = Spec(FORMATS["int4"], 32)
        run = _stored(spec, layout)
        yield Contender(f"{OURS}, 2 threads", f"{spec}, {layout}", run, pool=pool)


def _stored(spec: Spec, layout: str) -> Callable[[Weight], object]:
    store = LAYOUTS[layout].store
    return lambda weight: store(rtn(weight, spec).packed, spec.format.bits)


def in_numpy() -> Iterator[Contender]:
    """Yields what runs where numba cannot be used."""
    for name, block in (("int4", 32), ("int4", 128), ("int4", 0), ("int8", 32)):
        spec = Spec(FORMATS[name], block)
        run = _bound(rtn_numpy, spec)
        yield Contender("qmoe_rules without numba", f"{spec}, raw", run, experts=1)
    for name, block in (("mxfp4", 32), ("nvfp4", 16)):
        spec = Spec(FORMATS[name], block)
        run = _bound(float_rtn_numpy, spec)
        yield Contender("qmoe_rules without numba", f"{spec}, k_packed", run, experts=1)


def _bound(quantizer: Callable[[Weight, Spec], object], spec: Spec) -> Callable[[Weight], object]:
    return lambda weight: quantizer(weight, spec)


def onnxruntimes_nbits() -> Iterator[Contender]:
    """Yields the tools behind MatMulNBits, with the transpose that they need."""
    tools = _imported("onnxruntime.capi._pybind_state")
    for bits, block in ((4, 32), (4, 128), (8, 32), (8, 128)):
        tool = getattr(tools, f"quantize_matmul_{bits}bits")
        for symmetric in (True, False):
            spec = Spec(FORMATS[f"int{bits}"], block, symmetric)
            run = _nbits(tool, bits, block, symmetric)
            yield Contender(f"onnxruntime {tool.__name__}", f"{spec}, raw", run, experts=1)


def _nbits(tool: Any, bits: int, block: int, symmetric: bool) -> Callable[[Weight], object]:
    def run(weight: Weight) -> object:
        rows, columns = weight.shape
        blocks = columns // block
        packed = np.zeros((rows, blocks, block * bits // 8), np.uint8)
        scales = np.zeros((rows, blocks), weight.dtype)
        points = np.zeros((rows, -(-blocks * bits // 8)), np.uint8)
        transposed = np.ascontiguousarray(weight.T)
        tool(packed, transposed, scales, points, block, rows, columns, symmetric)
        return packed

    return run


def onnxruntimes_cuda_quantizer() -> Iterator[Contender]:
    """Yields the tool with which models for the CUDA provider are built, on torch."""
    torch: Any = _imported("torch")
    torch.set_num_threads(1)
    tool: Any = _imported("onnxruntime.quantization.cuda_quantizer").CudaQuantizer
    logging.getLogger("onnxruntime.quantization.cuda_quantizer").setLevel(logging.ERROR)
    who = "onnxruntime cuda_quantizer"
    for bits, block in ((4, 32), (4, 128), (8, 32)):
        spec = Spec(FORMATS[f"int{bits}"], block)
        for layout, method in (
            ("raw", tool.matmulnbits_blockwise_quantize),
            ("cutlass_sm80", tool.qmoe_prepacked_blockwise_quantize),
        ):
            run = _on_torch(torch, method, bits, block)
            yield Contender(who, f"{spec}, {layout}", run, experts=1)
    for bits, (layout, prepack) in itertools.product(
        (4, 8), (("raw", False), ("cutlass_sm80", True))
    ):
        run = _on_torch(torch, tool.qmoe_per_channel_quantize, bits, prepack)
        yield Contender(who, f"{Spec(FORMATS[f'int{bits}'])}, {layout}", run, experts=1)


def _on_torch(torch: Any, method: Any, *arguments: int) -> Callable[[Weight], object]:
    return lambda weight: method(torch.from_numpy(weight), *arguments)


def ggmls() -> Iterator[Contender]:
    """Yields the quantizers of ggml's Python package."""
    gguf = _imported("gguf")
    for bits, name in ((4, "Q4_0"), (8, "Q8_0")):
        run = _with_gguf(gguf, gguf.GGMLQuantizationType[name])
        yield Contender(f"gguf {name}", f"{Spec(FORMATS[f'int{bits}'], 32)}, raw", run, experts=1)


def _with_gguf(gguf: Any, kind: Any) -> Callable[[Weight], object]:
    return lambda weight: gguf.quants.quantize(weight.astype(np.float32), kind)


def _imported(name: str) -> ModuleType:
    return importlib.import_module(name)


def contenders(quick: bool, shape: tuple[int, ...]) -> tuple[list[Contender], list[str]]:
    """Returns who is here, memcpy first, and who is not and why."""
    slots = itertools.cycle(np.empty(shape, np.float16))

    def copy(weight: Weight) -> None:
        np.copyto(next(slots), weight)

    pool = ThreadPoolExecutor(2)
    found = [Contender("memcpy", "", copy), Contender("memcpy, 2 threads", "", copy, pool=pool)]
    found += [*ours(quick, pool), *in_numpy()]
    absent = []
    for group in (onnxruntimes_nbits, onnxruntimes_cuda_quantizer, ggmls):
        try:
            found += group()
        except (ImportError, AttributeError) as error:
            absent.append(f"{group.__name__}: left out, {error}")
    return found, absent


def measure(
    everyone: list[Contender], weights: Weight, repeats: int, clock: Callable[[], float]
) -> list[float]:
    """Returns the best seconds per expert of every contender."""
    for contender in everyone:
        contender.run(weights[0])  # compiles, imports, fills caches
    rounds = [[each.seconds(weights, clock) for each in everyone] for _ in range(repeats)]
    return [min(own) for own in zip(*rounds, strict=True)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer block sizes, smaller weights")
    parser.add_argument("--cpu", action="store_true", help="processor time, not wall time")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--rows", type=int, default=1408, help="N, a multiple of 64")
    parser.add_argument("--columns", type=int, default=2816, help="K, a multiple of 256")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.repeats, arguments.experts, arguments.rows = 3, 4, 512
    shape = (arguments.experts, arguments.rows, arguments.columns)
    weights = (np.random.default_rng(0).standard_normal(shape, np.float32) * 0.02).astype(
        np.float16
    )
    everyone, absent = contenders(arguments.quick, shape)
    if arguments.cpu:
        everyone = [each for each in everyone if each.pool is None]
    clock = time.process_time if arguments.cpu else time.perf_counter
    seconds = measure(everyone, weights, arguments.repeats, clock)

    kind = "processor time" if arguments.cpu else "wall time"
    title = f"float16 weights [E, N, K] = {list(shape)}, {kind}, best of {arguments.repeats}"
    table = Table("who", "what", "GB/s", "of memcpy", "ours is", title=title, box=None)
    own = {each.what: s for each, s in zip(everyone, seconds, strict=True) if each.who == OURS}
    for each, s in zip(everyone, seconds, strict=True):
        other = each.who != OURS and each.what in own
        faster = f"{s / own[each.what]:.1f}x" if other else ""
        if each.pool and each.what in own:
            faster = f"{own[each.what] / s:.2f}x of one thread's speed"
        speed, ratio = weights[0].nbytes / s / 1e9, seconds[0] / s
        table.add_row(each.who, each.what, f"{speed:.2f}", f"{ratio:.3f}", faster)
    console = Console(width=120)
    console.print(table)
    for line in absent:
        console.print(line)


if __name__ == "__main__":
    main()
