"""Experts that are MatMuls and all compute every token -> MoE.

The family's graph is told in `_chain`; here a linear map is MatMul or Gemm with one constant
weight per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.rules._chain import ChainRule, Map
from qmoe_rules.rules._experts import Parts, stack, transposed
from qmoe_rules.rules._facts import is_op
from qmoe_rules.rules._mlp import Linear

__all__ = ["FuseDenseExperts"]


class FuseDenseExperts(ChainRule[Map]):
    """The rule for MatMul and Gemm; the only attribute of a map is whether it is stored [K, N]."""

    def claims(self, value: ir.Value) -> bool:
        """Takes what is not MatMulNBits', to say why it stays."""
        node = value.producer()
        sources = () if node is None else (node, *(v.producer() for v in node.inputs if v))
        return not any(node is not None and ops.is_op(node, "MatMulNBits") for node in sources)

    def linear(self, value: ir.Value) -> Linear[Map] | None:
        """Reads MatMul(x, W), MatMul(x, W) + b and Gemm(x, W, b)."""
        node = value.producer()
        if node is None:
            return None
        if is_op(node, "Add"):
            for product, bias in (node.inputs, node.inputs[::-1]):
                inner = None if product is None else _product(product.producer())
                if inner is not None and bias is not None and inner.weight.constants[1] is None:
                    weight = inner.weight
                    constants = (weight.constants[0], bias)
                    nodes = (*weight.nodes, node)
                    return Linear(inner.source, Map(constants, weight.attributes, nodes))
            return None
        return _product(node)

    def parts(self, maps: Sequence[Map]) -> Parts | str:
        """Stacks the weights and the biases of all experts."""
        first = maps[0]
        parts = {}
        for index, part in enumerate(("weights", "bias")):
            values = [each.constants[index] for each in maps]
            given = [value for value in values if value is not None]
            if not given:
                continue
            if len(given) < len(values):
                return f"expert {values.index(None)} has no {part}, and others have"
            if any(each.attributes != first.attributes for each in maps):
                return "some weights are stored transposed, and others are not"
            slices = stack(given)
            if isinstance(slices, str):
                return slices
            if len(slices.shape) != 3 - index:
                return f"{given[0].name} is {list(slices.shape[1:])}"
            parts[part] = slices
        if first.attributes == (True,):
            parts["weights"] = transposed(parts["weights"])
        return parts


def _product(node: ir.Node | None) -> Linear[Map] | None:
    """Reads MatMul and Gemm."""
    if node is None or not is_op(node, "MatMul", "Gemm") or None in node.inputs[:2]:
        return None
    attributes = node.attributes
    if attributes.get_int("transA", 0) or any(
        attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")
    ):
        return None
    source, weight = node.inputs[:2]
    if source is None or weight is None:
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    is_stored_transposed = not attributes.get_int("transB", 0)
    return Linear(source, Map((weight, bias), (is_stored_transposed,), (node,)))
