"""Two models in the same form, and which of their MoE and QMoE nodes belong together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.loading import load, locate
from qmoe_rules.passes import prepare
from qmoe_rules.providers import TARGETS
from qmoe_rules.report import Report
from qmoe_rules.rules import apply_rules, fuse_experts_rules, normalize_moe_rules

__all__ = ["Pair", "Source", "comparable", "pairs"]


@dataclass(frozen=True)
class Pair:
    """A node of the float model and what became of it.

    Attributes:
        before: The MoE or QMoE of the float model, None where it has none.
        after: That of the converted model, None where it has none.
    """

    before: ir.Node | None
    after: ir.Node | None

    @property
    def name(self) -> str:
        """What to call the nodes."""
        return next(ops.label(node) for node in (self.before, self.after) if node is not None)


@dataclass(frozen=True)
class Source:
    """A model on disk, loaded and brought to the form in which both models are compared.

    Attributes:
        path: The .onnx file.
        model: The model, in the form that `comparable` brings it to.
        names: The values of the main graph that the file has too, and what it calls them.
    """

    path: Path
    model: ir.Model
    names: dict[ir.Value, str]

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Source:
        """Loads a model; no weight is read.

        Raises:
            SourceError: The model cannot be used.
        """
        file = locate(path).model
        model = load(file)
        values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
        names = {value: value.name for value in values if value.name}
        return cls(file, comparable(model), names)


def comparable(model: ir.Model) -> ir.Model:
    """Brings a model, in place, to the form in which both models are compared.

    Functions that hold a MoE are inlined, experts that are spelled out are fused, and the gate and
    linear rows of fc1 interleaved.
    """
    prepare(model)
    # Which experts of MatMulNBits are fused depends on the target, and it is not known here.
    targets = TARGETS if any(ops.nodes(model, "MatMulNBits")) else ("portable",)
    for target in targets:
        rules = [
            *fuse_experts_rules(report=Report(), target=target),
            *normalize_moe_rules(report=Report()),
        ]
        apply_rules(model, rules)
    return model


def pairs(before: ir.Model, after: ir.Model, met: Mapping[ir.Node, ir.Node]) -> list[Pair]:
    """Pairs the MoE and QMoE nodes of two models by name and output, or by one of the two.

    Rules keep both, and other tools at least the place in the graph. Nodes without a partner make
    pairs of their own, at the end where they are of the converted model.

    Args:
        before: The float model.
        after: The converted model.
        met: Nodes of the float model, and those in their places.
    """
    left, right = (list(ops.nodes(model, "MoE", "QMoE")) for model in (before, after))
    partners: dict[ir.Node, ir.Node] = {}
    for key in (_name_and_output, _name, _output):
        for node in left:
            if node not in partners and key(node) and (found := _first(right, key, node)):
                partners[node] = found
                right.remove(found)
    for node, found in met.items():
        if node in left and node not in partners and found in right:
            partners[node] = found
            right.remove(found)
    return [
        *(Pair(node, partners.get(node)) for node in left),
        *(Pair(None, node) for node in right),
    ]


def _first(
    nodes: Iterable[ir.Node], key: Callable[[ir.Node], object], node: ir.Node
) -> ir.Node | None:
    return next((other for other in nodes if key(other) == key(node)), None)


def _name(node: ir.Node) -> str | None:
    return node.name


def _output(node: ir.Node) -> str | None:
    return node.outputs[0].name if node.outputs else None


def _name_and_output(node: ir.Node) -> tuple[str, str] | None:
    name, output = _name(node), _output(node)
    return (name, output) if name and output else None
