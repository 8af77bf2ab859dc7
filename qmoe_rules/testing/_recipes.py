"""A strategy for recipes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from qmoe_rules.errors import ConfigError
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.overrides import OVERRIDABLE, exactly
from qmoe_rules.providers import TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import BLOCK_SIZES, FORMAT_CHOICES, WIDTHS, Recipe

__all__ = ["recipes"]

_BUDGETS = (4, 3, 8.0, 32, "1MB", 10_000)
_ANY_NODES = ("*", "re:.*layers.0.*", "*moe*")


def recipes(
    targets: Collection[str] | None = None,
    *,
    formats: Collection[str] = FORMAT_CHOICES,
    methods: Collection[str] = ("rtn",),
    nodes: Sequence[str] = (),
    allow_excludes: bool = True,
    allow_overrides: bool = True,
    allow_budgets: bool = False,
) -> SearchStrategy[Recipe]:
    """Returns a strategy for valid recipes; they shrink to the default one.

    Args:
        targets: Values of `target`; all where they are left out.
        formats: Values of `format`.
        methods: Values of `method`, of those that need no calibration.
        nodes: Names of nodes, which excludes and overrides then name; otherwise they are
            patterns.
        allow_excludes: Whether nodes may be left in float.
        allow_overrides: Whether there may be other settings for some nodes.
        allow_budgets: Whether there may be a budget, which rules by themselves do not take.

    Example:
        >>> for_the_cpu = recipes(["cpu"], formats=["int"], allow_overrides=False)
    """
    chosen = tuple(TARGETS) if targets is None else tuple(targets)
    for name, given, known in (
        ("targets", chosen, TARGETS),
        ("formats", formats, FORMAT_CHOICES),
        ("methods", methods, METHODS),
    ):
        if isinstance(given, str) or not given or not {*given} <= {*known}:
            raise InvalidArgument(f"{name}={given!r}; it is a collection of {', '.join(known)}")
    for method in methods:
        try:
            Recipe(method=method)
        except ConfigError as error:
            raise InvalidArgument(str(error)) from None
    storages = {
        target: tuple(each for each in _storages(target) if each.format in formats)
        for target in chosen
    }
    if not any(storages.values()):
        raise InvalidArgument(f"no target of {', '.join(chosen)} takes {', '.join(formats)}")
    patterns = st.sampled_from([exactly(name) for name in nodes] or _ANY_NODES)
    budgets = st.sampled_from((None, *_BUDGETS)) if allow_budgets else st.none()
    excludes = st.lists(patterns, max_size=2) if allow_excludes else st.just([])

    def of_target(target: str) -> SearchStrategy[Recipe]:
        storage = _storage(storages[target])
        overrides = st.lists(st.tuples(patterns, storage), max_size=2)
        return st.builds(
            _recipe,
            storage,
            budgets,
            st.sampled_from(tuple(methods)),
            excludes,
            overrides if allow_overrides else st.just([]),
        )

    strategies = {target: of_target(target) for target in chosen if storages[target]}
    return st.sampled_from(list(strategies)).flatmap(strategies.__getitem__)


def _storage(recipes: Sequence[Recipe]) -> SearchStrategy[Recipe]:
    """Returns a strategy for one of some recipes, all formats being as likely."""
    by_format: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        by_format.setdefault(recipe.format, []).append(recipe)
    # Of numbers, because a strategy that prints hundreds of recipes cannot be read.
    places = {
        format: st.integers(0, len(group) - 1).map(group.__getitem__)
        for format, group in by_format.items()
    }
    return st.sampled_from(list(places)).flatmap(places.__getitem__)


def _recipe(
    storage: Recipe,
    budget: float | str | None,
    method: str,
    excludes: Sequence[str],
    others: Sequence[tuple[str, Recipe]],
) -> Recipe:
    """Returns a recipe; `others` are the storages of the nodes that match a pattern."""
    base = storage
    if budget is not None and base.format == "int":
        base = Recipe.of(base, bits=None, fc2_bits=None, block_size=None, budget=budget)
    settings = ((pattern, _settings(base, other)) for pattern, other in others)
    overrides = tuple((pattern, fields) for pattern, fields in settings if fields)
    return Recipe.of(base, method=method, nodes_to_exclude=tuple(excludes), overrides=overrides)


def _settings(base: Recipe, other: Recipe) -> dict[str, Any]:
    """Returns what an override sets so that a node is stored like `other`, nothing if it may not.

    A layout cannot be overridden, so that of the base must do; another format brings its own.
    """
    fields = {name: getattr(other, name) for name in OVERRIDABLE}
    changed = {name: value for name, value in fields.items() if value != getattr(base, name)}
    if "format" in changed:
        changed = {name: value for name, value in changed.items() if value is not None}
    try:
        Recipe.of(base, overrides=[("*", changed)] if changed else ())
    except ConfigError:
        return {}
    return changed


@functools.cache
def _storages(target: str) -> tuple[Recipe, ...]:
    """Returns every recipe for a target that says how weights are stored, simple ones first."""
    sizes: tuple[int | None, ...] = (None, *sorted(BLOCK_SIZES))
    choices: dict[str, Sequence[Any]] = {
        "symmetric": (True, False),
        "layout": (None, *LAYOUTS),
        "fc2_bits": (None, *sorted(WIDTHS)),
        "bits": (None, *sorted(WIDTHS)),
        "block_size": sizes,
    }
    found = []
    for format in FORMAT_CHOICES:
        own = choices if format == "int" else {"layout": (None, *LAYOUTS), "block_size": sizes}
        for values in itertools.product(*own.values()):
            fields = dict(zip(own, values, strict=True))
            try:
                found.append(Recipe(format=format, target=target, **fields))
            except ConfigError:
                continue
    return tuple(found)
