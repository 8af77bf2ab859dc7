"""What the tests of saving share: models that are planned, and what lies in a folder."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from qmoe_rules import QuantizeMoEPass, quantizers

RECIPE: dict[str, Any] = {"bits": 4, "block_size": 32}
OPTIONS = ("--bits", "4", "--block-size", "32")
SLABS = 2 * 2 * 8
"""Of the tiny models: layers, projections, experts."""
MODEL = {"model.onnx", "model.onnx.data"}
SIDE_FILES = {"config.json", "tokenizer", "tokenizer/merges", "tokenizer/merges/a.txt"}
"""Of the fixture `model_folder`, besides the model."""

Tensors = dict[str, tuple[ir.DataType, tuple[int, ...], bytes]]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Returns every file below a folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def model_bytes(path: Path) -> int:
    """Returns the size of a saved model: the .onnx file and the data files of its name."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def edit(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Changes the .onnx file of a model, and leaves its data alone."""
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def copied(model: Path, folder: Path) -> Path:
    """Copies the folder of a model, so that a test may alter it; returns the model."""
    shutil.copytree(model.parent, folder)
    return folder / model.name


def planned(path: Path, **recipe: Any) -> ir.Model:
    """Loads a model and plans its quantization."""
    return QuantizeMoEPass(**(recipe or RECIPE))(ir.load(path)).model


def saved_by_onnx_ir(model: ir.Model, path: Path, **options: Any) -> Path:
    """Saves a model with `onnx_ir.save`, with the data file's name that `save` uses."""
    path.parent.mkdir(parents=True)
    ir.save(model, path, external_data=f"{path.name}.data", **options)
    return path


def tensors(path: Path) -> Tensors:
    """Returns type, shape and bytes of every initializer of every graph."""
    found = {}
    for graph in ir.load(path.absolute()).graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            found[name] = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
    return found


def logits(path: Path) -> np.ndarray[Any, Any]:
    """Runs a tiny model on some bytes."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    ids = np.arange(40, dtype=np.int64).reshape(2, 20)
    outputs: list[np.ndarray[Any, Any]] = session.run(None, {"input_ids": ids})
    return outputs[0]


def with_quantizer(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]
) -> Callable[[], int]:
    """Calls `before` with 0, 1, ... before every slab; returns how to ask for the number so far."""
    rtn = quantizers.METHODS["rtn"]
    numbers = itertools.count()
    calls: list[int] = []

    def watched(*arguments: Any) -> Any:
        number = next(numbers)  # one each, whichever threads ask
        calls.append(number)
        before(number)
        return rtn(*arguments)

    monkeypatch.setitem(quantizers.METHODS, "rtn", watched)
    return lambda: len(calls)
