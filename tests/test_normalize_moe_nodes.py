"""`normalize_moe_rules` on one node: it means what it meant, and every attribute is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings

from qmoe_rules import normalize_moe_rules, ops
from qmoe_rules.report import Report
from qmoe_rules.rules import apply_rules
from qmoe_rules.testing import moe_models
from tests.gated_nodes import (
    ALPHA,
    FORMS,
    FP32,
    apart,
    arrays_of,
    attributes_of,
    constants,
    meaning,
    normal,
    normalize,
    written,
)
from tests.moe_models import Experts, Graph, inputs_of, nodes_of, relative_error, run, the_node

EXACT = 1e-12


# --- What it means -------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, ALPHA], ids=["plain", "alpha, beta, limit"])
@pytest.mark.parametrize(("form", "activation", "biases"), FORMS)
def test_a_normalized_node_means_what_it_meant(
    form: str, activation: str, biases: tuple[str, ...], more: dict[str, Any]
) -> None:
    feeds = Experts().feeds()
    model = apart(form, activation, biases, **more)
    before = meaning(the_node(model, "MoE"), feeds)
    normalize(model)
    node = the_node(model, "MoE")
    assert relative_error(meaning(node, feeds), before) <= EXACT
    expected = normal(arrays_of(form, biases))
    actual = constants(node)
    assert set(actual) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)
    assert ops.attributes(node)["swiglu_fusion"] == 1
    assert len(node.inputs) == 6


@pytest.mark.parametrize("biases", [(), ("fc1", "fc3")])
@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_the_float_model_runs(
    activation: str, biases: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    feeds = Experts().feeds()
    model = apart("fc3", activation, biases, **ALPHA)
    before = meaning(the_node(model, "MoE"), feeds)
    error = relative_error(run(normalize(model), feeds)[0], before)
    record_property("error", error)
    assert error <= FP32


def test_the_float_model_of_halves_runs() -> None:
    feeds = Experts().feeds()
    model = apart("halves", "swiglu", ("fc1",), **ALPHA)
    before = meaning(the_node(model, "MoE"), feeds)
    assert relative_error(run(normalize(model), feeds)[0], before) <= FP32


@given(
    moe_models(
        forms=["fc3", "halves"],
        hidden_sizes=range(1, 6),
        inter_sizes=range(1, 6),
        allow_functions=False,
        allow_nodes_before_weights=False,
    )
)
@settings(max_examples=50)
def test_every_shape_is_interleaved(model: ir.Model) -> None:
    wanted = [normal(constants(node)) for node in nodes_of(model, "MoE")]
    for node, arrays in zip(nodes_of(normalize(model), "MoE"), wanted, strict=True):
        found = constants(node)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


# --- What is written -----------------------------------------------------------------------------


def test_every_attribute_is_explicit() -> None:
    more = {**ALPHA, "normalize_routing_weights": 1}
    assert written(the_node(normalize(apart("fc3", "swiglu", **more)), "MoE")) == {
        "activation_alpha": pytest.approx(1.702),
        "activation_beta": 1.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": pytest.approx(0.8),
        "use_sparse_mixer": 0,
    }


def test_silu_is_bare_swiglu() -> None:
    node = the_node(
        normalize(apart("fc3", "silu", **ALPHA, swiglu_limit_after_activation=1)), "MoE"
    )
    assert written(node) == {
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 0,
        "swiglu_fusion": 1,
        "use_sparse_mixer": 0,
    }


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_gelu_is_geglu(activation: str) -> None:
    values = written(the_node(normalize(apart("fc3", activation)), "MoE"))
    assert (values["activation_type"], values["swiglu_fusion"]) == ("geglu", 1)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_limit_that_the_activation_never_read_goes(activation: str) -> None:
    node = the_node(normalize(apart("fc3", activation, swiglu_limit=0.8)), "MoE")
    assert "swiglu_limit" not in written(node)


def test_a_node_keeps_what_is_said_about_it() -> None:
    model = apart()
    node = the_node(model, "MoE")
    before = ops.inputs(node)
    kept = {name: before[name] for name in before if name[:3] not in ("fc1", "fc3")}
    node.doc_string, node.metadata_props["layer"] = "the experts", "7"
    output = node.outputs[0]
    output.doc_string, output.metadata_props["stage"] = "hidden", "9"
    normalize(model)
    node = the_node(model, "MoE")
    assert (node.name, node.doc_string, node.metadata_props["layer"]) == ("moe", "the experts", "7")
    (output,) = model.graph.outputs
    assert output is node.outputs[0]
    assert (output.name, output.doc_string, output.metadata_props) == (
        "y",
        "hidden",
        {"stage": "9"},
    )
    after = ops.inputs(node)
    assert {name: after[name] for name in kept} == kept


@pytest.mark.parametrize("home", ["initializer", "constant"])
def test_old_constants_are_gone(home: str) -> None:
    model = apart(
        biases=("fc1", "fc3"), homes=dict.fromkeys(("fc1", "fc3", "fc1_bias", "fc3_bias"), home)
    )
    assert apply_rules(model, normalize_moe_rules())  # without rewrite's own clean-up
    assert sorted(model.graph.initializers) == [
        "fc1_bias_interleaved",
        "fc1_interleaved",
        "fc2",
        "fc2_bias",
    ]
    assert [node.op_type for node in model.graph] == ["MoE"]


def test_a_constant_with_another_user_stays_for_it() -> None:
    graph = Graph()
    x, router = inputs_of(graph, Experts())
    weights = graph.weights(arrays_of("fc3"))
    y = graph.moe(x, router, weights, **attributes_of("fc3", "silu"))
    model = graph.model(y, graph.op("Neg", weights["fc3"], out="copy", like=weights["fc3"]))
    normalize(model)
    assert sorted(model.graph.initializers) == ["fc1_interleaved", "fc2", "fc2_bias", "fc3"]


@pytest.mark.parametrize(
    "model", [apart("halves", swiglu_fusion=1), apart("halves", activation_type="relu")]
)
def test_other_nodes_are_not_matched(model: ir.Model, caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    node = the_node(model, "MoE")
    assert not apply_rules(model, normalize_moe_rules(report=report))
    assert the_node(model, "MoE") is node
    assert (report.rows, caplog.records) == ([], [])


def test_a_second_sweep_finds_nothing() -> None:
    model = normalize(apart())
    assert not apply_rules(model, normalize_moe_rules())
