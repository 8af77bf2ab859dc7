"""What a caller may get wrong in Python: one clear error that says what would work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import qmoe_rules as q

TOKENS = np.zeros((1, 4), np.int64)
FEED = {"input_ids": TOKENS}
FEEDS = "feeds are dictionaries of arrays, one per run, not one {}; a list of one will do"

MISUSE: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "a model in memory is quantized": (
        lambda model, out: q.quantize(ir.load(model), out),  # type: ignore[arg-type]
        "expected the path of a model, not Model; a model in memory is quantized by Quan",
    ),
    "a proto is planned": (
        lambda model, _: q.plan(onnx.load(model)),
        "expected the path of a model, not ModelProto; a model in memory is quantized by",
    ),
    "a model in memory is verified": (
        lambda model, _: q.verify(ir.load(model), model),  # type: ignore[arg-type]
        "expected the path of a model, not Model; ",
    ),
    "a proto is saved": (
        lambda model, out: q.save(onnx.load(model), out / "model.onnx"),
        "expected an onnx_ir.Model, not ModelProto; onnx_ir.load makes one of a file, onnx_ir.f",
    ),
    "a proto is prepared": (
        lambda model, _: q.prepare(onnx.load(model)),
        "expected an onnx_ir.Model, not ModelProto; ",
    ),
    "a proto goes through the pass": (
        lambda model, _: q.QuantizeMoEPass().call(onnx.load(model)),
        "expected an onnx_ir.Model, not ModelProto; ",
    ),
    "one feed": (lambda model, _: q.calibrate(model, FEED), FEEDS.format("dict")),  # type: ignore[arg-type]
    "a file of feeds": (lambda model, _: q.calibrate(model, "data.npz"), FEEDS.format("str")),  # type: ignore[arg-type]
    "feeds without names": (
        lambda model, _: q.calibrate(model, [TOKENS]),  # type: ignore[list-item]
        "a feed is a dictionary of arrays by input name, not ndarray",
    ),
    "inputs without names": (
        lambda model, _: q.verify(model, model, inputs=[TOKENS]),  # type: ignore[arg-type]
        "a feed is a dictionary of arrays by input name, not list",
    ),
    "a recipe that is a dictionary": (
        lambda model, out: q.quantize(model, out, {"bits": 4}),  # type: ignore[arg-type]
        "recipe={'bits': 4} is no Recipe; fields are given by name, such as bits=4",
    ),
}


@pytest.mark.parametrize(("call", "message"), MISUSE.values(), ids=MISUSE)
def test_what_is_of_another_type(
    call: Callable[[Path, Path], Any], message: str, tiny_fp32: Path, tmp_path: Path
) -> None:
    with pytest.raises(TypeError) as error:
        call(tiny_fp32, tmp_path / "out")
    assert str(error.value).startswith(message)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "factory",
    [
        q.moe_to_qmoe_rules,
        q.normalize_moe_rules,
        q.fuse_experts_rules,
        q.qmoe_to_moe_rules,
        q.relayout_qmoe_rules,
    ],
    ids=lambda factory: factory.__name__,
)
def test_a_report_that_would_stay_empty(factory: Callable[..., object]) -> None:
    arguments = ["raw"] if factory is q.relayout_qmoe_rules else []
    with pytest.raises(TypeError, match=r"^report=\[\] is no Report; give one: report=Report\(\)$"):
        factory(*arguments, report=[])


def test_zero_points_go_by_another_name() -> None:
    with pytest.raises(q.ConfigError) as error:
        q.Recipe.of(asymmetric=True)
    assert str(error.value) == (
        "recipe has no field 'asymmetric'; symmetric=False stores zero points"
    )
