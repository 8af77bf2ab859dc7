"""Runs cases of the contract on a device; needs numpy and onnxruntime alone, and no project.

    python run_case.py FOLDER NAME                    one case, in this process: prints a JSON line
    python run_case.py FOLDER --jobs 6 --out FILE     every case of the folder, each in a process

A wrong case can end the process or leave the CUDA context unusable: so every case has its own.
FOLDER is what `cases.py` wrote: `cases.json`, and for every case NAME.onnx and NAME.npz (the
feeds, and the float64 answer as `expected`). torch is imported first where it is installed: it
brings the CUDA libraries that onnxruntime looks for.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CUDA = "CUDAExecutionProvider"
# What a kernel that left its memory says, there and then or at the next call.
_CRASHES = ("CUDA failure", "CUDA error", "illegal memory access", "misaligned address", "CUBLAS")
_RUNS = 3

Case = Mapping[str, Any]
Result = dict[str, Any]


def verdict(case: Case, result: Result) -> str:
    """Returns what became of a case: right, garbage, crash, refused, or that there is no device."""
    if result["status"] == "ran":
        error = result["error"]
        return "right" if error is not None and error <= case["tolerance"] else "garbage"
    if any(mark in result["message"] for mark in _CRASHES):
        return "crash"
    return str(result["status"])


def run(folder: Path, case: Case, provider: str = CUDA) -> Result:
    """Runs one case in this process.

    Returns:
        name, status ("ran", "refused" or "no device"), error (relative, of the worst of three runs;
        None for none or not finite), message, and the stage that refused it.
    """
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401
    import onnxruntime as ort

    result: Result = {"name": case["name"], "status": "no device", "error": None, "message": ""}
    if provider not in ort.get_available_providers():
        return result | {"message": f"this onnxruntime has no {provider}"}
    if provider == CUDA:
        ort.preload_dlls()
    ort.set_default_logger_severity(4)
    stage = "load"
    try:
        session = _session(ort, folder / f"{case['name']}.onnx", provider, case["fallback"])
        if provider not in session.get_providers():
            return result | {"message": f"{provider} could not be started"}
        stage = "run"
        error = _error(session, folder / f"{case['name']}.npz")
    except Exception as raised:  # whatever the runtime throws is the answer
        message = " ".join(str(raised).split())
        return result | {"status": "refused", "message": message, "stage": stage}
    return result | {"status": "ran", "error": error}


def _session(ort: Any, model: Path, provider: str, fallback: bool) -> Any:
    options = ort.SessionOptions()
    if provider != "CPUExecutionProvider" and not fallback:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return ort.InferenceSession(str(model), options, providers=[provider], enable_fallback=0)


def _error(session: Any, data: Path) -> float | None:
    """Returns |actual - expected| / |expected|, the worst of several runs, None if not finite."""
    import numpy as np

    with np.load(data) as arrays:
        feeds = {name: arrays[name] for name in arrays.files}
    expected = feeds.pop("expected")
    worst = 0.0
    for _ in range(_RUNS):
        actual = session.run(None, feeds)[0].astype(np.float64)
        error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
        if not np.isfinite(error):
            return None
        worst = max(worst, error)
    return worst


def run_apart(folder: Path, case: Case, provider: str = CUDA, timeout: float = 60) -> Result:
    """Runs one case in a process of its own; one that dies or hangs is the status `crash`."""
    command = [sys.executable, __file__, str(folder), case["name"], "--provider", provider]
    dead: Result = {"name": case["name"], "status": "crash", "error": None}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return dead | {"message": f"no answer in {timeout:.0f} s"}
    # The answer is there before a broken CUDA context ends the process.
    for line in done.stdout.splitlines():
        if line.startswith('{"name"'):
            result: Result = json.loads(line)
            return result
    return dead | {"message": f"exit {done.returncode}: {done.stderr.strip()[-300:]}"}


def run_all(
    folder: Path, cases: Sequence[Case], jobs: int, provider: str = CUDA, timeout: float = 60
) -> Iterator[Result]:
    """Runs cases, `jobs` at a time, and yields their results in order, with the verdict."""
    with ThreadPoolExecutor(jobs) as pool:
        done = pool.map(lambda case: run_apart(folder, case, provider, timeout), cases)
        for case, result in zip(cases, done, strict=True):
            yield result | {"verdict": verdict(case, result)}


def read_cases(folder: Path) -> list[Result]:
    """Returns the cases of a folder."""
    cases: list[Result] = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    return cases


def versions() -> dict[str, str]:
    """Returns what was measured with, and when."""
    import numpy as np
    import onnxruntime as ort

    try:
        command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        device = subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        device = ""
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "onnxruntime": ort.__version__,
        "numpy": np.__version__,
        "device": device or "CPU",
    }


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()  # before a broken CUDA context ends the process


def main() -> None:
    """Runs one case, or all of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="cases; without --out exactly one")
    parser.add_argument("--provider", default=CUDA)
    parser.add_argument("--jobs", type=int, default=6)
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--out", type=Path, help="where the results of several cases go")
    arguments = parser.parse_args()
    cases = read_cases(arguments.folder)
    if arguments.names:
        cases = [case for case in cases if case["name"] in arguments.names]
    if arguments.out is None:
        (case,) = cases
        _say(json.dumps(run(arguments.folder, case, arguments.provider)))
        return
    written: Result = {"versions": versions(), "cases": cases, "results": []}
    options = arguments.jobs, arguments.provider, arguments.timeout
    for result in run_all(arguments.folder, cases, *options):
        case = cases[len(written["results"])]
        written["results"].append(result)
        arguments.out.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
        mark = " " if result["verdict"] in case["verdicts"] else "!"
        said = result["message"][-150:] if result["error"] is None else f"{result['error']:.1e}"
        _say(f"{mark} {case['name']:60} {result['verdict']:8} {said}")


if __name__ == "__main__":
    main()
