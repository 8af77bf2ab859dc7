"""Quantization by a calibration: which statistics reach a quantizer."""

from __future__ import annotations

import dataclasses
import pickle
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import Calibration, Recipe, calibrate, moe_to_qmoe_rules, ops, save
from qmoe_rules.errors import SourceError
from qmoe_rules.lazy import Projection
from qmoe_rules.report import CONVERTED
from qmoe_rules.rules import apply_rules
from qmoe_rules.slabs import FileStatistics
from qmoe_rules.statistics import ProjectionStatistics
from tests.calibrated import Call, feeds, planned
from tests.calibrations import SMALL
from tests.moe_models import Experts, Graph, layers, single
from tests.moe_models import inputs_of as graph_inputs


@pytest.mark.parametrize(("method", "hessian"), [("gptq", True), ("search", False)])
def test_every_expert_gets_its_own_statistics(
    method: str, hessian: bool, calls: list[Call], tmp_path: Path
) -> None:
    model = layers(2, SMALL, k=2)
    calibration = calibrate(model, feeds(), hessian=True)
    converted, report = planned(model, method=method, calibration=calibration)
    assert report.count(CONVERTED) == 2
    assert not calls  # nothing is computed before the model is saved
    save(converted, tmp_path / "model.onnx", workers=1)
    sources = {
        own.arrays()[name][expert].tobytes(): (f"moe{seed}", name, expert)
        for seed in range(2)
        for own in [Experts(**{**vars(SMALL), "seed": seed})]
        for name in ("fc1", "fc2")
        for expert in range(4)
    }
    asked = {sources[weight.tobytes()]: statistics for weight, statistics in calls}
    assert len(asked) == 16
    for (node, name, expert), known in asked.items():
        expected = calibration.for_expert(node, name, expert, hessian=hessian)
        assert known is not None
        assert expected is not None
        assert known.tokens == expected.tokens
        np.testing.assert_array_equal(known.mean_square, expected.mean_square)
        assert (known.hessian is None) == (expected.hessian is None)
        if known.hessian is not None:
            np.testing.assert_array_equal(known.hessian, expected.hessian)
    assert any(known and known.hessian is not None for known in asked.values()) == hessian


def test_a_method_that_does_not_ask_is_given_nothing_and_told_so(calls: list[Call]) -> None:
    model = single(SMALL)
    calibration = calibrate(model, feeds())
    _, report = planned(model, calibration=calibration)
    (row,) = report.rows
    assert "method 'rtn' does not go by the calibration" in row.warnings
    (node,) = ops.nodes(model, "QMoE")
    tensor = ops.inputs(node)["fc1_experts_weights"]
    assert tensor is not None
    assert tensor.const_value.projection.statistics is None  # type: ignore[union-attr]


def test_experts_that_fall_back_are_counted_in_the_report(calls: list[Call]) -> None:
    model, data = single(SMALL), feeds(2)
    for feed in data:
        feed["router_probs"][:, 2] = -1e9
    calibration = calibrate(model, data, hessian=True)
    counts = calibration.counts("moe", "fc1")
    few = {name: int((counts < enough).sum()) for name, enough in (("fc1", 64), ("fc2", 96))}
    assert 1 <= few["fc1"] < few["fc2"] <= 4 or few["fc1"] == few["fc2"]
    _, report = planned(model, method="gptq", calibration=calibration)
    (row,) = report.rows
    for name, enough in (("fc1", 64), ("fc2", 96)):
        assert (
            f"moe: {name} of {few[name]} of 4 experts saw fewer than {enough} tokens and falls "
            "back to its mean squares"
        ) in row.warnings


def test_experts_without_enough_tokens_for_a_mean_have_that_of_all(calls: list[Call]) -> None:
    model, data = single(SMALL), feeds(2)
    for feed in data:
        feed["router_probs"][:, 2] = -1e9
    calibration = calibrate(model, data)
    few = int((calibration.counts("moe", "fc1") < 64).sum())
    assert few
    _, report = planned(model, method="search", calibration=calibration)
    (row,) = report.rows
    assert (
        f"moe: fc1 of {few} of 4 experts saw fewer than 64 tokens and falls back to the mean "
        "squares of all"
    ) in row.warnings


def shared_weights() -> ir.Model:
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    weights = graph.weights(SMALL.arrays())
    first = graph.moe(x, router, weights, out="y0", name="moe0", k=2, **SMALL.attributes)
    second = graph.moe(first, router, weights, out="y1", name="moe1", k=2, **SMALL.attributes)
    return graph.model(second)


@pytest.mark.parametrize(("method", "copies"), [("rtn", 1), ("search", 2)])
def test_a_shared_weight_is_quantized_for_everyone_that_sees_something_else(
    method: str, copies: int, calls: list[Call]
) -> None:
    model = shared_weights()
    calibration = calibrate(model, feeds())
    converted, _ = planned(model, method=method, calibration=calibration)
    stored = {ops.inputs(node)["fc1_experts_weights"] for node in ops.nodes(converted, "QMoE")}
    assert len(stored) == copies


def test_equal_calibrations_share_and_clones_keep_theirs(calls: list[Call], tmp_path: Path) -> None:
    """One weight in two nodes that see the same, by the same file opened twice."""
    calibrate(single(SMALL), feeds(), tmp_path / "c")
    first, second = (Calibration.load(tmp_path / "c") for _ in range(2))
    model = single(SMALL)
    apply_rules(model, moe_to_qmoe_rules(Recipe(method="search", calibration=first, target="cpu")))
    clone = model.clone()
    (node,) = ops.nodes(clone, "QMoE")
    value = ops.inputs(node)["fc1_experts_weights"]
    assert value is not None
    projection: Projection = value.const_value.projection  # type: ignore[union-attr]
    same = Recipe(method="search", calibration=second, target="cpu").statistics("moe", "fc1")
    assert projection.statistics == same
    assert hash(projection.statistics) == hash(same)
    assert repr(first) in repr(projection)


def test_other_processes_get_the_statistics(tmp_path: Path) -> None:
    """They read them: the work that is handed to them is smaller than a Hessian."""
    model = single(SMALL)
    calibration = calibrate(model, feeds(16), tmp_path / "c", hessian=True)
    converted, _ = planned(model, method="rtn", calibration=calibration)
    (node,) = ops.nodes(converted, "QMoE")
    value = ops.inputs(node)["fc1_experts_weights"]
    assert value is not None
    before: Projection = value.const_value.projection  # type: ignore[union-attr]
    known = ProjectionStatistics(calibration, "moe", "fc1", hessian=True)
    after = Projection(before.weights, before.spec, before.layout, before.method, known)
    work = after.portable_work(1)
    assert isinstance(work.statistics, FileStatistics)
    assert len(pickle.dumps(work.statistics)) < SMALL.hidden**2 * 4
    with ProcessPoolExecutor(1) as pool:
        read = pool.submit(work.statistics.read).result()
        slab = pool.submit(work.compute).result()
        changed = dataclasses.replace(work.statistics, identity=())
        with pytest.raises(SourceError, match="is another calibration than the one that was"):
            pool.submit(changed.read).result()
    expected = known(1)
    assert read is not None
    assert expected is not None
    assert read.tokens == expected.tokens
    assert read.hessian is not None
    np.testing.assert_array_equal(read.hessian, expected.hessian)
    np.testing.assert_array_equal(read.mean_square, expected.mean_square)
    np.testing.assert_array_equal(slab["weights"], before.slab(1)["weights"])
