"""The checks of one pair of nodes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.stored import StoredProjection, stored_projections
from qmoe_rules.verification._comparison import Comparison
from qmoe_rules.verification._conversion import Captured, Settings, check_conversion, misread
from qmoe_rules.verification._pairing import Pair
from qmoe_rules.verification._report import (
    CONVERTED,
    FLOAT,
    KEPT,
    MISSING,
    Failure,
    NodeResult,
)

__all__ = ["attribute_differences", "check_node"]

_STATUS = {("MoE", "QMoE"): CONVERTED, ("QMoE", "QMoE"): KEPT, ("MoE", "MoE"): FLOAT}
# The attributes that mean something, and the check of each.
_CHECKED = {
    "activation_type": "attributes",
    "activation_alpha": "attributes",
    "activation_beta": "attributes",
    "swiglu_fusion": "attributes",
    "swiglu_limit": "attributes",
    "swiglu_limit_after_activation": "attributes",
    "k": "routing",
    "normalize_routing_weights": "routing",
    "use_sparse_mixer": "routing",
}
# What the absence of an attribute means.
_ABSENT = {"swiglu_limit": float("inf"), "swiglu_limit_after_activation": 0}
_BIASES = ("fc1_experts_bias", "fc2_experts_bias", "fc3_experts_bias")


def check_node(
    pair: Pair, comparison: Comparison, captured: Captured | None, settings: Settings
) -> NodeResult:
    """Checks one pair of nodes.

    Args:
        pair: The nodes.
        comparison: What differs between the models; what belongs to the node is taken out of it.
        captured: What reaches the node in the whole model, None for random values.
        settings: What to check with.

    Raises:
        SourceError: The data of a model cannot be read.
    """
    before, after = pair.before, pair.after
    first, second = ("" if node is None else node.op_type for node in (before, after))
    status = _STATUS.get((first, second), MISSING)
    result = NodeResult(pair.name, status)
    if before is None or after is None or status == MISSING:
        reason = f"{first or 'nothing'} in the float model, {second or 'nothing'} in the other"
        return result.failing(Failure("pairing", reason))
    result = result.failing(
        *(Failure(check, text) for check, text in attribute_differences(before, after)),
        *_values(before, after, comparison),
    )
    if status == CONVERTED:
        return check_conversion(result, before, after, captured, settings)
    if garbage := misread(after, settings.provider):
        result = result.noting(f"{settings.provider} computes garbage: {garbage}")
    return result.failing(*_changes(before, after, comparison, settings))


def attribute_differences(before: ir.Node, after: ir.Node) -> Iterator[tuple[str, str]]:
    """Yields what two MoE or QMoE nodes do not agree about: the check that it fails, and words.

    Defaults are filled in; what says how weights are stored is left out.
    """
    first, second = ops.attributes(before), ops.attributes(after)
    for name, check in _CHECKED.items():
        a, b = (_ABSENT.get(name) if each[name] is None else each[name] for each in (first, second))
        # The file holds float32, and a rule may have written a Python float.
        if a != b and not (isinstance(a, float) and np.float32(a) == np.float32(b)):
            yield check, f"{name}={_shown(b)}, and {_shown(a)} in the float model"


def _shown(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _values(before: ir.Node, after: ir.Node, comparison: Comparison) -> Iterator[Failure]:
    """Yields what differs in how tokens are routed, and in the biases."""
    first, second = ops.inputs(before), ops.inputs(after)
    weights = None if first.get("router_weights") else second.get("router_weights")
    if weights is not None and not _is_softmax(weights, second["router_probs"]):
        yield Failure("routing", "router_weights is not Softmax(router_probs)")
    for check, names in (("routing", ("router_probs", "router_weights")), ("biases", _BIASES)):
        values = [first.get(name) for name in names]
        for difference in comparison.take(values, first["input"]):
            yield Failure(check, difference.text)


def _is_softmax(value: ir.Value, of: ir.Value | None) -> bool:
    node = value.producer()
    return (
        node is not None
        and (node.domain, node.op_type) == ("", "Softmax")
        and node.inputs[0] is of
        and node.attributes.get_int("axis", -1) in (-1, 1)
    )


def _changes(
    before: ir.Node, after: ir.Node, comparison: Comparison, settings: Settings
) -> Iterator[Failure]:
    """Yields what differs in the weights of a node that should be as it was."""
    values = [value for name, value in ops.inputs(before).items() if name.startswith("fc")]
    differences = comparison.take(values, None)
    if differences and not _same_codes(before, after, settings):
        for difference in differences:
            yield Failure("kept", difference.text)


def _same_codes(before: ir.Node, after: ir.Node, settings: Settings) -> bool:
    """Returns whether two QMoE nodes hold the same codes and scales in different layouts."""
    if not ops.is_op(before, "QMoE"):
        return False
    first, second = (stored_projections(node, settings.layout_of(node)) for node in (before, after))
    if isinstance(first, str) or isinstance(second, str) or first.keys() != second.keys():
        return False
    return all(_same_experts(each, second[name]) for name, each in first.items())


def _same_experts(a: StoredProjection, b: StoredProjection) -> bool:
    if (a.spec, a.shape) != (b.spec, b.shape):
        return False
    pairs = ((a.expert(e).parts(), b.expert(e).parts()) for e in range(a.shape[0]))
    return all(
        np.array_equal(first[part], second[part]) for first, second in pairs for part in first
    )
