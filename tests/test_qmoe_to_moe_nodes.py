"""QMoE back to a float MoE: what is written of the node, and how it routes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import ops
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules, qmoe_to_moe_rules
from qmoe_rules.slices import SlicedTensor
from tests.moe_models import Experts, Graph, inputs_of, relative_error, run, single, the_node
from tests.qmoe_models import Codes, append, spec_of
from tests.qmoe_rewrites import FLOAT, back

# The node.


def test_every_attribute_is_explicit_and_the_moes_own() -> None:
    model = Codes(fc1=spec_of(4, 32)).model(accuracy_level=4, swiglu_limit=7.0)
    node = the_node(back(model), "MoE")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": 7.0,
        "use_sparse_mixer": 0,
    }


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_take_the_slots_of_a_moe(bias: bool) -> None:
    model = back(Codes(Experts(bias=bias), zero_points=True).model())
    node = the_node(model, "MoE")
    names = {slot: value.name for slot, value in ops.inputs(node).items() if value is not None}
    biases = {f"{name}_experts_bias": f"{name}_experts_bias" for name in ("fc1", "fc2") if bias}
    assert names == {
        "input": "x",
        "router_probs": "router_probs",
        "fc1_experts_weights": "fc1_experts_weights_dequantized",
        "fc2_experts_weights": "fc2_experts_weights_dequantized",
        **biases,
    }
    assert set(model.graph.initializers) == {*names.values()} - {"x", "router_probs"}
    assert isinstance(model.graph.initializers[names[FLOAT[0]]].const_value, SlicedTensor)


def test_the_node_keeps_its_name_documentation_and_metadata() -> None:
    model = Codes().model()
    node = the_node(model)
    node.doc_string, node.metadata_props["from"] = "experts", "layer 3"
    node.outputs[0].doc_string, node.outputs[0].metadata_props["to"] = "mixed", "layer 4"
    new = the_node(back(model), "MoE")
    assert (new.name, new.doc_string, new.metadata_props["from"]) == ("qmoe", "experts", "layer 3")
    (output,) = new.outputs
    assert (output.name, output.doc_string, output.metadata_props) == (
        "y",
        "mixed",
        {"to": "layer 4"},
    )


def test_the_report_tells_what_was_done() -> None:
    report = Report()
    codes = Codes(Experts(dtype=np.float16), spec_of(4, 32), zero_points=True)
    back(codes.model(), report=report)
    (row,) = report.rows
    assert (row.node, row.status, row.reason, row.stored) == ("qmoe", CONVERTED, "", "float16")
    assert (row.experts, row.hidden, row.inter) == (3, 128, 192)
    weights = 3 * (384 * 128 + 128 * 192)
    constants = codes.arrays()
    stored = [constants[slot].nbytes for slot in constants if not slot.endswith("bias")]
    assert (row.bytes_before, row.bytes_after) == (sum(stored), 2 * weights)
    assert row.warnings == ()


# Routing.


def with_router_weights(
    make: Callable[[Graph, ir.Value], ir.Value], normalize: int = 0
) -> ir.Model:
    """Returns a QMoE whose input 14 is what `make` makes of router_probs."""
    codes = Codes()
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values = {slot: graph.weight(slot, array) for slot, array in codes.arrays().items()}
    values["router_weights"] = make(graph, router)
    attributes = codes.attributes(normalize_routing_weights=normalize)
    return graph.model(append(graph, x, router, values, **attributes))


def softmax(graph: Graph, router: ir.Value, **attributes: Any) -> ir.Value:
    return graph.op("Softmax", router, out="weights", like=router, **attributes)


@pytest.mark.parametrize("attributes", [{}, {"axis": -1}, {"axis": 1}])
def test_a_softmax_of_the_router_is_what_moe_computes_itself(attributes: dict[str, Any]) -> None:
    model = with_router_weights(lambda graph, router: softmax(graph, router, **attributes))
    feeds = Codes().experts.feeds()
    (before,) = run(model, feeds)
    assert apply_rules(model, qmoe_to_moe_rules())
    assert [node.op_type for node in model.graph] == ["MoE"]
    (after,) = run(model, feeds)
    assert relative_error(after, before) <= 1e-5


def test_what_moe_to_qmoe_adds_for_the_cpu_goes_again() -> None:
    model = single(k=2, normalize_routing_weights=0)
    there = rewrite(model, [*moe_to_qmoe_rules()])
    assert [node.op_type for node in there.graph] == ["Softmax", "QMoE"]
    assert [node.op_type for node in back(there).graph] == ["MoE"]


NOT_A_SOFTMAX = "router_weights is not Softmax(router_probs), which is all that MoE mixes with"


@pytest.mark.parametrize(
    ("make", "normalize", "reason"),
    [
        (softmax, 1, "router_weights is present with normalize_routing_weights=1"),
        (lambda graph, router: router, 0, NOT_A_SOFTMAX),
        (lambda graph, router: softmax(graph, router, axis=0), 0, NOT_A_SOFTMAX),
        (
            lambda graph, router: graph.op("Sigmoid", router, out="weights", like=router),
            0,
            NOT_A_SOFTMAX,
        ),
        (
            lambda graph, router: softmax(graph, graph.op("Neg", router, out="other", like=router)),
            0,
            NOT_A_SOFTMAX,
        ),
    ],
    ids=["normalized", "an input", "another axis", "a sigmoid", "another router"],
)
def test_other_routing_weights_are_a_reason(
    make: Callable[[Graph, ir.Value], ir.Value], normalize: int, reason: str
) -> None:
    report = Report()
    model = back(with_router_weights(make, normalize), report=report)
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]
    assert ops.inputs(the_node(model))["router_weights"] is not None


def test_a_kernel_that_renormalizes_all_the_same_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report = Report()
    back(Codes().model(normalize_routing_weights=0), report=report)
    (warning,) = report.rows[0].warnings
    assert warning == (
        "normalize_routing_weights=0 without router_weights: the CPU kernel of QMoE renormalizes "
        "all the same, and that of MoE does not"
    )
    assert caplog.messages == [f"qmoe: {warning}"]
