"""`Recipe`: what to do with every MoE node, validated once, when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Format, Spec
from qmoe_rules.layouts import LAYOUTS, Layout
from qmoe_rules.providers import TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.targets import Facts, Specs, Target

__all__ = ["FORMAT_CHOICES", "PROJECTIONS", "WIDTHS", "Override", "Recipe"]

_FLOATS: dict[str, Format] = {
    name: format for name, format in FORMATS.items() if format.element is not None
}
_BLOCKS = {name: format.block_size or 128 for name, format in _FLOATS.items()}

FORMAT_CHOICES = ("int", *_FLOATS)
"""The values of `format`."""

WIDTHS = tuple(format.bits for format in FORMATS.values() if format.element is None)
"""The values of `bits` and `fc2_bits` for integers."""

PROJECTIONS = ("fc1", "fc2")
"""The projections of a QMoE node that every provider takes."""

_OVERRIDABLE = ("format", "bits", "fc2_bits", "block_size", "symmetric", "method")
# What a format decides where the recipe does not.
_OF_FORMAT = ("bits", "fc2_bits", "block_size", "layout")


@dataclass(frozen=True)
class Override:
    """Other settings for the nodes whose name matches.

    Attributes:
        pattern: A node name, an fnmatch pattern, or `re:` and a regular expression that must
            match the whole name.
        settings: (field, value) pairs; the fields are format, bits, fc2_bits, block_size,
            symmetric and method.
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
                return cls(pattern, tuple((name, _value(value)) for name, _, value in pairs))
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

    Where a field is None the format decides; `specs` and `storage` say what it decided.

    Attributes:
        format: What the codes are: `"int"`, `"mxfp4"`, `"nvfp4"` or `"fp8"`.
        bits: Width of an integer code, 2, 3, 4 or 8; 4 where it is left out.
        fc2_bits: Width of fc2's codes, where it is not that of fc1's.
        block_size: Columns that share a scale: a power of two from 16, or 0 for the whole row.
            Left out, it is 0 for integers, 32 for mxfp4, 16 for nvfp4, and 128 for fp8, whose
            blocks are square, and where 0 means one scale per expert.
        symmetric: Whether integer codes are centred on zero. Otherwise zero points are stored.
        method: How codes are chosen: `"rtn"`, round to nearest.
        layout: Order of the stored bytes. For integers `"raw"`, which every provider reads and
            the default, or `"cutlass_sm80"`, which CUDA reads without repacking at load time. For
            mxfp4 and nvfp4 `"k_packed"` (CPU) or `"n_packed"` (CUDA), as the target reads it.
        target: Where the model must run right: `"portable"` (CPU and CUDA), `"cpu"`, `"cuda"`,
            `"webgpu"` or `"trt-rtx"`.
        nodes_to_exclude: Names, fnmatch patterns or `re:` patterns of nodes to leave in float.
        overrides: Other settings for some nodes (see `Override`); the first match wins.

    Raises:
        ConfigError: A field is unknown or wrong, or the target takes no node with this recipe.

    Example:
        >>> Recipe(bits=4, block_size=32).resolve("/model/layers.0/moe/MoE").block_size
        32
    """

    format: str = "int"
    bits: int | None = None
    fc2_bits: int | None = None
    block_size: int | None = None
    symmetric: bool = True
    method: str = "rtn"
    layout: str | None = None
    target: str = "portable"
    nodes_to_exclude: Sequence[str] = ()
    overrides: Sequence[AnyOverride] = ()

    def __post_init__(self) -> None:
        _one_of("format", self.format, FORMAT_CHOICES)
        _one_of("method", self.method, METHODS)
        _one_of("target", self.target, TARGETS)
        _one_of("symmetric", self.symmetric, [True, False])
        self._check_bits("bits")
        self._check_bits("fc2_bits")
        if self.block_size is not None:
            _check_block_size(self.block_size)
        for spec in self.specs.values():
            if reason := spec.refuse():
                raise ConfigError(reason)
        if self.layout is not None:
            _one_of("layout", self.layout, LAYOUTS)
        object.__setattr__(self, "nodes_to_exclude", _patterns(self.nodes_to_exclude))
        object.__setattr__(self, "overrides", _parsed(self.overrides))
        self._check_storage()
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
    def specs(self) -> Specs:
        """How the projections are stored, by name."""
        bits = 4 if self.bits is None else self.bits
        fc2_bits = bits if self.fc2_bits is None else self.fc2_bits
        return {"fc1": self._spec(bits), "fc2": self._spec(fc2_bits)}

    @property
    def storage(self) -> Layout:
        """The order of the stored bytes."""
        if self.layout is not None:
            return LAYOUTS[self.layout]
        format, target = self.specs["fc1"].format, self.provider_target
        own = [layout for layout in LAYOUTS.values() if not layout.refuse_format(format)]
        read = (layout for layout in own if not target.refuse_storage(self.specs, layout.name))
        return next(read, own[0])

    def describe(self) -> str:
        """Returns how weights are stored, in words."""
        fc1, fc2 = self.specs.values()
        return f"{fc1 if fc1 == fc2 else f'{fc1} and {fc2}'}, {self.storage.name}"

    def refuse(self, facts: Facts) -> str | None:
        """Returns why a node cannot be stored so and run right on the target, or None."""
        reason = self.provider_target.refuse(facts, self.specs)
        for name, spec in self.specs.items():
            rows, columns = facts.shapes[name]
            unfit = spec.refuse_shape(rows, columns) or self.storage.refuse(
                rows, columns, spec.format
            )
            if unfit:
                reason = reason or f"{name}_experts_weights: {unfit}"
        return reason

    def advise(self, facts: Facts) -> str | None:
        """Returns what would take a node that this recipe refuses, in words, or None.

        That is the nearest recipe for the same target, which differs in as few fields as possible,
        or else another target.
        """
        for recipe in self._neighbours():
            if not recipe.refuse(facts):
                return f"{self.difference(recipe)} would do"
        for name in TARGETS:
            other = self._replaced(target=name)
            if other and not other.refuse(facts):
                return f"target={name!r} takes it"
        return None

    def difference(self, other: Recipe) -> str:
        """Returns the fields of `other` that differ from this recipe's, as they are written."""
        pairs = [(name, getattr(other, name)) for name in _OVERRIDABLE]
        return ", ".join(f"{name}={v!r}" for name, v in pairs if v != getattr(self, name))

    def _neighbours(self) -> Iterator[Recipe]:
        """Yields the recipes for the same target that differ in few fields, the nearest first."""
        if self.format != "int":
            return
        sizes = dict.fromkeys((self.block_size, 32, 64, 128, 16, 256, 0))
        candidates: list[dict[str, Any]] = [
            {"block_size": size, "symmetric": symmetric, "fc2_bits": width}
            for width, symmetric, size in itertools.product(
                dict.fromkeys((self.fc2_bits, None)), (True, False), sizes
            )
        ]
        for fields in sorted(candidates, key=self._distance):
            if self._distance(fields) and (recipe := self._replaced(**fields)):
                yield recipe

    def _replaced(self, **fields: Any) -> Recipe | None:
        try:
            return dataclasses.replace(self, overrides=(), **fields)
        except ConfigError:
            return None

    @property
    def _overrides(self) -> tuple[Override, ...]:
        return cast(tuple[Override, ...], self.overrides)

    def _spec(self, bits: int) -> Spec:
        format = _FLOATS.get(self.format) or FORMATS[f"int{bits}"]
        size = _BLOCKS.get(self.format, 0) if self.block_size is None else self.block_size
        return Spec(format, size, self.symmetric, self.provider_target.signed(format.name))

    def _check_bits(self, field: str) -> None:
        given = getattr(self, field)
        if given is not None and self.format not in _FLOATS:
            _one_of(field, given, WIDTHS)
        elif given is not None and given != _FLOATS[self.format].bits:
            raise ConfigError(
                f"{field}={given!r} with format={self.format!r}, whose codes have "
                f"{_FLOATS[self.format].bits} bits"
            )

    def _distance(self, fields: Mapping[str, Any]) -> int:
        return sum(value != getattr(self, name) for name, value in fields.items())

    def _overridden(self, override: Override) -> Recipe:
        settings = dict(override.settings)
        if "format" in settings:  # whatever depends on the format is decided anew
            settings = {**dict.fromkeys(_OF_FORMAT), "symmetric": True, **settings}
        return dataclasses.replace(self, overrides=(), **settings)

    def _check_storage(self) -> None:
        format = self.specs["fc1"].format
        if self.layout == "cutlass_sm90":  # refused everywhere: say why, and not by whom
            raise ConfigError(str(self.storage.refuse_shape(0, 0, format.bits)))
        if reason := self.storage.refuse_format(format):
            raise ConfigError(reason)
        reason = self.provider_target.refuse_storage(self.specs, self.storage.name)
        if reason:
            takers = [
                name
                for name, target in TARGETS.items()
                if not target.refuse_storage(self.specs, self.storage.name)
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


def _value(text: str) -> int | bool | str:
    if text in ("true", "false"):
        return text == "true"
    return int(text) if re.fullmatch(r"-?[0-9]+", text) else text
