"""Mixed precision: which width every node gets, so that all of them together meet a budget.

The error of a choice is measured, not guessed: some experts of every projection are quantized in
every way that the target takes, and the error of the projection's output, ||(W - Q) x||^2 relative
to ||W x||^2, is taken from the statistics' mean of x^2 (all alike where there are none); a kernel
that rounds activations adds what it was measured to. The choice with the least sum of errors within
the budget is then found exactly, up to the rounding of sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.facts import FloatMoE
from qmoe_rules.fingerprints import refuse_calibration
from qmoe_rules.formats import Spec
from qmoe_rules.kernels import GATED
from qmoe_rules.lazy import Projection
from qmoe_rules.overrides import exactly, matches
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import BLOCK_SIZES, MOST_BITS, WIDTHS, Override, Recipe
from qmoe_rules.statistics import Calibration, Statistics
from qmoe_rules.weights import ExpertWeights

__all__ = ["Choice", "allocate", "choices_for", "within_budget"]

# Errors of expert weights are alike within a projection: a few experts tell enough.
_SAMPLED_EXPERTS = 4
# Both halves of a gated fc1 pass their error on to the product.
_GATED_WEIGHT = 2.0
# The error of a kernel that is 1 to 2 % off whatever the weights: what it rounds are activations.
_APPROXIMATE = 0.012**2
_FRONTIER = 1 << 14

_Measure = Callable[[str, Spec], float]


@dataclass(frozen=True)
class Choice:
    """One way to store a node.

    Attributes:
        bits: Width of fc1's codes.
        fc2_bits: Width of fc2's codes.
        block_size: Columns that share a scale.
        nbytes: Size of everything stored of the node's experts.
        error: Sum of the relative output errors of its projections.
    """

    bits: int
    fc2_bits: int
    block_size: int
    nbytes: int
    error: float

    @property
    def settings(self) -> tuple[tuple[str, int], ...]:
        """The fields of a recipe that it sets."""
        return tuple((name, getattr(self, name)) for name in ("bits", "fc2_bits", "block_size"))


def within_budget(model: ir.Model, recipe: Recipe) -> Recipe:
    """Returns the recipe with its budget turned into overrides, one per node that it chooses for.

    Nodes that are excluded, or that an override of the recipe names, are left alone, and so are
    those that nothing can be done for; the budget is for all the others. Weights that several nodes
    share count for each of them.

    Args:
        model: A model whose MoE nodes are fused and normalized.
        recipe: With a budget or without one.

    Raises:
        ConfigError: The budget is too small for the smallest recipe, or the calibration is of
            another model.
        SourceError: Weights cannot be read, or hold an infinity or a NaN.
    """
    if recipe.budget is None:
        return recipe
    named = [*recipe.nodes_to_exclude, *(each.pattern for each in recipe.given_overrides)]
    choices: dict[str, list[Choice]] = {}
    weights = 0
    for node in ops.nodes(model, "MoE"):
        name, moe = ops.label(node), FloatMoE.of(node)
        if isinstance(moe, str) or any(matches(pattern, name) for pattern in named):
            continue
        if found := choices_for(moe, name, recipe):
            # Names are unique within one graph only, and an override goes by the name.
            choices[name] = _for_both(choices[name], found) if name in choices else found
            weights += sum(math.prod(view.shape) for view in moe.weights.values())
    limit = float(recipe.budget)
    taken = allocate([*choices.values()], int(limit * weights / 8 if limit <= MOST_BITS else limit))
    chosen = (
        Override(exactly(name), choice.settings)
        for name, choice in zip(choices, taken, strict=True)
    )
    return dataclasses.replace(recipe, budget=None, overrides=(*chosen, *recipe.given_overrides))


def choices_for(moe: FloatMoE, name: str, recipe: Recipe) -> list[Choice]:
    """Measures every way to store a node that the recipe's target takes.

    Args:
        moe: The node.
        name: Its name.
        recipe: Gives the target, the layout, the method, the calibration and whether there are
            zero points.

    Returns:
        The choices; none where no recipe fits the node.

    Raises:
        ConfigError: The calibration is of another model.
        SourceError: Weights cannot be read, or hold an infinity or a NaN.
    """
    calibration = recipe.calibration if isinstance(recipe.calibration, Calibration) else None
    if calibration and refuse_calibration(calibration, name, moe):
        if recipe.statistics(name, "fc1"):  # the method goes by it: the node stays in float
            return []
        calibration = None
    measure = functools.cache(partial(_measured, moe.weights, name, calibration, recipe.method))
    return [
        Choice(*fields, _stored_bytes(moe.weights, candidate), _error(moe, candidate, measure))
        for fields, candidate in _candidates(recipe)
        if not candidate.refuse(moe.facts)
    ]


def allocate(choices: Sequence[Sequence[Choice]], limit: int) -> list[Choice]:
    """Returns one choice per node with the least sum of errors in at most `limit` bytes.

    Args:
        choices: The choices of every node.
        limit: Bytes for all of them together.

    Raises:
        ConfigError: Not even the smallest choices fit.
    """
    least = [min(choice.nbytes for choice in node) for node in choices]
    spare = limit - sum(least)
    if spare < 0:
        raise ConfigError(
            f"a budget of {limit} bytes for the experts is too small; the smallest recipe that the "
            f"target takes needs {sum(least)}"
        )
    # What is best for some nodes, by how much more than the least it takes: sizes grow, and errors
    # become smaller.
    sizes, errors = np.zeros(1), np.zeros(1)
    steps: list[tuple[Sequence[Choice], npt.NDArray[np.intp]]] = []
    for node, smallest in zip(choices, least, strict=True):
        own_sizes = np.array([choice.nbytes - smallest for choice in node], np.float64)
        own_errors = np.array([choice.error for choice in node])
        own = _frontier(own_sizes, own_errors, spare)
        all_sizes = (sizes[:, None] + own_sizes[own]).ravel()
        all_errors = (errors[:, None] + own_errors[own]).ravel()
        kept = _frontier(all_sizes, all_errors, spare)
        steps.append(([node[index] for index in own], kept))
        sizes, errors = all_sizes[kept], all_errors[kept]
    taken, at = [], int(np.argmin(errors))
    for own_choices, kept in reversed(steps):
        at, pick = divmod(int(kept[at]), len(own_choices))
        taken.append(own_choices[pick])
    return taken[::-1]


def _frontier(
    sizes: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], limit: int
) -> npt.NDArray[np.intp]:
    """Returns the indices of what is within the limit and not beaten by anything smaller.

    Of very many it keeps the best of every size, sizes being told apart to a small fraction of the
    limit, and the smallest.
    """
    order = np.lexsort((errors, sizes))
    order = order[sizes[order] <= limit]
    best = np.minimum.accumulate(errors[order])
    kept = order[np.concatenate([[True], errors[order][1:] < best[:-1]])]
    if kept.size > _FRONTIER:
        shelf = (sizes[kept] * (_FRONTIER / limit)).astype(np.int64)
        is_best = np.append(np.diff(shelf) > 0, True)
        is_best[0] = True
        kept = kept[is_best]
    return np.asarray(kept, np.intp)


def _for_both(first: Sequence[Choice], second: Sequence[Choice]) -> list[Choice]:
    """Returns the choices that two nodes of one name both have."""
    others = {choice.settings: choice for choice in second}
    return [
        dataclasses.replace(
            choice, nbytes=choice.nbytes + other.nbytes, error=choice.error + other.error
        )
        for choice in first
        if (other := others.get(choice.settings))
    ]


def _candidates(recipe: Recipe) -> Iterator[tuple[tuple[int, int, int], Recipe]]:
    """Yields bits, fc2_bits and block_size, and the recipe that they make."""
    for bits, fc2_bits, size in itertools.product(WIDTHS, WIDTHS, BLOCK_SIZES):
        fields: dict[str, Any] = {"bits": bits, "fc2_bits": fc2_bits, "block_size": size}
        try:
            candidate = dataclasses.replace(recipe, budget=None, overrides=(), **fields)
        except ConfigError:
            continue
        yield (bits, fc2_bits, size), candidate


def _error(moe: FloatMoE, recipe: Recipe, measure: _Measure) -> float:
    counts = {"fc1": _GATED_WEIGHT if moe.facts.activation in GATED else 1.0, "fc2": 1.0}
    total = 0.0
    for name, spec in recipe.specs.items():
        rounded = recipe.provider_target.is_approximate(recipe.specs, spec.block_size)
        total += counts[name] * (measure(name, spec) + _APPROXIMATE * rounded)
    return total


def _measured(
    weights: Mapping[str, ExpertWeights],
    node: str,
    calibration: Calibration | None,
    method: str,
    name: str,
    spec: Spec,
) -> float:
    """Returns the mean over some experts of the relative error of a projection's output."""
    # Error feedback gains alike at every width, and takes far longer.
    quantize, view = METHODS["search" if method == "gptq" else method], weights[name]
    experts, _, columns = view.shape
    lost = whole = 0.0
    for expert in _sample(experts):
        known: Statistics | None = None
        if calibration is not None:
            known = calibration.for_expert(node, name, expert, hessian=False)
        weight = view.expert(expert)
        try:
            meant = quantize(weight, spec, known).dequantize()
        except SourceError as error:
            raise SourceError(f"weight {view.name!r}, expert {expert}: {error}") from None
        real = weight.astype(np.float32)
        squares = np.ones(columns, np.float32) if known is None else known.mean_square
        tokens = 1 if known is None else max(known.tokens, 1)
        lost += tokens * float(np.square(real - meant, dtype=np.float64).sum(axis=0) @ squares)
        whole += tokens * float(np.square(real, dtype=np.float64).sum(axis=0) @ squares)
        view.release(expert)
    return lost / whole if whole else 0.0


def _sample(experts: int) -> list[int]:
    """Returns some experts, evenly spaced."""
    count = min(experts, _SAMPLED_EXPERTS)
    return sorted({round(index * (experts - 1) / max(count - 1, 1)) for index in range(count)})


def _stored_bytes(weights: Mapping[str, ExpertWeights], recipe: Recipe) -> int:
    """Returns the size of everything that is stored of a node's experts."""
    layout = recipe.storage.name
    return sum(
        Projection(weights[name], spec, layout, recipe.method).nbytes
        for name, spec in recipe.specs.items()
    )
