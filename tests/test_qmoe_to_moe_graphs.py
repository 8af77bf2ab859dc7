"""QMoE back to a float MoE in whole graphs: shared codes, laziness, sweeps, real models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, rewrite

from qmoe_rules import ops
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.rtn import rtn_numpy
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import moe_to_qmoe_rules, qmoe_to_moe_rules
from qmoe_rules.saving import save
from tests.moe_models import (
    Experts,
    Graph,
    branches,
    inputs_of,
    nodes_of,
    relative_error,
    run,
    the_node,
)
from tests.qmoe_models import Codes, append, constants, meant, spec_of
from tests.qmoe_rewrites import FLOAT, back

# The graph.


def bodies(shared: bool) -> ir.Model:
    """Returns an If whose bodies hold a QMoE each, of the same constants or of their own."""
    codes = Codes(fc1=spec_of(4, 32))
    outer = Graph()
    common: dict[str, ir.Value] = {}

    def fill(graph: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        values = common if shared else {}
        if not values:
            home = outer if shared else graph
            values |= {slot: home.weight(slot, array) for slot, array in codes.arrays().items()}
        return append(graph, x, router, values, out="z", **codes.attributes())

    return branches(fill, fill, outer)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_nodes_in_both_bodies_of_an_if(shared: bool) -> None:
    model = bodies(shared)
    feeds = {"flag": np.array(True), **Codes().experts.feeds()}
    (before,) = run(model, feeds)
    model = back(model)
    assert not nodes_of(model, "QMoE")
    nodes = nodes_of(model, "MoE")
    assert len(nodes) == 2
    (after,) = run(model, feeds)
    assert relative_error(after, before) <= 1e-5
    wanted = {f"{slot}_dequantized" for slot in FLOAT} | {f"fc{i}_experts_bias" for i in (1, 2)}
    homes = [model.graph] if shared else [node.graph for node in nodes]
    for home in homes:
        assert isinstance(home, ir.Graph)
        assert set(home.initializers) == wanted
    assert (nodes[0].inputs[2] is nodes[1].inputs[2]) is shared


def test_shared_codes_with_other_scales_are_not_shared_weights() -> None:
    codes = Codes(Experts(activation="relu", hidden=192))
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values: dict[str, ir.Value | None] = {
        slot: graph.weight(slot, array) for slot, array in codes.arrays().items()
    }
    first = append(graph, x, router, values, out="first", name="first", **codes.attributes())
    doubled = graph.weight("doubled", 2 * codes.arrays()["fc1_scales"])
    other = {**values, "fc1_scales": doubled}
    y = append(graph, first, router, other, out="y", name="second", **codes.attributes())
    one, two = nodes_of(back(graph.model(y)), "MoE")
    assert one.inputs[4] is two.inputs[4]
    np.testing.assert_array_equal(
        2 * constants(one)["fc1_experts_weights"], constants(two)["fc1_experts_weights"]
    )
    names = ["fc1_experts_weights_dequantized", "fc1_experts_weights_dequantized_1"]
    assert [node.inputs[2].name for node in (one, two)] == names  # type: ignore[union-attr]


def test_codes_stay_for_a_node_that_was_refused() -> None:
    codes = Codes(Experts(activation="relu", hidden=192))
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values = {slot: graph.weight(slot, array) for slot, array in codes.arrays().items()}
    first = append(graph, x, router, values, out="first", name="first", **codes.attributes())
    odd = codes.attributes(weights_prepacked=-1)
    y = append(graph, first, router, values, out="y", name="second", **odd)
    report = Report()
    model = back(graph.model(y), report=report)
    assert [row.status for row in report.rows] == [CONVERTED, SKIPPED]
    assert set(codes.arrays()) <= set(model.graph.initializers)
    assert all(value is not None and value.graph is model.graph for value in values.values())


def test_weights_can_be_quantized_anew_in_the_same_sweep() -> None:
    codes = Codes(fc1=spec_of(4, 32))
    reports = Report(), Report()
    model = rewrite(
        codes.model(),
        [*qmoe_to_moe_rules(report=reports[0]), *moe_to_qmoe_rules(bits=8, report=reports[1])],
    )
    node = the_node(model)
    assert ops.attributes(node)["expert_weight_bits"] == 8
    assert [[row.status for row in report.rows] for report in reports] == [[CONVERTED]] * 2
    found = constants(node)
    spec = Recipe(bits=8).specs["fc1"]
    for name, weight in codes.weights().items():
        again = [rtn_numpy(expert, spec) for expert in meant(weight)]
        np.testing.assert_array_equal(
            found[f"{name}_experts_weights"], np.stack([expert.packed for expert in again])
        )
    used = {str(value.name) for value in node.inputs if value is not None}
    assert set(model.graph.initializers) == used - {"x", "router_probs"}


def test_nothing_is_read_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: QuantizedWeights) -> None:
        raise AssertionError("an expert was dequantized")

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeights, "dequantize", refuse)
        model = back(Codes().model())
    assert constants(the_node(model, "MoE"))["fc1_experts_weights"].any()


def test_a_dry_run_leaves_nothing_behind() -> None:
    model = Codes().model()
    before = list(model.graph.initializers)
    rules = qmoe_to_moe_rules()
    rules.apply_to_model(model, tracer=MatchingTracer())
    assert list(model.graph.initializers) == before
    assert the_node(model).op_type == "QMoE"


def test_rule_objects_may_be_used_again() -> None:
    rules = [*qmoe_to_moe_rules()]
    for _ in range(2):
        assert nodes_of(rewrite(Codes().model(), rules), "MoE")


# Real models.


@pytest.mark.parametrize(
    ("name", "source_layout"),
    [("genai-gptoss-int4-cpu", "raw"), ("genai-gptoss-int4-cuda", "cutlass_sm80")],
)
def test_a_model_of_the_genai_builder(
    name: str, source_layout: str, shared: Path, tmp_path: Path
) -> None:
    path = shared / "models" / name / "model.onnx"
    report = Report()
    back(ir.load(path), report=report)
    assert [row.status for row in report.rows] == [SKIPPED] * 2
    assert all(row.reason.startswith("weights_prepacked is not stated") for row in report.rows)

    report = Report()
    model = back(ir.load(path), source_layout, report)
    assert [row.status for row in report.rows] == [CONVERTED] * 2
    save(model, tmp_path / "model.onnx")
    real = ir.load(shared / "models" / "genai-gptoss-fp32-cpu" / "model.onnx")
    for node, original in zip(
        nodes_of(ir.load(tmp_path / "model.onnx"), "MoE"), nodes_of(real, "MoE"), strict=True
    ):
        for slot in FLOAT:
            weights, wanted = constants(node)[slot], constants(original)[slot]
            assert relative_error(weights, wanted) < 0.15


def test_a_model_whose_shapes_disagree(shared: Path) -> None:
    path = shared / "models" / "genai-phimoe-int4-cuda-raw" / "model.onnx"
    report = Report()
    model = back(ir.load(path), report=report)
    assert {(row.status, row.reason) for row in report.rows} == {
        (SKIPPED, "input is [?, ?, 128]; the weights ask for [?, ?, 192]")
    }
    assert len(nodes_of(model, "QMoE")) == 2
