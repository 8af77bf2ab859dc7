"""One node through the rule: what is refused or warned of, and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import ops
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import moe_to_qmoe_rules
from tests.moe_models import (
    Array,
    Experts,
    Graph,
    expected,
    inputs_of,
    relative_error,
    run,
    single,
    the_node,
)
from tests.moe_rewrites import EXACT


@dataclass(frozen=True)
class Refusal:
    """A node that must stay, by how it differs from an ordinary one, and the exact reason."""

    reason: str
    experts: Experts = field(default_factory=Experts)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    good: Experts = field(default_factory=lambda: Experts(activation="relu"))
    router: int = 0  # columns of router_probs, where they are wrong


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


FC3 = "fc3_experts_{} is present; QMoE kernels want gate and up interleaved in fc1"
CPU_ACTIVATIONS = "(it has gelu, identity, relu, silu, swiglu); target='cuda' takes it"
GATE_MISSING = "with swiglu_fusion=0 and no fc3: the gate is missing"
DIVISOR = "the CUDA provider needs hidden and inter sizes divisible by 64, and they are"

# CUDA has 16-bit kernels only.
HALF = Experts(dtype=np.float16)

REFUSALS = {
    "fc3": Refusal(FC3.format("weights"), arrays={"fc3": zeros(3, 192, 128)}),
    "fc3 bias": Refusal(FC3.format("bias"), arrays={"fc3_bias": zeros(3, 192)}),
    "computed fc1": Refusal(
        "fc1_experts_weights: bad_fc1 is not a constant", homes={"fc1": "computed"}
    ),
    "computed fc2": Refusal(
        "fc2_experts_weights: bad_fc2 is not a constant", homes={"fc2": "computed"}
    ),
    "graph input": Refusal(
        "fc1_experts_weights: bad_fc1 is a graph input, so its default may be overridden at run "
        "time",
        homes={"fc1": "input"},
    ),
    "overridable": Refusal(
        "fc2_experts_weights: bad_fc2 is a graph input, so its default may be overridden at run "
        "time",
        homes={"fc2": "overridable"},
    ),
    "2-D fc1": Refusal(
        "fc1_experts_weights: bad_fc1 has shape [384, 128], not [E, N, K]",
        arrays={"fc1": zeros(384, 128)},
    ),
    "4-D fc2": Refusal(
        "fc2_experts_weights: bad_fc2 has shape [3, 1, 128, 192], not [E, N, K]",
        arrays={"fc2": zeros(3, 1, 128, 192)},
    ),
    "float64": Refusal(
        "fc1_experts_weights: bad_fc1 is DOUBLE, not FLOAT, FLOAT16 or BFLOAT16",
        arrays={"fc1": zeros(3, 384, 128, dtype=np.float64)},
    ),
    "two types": Refusal(
        "fc1_experts_weights is float32, fc2_experts_weights is float16",
        arrays={"fc2": zeros(3, 128, 192, dtype=np.float16)},
    ),
    "fc1 against fc2": Refusal(
        "fc1_experts_weights is [3, 192, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
        arrays={"fc1": zeros(3, 192, 128)},
    ),
    "transposed fc1": Refusal(
        "fc1_experts_weights is [3, 128, 384]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
        arrays={"fc1": zeros(3, 128, 384)},
    ),
    "other experts": Refusal(
        "fc1_experts_weights is [4, 384, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
        arrays={"fc1": zeros(4, 384, 128)},
    ),
    "fc1 bias": Refusal(
        "fc1_experts_bias is [3, 192]; the weights ask for [3, 384]",
        arrays={"fc1_bias": zeros(3, 192)},
    ),
    "fc2 bias": Refusal(
        "fc2_experts_bias is [3, 192]; the weights ask for [3, 128]",
        arrays={"fc2_bias": zeros(3, 192)},
    ),
    "router": Refusal("router_probs is [?, 4]; the weights ask for [?, 3]", router=4),
    "fusion without gate": Refusal(
        "swiglu_fusion=1 with activation 'relu', which has no gate to fuse",
        experts=Experts(activation="relu"),
        attributes={"swiglu_fusion": 1},
    ),
    "gate without fusion": Refusal(
        f"activation 'swiglu' {GATE_MISSING}", attributes={"swiglu_fusion": 0}
    ),
    "fc2 columns against the block": Refusal(
        "fc2_experts_weights: K=192 is not divisible by block_size=128; block_size=32 would do",
        recipe={"block_size": 128},
        good=Experts(activation="relu", inter=256),
    ),
    "fc1 columns against the block": Refusal(
        "fc1_experts_weights: K=192 is not divisible by block_size=128; block_size=32 would do",
        experts=Experts(hidden=192, inter=128),
        recipe={"block_size": 128},
        good=Experts(activation="relu", inter=256),
    ),
    "odd columns": Refusal(
        "fc2_experts_weights: K=33 does not fill whole bytes of 4-bit codes (a multiple of 2 "
        "would)",
        experts=Experts(inter=33),
        recipe={"target": "cpu"},
    ),
    "unknown attribute": Refusal("MoE has no attribute 'made_up'", attributes={"made_up": 1}),
    "an attribute of QMoE": Refusal(
        "MoE has no attribute 'expert_weight_bits'", attributes={"expert_weight_bits": 4}
    ),
    "negative limit": Refusal(
        "swiglu_limit=-1 is negative, which ends the whole process",
        attributes={"swiglu_limit": -1.0},
    ),
    "limit after activation": Refusal(
        "the CPU provider does not honour swiglu_limit_after_activation=1; target='cuda' takes it",
        attributes={"swiglu_limit_after_activation": 1},
        experts=HALF,
        good=HALF,
    ),
    "sparse mixer": Refusal(
        "the CPU provider ignores use_sparse_mixer=1 and would route differently",
        attributes={"use_sparse_mixer": 1},
    ),
    "geglu": Refusal(
        f"the CPU provider has no kernel for activation 'geglu' {CPU_ACTIVATIONS}",
        experts=Experts(activation="geglu", dtype=np.float16),
        good=HALF,
    ),
    "unknown activation": Refusal(
        "the CPU provider has no kernel for activation 'relu2' "
        "(it has gelu, identity, relu, silu, swiglu)",
        experts=Experts(activation="relu2"),
    ),
    "bfloat16": Refusal(
        "the CPU provider has no bfloat16 kernel (it has float16, float32); target='cuda' takes it",
        experts=Experts(dtype=ml_dtypes.bfloat16),
        good=HALF,
    ),
    "halves": Refusal(
        "the CPU provider does not take swiglu_fusion=2 (it takes 1); target='cuda' takes it",
        attributes={"swiglu_fusion": 2},
        experts=HALF,
        good=HALF,
    ),
    "hidden size": Refusal(
        f"{DIVISOR} 96 and 192; target='cpu' takes it", experts=Experts(hidden=96, dtype=np.float16)
    ),
    "inter size": Refusal(
        f"{DIVISOR} 128 and 96; target='cpu' takes it", experts=Experts(inter=96, dtype=np.float16)
    ),
    "size for cuda": Refusal(
        f"{DIVISOR} 128 and 96; target='cpu' takes it",
        experts=Experts(inter=96, dtype=np.float16),
        good=HALF,
        recipe={"target": "cuda"},
    ),
    "size for the packed layout": Refusal(
        f"{DIVISOR} 96 and 192",
        experts=Experts(hidden=96, dtype=np.float16),
        good=HALF,
        recipe={"target": "cuda", "layout": "cutlass_sm80"},
    ),
    "excluded by name": Refusal("excluded by the recipe", recipe={"nodes_to_exclude": ["bad"]}),
    "excluded by pattern": Refusal("excluded by the recipe", recipe={"nodes_to_exclude": ["b*"]}),
    "excluded by expression": Refusal(
        "excluded by the recipe", recipe={"nodes_to_exclude": ["goo", "re:ba[dt]"]}
    ),
}


def model_with(case: Refusal) -> ir.Model:
    """Returns a model of the node of the case, `bad`, beside an ordinary one, `good`."""
    graph = Graph()
    outputs = []
    for prefix, experts in (("bad", case.experts), ("good", case.good)):
        arrays, homes, attributes = experts.arrays(), {}, experts.attributes
        x, router_probs = inputs_of(graph, experts, prefix=f"{prefix}_")
        if prefix == "bad":
            arrays.update(case.arrays)
            homes, attributes = dict(case.homes), {**attributes, **case.attributes}
            if case.router:
                router_probs.shape = ir.Shape(["tokens", case.router])
        weights = graph.weights(arrays, f"{prefix}_", homes)
        out = f"{prefix}_y"
        outputs.append(graph.moe(x, router_probs, weights, out=out, name=prefix, **attributes))
    return graph.model(*outputs)


@pytest.mark.parametrize("case", REFUSALS.values(), ids=list(REFUSALS))
def test_a_refused_node_stays_as_it_was(case: Refusal, caplog: pytest.LogCaptureFixture) -> None:
    model = model_with(case)
    bad = the_named(model, "bad")
    inputs, attributes = list(bad.inputs), dict(bad.attributes)
    report = Report()
    rewrite(model, [*moe_to_qmoe_rules(report=report, **case.recipe)])

    assert the_named(model, "bad") is bad
    assert bad.op_type == "MoE"
    assert list(bad.inputs) == inputs
    assert dict(bad.attributes) == attributes
    assert all(value.graph is model.graph for value in inputs if value is not None)
    assert the_named(model, "good").op_type == "QMoE"

    rows = {row.node: row for row in report.rows}
    assert len(report.rows) == 2
    assert (rows["bad"].status, rows["bad"].reason) == (SKIPPED, case.reason)
    assert rows["bad"].bytes_after == rows["bad"].bytes_before
    assert rows["good"].status == CONVERTED
    assert caplog.record_tuples == [
        (
            "qmoe_rules.rules.moe_to_qmoe",
            logging.WARNING,
            f"bad stays in float: {case.reason}",
        )
    ]
    onnx.checker.check_model(ir.to_proto(model))


def the_named(model: ir.Model, name: str) -> ir.Node:
    (node,) = [node for node in model.graph if node.name == name]
    return node


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("bfloat16", "cuda"),
        ("geglu", "cuda"),
        ("halves", "cuda"),
        ("limit after activation", "cuda"),
        ("hidden size", "cpu"),
        ("inter size", "cpu"),
    ],
)
def test_the_target_that_the_reason_names_does_take_the_node(name: str, target: str) -> None:
    model = model_with(REFUSALS[name])
    rewrite(model, [*moe_to_qmoe_rules(target=target)])
    assert [node.op_type for node in model.graph if node.domain == ops.DOMAIN] == ["QMoE", "QMoE"]


@pytest.mark.parametrize("empty", [None, ir.Value(name="")], ids=["None", "unnamed value"])
def test_a_missing_fc2_is_a_reason(empty: ir.Value | None) -> None:
    graph, report = Graph(), Report()
    x, router_probs = inputs_of(graph, Experts())
    fc1 = graph.weight("fc1", Experts().arrays()["fc1"])
    y = graph.op("MoE", x, router_probs, fc1, empty, empty, out="y", domain=ops.DOMAIN)
    rewrite(graph.model(y), [*moe_to_qmoe_rules(report=report)])
    assert [row.reason for row in report.rows] == ["fc2_experts_weights: it is missing"]


def test_an_input_that_the_schema_does_not_know_is_a_reason() -> None:
    """Newer runtimes append inputs; what is not understood must not be lost."""
    model = single()
    node = the_node(model, "MoE")
    node.resize_inputs(9)
    node.replace_input_with(8, model.graph.inputs[0])
    report = Report()
    rewrite(model, [*moe_to_qmoe_rules(report=report)])
    assert [row.status for row in report.rows] == [SKIPPED]


def test_the_warning_of_an_inexact_kernel_is_logged_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report, experts = Report(), Experts(dtype=np.float16)
    with caplog.at_level(logging.INFO, "qmoe_rules"):
        rewrite(single(experts), [*moe_to_qmoe_rules(bits=8, block_size=32, report=report)])
    (row,) = report.rows
    warning = "the CPU provider rounds activations to int8 with blockwise int8, 1 to 2 % off"
    assert row.warnings == (warning,)
    assert caplog.messages == [f"moe: {warning}"]


def test_probabilities_instead_of_logits_are_converted_faithfully_and_warned_about(
    caplog: pytest.LogCaptureFixture,
) -> None:
    experts = Experts()
    graph, report = Graph(), Report()
    x, logits = inputs_of(graph, experts)
    probabilities = graph.op("Softmax", logits, out="probabilities", like=logits, axis=-1)
    attributes = {**experts.attributes, "k": 2}
    y = graph.moe(x, probabilities, graph.weights(experts.arrays()), **attributes)
    model = graph.model(y)
    with caplog.at_level(logging.INFO, "qmoe_rules"):
        rewrite(model, [*moe_to_qmoe_rules(report=report)])
    assert report.rows[0].warnings[-1].startswith("router_probs comes from a Softmax")
    assert caplog.messages == [f"moe: {warning}" for warning in report.rows[0].warnings]
    feeds = experts.feeds()
    powers = np.exp(feeds["router_probs"].astype(np.float64))
    twice = feeds | {"router_probs": powers / powers.sum(axis=-1, keepdims=True)}
    wanted = expected(experts.arrays(), twice, Recipe().specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= EXACT
