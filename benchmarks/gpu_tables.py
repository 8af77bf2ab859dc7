"""Writes docs/gpu.md from what the CUDA cases and bench_gpu.py measured.

    python benchmarks/gpu_tables.py results.json bench.json > docs/gpu.md

results.json is what `tests/gpu/run_case.py FOLDER --out` wrote, once or several times under several
names, bench.json what `bench_gpu.py` wrote. Prints Markdown; any file may be left out.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]

_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_PATH = re.compile(r"/\S+/(onnxruntime/\S+?)(?::\d+)?(?=\s)")


def versions() -> dict[str, str]:
    """Returns the device, the driver, the runtime and the date."""
    import onnxruntime as ort

    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        device = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        device = ""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"date": date, "onnxruntime": ort.__version__, "device": device or "CPU"}


def speed_tables(rows: Sequence[Row]) -> str:
    """Returns a table per layer and mode: milliseconds by tokens, how many times float's speed."""
    tables = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        mine = [row for row in rows if row["layer"] == layer]
        for mode in dict.fromkeys(row["mode"] for row in mine if "mode" in row):
            title = f"### {layer}{', as a CUDA graph' if mode == 'graph' else ''}"
            tables.append(f"{title}\n\n{table(list(_speed_lines(mine, mode)))}")
    return "\n\n".join(tables)


def _speed_lines(rows: Sequence[Row], mode: str) -> Iterator[list[str]]:
    timed = [row for row in rows if row.get("mode") == mode and "tokens" in row]
    times = {(row["stored"], row["tokens"]): row["ms"] for row in timed}
    tokens = sorted({row["tokens"] for row in timed})
    yield ["stored", *_COSTS.values(), *(f"{count} tokens" for count in tokens)]
    for stored in dict.fromkeys(row["stored"] for row in rows):
        own = next(row for row in rows if row["stored"] == stored)
        head = [form.format(own[name]) if name in own else "-" for name, form in _FORMS.items()]
        errors = [row["error"] for row in rows if row["stored"] == stored and "error" in row]
        if not any((stored, count) in times for count in tokens):
            yield [stored, *head, _short(errors[0]) if errors else "-", *["-"] * (len(tokens) - 1)]
            continue
        pairs = ((times.get((stored, n)), times.get(("float16", n))) for n in tokens)
        yield [stored, *head, *(_speed(*pair) for pair in pairs)]


_COSTS = {"file_mib": "file, MiB", "device_mib": "device, MiB", "load_s": "load, s"}
_FORMS = {"file_mib": "{}", "device_mib": "{}", "load_s": "{:.2f}"}


def _speed(ms: float | None, floats: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.3f} ({floats / ms:.2f}x)" if floats else f"{ms:.3f}"


def case_tables(runs: Sequence[Mapping[str, Any]]) -> str:
    """Returns what became of the cases, by group: the right ones in a list, the rest in a table.

    Args:
        runs: What was measured, once or several times; what a later one says of a case counts.
    """
    cases = list({case["name"]: case for run in runs for case in run["cases"]}.values())
    found: dict[str, list[Row]] = {case["name"]: [] for case in cases}
    for result in (result for run in runs for result in run["results"]):
        found[result["name"]].append(result)
    parts = []
    for group in dict.fromkeys(case["group"] for case in cases):
        mine = [(case, found[case["name"]]) for case in cases if case["group"] == group]
        good = [pair for pair in mine if _is_good(*pair)]
        parts.append(f"### {group[0].upper()}{group[1:]}")
        if good:
            errors = [result["error"] for _, results in good for result in results]
            titles = "; ".join(case["title"] for case, _ in good)
            span = f"{min(errors):.1e} to {max(errors):.1e}"
            parts.append(f"Right and converted, {len(good)} cases, {span}: {titles}.")
        if len(good) < len(mine):
            rest = [pair for pair in mine if pair not in good]
            lines = [[case["title"], _outcomes(results), _library(case)] for case, results in rest]
            parts.append(table([["case", "device", "library"], *lines]))
    return "\n\n".join(parts)


def _is_good(case: Row, results: Sequence[Row]) -> bool:
    right = all(result["verdict"] == "right" for result in results)
    return bool(results) and right and case["library"] in ("converts", "-")


def _outcomes(results: Sequence[Row]) -> str:
    """Returns what became of a case, once per verdict."""
    verdicts = {result["verdict"]: _outcome(result) for result in results}
    return " or ".join(verdicts.values()) or "not run"


def _outcome(result: Row) -> str:
    if result["error"] is not None:
        return f"{result['verdict']}, {result['error']:.1e}"
    said = _short(result["message"])
    return f"{result['verdict']}: {said}" if said else f"{result['verdict']}, not finite"


def _library(case: Row) -> str:
    said = str(case["library"])
    known = ("-", "converts", "no rule writes it")
    reason = said.removeprefix("target 'cuda': ").split(";")[0]
    return said if said in known else f"refuses: {reason}"


def _short(message: str) -> str:
    """Returns the end of a runtime's message, which says what it wants, without source paths."""
    said = _CODE.sub("", _PATH.sub("", message))
    for mark in ("Status Message:", "was false.", "failed:"):
        said = said.rpartition(mark)[2] or said
    return said.strip()[:160].strip()


def table(lines: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; the first line is the head."""
    head, *rest = [f"| {' | '.join(text.replace('|', ' ') for text in line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *rest])


_PAGE = """# What a CUDA device computes

Every case of `tests/gpu/` is one node in a process of its own, with CPU fallback disabled, compared
with the float64 reference on the dequantized weights: ||difference|| / ||expected||, the worst of
three runs. "Garbage" ran and was wrong, without a message; "right or garbage" is decided anew by
every session, which times several kernels and keeps the fastest. Where the library converts a case
for target `cuda`, the model is the rules' own; else it was built by hand. A cell's defaults:
float16, 4 experts, 2 per token, 6 tokens, H=128, I=192, biases, swiglu interleaved, weights
normalized.

<!-- not run: needs a CUDA device -->
```sh
python -m tests.gpu.cases FOLDER                        # where the project is installed
python tests/gpu/run_case.py FOLDER --out results.json  # where the device is
python benchmarks/bench_gpu.py --out FOLDER             # where the device is
python benchmarks/gpu_tables.py results.json FOLDER/bench.json > docs/gpu.md
```

`pytest tests/gpu` does the first two where it finds a device, and holds every verdict.
"""

_SPEED = """Milliseconds of one layer, and how many times faster than float16. Weights and inputs
are random, so every token finds other experts. Run by run, a few tokens wait for the host, which
launches the kernels; replayed as a CUDA graph, the time is the device's. "Device" is what the
session holds, prepacked weights included; "load" is the time to make it."""


def main() -> None:
    """Prints the page from the files that are named."""
    files = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    runs, speeds = ([f for f in files if key in f] for key in ("cases", "rows"))
    parts = [_PAGE]
    if runs:
        parts += ["## Right, refused, or garbage", _said(runs), case_tables(runs)]
    for speed in speeds:
        parts += ["## Speed", _said([speed]), _SPEED, speed_tables(speed["rows"])]
    print("\n\n".join(part.strip() for part in parts))


def _said(files: Sequence[Mapping[str, Any]]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in files[-1]["versions"].items())
    return f"Measured {'once' if len(files) == 1 else f'{len(files)} times'}: {versions}."


if __name__ == "__main__":
    main()
