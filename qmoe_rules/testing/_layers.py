"""Which layers there are for a target, and a strategy for them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.kernels import Facts
from qmoe_rules.providers import TARGETS
from qmoe_rules.testing._designs import ACTIVATIONS, FORMS, LayerDesign
from qmoe_rules.testing._weights import WeightDesign

__all__ = ["SUBGRAPHS", "Choices", "Kind", "every_kind", "layers", "settled"]

SUBGRAPHS = ("if", "loop")
"""The places in a body."""

_BIASES: tuple[tuple[str, ...], ...] = ((), ("fc1", "fc2"), ("fc1",), ("fc2",))
_FC3_BIASES = ((), ("fc1", "fc2", "fc3"), ("fc1", "fc3"), ("fc3",))
# Alpha, beta and limit of swiglu, as models have them.
_SCALED = ((None, None, None), (None, None, 0.5), (1.702, 1.0, 7.0), (1.702, None, None))
# What a layer has in common with the one whose weights it shares.
_OF_WEIGHTS = ("experts", "inter", "activation", "form", "biases", "weights", "home", "behind")


@dataclass(frozen=True)
class Kind:
    """A combination of what decides whether a provider runs a MoE.

    Attributes:
        dtype: The activation type.
        form: One of `FORMS`.
        activation: The attribute `activation_type`.
        biases: Which projections have biases.
    """

    dtype: str
    form: str
    activation: str
    biases: tuple[str, ...]

    def runs_on(self, target: str) -> bool:
        """Returns whether every provider of a target runs it right, by the tables."""
        trap = {"fc3_biases"} if {"fc1", "fc3"} & {*self.biases} and self.form == "fc3" else set()
        design = LayerDesign(form=self.form)
        facts = Facts(
            self.dtype,
            self.activation,
            design.fusion,
            hidden=64,
            inter=64,
            fc3=self.form == "fc3",
            others=frozenset(trap),
        )
        return TARGETS[target].judge(facts, None) is None


@functools.cache
def every_kind(runs_on: str | None) -> tuple[Kind, ...]:
    """Returns all kinds, or those that every provider of a target runs right; simple ones first."""
    kinds = (
        Kind(dtype, form, activation, (_FC3_BIASES if form == "fc3" else _BIASES)[some])
        for dtype in SCALE_DTYPES
        for some in range(len(_BIASES))
        for form in FORMS
        for activation in ACTIVATIONS[form]
    )
    return tuple(kind for kind in kinds if runs_on is None or kind.runs_on(runs_on))


@dataclass(frozen=True)
class Choices:
    """What there is to choose from for a layer, the simplest first.

    Attributes:
        kinds: Kinds of MoE.
        max_experts: The largest E.
        inter: Values of I.
        weights: What weights are made of.
        homes: Where they live.
        behind: Nodes that they may lie behind.
        places: Where a MoE is.
        routers: Where router logits come from.
        allow_shared: Whether layers may share weights.
    """

    kinds: tuple[Kind, ...]
    max_experts: int
    inter: Sequence[int]
    weights: SearchStrategy[WeightDesign]
    homes: Sequence[str]
    behind: Sequence[str]
    places: Sequence[str]
    routers: Sequence[str]
    allow_shared: bool


def layers(choices: Choices, dtype: str) -> SearchStrategy[LayerDesign]:
    """Returns a strategy for layers by themselves, which `settled` fits together.

    Whatever is drawn is drawn always, and what does not matter is left out afterwards: then
    nothing else changes where one draw becomes simpler.

    Args:
        choices: What there is to choose from.
        dtype: The activation type.
    """
    flags = st.booleans()
    groups: dict[tuple[str, str], list[Kind]] = {}
    for kind in choices.kinds:
        if kind.dtype == dtype:
            groups.setdefault((kind.form, kind.activation), []).append(kind)
    return st.builds(
        _layer,
        kinds=st.sampled_from(list(groups.values())),
        biased=st.integers(0, len(_BIASES) - 1),
        scaled=st.sampled_from(_SCALED),
        experts=st.integers(1, choices.max_experts),
        k=st.integers(1, choices.max_experts),
        inter=st.sampled_from(choices.inter),
        normalize=st.sampled_from([None, 0, 1]),
        weights=choices.weights,
        home=st.sampled_from(choices.homes),
        behind=st.sampled_from(choices.behind),
        place=st.sampled_from(choices.places),
        inside=flags,
        shared=flags if choices.allow_shared else st.just(False),
        router=st.sampled_from(choices.routers),
    )


def _layer(
    kinds: Sequence[Kind], biased: int, scaled: tuple[float | None, ...], **fields: Any
) -> LayerDesign:
    """Returns a layer of one of some kinds, which differ in their biases."""
    alpha, beta, limit = scaled
    kind = kinds[min(biased, len(kinds) - 1)]
    return LayerDesign(
        activation=kind.activation,
        form=kind.form,
        biases=kind.biases,
        alpha=alpha,
        beta=beta,
        limit=limit,
        **fields,
    )


def settled(
    drawn: Sequence[LayerDesign], *, subgraphs: bool, constants: bool
) -> tuple[LayerDesign, ...]:
    """Returns layers that fit together and hold nothing that does not matter.

    Args:
        drawn: Layers; those that want to share the weights of the one before do, where they can.
        subgraphs: Whether they may be in subgraphs.
        constants: Whether weights may be Constant nodes, as they are inside a function.
    """
    found: list[LayerDesign] = []
    for layer in drawn:
        before = found[-1] if found else None
        if not subgraphs and layer.place in SUBGRAPHS:
            layer = replace(layer, place="main")
        if layer.place == "main" or (layer.place == "function" and not constants):
            layer = replace(layer, inside=False)
        if layer.shared and before is not None and not before.inside:
            own: dict[str, Any] = {name: getattr(before, name) for name in _OF_WEIGHTS}
            layer = replace(layer, **own, inside=False)
        else:
            layer = replace(layer, shared=False)
        if layer.activation != "swiglu":
            layer = replace(layer, alpha=None, beta=None, limit=None)
        found.append(replace(layer, k=min(layer.k, layer.experts)))
    return tuple(found)
