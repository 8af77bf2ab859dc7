"""The cases that are run on a CUDA device: what the kernels take, and every trap, with the verdict.

    python -m tests.gpu.cases FOLDER          writes cases.json, NAME.onnx and NAME.npz

Where the library converts the cell for CUDA, the case is the rules' own model; else it is built by
hand. The verdicts were measured with onnxruntime-gpu 1.31.1 on an H200 (docs/gpu.md).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests.contract import serialized
from tests.gpu import nodes, storage
from tests.gpu.case import TOLERANCES, Case


def cases() -> list[Case]:
    """Returns every case."""
    found = [case for group in (*storage.GROUPS, *nodes.GROUPS) for case in group()]
    names = [case.name for case in found]
    if len(set(names)) < len(names):
        raise AssertionError({name for name in names if names.count(name) > 1})
    return found


def write(folder: Path, some: list[Case]) -> None:
    """Writes the models, their feeds and answers, and `cases.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    for case in some:
        model, refusal = case.made()
        (folder / f"{case.name}.onnx").write_bytes(serialized(model))
        data: dict[str, Any] = {"expected": case.expected(), **case.cell.feeds()}
        np.savez(folder / f"{case.name}.npz", **data)
        listed.append(
            {
                "name": case.name,
                "group": case.group,
                "title": case.title,
                "verdicts": case.verdicts,
                "message": case.message,
                "tolerance": TOLERANCES[case.cell.dtype],
                "fallback": case.fallback,
                "library": refusal or "converts",
            }
        )
    (folder / "cases.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), cases())
