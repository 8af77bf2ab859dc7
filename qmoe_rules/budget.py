"""Mixed precision: which width every node gets, so that all of them together meet a budget.

The error of a choice is measured, not guessed: some experts of every projection are quantized in
every way that the target takes, and the error of the projection's output, ||(W - Q) x||^2 relative
to ||W x||^2, is taken from the statistics' mean of x^2 (all alike where there are none). The choice
with the least sum of errors within the budget is then found exactly, up to the rounding of sizes.
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
from qmoe_rules.errors import ConfigError
from qmoe_rules.facts import constant_weights, facts_of
from qmoe_rules.formats import Spec
from qmoe_rules.overrides import matches
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import WIDTHS, Override, Recipe
from qmoe_rules.statistics import Calibration, Statistics
from qmoe_rules.targets import GATED
from qmoe_rules.weights import ExpertWeights

__all__ = ["Choice", "allocate", "choices_for", "within_budget"]

# Errors of expert weights are alike within a projection: a few experts tell enough.
_SAMPLED_EXPERTS = 4
_BLOCKS = (16, 32, 64, 128, 256, 0)
# Both halves of a gated fc1 pass their error on to the product.
_GATED_WEIGHT = 2.0
_FRONTIER = 4096

StatisticsOf = Callable[[str, int], Statistics | None]
"""Returns what is known of an expert, given the projection and the expert."""


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

    bits: int | None
    fc2_bits: int | None
    block_size: int | None
    nbytes: int
    error: float


def choices_for(node: ir.Node, recipe: Recipe) -> list[Choice]:
    """Measures every way to store a node that the recipe's target takes.

    Args:
        node: A float MoE.
        recipe: Gives the target, the layout, the method, the calibration and whether there are
            zero points.

    Returns:
        The choices; none where no recipe fits the node.
    """
    weights, attributes = constant_weights(ops.inputs(node)), ops.attributes(node)
    if isinstance(weights, str):
        return []
    facts = facts_of(weights, attributes)
    measure = functools.cache(partial(_measured, weights, _statistics(node, recipe), recipe.method))
    found = []
    for candidate in _candidates(recipe):
        if candidate.refuse(facts):
            continue
        error = sum(measure(name, spec) for name, spec in candidate.specs.items())
        if facts.activation in GATED:
            error += measure("fc1", candidate.specs["fc1"]) * (_GATED_WEIGHT - 1)
        nbytes = sum(_stored_bytes(weights[name], spec) for name, spec in candidate.specs.items())
        found.append(
            Choice(candidate.bits, candidate.fc2_bits, candidate.block_size, nbytes, error)
        )
    return found


def allocate(choices: Sequence[Sequence[Choice]], limit: int) -> list[Choice]:
    """Returns one choice per node with the least sum of errors in at most `limit` bytes.

    Args:
        choices: The choices of every node.
        limit: Bytes for all of them together.

    Raises:
        ConfigError: Not even the smallest choices fit.
    """
    sizes, errors = np.zeros(1), np.zeros(1)
    steps: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    for node in choices:
        own = np.array([(choice.nbytes, choice.error) for choice in node])
        all_sizes = (sizes[:, None] + own[:, 0]).ravel()
        all_errors = (errors[:, None] + own[:, 1]).ravel()
        kept = _frontier(all_sizes, all_errors, limit)
        if not kept.size:
            smallest = sum(min(choice.nbytes for choice in node) for node in choices)
            raise ConfigError(
                f"a budget of {limit} bytes for the experts is too small; the smallest recipe that "
                f"the target takes needs {smallest}"
            )
        steps.append((kept // len(node), kept % len(node)))
        sizes, errors = all_sizes[kept], all_errors[kept]
    taken, at = [], int(np.argmin(errors))
    for node, (parents, picks) in zip(reversed(choices), reversed(steps), strict=True):
        taken.append(node[picks[at]])
        at = int(parents[at])
    return taken[::-1]


def within_budget(model: ir.Model, recipe: Recipe) -> Recipe:
    """Returns the recipe with its budget turned into overrides, one per node that it chooses for.

    Nodes that are excluded, or that an override of the recipe names, are left alone, and so are
    those that nothing can be done for; the budget is for all the others.

    Args:
        model: A model whose MoE nodes are fused and normalized.
        recipe: With a budget or without one.

    Raises:
        ConfigError: The budget is too small for the smallest recipe.
    """
    if recipe.budget is None:
        return recipe
    named = [override.pattern for override in recipe.given_overrides]
    choices: dict[str, list[Choice]] = {}
    weights = 0
    for node in ops.nodes(model, "MoE"):
        name = ops.label(node)
        if recipe.excludes(name) or any(matches(pattern, name) for pattern in named):
            continue
        if found := choices_for(node, recipe):
            choices[name] = found
            views = constant_weights(ops.inputs(node))
            weights += (
                sum(math.prod(v.shape) for v in views.values()) if isinstance(views, dict) else 0
            )
    limit = float(recipe.budget)
    taken = allocate(list(choices.values()), int(limit * weights / 8 if limit <= 32 else limit))
    chosen = [
        Override(
            name,
            (
                ("bits", choice.bits),
                ("fc2_bits", choice.fc2_bits),
                ("block_size", choice.block_size),
            ),
        )
        for name, choice in zip(choices, taken, strict=True)
    ]
    return dataclasses.replace(recipe, budget=None, overrides=(*chosen, *recipe.given_overrides))


def _frontier(
    sizes: npt.NDArray[np.float64], errors: npt.NDArray[np.float64], limit: int
) -> npt.NDArray[np.intp]:
    """Returns the indices of what is within the limit and not beaten by anything smaller."""
    order = np.lexsort((errors, sizes))
    order = order[sizes[order] <= limit]
    best = np.minimum.accumulate(errors[order])
    first = np.concatenate([[True], errors[order][1:] < best[:-1]])[: order.size]
    kept = order[first]
    if kept.size > _FRONTIER:  # the best of every size, to a thousandth of the limit or so
        shelf = (sizes[kept] * (_FRONTIER / limit)).astype(np.int64)
        kept = kept[np.append(np.diff(shelf) > 0, True)]
    return np.asarray(kept, np.intp)


def _count(node: ir.Node) -> int:
    weights = constant_weights(ops.inputs(node))
    return 0 if isinstance(weights, str) else sum(math.prod(v.shape) for v in weights.values())


def _candidates(recipe: Recipe) -> Iterator[Recipe]:
    for bits, fc2_bits, size in itertools.product(WIDTHS, WIDTHS, _BLOCKS):
        fields: dict[str, Any] = {"bits": bits, "fc2_bits": fc2_bits, "block_size": size}
        try:
            yield dataclasses.replace(recipe, budget=None, overrides=(), **fields)
        except ConfigError:
            continue


def _statistics(node: ir.Node, recipe: Recipe) -> StatisticsOf:
    calibration, name = recipe.calibration, ops.label(node)
    if not isinstance(calibration, Calibration) or name not in calibration.fingerprints:
        return lambda projection, expert: None
    return lambda projection, expert: calibration.for_expert(
        name, projection, expert, hessian=False
    )


def _measured(
    weights: Mapping[str, ExpertWeights],
    statistics: StatisticsOf,
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
        known = statistics(name, expert)
        weight = view.expert(expert)
        real = weight.astype(np.float32)
        off = real - quantize(weight, spec, known).dequantize()
        squares = np.ones(columns, np.float32) if known is None else known.mean_square
        tokens = 1 if known is None else max(known.tokens, 1)
        lost += tokens * float((off * off).sum(axis=0, dtype=np.float64) @ squares)
        whole += tokens * float((real * real).sum(axis=0, dtype=np.float64) @ squares)
        view.release(expert)
    return lost / whole if whole else 0.0


def _sample(experts: int) -> list[int]:
    """Returns some experts, evenly spaced."""
    count = min(experts, _SAMPLED_EXPERTS)
    return sorted({round(index * (experts - 1) / max(count - 1, 1)) for index in range(count)})


def _stored_bytes(view: ExpertWeights, spec: Spec) -> int:
    experts, rows, columns = view.shape
    parts = spec.parts(rows, columns, view.dtype).values()
    return experts * sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in parts)
