"""Normalizing reads no weight: the interleaved rows are a view until somebody saves the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, rewrite

from qmoe_rules import SaveError, normalize_moe_rules, ops, save
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.loading import data_files
from qmoe_rules.report import CONVERTED, Report
from qmoe_rules.slices import SlicedTensor
from tests.gated_nodes import (
    ALPHA,
    FP32,
    apart,
    arrays_of,
    both,
    constants,
    meaning,
    normal,
    normalize,
)
from tests.moe_models import Experts, relative_error, run, the_node


class ReadError(Exception):
    """A weight was read."""


def unreadable(shape: tuple[int, ...]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        raise ReadError

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(shape))


@pytest.mark.parametrize("form", ["fc3", "halves"])
@pytest.mark.parametrize("quantizing", [False, True])
def test_nothing_is_read_while_rewriting(form: str, quantizing: bool) -> None:
    biases = ("fc1", "fc3") if form == "fc3" else ("fc1",)
    model = apart(form, "swiglu", biases)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = unreadable(tuple(value.const_value.shape.numpy()))
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    node = the_node(model, "QMoE" if quantizing else "MoE")
    weight = ops.inputs(node)["fc1_experts_weights"]
    assert weight is not None
    assert weight.const_value is not None
    with pytest.raises(ReadError):
        weight.const_value.numpy()


def saved_by_onnx_ir(model: ir.Model, path: Path) -> None:
    ir.save(model, path, external_data=path.name + ".data")


@pytest.mark.parametrize("write", [save, saved_by_onnx_ir])
@pytest.mark.parametrize("form", ["fc3", "halves"])
def test_a_normalized_float_model_is_saved(
    form: str, write: Callable[[ir.Model, Path], None], tmp_path: Path
) -> None:
    feeds = Experts().feeds()
    biases = ("fc1", "fc3") if form == "fc3" else ("fc1",)
    saved_by_onnx_ir(apart(form, "swiglu", biases, **ALPHA), tmp_path / "a.onnx")
    model = ir.load(tmp_path / "a.onnx")
    before = meaning(the_node(model, "MoE"), feeds)
    normalize(model)
    assert data_files(model) == {(tmp_path / "a.onnx.data").resolve()}
    write(model, tmp_path / "b.onnx")
    loaded = ir.load(tmp_path / "b.onnx")
    for name, array in constants(the_node(loaded, "MoE")).items():
        np.testing.assert_array_equal(array, normal(arrays_of(form, biases))[name])
    proto = onnx.load(tmp_path / "b.onnx")
    assert relative_error(run(proto, feeds)[0], before) <= FP32


def test_saving_over_the_source_is_refused(tmp_path: Path) -> None:
    saved_by_onnx_ir(apart(), tmp_path / "a.onnx")
    model = normalize(ir.load(tmp_path / "a.onnx"))
    with pytest.raises(SaveError, match="the model still reads from it"):
        save(model, tmp_path / "a.onnx")


def test_a_dry_run_changes_nothing() -> None:
    model = apart(biases=("fc1", "fc3"))
    report = Report()
    rules = both(report, bits=4)
    before = dict(model.graph.initializers)
    rules.apply_to_model(model, tracer=MatchingTracer())
    assert dict(model.graph.initializers) == before
    assert the_node(model, "MoE")
    rewrite(model, rules)
    assert [(row.node, row.status) for row in report.rows] == [("moe", CONVERTED)]
    assert {
        type(v.const_value) for v in model.graph.initializers.values() if "bias" not in str(v.name)
    } == {PlannedTensor}


def test_what_is_normalized_is_a_lazy_view() -> None:
    model = normalize(apart())
    tensor = model.graph.initializers["fc1_interleaved"].const_value
    assert isinstance(tensor, SlicedTensor)
    sources = [source.name for source in tensor.slices.tensors]
    assert sources == ["fc1", "fc3"]
