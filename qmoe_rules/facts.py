"""What a float MoE node is: its constant weights, and the facts that providers ask about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.kernels import Facts
from qmoe_rules.weights import ExpertWeights

__all__ = ["FloatMoE", "constant_weights", "facts_of"]


@dataclass(frozen=True)
class FloatMoE:
    """A MoE node that some recipe may quantize.

    Attributes:
        attributes: Its attributes, from `ops.attributes`.
        weights: Its weights by projection.
        facts: What a provider needs to know about it.
    """

    attributes: Mapping[str, Any]
    weights: Mapping[str, ExpertWeights]
    facts: Facts

    @classmethod
    def of(cls, node: ir.Node) -> FloatMoE | str:
        """Returns what a node is, or the reason why no recipe can quantize it."""
        if unknown := ops.refuse_unknown(node):
            return unknown
        given, attributes = ops.inputs(node), ops.attributes(node)
        if "fc3" in ops.projections(given):
            slot = next(name for name, value in given.items() if value and name.startswith("fc3_"))
            return f"{slot} is present; QMoE kernels want gate and up interleaved in fc1"
        for name in ("input", "router_probs"):
            if given[name] is None:
                return f"{name}: it is missing"
        weights = constant_weights(given)
        if isinstance(weights, str):
            return weights
        fc1, fc2 = weights["fc1"], weights["fc2"]
        reason = ops.refuse_shapes(fc1.shape, fc2.shape, given, attributes)
        return reason or cls(attributes, weights, facts_of(fc1.dtype.name, fc2.shape, attributes))


def constant_weights(given: Mapping[str, ir.Value | None]) -> dict[str, ExpertWeights] | str:
    """Returns views of the constant weights by projection, or why there are none.

    Args:
        given: The node's inputs, from `ops.inputs`.
    """
    weights = {}
    for name in ops.projections(given):
        value = given[f"{name}_experts_weights"]
        view = "it is missing" if value is None else ExpertWeights.of(value)
        if isinstance(view, str):
            return f"{name}_experts_weights: {view}"
        weights[name] = view
    types = {name: view.dtype.name for name, view in weights.items()}
    if len(set(types.values())) > 1:
        return ", ".join(f"{name}_experts_weights is {dtype}" for name, dtype in types.items())
    return weights


def facts_of(dtype: str, fc2: tuple[int, ...], attributes: Mapping[str, Any]) -> Facts:
    """Returns what a provider needs to know about a node without fc3.

    Args:
        dtype: The activation type.
        fc2: (E, N, K) of fc2.
        attributes: The node's attributes, from `ops.attributes`.
    """
    _, hidden, inter = fc2
    return Facts(
        dtype=dtype,
        activation=attributes["activation_type"],
        fusion=attributes["swiglu_fusion"],
        hidden=hidden,
        inter=inter,
        sparse_mixer=bool(attributes["use_sparse_mixer"]),
        limit_after_activation=bool(attributes["swiglu_limit_after_activation"]),
    )
