"""Experts that all compute every token: a chain of Adds over `expert(x) * weight`.

The weight of expert e is `ReduceSum(weights * (indices == e), -1)`, so it is zero for the tokens
that were not routed to it. Exporters without a fused operator write this. A chain of any length is
read iteratively, from its last Add; what else is added on its way stays an Add.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.rules._experts import Experts, Parts, assemble
from qmoe_rules.rules._facts import both_ways, is_op, over_last_axis, producer, scalar
from qmoe_rules.rules._fusing import Block, FusingRule
from qmoe_rules.rules._mlp import MLP, Linear, match_mlp
from qmoe_rules.rules._routing import routing_of

__all__ = [
    "Chain",
    "ChainRule",
    "Map",
    "Mask",
    "Term",
    "chain_ending_in",
    "mask_of",
    "name_of",
    "term_of",
]


@dataclass(frozen=True)
class Mask:
    """What is 1 where an expert was chosen and 0 elsewhere.

    Attributes:
        expert: Which expert.
        indices: The chosen experts.
        cast: The node that makes numbers of what `equal` compares.
        equal: The node that compares.
    """

    expert: int
    indices: ir.Value
    cast: ir.Node
    equal: ir.Node


def mask_of(value: ir.Value | None) -> Mask | None:
    """Reads `indices == e` as numbers."""
    cast = producer(value, "Cast", "CastLike")
    equal = None if cast is None else producer(cast.inputs[0], "Equal")
    for indices, number in both_ways(equal):
        expert = scalar(number)
        if cast is None or equal is None or indices is None or expert is None or expert % 1:
            continue
        return Mask(int(expert), indices, cast, equal)
    return None


@dataclass(frozen=True)
class Term:
    """An expert's share of the sum.

    Attributes:
        expert: Which expert.
        value: What it computes.
        indices: The chosen experts, [..., k].
        weights: Their weights, [..., k].
        nodes: The nodes that weight it.
        mask: The Cast that makes 1 where this expert was chosen and 0 elsewhere.
    """

    expert: int
    value: ir.Value
    indices: ir.Value
    weights: ir.Value
    nodes: tuple[ir.Node, ...]
    mask: ir.Node

    def refuse_mask(self) -> str | None:
        """Returns how the types of weights and mask differ, as one exporter's do, or None."""
        known = self.weights.dtype
        to = ops.cast_type(self.mask)  # CastLike does not say
        if known is None or to in (known, None):
            return None
        return f"expert {self.expert} has {known.name} weights and a {to.name} mask"

    def shares_routing(self, other: Term | None) -> bool:
        """Returns whether another term, if it is one, is of the same layer."""
        return other is not None and other.indices is self.indices and other.weights is self.weights


@dataclass(frozen=True)
class Chain:
    """The terms of one layer.

    Attributes:
        terms: The terms, last one first.
        adds: The nodes that add them.
        rest: What is added to them, or None.
    """

    terms: Sequence[Term]
    adds: Sequence[ir.Node]
    rest: ir.Value | None


Reader = Callable[[ir.Value | None], Term | None]


def term_of(value: ir.Value | None) -> Term | None:
    """Returns the share of an expert that a value is, or None; in constant time."""
    product = producer(value, "Mul")
    for output, weight in both_ways(product):
        shape = producer(weight, "Unsqueeze")
        kept = 0 if shape is not None else 1
        if shape is not None:
            if not over_last_axis(shape, weight):
                continue
            weight = shape.inputs[0]
        total = producer(weight, "ReduceSum")
        if total is None or total.attributes.get_int("keepdims", 1) != kept:
            continue
        if not over_last_axis(total, total.inputs[0]):
            continue
        masked = producer(total.inputs[0], "Mul")
        for weights, mask in both_ways(masked):
            found = mask_of(mask)
            if found is None or None in (output, weights):
                continue
            nodes = (product, shape, total, masked, found.cast, found.equal)
            present = tuple(node for node in nodes if node is not None)
            return Term(found.expert, output, found.indices, weights, present, found.cast)
    return None


def chain_ending_in(node: ir.Node, read: Reader) -> Chain | None:
    """Returns the chain whose last Add a node is, or None.

    Constant time where there is none, else linear in its length.

    Args:
        node: The node.
        read: Returns the share of an expert that a value is, or None.
    """
    term = next(filter(None, map(read, node.inputs)), None)
    total = node.outputs[0]
    if term is None or any(_goes_on(term, total, user, read) for user in total.consumers()):
        return None
    terms: list[Term] = []
    adds: list[ir.Node] = []
    rest: ir.Value | None = None
    current: ir.Node | None = node
    while current is not None:
        adds.append(current)
        rest, current = _step(term, current, terms, read)
    return Chain(terms, adds, rest)


def _step(
    first: Term, add: ir.Node, terms: list[Term], read: Reader
) -> tuple[ir.Value | None, ir.Node | None]:
    """Collects the terms of one Add; returns what it adds them to, or the chain's next Add."""
    left = []
    for value in add.inputs:
        term = read(value)
        if term is not None and first.shares_routing(term):
            terms.append(term)
        else:
            left.append(value)
    if not left:
        return None, None
    below = producer(left[0], "Add")
    if below is not None and any(first.shares_routing(read(v)) for v in below.inputs):
        return None, below
    return left[0], None


def _goes_on(term: Term, total: ir.Value, user: ir.Node, read: Reader) -> bool:
    """Returns whether a user of a sum adds another term of the same layer."""
    if not is_op(user, "Add"):
        return False
    others = [value for value in user.inputs if value is not total]
    return any(term.shares_routing(read(value)) for value in others)


@dataclass(frozen=True)
class Map:
    """A linear map of one expert: equal where the constants are.

    Attributes:
        constants: What it is made of, None for what it does not have.
        attributes: How to read them.
        nodes: The nodes that apply it.
    """

    constants: tuple[ir.Value | None, ...]
    attributes: tuple[Any, ...] = ()
    nodes: tuple[ir.Node, ...] = field(default=(), compare=False)


M = TypeVar("M", bound=Map)


class ChainRule(FusingRule, Generic[M]):
    """The rule for such chains; a family says what a linear map is."""

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        """Matches any Add; `find` looks for the last one of a chain."""
        return op.Add(a, b, _outputs=["result"])

    @abstractmethod
    def linear(self, value: ir.Value) -> Linear[M] | None:
        """Returns the linear map that computes a value, or None."""

    @abstractmethod
    def parts(self, maps: Sequence[M]) -> Parts | str:
        """Returns one map of all experts, or why there is none."""

    @abstractmethod
    def claims(self, value: ir.Value) -> bool:
        """Returns whether an expert's output is of this family, or at least of no other."""

    def term(self, value: ir.Value | None) -> Term | None:
        """Returns the share of an expert that a value is, or None; in constant time."""
        return term_of(value)

    def storage(self, maps: Sequence[M]) -> Mapping[str, Any]:
        """Returns QMoE's attributes for quantized maps."""
        return {}

    def refuse(self, experts: Experts, maps: Sequence[M]) -> str | None:
        """Returns why experts that are one MoE by themselves stay, or None."""
        return None

    def find(self, node: ir.Node) -> Block | str | None:
        """Returns the experts that a chain adds up, and why they stay where they do."""
        chain = chain_ending_in(node, self.term)
        if chain is None or not self.claims(chain.terms[0].value):
            return None
        terms = sorted(chain.terms, key=lambda term: term.expert)
        if reason := _refuse_count(terms):
            return reason
        mlps: list[MLP[M]] = []
        nodes = [*chain.adds]
        for term in terms:
            if reason := term.refuse_mask():
                return reason
            mlp = match_mlp(term.value, self.linear)
            if isinstance(mlp, str):
                return f"expert {term.expert}: {mlp}"
            mlps.append(mlp)
            nodes += [*term.nodes, *mlp.nodes]
            nodes += [inner for each in _maps(mlp) for inner in each.nodes]
        experts = self._experts(terms[0], mlps)
        if isinstance(experts, str):
            return experts
        return Block(experts, nodes, name_of(mlps, node), chain.rest)

    def _experts(self, term: Term, mlps: Sequence[MLP[M]]) -> Experts | str:
        routing = routing_of(term.indices, term.weights, len(mlps), mlps[0].source)
        if isinstance(routing, str):
            return routing
        maps = [each for mlp in mlps for each in _maps(mlp)]
        home = maps[0].constants[0]
        if home is None:
            raise AssertionError("a map has a weight")
        storage = self.storage(maps)
        experts = assemble(mlps, routing, self.parts, home=home, storage=storage)
        if isinstance(experts, str):
            return experts
        return self.refuse(experts, maps) or experts


def _maps(mlp: MLP[M]) -> list[M]:
    return [mlp.gate[0], *([] if mlp.up is None else [mlp.up[0]]), mlp.down]


def _refuse_count(terms: Sequence[Term]) -> str | None:
    """Returns which of the experts, sorted, is missing or there twice, or None."""
    for index, term in enumerate(terms):
        if term.expert < 0:
            return f"there is no expert {term.expert}"
        if term.expert < index:
            return f"expert {term.expert} is added twice"
        if term.expert > index:
            return f"expert {index} is missing"
    return None


def name_of(mlps: Sequence[MLP[Any]], node: ir.Node) -> str:
    """Returns what the names of all weights begin with, or the name of a node."""
    names = [str(each.constants[0].name) for mlp in mlps for each in _maps(mlp)]
    pairs = zip(min(names), max(names), strict=False)  # what these two share, all share
    prefix = "".join(a for a, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    cut = max(prefix.rfind("."), prefix.rfind("/"))
    return prefix[:cut] if cut > 0 else (node.name or str(node.outputs[0].name))
