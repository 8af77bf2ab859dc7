"""Quantization by a calibration: what is refused, and why."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import Calibration, Recipe, calibrate, moe_to_qmoe_rules, ops
from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.report import CONVERTED, SKIPPED
from qmoe_rules.rules import apply_rules
from qmoe_rules.slabs import FileSlice, SlabWork
from qmoe_rules.statistics import Statistics
from tests.calibrated import Call, feeds, planned
from tests.calibrations import SMALL
from tests.moe_models import Experts, Graph, layers, single
from tests.moe_models import inputs_of as graph_inputs


@pytest.fixture
def means(tmp_path: Path) -> Calibration:
    return calibrate(single(SMALL), feeds(), tmp_path / "means")


def test_a_method_that_needs_hessians_says_how_to_make_them(
    means: Calibration, calls: list[Call]
) -> None:
    make = "make one with: qmoe calibrate MODEL DATA OUT --hessian"
    with pytest.raises(ConfigError) as error:
        Recipe(method="gptq")
    assert str(error.value) == f"method='gptq' needs calibration=...; {make}"
    with pytest.raises(ConfigError) as error:
        Recipe(method="gptq", calibration=means)
    assert str(error.value) == f"method='gptq' needs Hessians, and {means.path} has none; {make}"
    with pytest.raises(ConfigError, match=r"override for '\*': method='gptq' needs calibration"):
        Recipe(overrides=["*:method=gptq"])
    assert Recipe(method="search").calibration is None


def test_a_calibration_is_opened_when_the_recipe_is_made(means: Calibration) -> None:
    assert Recipe(calibration=means.path) == Recipe(calibration=str(means.path))
    assert Recipe(calibration=means.path).calibration == means
    with pytest.raises(SourceError, match="nowhere does not exist"):
        Recipe(calibration="nowhere")
    with pytest.raises(ConfigError, match="calibration=3; it is a Calibration, or the file of one"):
        Recipe(calibration=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gptq", "search"])
def test_moments_that_no_inputs_have_are_no_fault_of_the_weights(
    method: str, tmp_path: Path
) -> None:
    hessian = np.eye(32, dtype=np.float32)
    hessian[3, 5] = 2
    known = Statistics(100, np.ones(32, np.float32), hessian)
    work = SlabWork(
        np.ones((4, 32), np.float32), Spec(FORMATS["int4"]), "raw", method, known, "weight 'w'"
    )
    message = r"^weight 'w': the calibration does not fit: hessian\[3, 5\] is 2, more than its "
    with pytest.raises(SourceError, match=message):
        work.compute()
    (tmp_path / "short").write_bytes(bytes(12))
    short = FileSlice(str(tmp_path / "short"), 0, (4, 32), np.dtype(np.float32))
    with pytest.raises(SourceError, match=r"^weight 'w': cannot be read: .*short ends before the"):
        dataclasses.replace(work, source=short).compute()


def test_another_models_file_is_refused(means: Calibration, calls: list[Call]) -> None:
    others = {
        "weights": single(Experts(**{**vars(SMALL), "seed": 7})),
        "type": single(Experts(**{**vars(SMALL), "dtype": np.float16})),
        "attributes": single(SMALL, k=2),
        "last expert": single(SMALL),
        "name": layers(1, SMALL),
    }
    last = others["last expert"].graph.initializers["fc2"]
    array = last.const_value.numpy().copy()  # type: ignore[union-attr]
    array[-1, -1, -1] += 1
    last.const_value = ir.tensor(array, name="fc2")
    for model in others.values():
        with pytest.raises(ConfigError, match="is of another model"):
            planned(model, method="search", calibration=means)
    rules = moe_to_qmoe_rules(method="search", calibration=means, target="cpu")
    with pytest.raises(ConfigError, match="node moe are not those that were calibrated"):
        apply_rules(others["weights"], rules)


def test_a_node_that_the_file_lacks_is_skipped(calls: list[Call]) -> None:
    both = layers(2, SMALL)
    second = list(ops.nodes(both, "MoE"))[1]
    second.name = "new"
    known = calibrate(layers(1, SMALL), feeds())
    (first,) = known.nodes
    _, report = planned(both, method="search", calibration=known)
    rows = {row.node: row for row in report.rows}
    assert rows[first].status == CONVERTED
    assert rows["new"].status == SKIPPED
    assert rows["new"].reason == f"calibration {known.path.name} has no node new"


def test_weights_stored_in_halves_or_apart_are_the_same_node(means: Calibration) -> None:
    """The file is of the nodes that quantization sees, whatever the model looked like before."""
    arrays = SMALL.arrays()
    fc1, bias = arrays.pop("fc1"), arrays.pop("fc1_bias")
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    arrays |= {"fc1": fc1[:, 0::2], "fc3": fc1[:, 1::2]}
    arrays |= {"fc1_bias": bias[:, 0::2], "fc3_bias": bias[:, 1::2]}
    apart = graph.moe(x, router, graph.weights(arrays), name="moe", activation_type="swiglu")
    model = graph.model(apart)
    assert calibrate(model, feeds()).fingerprints == means.fingerprints
