"""`Recipe`: what to do with every MoE node, validated once, when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.targets import TARGETS, Target

__all__ = ["Override", "Recipe"]

_OVERRIDABLE = ("bits", "block_size", "method")


@dataclass(frozen=True)
class Override:
    """Other settings for the nodes whose name matches.

    Attributes:
        pattern: A node name, an fnmatch pattern, or `re:` and a regular expression that must
            match the whole name.
        settings: (field, value) pairs; the fields are bits, block_size and method.
    """

    pattern: str
    settings: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise ConfigError(f"override pattern {self.pattern!r} is not a string")
        _check_pattern(self.pattern)
        if not self.settings:
            raise ConfigError(f"override for {self.pattern!r} sets nothing")
        names = [name for name, _ in self.settings]
        for name in names:
            if name not in _OVERRIDABLE:
                raise ConfigError(
                    f"override for {self.pattern!r} sets {name!r}; it may set "
                    f"{', '.join(_OVERRIDABLE)}"
                )
            if names.count(name) > 1:
                raise ConfigError(f"override for {self.pattern!r} sets {name!r} twice")

    @classmethod
    def parse(cls, given: AnyOverride) -> Override:
        """Reads an override from `("pattern", {"bits": 8})` or from `"pattern:bits=8,method=rtn"`.

        Raises:
            ConfigError: The override has another form, or sets an unknown field.
        """
        if isinstance(given, Override):
            return given
        if isinstance(given, str):
            pattern, _, text = given.rpartition(":")
            pairs = [item.partition("=") for item in text.split(",")]
            if pattern and all(name and mark and value for name, mark, value in pairs):
                return cls(pattern, tuple((name, _number(value)) for name, _, value in pairs))
        elif isinstance(given, tuple) and len(given) == 2 and isinstance(given[1], Mapping):
            return cls(given[0], tuple(given[1].items()))
        raise ConfigError(
            f"overrides: {given!r} is neither 'PATTERN:bits=8' nor ('PATTERN', {{'bits': 8}})"
        )


AnyOverride = Override | str | tuple[str, Mapping[str, Any]]
"""What `Recipe` takes for an override; it keeps an `Override`."""


@dataclass(frozen=True)
class Recipe:
    """What to do with every MoE node. Every field is also an option of the `qmoe` command.

    Attributes:
        bits: Width of a code, 4 or 8.
        block_size: Columns that share a scale: a power of two from 16, or 0 for the whole row.
        method: How codes are chosen: `"rtn"`, round to nearest.
        layout: Order of the stored bytes: `"raw"`, which every provider reads, or
            `"cutlass_sm80"`, which CUDA reads without repacking at load time.
        target: Where the model must run right: `"portable"` (CPU and CUDA), `"cpu"` or `"cuda"`.
        nodes_to_exclude: Names, fnmatch patterns or `re:` patterns of nodes to leave in float.
        overrides: Other settings for some nodes (see `Override`); the first match wins.

    Raises:
        ConfigError: A field is unknown or wrong, or the target takes no node with this recipe.

    Example:
        >>> Recipe(bits=4, block_size=32).resolve("/model/layers.0/moe/MoE").block_size
        32
    """

    bits: int = 4
    block_size: int = 0
    method: str = "rtn"
    layout: str = "raw"
    target: str = "portable"
    nodes_to_exclude: Sequence[str] = ()
    overrides: Sequence[AnyOverride] = ()

    def __post_init__(self) -> None:
        _one_of("bits", self.bits, [format.bits for format in FORMATS.values()])
        _one_of("method", self.method, METHODS)
        _one_of("layout", self.layout, LAYOUTS)
        _one_of("target", self.target, TARGETS)
        _check_block_size(self.block_size)
        object.__setattr__(self, "nodes_to_exclude", _patterns(self.nodes_to_exclude))
        object.__setattr__(self, "overrides", _parsed(self.overrides))
        self._check_target()
        for override in self._overrides:
            try:
                self._overridden(override)  # validates it, as a recipe of its own
            except ConfigError as error:
                raise ConfigError(f"override for {override.pattern!r}: {error}") from None

    @classmethod
    def of(cls, recipe: Recipe | None = None, /, **fields: Any) -> Recipe:
        """Returns `recipe` (or the default one) with `fields` set.

        Raises:
            ConfigError: A field is unknown or wrong.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                raise ConfigError(f"recipe has no field {name!r}; {hint}")
        return dataclasses.replace(recipe or cls(), **fields)

    @property
    def provider_target(self) -> Target:
        """The target's tables."""
        return TARGETS[self.target]

    def excludes(self, node: str) -> bool:
        """Returns whether the node with this name stays in float."""
        return any(_matches(pattern, node) for pattern in self.nodes_to_exclude)

    def unmatched(self, nodes: Iterable[str]) -> list[str]:
        """Returns the patterns that match none of these nodes, which are likely mistyped."""
        names = list(nodes)
        patterns = [*self.nodes_to_exclude, *(override.pattern for override in self._overrides)]
        return [given for given in patterns if not any(_matches(given, name) for name in names)]

    def resolve(self, node: str) -> Recipe:
        """Returns the recipe for one node, with the first override that matches applied."""
        for override in self._overrides:
            if _matches(override.pattern, node):
                return self._overridden(override)
        return self

    @property
    def spec(self) -> Spec:
        """How a projection is stored."""
        return Spec(FORMATS[f"int{self.bits}"], self.block_size)

    @property
    def _overrides(self) -> tuple[Override, ...]:
        return cast(tuple[Override, ...], self.overrides)

    def _overridden(self, override: Override) -> Recipe:
        return dataclasses.replace(self, overrides=(), **dict(override.settings))

    def _check_target(self) -> None:
        target = self.provider_target
        if self.layout == "cutlass_sm90":  # refused everywhere: say the reason, not the list
            raise ConfigError(str(LAYOUTS[self.layout].refuse(0, 0, self.bits)))
        for reason in (target.refuse_spec(self.spec), target.refuse_layout(self.layout)):
            if reason:
                takers = [
                    name
                    for name, other in TARGETS.items()
                    if not other.refuse_spec(self.spec) and not other.refuse_layout(self.layout)
                ]
                hint = f"; target={takers[0]!r} takes this recipe" if takers else ""
                raise ConfigError(f"target {self.target!r}: {reason}{hint}")


def _one_of(field: str, value: object, allowed: Iterable[object]) -> None:
    choices = list(allowed)
    if type(value) is not type(choices[0]) or value not in choices:
        raise ConfigError(f"{field}={value!r}; it may be {', '.join(map(repr, choices))}")


def _check_block_size(size: object) -> None:
    is_int = isinstance(size, int) and not isinstance(size, bool)
    if not is_int or (size and (size < 16 or size & (size - 1))):  # type: ignore[operator]
        raise ConfigError(
            f"block_size={size!r}; it may be 0 (one scale per row) or a power of two from 16"
        )


def _patterns(given: object) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"nodes_to_exclude={given!r}; it is a sequence of names or patterns")
    patterns = tuple(str(pattern) for pattern in given)
    for pattern in patterns:
        _check_pattern(pattern)
    return patterns


def _parsed(given: object) -> tuple[Override, ...]:
    if isinstance(given, (str, Override)) or not isinstance(given, Iterable):
        raise ConfigError(f"overrides={given!r}; it is a sequence of overrides")
    return tuple(Override.parse(override) for override in given)


def _check_pattern(pattern: str) -> None:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as error:
            raise ConfigError(f"pattern {pattern!r} is no regular expression: {error}") from None


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


def _number(text: str) -> int | str:
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text
