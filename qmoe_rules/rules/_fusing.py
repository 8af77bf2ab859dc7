"""What the rules that fuse experts share: a rule that puts one node in the place of a block.

A family of expert graphs says where a block ends and what it computes; `FusingRule` proves that
nothing else needs the block, builds the MoE, removes what is dead and reports what stays.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase

from qmoe_rules import ops
from qmoe_rules.report import SKIPPED, Report, Row
from qmoe_rules.rules._experts import Experts, emit_moe, refuse_experts
from qmoe_rules.rules._leftovers import Leftovers, carry_notes

__all__ = ["Block", "FusingRule", "used_outside"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Block:
    """The part of a graph that a MoE takes the place of.

    Attributes:
        experts: What it computes.
        nodes: Its nodes, dead afterwards; the node of the result is among them.
        name: What to call the MoE.
        rest: What is added to the experts' output, or None.
    """

    experts: Experts
    nodes: Sequence[ir.Node]
    name: str
    rest: ir.Value | None = None


class FusingRule(RewriteRuleClassBase):
    """A rule that puts a MoE, or a QMoE, in the place of a block.

    A family overrides `pattern`, which names the block's last value `result`, and `find`.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(type(self).__name__)
        self._report = report
        self._block: Block | None = None
        # The node that was matched loses its inputs, so they are remembered.
        self._fused: list[tuple[ir.Node, Sequence[ir.Value | None], Block]] = []
        self._leftovers = Leftovers()

    @abstractmethod
    def find(self, node: ir.Node) -> Block | str | None:
        """Returns the block that ends in a node, why it stays, or None where there is none.

        It is called for every node that the pattern matches, so None has to be cheap.
        """

    def fused(self, block: Block, replacement: ir.Node) -> None:
        """Is told the MoE that takes the place of a block; a family may report it."""

    def check(self, op: Any, *args: Any, **bindings: Any) -> MatchResult:
        """Accepts a block, or says why it stays; `op` is the match context here."""
        node = ops.producer(bindings["result"])
        result = MatchResult()
        found = self.find(node)
        if found is None:
            return result.fail("no experts end here", node)
        if isinstance(found, Block):
            found = _refuse(found, node, op.model) or found
        if isinstance(found, str):
            label = ops.label(node)
            self._report.record(node, Row(label, SKIPPED, found))
            logger.warning("the experts before %s are not fused: %s", label, found)
            return result.fail(found, node)
        self._block = found
        return result

    def rewrite(self, op: Any, *args: Any, **bindings: Any) -> ir.Value:
        """Builds the node and registers its planned initializers."""
        block = self._block
        if block is None:
            raise AssertionError("rewrite was called without a successful check")
        result: ir.Value = bindings["result"]
        made = emit_moe(op, block.experts, block.name)
        self._leftovers.made(*made.planned)
        last = ops.producer(result)
        self._fused.append((last, tuple(last.inputs), block))
        self.fused(block, made.node)
        output = made.output if block.rest is None else op.Add(made.output, block.rest)
        carry_notes(result, output)
        return output

    def cleanup(self) -> None:
        """Removes the nodes and the constants that only the fused blocks used.

        After a dry run it is the planned weights that no node of the model uses.
        """
        self._leftovers.sweep()
        loose: dict[ir.Value, None] = {}
        for last, inputs, block in self._fused:
            if last.graph is None:
                loose |= _remove(block.nodes)
                loose |= {value: None for value in inputs if value is not None}
        self._fused.clear()
        for value in loose:
            ops.discard(value)


def _remove(nodes: Iterable[ir.Node]) -> dict[ir.Value, None]:
    """Removes nodes that only use each other's outputs; returns what else they used.

    `ops.discard` would find them one by one, and ask their input after each for all its users.
    """
    own = {node: None for node in nodes if node.graph is not None}
    loose = {
        value: None
        for node in own
        for value in node.inputs
        if value is not None and value.producer() not in own
    }
    for graph in {node.graph: None for node in own}:
        if isinstance(graph, ir.Graph):
            graph.remove((node for node in own if node.graph is graph), safe=True)
    return loose


def used_outside(nodes: Iterable[ir.Node], result: ir.Value) -> str | None:
    """Returns which value of a block is used by others than its own nodes, or None.

    Args:
        nodes: The block's nodes.
        result: The one value that others may use.
    """
    own = dict.fromkeys(nodes)
    for node in own:
        if node.graph is not ops.producer(result).graph:
            return f"{ops.label(node)} is in another graph than {result.name}"
        for value in node.outputs:
            if value is result:
                continue
            if value.is_graph_output():
                return f"{value.name} is a graph output"
            for user in value.consumers():
                if user not in own:
                    return f"{value.name} is used by {ops.label(user)} too"
    return None


def _refuse(block: Block, node: ir.Node, model: ir.Model) -> str | None:
    """Returns why a block cannot be replaced, or None."""
    if ops.in_function(model, node):
        return "they are inside a function, which holds no initializers; inline it (see prepare)"
    return (
        refuse_experts(block.experts, model.graph.opset_imports.get("", 0))
        or used_outside(block.nodes, node.outputs[0])
        or _used_inside(block)
    )


def _used_inside(block: Block) -> str | None:
    """Returns which value that the replacement reads goes with the block, or None."""
    own = set(block.nodes)
    experts, routing = block.experts, block.experts.routing
    needed = (experts.source, routing.indices, routing.weights, routing.logits, block.rest)
    for value in needed:
        if value is not None and value.producer() in own:
            return f"{value.name} is a part of the experts and their input too"
    return None
