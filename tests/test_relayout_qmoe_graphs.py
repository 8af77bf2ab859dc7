"""QMoE from one layout to another in whole graphs: bodies, shared codes, laziness, sweeps."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, rewrite

from qmoe_rules import ops
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.report import CONVERTED, KEPT, Report
from qmoe_rules.rules import relayout_qmoe_rules
from qmoe_rules.slices import SlicedTensor
from qmoe_rules.stored import StoredProjection
from tests.moe_models import Experts, Graph, branches, inputs_of, nodes_of, the_node
from tests.qmoe_models import Codes, append, constants, spec_of
from tests.qmoe_rewrites import RAW, SM80, WEIGHTS, relayout


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_nodes_in_both_bodies_of_an_if(shared: bool) -> None:
    codes = Codes(fc1=spec_of(4, 32), layout=SM80)
    outer = Graph()
    common: dict[str, ir.Value] = {}

    def fill(graph: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        values = common if shared else {}
        if not values:
            home = outer if shared else graph
            values |= {slot: home.weight(slot, array) for slot, array in codes.arrays().items()}
        return append(graph, x, router, values, out="z", **codes.attributes())

    model = relayout(branches(fill, fill, outer), RAW)
    raw = Codes(fc1=spec_of(4, 32)).arrays()
    nodes = nodes_of(model, "QMoE")
    for node in nodes:
        for slot in WEIGHTS[:2]:
            np.testing.assert_array_equal(constants(node)[slot], raw[slot])
        home = model.graph if shared else node.graph
        assert isinstance(home, ir.Graph)
        moved = {f"{slot}_raw" for slot in WEIGHTS[:2]}
        assert set(home.initializers) == {*raw} - {*WEIGHTS} | moved
    assert (nodes[0].inputs[2] is nodes[1].inputs[2]) is shared


def test_bytes_that_two_nodes_read_in_two_widths_are_moved_twice() -> None:
    bytes_, narrow = Codes(Experts(activation="relu"), spec_of(8)), spec_of(4)
    halves = Codes(Experts(activation="relu", hidden=2 * bytes_.experts.hidden), narrow)
    graph = Graph()
    x, router = inputs_of(graph, bytes_.experts)
    wide = graph.input("wide", np.float32, ("tokens", halves.experts.hidden))
    shared = graph.weight("codes", bytes_.arrays()["fc1_experts_weights"])
    outputs = []
    for codes, source in ((bytes_, x), (halves, wide)):
        name = f"int{codes.fc1.format.bits}"
        values = {slot: graph.weight(f"{name}.{slot}", a) for slot, a in codes.arrays().items()}
        values["fc1_experts_weights"] = shared
        attributes = codes.attributes()
        outputs.append(append(graph, source, router, values, out=name, name=name, **attributes))
    for node in nodes_of(relayout(graph.model(*outputs), SM80), "QMoE"):
        bits = ops.attributes(node)["expert_weight_bits"]
        moved = [LAYOUTS[SM80].store(e, bits) for e in bytes_.arrays()["fc1_experts_weights"]]
        np.testing.assert_array_equal(constants(node)["fc1_experts_weights"], moved)


def test_codes_behind_other_nodes_are_moved() -> None:
    codes = Codes(Experts(activation="relu"))
    arrays = codes.arrays()
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values = {slot: graph.weight(slot, array) for slot, array in arrays.items()}
    stored = values["fc1_experts_weights"]
    values["fc1_experts_weights"] = graph.op("Identity", stored, out="same", like=stored)
    model = graph.model(append(graph, x, router, values, **codes.attributes()))
    node = the_node(relayout(model, SM80))
    assert [each.op_type for each in model.graph] == ["QMoE"]
    np.testing.assert_array_equal(
        constants(node)["fc1_experts_weights"],
        Codes(Experts(activation="relu"), layout=SM80).arrays()["fc1_experts_weights"],
    )


def test_nothing_is_moved_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StoredProjection, stored: Any) -> None:
        raise AssertionError("an expert was read")

    with monkeypatch.context() as patch:
        patch.setattr(StoredProjection, "_packed", refuse)
        model = relayout(Codes().model(), SM80)
    value = the_node(model).inputs[2]
    assert value is not None
    assert isinstance(value.const_value, SlicedTensor)
    assert value.const_value.numpy().any()


def test_a_dry_run_leaves_nothing_behind() -> None:
    model = Codes().model()
    before = list(model.graph.initializers)
    relayout_qmoe_rules(SM80).apply_to_model(model, tracer=MatchingTracer())
    assert list(model.graph.initializers) == before
    assert ops.attributes(the_node(model))["weights_prepacked"] == 0


def test_rules_that_undo_each_other_come_to_an_end() -> None:
    model = rewrite(Codes().model(), [*relayout_qmoe_rules(SM80), *relayout_qmoe_rules(RAW)])
    arrays = Codes().arrays()
    node = the_node(model)
    assert ops.attributes(node)["weights_prepacked"] == 0
    for slot in WEIGHTS[:2]:
        np.testing.assert_array_equal(constants(node)[slot], arrays[slot])


def test_a_second_sweep_finds_nothing_to_do() -> None:
    report = Report()
    rules = [*relayout_qmoe_rules(SM80, report=report)]
    model = rewrite(rewrite(Codes().model(), rules), rules)
    assert [row.status for row in report.rows] == [CONVERTED, KEPT]
    assert ops.attributes(the_node(model))["weights_prepacked"] == 1
