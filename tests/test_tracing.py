"""A dry run with a tracer tells of every rule which node it left, and why."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, MatchStatus, RewriteRuleSet

from qmoe_rules import (
    fuse_experts_rules,
    moe_to_qmoe_rules,
    normalize_moe_rules,
    qmoe_to_moe_rules,
    relayout_qmoe_rules,
)
from tests import expert_graphs
from tests.moe_models import nodes_of, single
from tests.qmoe_models import Codes

UNSTATED = (
    "weights_prepacked is not stated, so the layout of its bytes is unknown; "
    "source_layout='raw' says that a CPU build wrote them, 'cutlass_sm80' a CUDA build"
)


def told(model: ir.Model, rules: RewriteRuleSet) -> list[tuple[str, list[object]]]:
    """Returns the reasons that a tracer is given, each with the nodes that are to blame."""
    tracer = MatchingTracer()
    rules.apply_to_model(model, tracer=tracer)
    matches = [match for found in tracer.best_matches_map.values() for match in found]
    assert {match.status for match in matches} == {MatchStatus.CONDITION_FAILED}
    results = [match.match_result for match in matches]
    return [(result.reason, [*result.failure_nodes_and_values]) for result in results]


@pytest.mark.parametrize(
    ("model", "rules", "reason"),
    [
        (single(), moe_to_qmoe_rules(nodes_to_exclude=["moe"]), "excluded by the recipe"),
        (single(), normalize_moe_rules(), "gate and linear rows are not apart"),
        (
            single(swiglu_fusion=2, weight_order=1),
            normalize_moe_rules(),
            "MoE has no attribute 'weight_order'",
        ),
        (Codes().model(weights_prepacked=None), qmoe_to_moe_rules(), UNSTATED),
        (Codes().model(weights_prepacked=None), relayout_qmoe_rules("raw"), UNSTATED),
        (Codes().model(), relayout_qmoe_rules("raw"), "it is stored in layout raw already"),
    ],
    ids=["excluded", "interleaved", "fc3", "to float", "relayout", "kept"],
)
def test_a_node_that_stays(model: ir.Model, rules: RewriteRuleSet, reason: str) -> None:
    assert told(model, rules) == [(reason, nodes_of(model, "MoE", "QMoE"))]


def test_experts_that_stay_and_sums_of_something_else() -> None:
    model = expert_graphs.model(numbers=[0, 1, 1, 2, 3])
    sums = [node for node in model.graph if node.op_type == "Add"]
    reasons = dict.fromkeys(sums, "no experts end here") | {sums[-1]: "expert 1 is added twice"}
    found = told(model, fuse_experts_rules())
    for node, reason in reasons.items():
        assert (reason, [node]) in found
