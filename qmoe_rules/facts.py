"""What a float MoE node is: its constant weights, and the facts that providers ask about."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from qmoe_rules.recipe import PROJECTIONS
from qmoe_rules.targets import Facts
from qmoe_rules.weights import ExpertWeights

__all__ = ["constant_weights", "facts_of"]


def constant_weights(given: Mapping[str, ir.Value | None]) -> dict[str, ExpertWeights] | str:
    """Returns views of the constant weights of fc1 and fc2, or why there are none.

    Args:
        given: The node's inputs, from `ops.inputs`.
    """
    weights = {}
    for name in PROJECTIONS:
        value = given[f"{name}_experts_weights"]
        view = "it is missing" if value is None else ExpertWeights.of(value)
        if isinstance(view, str):
            return f"{name}_experts_weights: {view}"
        weights[name] = view
    return weights


def facts_of(weights: Mapping[str, ExpertWeights], attributes: Mapping[str, Any]) -> Facts:
    """Returns what a provider needs to know about a node.

    Args:
        weights: Of both projections.
        attributes: The node's attributes, from `ops.attributes`.
    """
    _, hidden, inter = weights["fc2"].shape
    return Facts(
        dtype=weights["fc1"].dtype.name,
        activation=attributes["activation_type"],
        fusion=attributes["swiglu_fusion"],
        hidden=hidden,
        inter=inter,
        sparse_mixer=bool(attributes["use_sparse_mixer"]),
        limit_after_activation=bool(attributes["swiglu_limit_after_activation"]),
    )
