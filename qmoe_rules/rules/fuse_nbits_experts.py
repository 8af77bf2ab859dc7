"""Experts that are MatMulNBits and all compute every token -> QMoE, with the very same bytes.

MatMulNBits and QMoE store codes, scales and zero points alike, so the rows of the experts are put
together as they are. The family's graph is told in `_chain`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import Facts
from qmoe_rules.report import CONVERTED, Report, Row
from qmoe_rules.rules._chain import ChainRule, Map
from qmoe_rules.rules._experts import Experts, Parts, derived, stack
from qmoe_rules.rules._fusing import Block
from qmoe_rules.rules._mlp import Linear
from qmoe_rules.slices import Slices
from qmoe_rules.statistics import PROJECTIONS
from qmoe_rules.targets import Target

__all__ = ["FuseNBitsExperts"]

# MatMulNBits' inputs after the activations, in the order of `Map.constants`.
_INPUTS = ("weights", "scales", "zero_points", "g_idx", "bias")
# The compute types that MatMulNBits may choose from; QMoE computes as exactly as the activations.
_ACCURACY_LEVELS = range(5)
_WIDTHS = (2, 4, 8)
_ATTRIBUTES = {"K", "N", "accuracy_level", "bits", "block_size", "weight_prepacked"}


@dataclass(frozen=True)
class _Storage:
    """How MatMulNBits stores a map [rows, columns]."""

    rows: int
    columns: int
    bits: int
    block_size: int
    accuracy_level: int
    weight_prepacked: int
    unknown: tuple[str, ...]

    def spec(self, zero_points: bool) -> Spec:
        """Returns the same as QMoE says it."""
        return Spec(FORMATS[f"int{self.bits}"], self.block_size, symmetric=not zero_points)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the parts of one expert, as QMoE has them."""
        parts = self.spec(zero_points=True).parts(self.rows, self.columns, np.dtype(np.float32))
        return {name: shape for name, (shape, _) in parts.items()} | {"bias": (self.rows,)}

    def refuse(self) -> str | None:
        """Returns why QMoE cannot store it so, or None."""
        if self.unknown:
            name = self.unknown[0]
            kind = " of this type" if name in _ATTRIBUTES else ""
            return f"MatMulNBits has no attribute {name!r}{kind}"
        if self.weight_prepacked:
            return f"MatMulNBits with weight_prepacked={self.weight_prepacked}, an order of its own"
        if self.bits not in _WIDTHS:
            return f"MatMulNBits with {self.bits} bits"
        if self.block_size < 1 or self.columns % self.block_size:
            return f"{self.columns} columns are not whole blocks of {self.block_size}"
        if self.accuracy_level not in _ACCURACY_LEVELS:
            return f"MatMulNBits with accuracy_level={self.accuracy_level}"
        return None


class FuseNBitsExperts(ChainRule[Map]):
    """The rule for MatMulNBits; the attribute of a map is its `_Storage`."""

    def __init__(self, report: Report, target: Target) -> None:
        super().__init__(report)
        self._target = target

    def claims(self, value: ir.Value) -> bool:
        """Takes the experts that end in MatMulNBits."""
        return self.linear(value) is not None

    def linear(self, value: ir.Value) -> Linear[Map] | None:
        """Reads MatMulNBits, and MatMulNBits + b."""
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Add" and node.domain == "":
            for product, bias in (node.inputs, node.inputs[::-1]):
                inner = None if product is None else _product(product.producer())
                if inner is not None and bias is not None and inner.weight.constants[-1] is None:
                    weight = inner.weight
                    constants = (*weight.constants[:-1], bias)
                    nodes = (*weight.nodes, node)
                    return Linear(inner.source, Map(constants, weight.attributes, nodes))
            return None
        return _product(node)

    def parts(self, maps: Sequence[Map]) -> Parts | str:
        """Stacks the codes, scales, zero points and biases of all experts."""
        storage: _Storage = maps[0].attributes[0]
        if any(each.attributes != maps[0].attributes for each in maps):
            return "the experts' MatMulNBits differ in their attributes"
        if reason := storage.refuse():
            return reason
        parts: dict[str, Slices] = {}
        for name, values in zip(
            _INPUTS, zip(*(m.constants for m in maps), strict=True), strict=True
        ):
            given = [value for value in values if value is not None]
            if not given:
                continue
            if name == "g_idx":
                return "MatMulNBits has g_idx, which reorders its columns"
            if len(given) < len(values):
                return f"expert {values.index(None)} has no {name}, and others have"
            slices = _shaped(stack(given), storage.shapes()[name], str(given[0].name))
            if isinstance(slices, str):
                return slices
            if name in ("weights", "zero_points") and slices.dtype.name != "uint8":
                return f"{given[0].name} is {slices.dtype.name}, not uint8"
            parts[name] = slices
        return parts

    def storage(self, maps: Sequence[Map]) -> Mapping[str, Any]:
        """Returns QMoE's attributes."""
        storage: _Storage = maps[0].attributes[0]
        return {
            "expert_weight_bits": storage.bits,
            "block_size": storage.block_size,
            "quant_type": "int",
            "weights_prepacked": 0,
        }

    def refuse(self, experts: Experts, maps: Sequence[Map]) -> str | None:
        """Returns why QMoE would compute something else, or None."""
        gate, down = maps[0].attributes[0], maps[-1].attributes[0]
        has_points = "zero_points" in experts.gate
        spec = gate.spec(has_points)
        for each in maps:
            if (found := each.attributes[0].spec(has_points)) != spec:
                return f"both {spec} and {found} weights"
        if (down.rows, down.columns) != (gate.columns, experts.gate["weights"].shape[1]):
            return f"gate is {[gate.rows, gate.columns]}, and down {[down.rows, down.columns]}"
        specs = dict.fromkeys(PROJECTIONS, spec)
        return self._target.refuse_storage(specs, "raw") or self._target.refuse(
            _facts(experts), specs
        )

    def fused(self, block: Block, replacement: ir.Node) -> None:
        """Reports the QMoE."""
        experts = block.experts
        maps = [experts.gate, experts.down, *([experts.up] if experts.up is not None else [])]
        nbytes = sum(
            part.nbytes for parts in maps for name, part in parts.items() if name != "bias"
        )
        attributes, facts = experts.storage, _facts(experts)
        spec = Spec(
            FORMATS[f"int{attributes['expert_weight_bits']}"],
            attributes["block_size"],
            symmetric="zero_points" not in experts.gate,
        )
        row = Row(
            ops.label(replacement),
            CONVERTED,
            experts=experts.routing.experts,
            hidden=facts.hidden,
            inter=facts.inter,
            stored=f"{spec}, raw, as they were",
            bytes_before=nbytes,
            bytes_after=nbytes,
            warnings=self._target.warnings(facts, dict.fromkeys(PROJECTIONS, spec)),
        )
        self._report.record(replacement, row)


def _facts(experts: Experts) -> Facts:
    return Facts(
        experts.dtype.numpy().name,
        experts.activation,
        int(experts.up is not None),
        hidden=experts.down["weights"].shape[1],
        inter=experts.gate["weights"].shape[1],
    )


def _product(node: ir.Node | None) -> Linear[Map] | None:
    """Reads MatMulNBits."""
    if node is None or not ops.is_op(node, "MatMulNBits") or node.inputs[0] is None:
        return None
    known = {
        name: attribute.as_int()
        for name, attribute in node.attributes.items()
        if name in _ATTRIBUTES and attribute.type == ir.AttributeType.INT and not attribute.is_ref()
    }
    get = known.get
    storage = _Storage(
        get("N", 0),
        get("K", 0),
        get("bits", 4),
        get("block_size", 0),
        get("accuracy_level", 0),
        get("weight_prepacked", 0),
        tuple(sorted(set(node.attributes) - set(known))),
    )
    inputs = [None if value is None or value.name == "" else value for value in node.inputs[1:]]
    inputs += [None] * (len(_INPUTS) - len(inputs))
    return Linear(node.inputs[0], Map(tuple(inputs), (storage,), (node,)))


def _shaped(slices: Slices | str, shape: tuple[int, ...], name: str) -> Slices | str:
    """Returns slices [E, *shape] of slices that hold as many numbers in the same order.

    A shape of one axis has to be given: any other is added to the tokens, or to more axes.
    """
    if isinstance(slices, str):
        return slices
    given = slices.shape[1:]
    if math.prod(given) != math.prod(shape) or (len(shape) == 1 and given != shape):
        return f"{name} is {list(given)}, and its attributes ask for {list(shape)}"
    return derived(slices, shape, lambda block: block.reshape(len(block), *shape))
