"""`Recipe`: what to do with every MoE node, validated once, when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Format, Spec
from qmoe_rules.kernels import Facts, Specs
from qmoe_rules.layouts import LAYOUTS, Layout
from qmoe_rules.overrides import (
    OVERRIDABLE,
    AnyOverride,
    Override,
    matches,
    parse_overrides,
    parse_patterns,
)
from qmoe_rules.providers import TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.sizes import parse_bytes
from qmoe_rules.statistics import PROJECTIONS, Calibration, ProjectionStatistics
from qmoe_rules.targets import Target

__all__ = ["BLOCK_SIZES", "FORMAT_CHOICES", "MOST_BITS", "WIDTHS", "Override", "Recipe"]

_FLOATS: dict[str, Format] = {
    name: format for name, format in FORMATS.items() if format.element is not None
}

FORMAT_CHOICES = ("int", *_FLOATS)
"""The values of `format`."""

WIDTHS = tuple(format.bits for format in FORMATS.values() if format.element is None)
"""The values of `bits` and `fc2_bits` for integers."""

BLOCK_SIZES = (32, 64, 128, 16, 256, 0)
"""The values of `block_size` that kernels of integers take, the more usual ones first."""

MOST_BITS = 32
"""The greatest `budget` that means bits per weight; a greater one means bytes."""

# The block size of formats with square blocks, where the recipe does not say.
_SQUARE = 128
_WITH_HESSIANS = frozenset({"gptq"})
_WITHOUT_STATISTICS = frozenset({"rtn"})
# What a format decides where the recipe does not.
_OF_FORMAT = ("bits", "fc2_bits", "block_size", "layout")


@dataclass(frozen=True)
class Recipe:
    """What to do with every MoE node. Every field is also an option of the `qmoe` command.

    Where a field is None the format and the target decide; `specs` and `storage` say what.

    Attributes:
        format: What the codes are: `"int"`, `"mxfp4"`, `"nvfp4"` or `"fp8"`.
        bits: Width of an integer code, 2, 3, 4 or 8; 4 where it is left out.
        fc2_bits: Width of fc2's codes, where it is not that of fc1's.
        block_size: Columns that share a scale: a power of two from 16, or 0 for the whole row.
            Left out, it is 0 for integers where every provider of the target takes that, and else
            the first of 32, 64, 128, 16 and 256 that they take; 32 for mxfp4, 16 for nvfp4, and
            128 for fp8, whose blocks are square, and where 0 means one scale per expert.
        symmetric: Whether integer codes are centred on zero. Otherwise zero points are stored.
        method: How codes are chosen: `"rtn"`, round to nearest; `"search"`, the scales of least
            error, by the calibration where there is one; or `"gptq"`, error feedback, which asks
            for a calibration with Hessians. The router and all else outside the experts keep
            their bytes whatever it is.
        calibration: What the experts have seen, for methods that ask for it: a `Calibration`, or
            the file of one.
        layout: Order of the stored bytes. For integers `"raw"`, which every provider reads and
            the default, or `"cutlass_sm80"`, which CUDA reads without repacking at load time. For
            mxfp4 and nvfp4 `"k_packed"` (CPU) or `"n_packed"` (CUDA), as the target reads it.
        target: Where the model must run right: `"portable"` (CPU and CUDA), `"cpu"`, `"cuda"`,
            `"webgpu"` or `"trt-rtx"`.
        nodes_to_exclude: Names, fnmatch patterns or `re:` patterns of nodes to leave in float.
        overrides: Other settings for some nodes (see `Override`); the first match wins.
        budget: How large all experts together may become: bits per weight up to 32, scales and
            zero points included, or bytes, as a number or like `"12GB"`. Widths and block sizes
            are then chosen node by node, for the least error; nodes that stay in float, or that an
            override names, do not count. For `plan`, `quantize` and `QuantizeMoEPass`, which see
            the whole model, and quantize some experts of every node to measure the error.

    Raises:
        ConfigError: A field is unknown or wrong, or the target takes no node with this recipe.
        SourceError: The calibration cannot be read.

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
    calibration: Calibration | str | os.PathLike[str] | None = None
    layout: str | None = None
    target: str = "portable"
    nodes_to_exclude: Sequence[str] = ()
    overrides: Sequence[AnyOverride] = ()
    budget: float | str | None = None

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
        object.__setattr__(self, "calibration", _calibration(self.calibration, self.method))
        object.__setattr__(self, "nodes_to_exclude", parse_patterns(self.nodes_to_exclude))
        object.__setattr__(self, "overrides", parse_overrides(self.overrides))
        object.__setattr__(self, "budget", self._checked_budget())
        self._check_storage()
        for override in self.given_overrides:
            try:
                self._overridden(override)  # validates it, as a recipe of its own
            except ConfigError as error:
                raise ConfigError(f"override for {override.pattern!r}: {error}") from None

    @classmethod
    def of(cls, recipe: Recipe | None = None, /, **fields: Any) -> Recipe:
        """Returns `recipe` (or the default one) with `fields` set.

        Raises:
            ConfigError: A field is unknown or wrong.
            TypeError: `recipe` is no recipe.
        """
        if not isinstance(recipe, cls | None):
            raise TypeError(
                f"recipe={recipe!r} is no Recipe; fields are given by name, such as bits=4"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
                if name == "asymmetric":
                    hint = "symmetric=False stores zero points"
                raise ConfigError(f"recipe has no field {name!r}; {hint}")
        return dataclasses.replace(recipe or cls(), **fields)

    @property
    def provider_target(self) -> Target:
        """The target's tables."""
        return TARGETS[self.target]

    def excludes(self, node: str) -> bool:
        """Returns whether the node with this name stays in float."""
        return any(matches(pattern, node) for pattern in self.nodes_to_exclude)

    @property
    def patterns(self) -> list[str]:
        """What says which nodes are excluded or overridden; the first that matches counts."""
        return [*self.nodes_to_exclude, *(each.pattern for each in self.given_overrides)]

    def resolve(self, node: str) -> Recipe:
        """Returns the recipe for one node, with the first override that matches applied."""
        for override in self.given_overrides:
            if matches(override.pattern, node):
                return self._overridden(override)
        return self

    @property
    def specs(self) -> Specs:
        """How the projections are stored, by name."""
        return self._specs_on(self.target)

    def statistics(self, node: str, projection: str) -> ProjectionStatistics | None:
        """Returns what is known of a projection's inputs, where the method asks for it."""
        if not isinstance(self.calibration, Calibration) or self.method in _WITHOUT_STATISTICS:
            return None
        return ProjectionStatistics(
            self.calibration, node, projection, self.method in _WITH_HESSIANS
        )

    @property
    def storage(self) -> Layout:
        """The order of the stored bytes."""
        if self.layout is not None:
            return LAYOUTS[self.layout]
        read = self.provider_target.layouts(self.specs)
        return next(layout for name, layout in LAYOUTS.items() if name in read)

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
        pairs = [(name, getattr(other, name)) for name in OVERRIDABLE]
        return ", ".join(f"{name}={v!r}" for name, v in pairs if v != getattr(self, name))

    def _neighbours(self) -> Iterator[Recipe]:
        """Yields the recipes for the same target that differ in few fields, the nearest first."""
        if self.format != "int":
            return
        sizes = dict.fromkeys((self.block_size, *BLOCK_SIZES))
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
            return dataclasses.replace(self, overrides=(), budget=None, **fields)
        except ConfigError:
            return None

    @property
    def given_overrides(self) -> tuple[Override, ...]:
        """The overrides, parsed."""
        return cast(tuple[Override, ...], self.overrides)

    def _specs_on(self, target: str) -> Specs:
        """Returns how the projections are stored for a target."""
        return _specs(
            target, self.format, self.bits, self.fc2_bits, self.block_size, self.symmetric
        )

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

    def _checked_budget(self) -> float | None:
        given = self.budget
        if given is None:
            return None
        if isinstance(given, str):
            size: float = parse_bytes(given) or 0
            if re.fullmatch(r"[0-9]+(\.[0-9]+)?", given.strip()):
                size = float(given)
            elif size <= MOST_BITS:  # or it would be taken for bits
                size = 0
            given = size
        is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
        if not is_number or not 0 < given < math.inf:
            raise ConfigError(
                f"budget={self.budget!r}; it may be bits per weight, such as 3.5, or a size, such "
                "as '12GB'"
            )
        for field in ("bits", "fc2_bits", "block_size"):
            if getattr(self, field) is not None:
                raise ConfigError(
                    f"{field}={getattr(self, field)!r} with a budget, which chooses it"
                )
        if self.format != "int":
            raise ConfigError(f"format={self.format!r} with a budget, which chooses among integers")
        return given

    def _overridden(self, override: Override) -> Recipe:
        settings = dict(override.settings)
        if "format" in settings:  # whatever depends on the format is decided anew
            settings = {**dict.fromkeys(_OF_FORMAT), "symmetric": True, **settings}
        return dataclasses.replace(self, overrides=(), budget=None, **settings)

    def _check_storage(self) -> None:
        format = self.specs["fc1"].format
        if self.layout == "cutlass_sm90":  # refused everywhere: say why, and not by whom
            raise ConfigError(str(self.storage.refuse_shape(0, 0, format.bits)))
        if self.layout is not None and (reason := self.storage.refuse_format(format)):
            raise ConfigError(reason)
        reasons = {
            name: target.refuse_storage(self._specs_on(name), self.layout)
            for name, target in TARGETS.items()
        }
        if reason := reasons[self.target]:
            taker = next((name for name in TARGETS if reasons[name] is None), None)
            hint = f"; target={taker!r} takes this recipe" if taker else ""
            raise ConfigError(f"target {self.target!r}: {reason}{hint}")


@functools.cache
def _specs(
    target: str,
    format: str,
    bits: int | None,
    fc2_bits: int | None,
    block_size: int | None,
    symmetric: bool,
) -> Specs:
    """Returns how the fields of a recipe store the projections, with what they leave open decided.

    An open block size is the first that the providers have least against, which is nothing where
    any other one would do.
    """
    tables = TARGETS[target]
    fc1 = _FLOATS.get(format) or FORMATS[f"int{bits or 4}"]
    fc2 = _FLOATS.get(format) or FORMATS[f"int{fc2_bits or bits or 4}"]
    sizes: tuple[int, ...] = (0, *BLOCK_SIZES)
    if block_size is not None:
        sizes = (block_size,)
    elif format in _FLOATS:
        sizes = (fc1.block_size or _SQUARE,)
    ways = [
        {
            name: Spec(each, size, symmetric, tables.signed(each.name))
            for name, each in zip(PROJECTIONS, (fc1, fc2), strict=True)
        }
        for size in sizes
    ]
    return min(ways, key=tables.objections)


def _one_of(field: str, value: object, allowed: Iterable[object]) -> None:
    choices = list(allowed)
    if type(value) is not type(choices[0]) or value not in choices:
        raise ConfigError(f"{field}={value!r}; it may be {', '.join(map(repr, choices))}")


def _calibration(given: object, method: str) -> Calibration | None:
    if isinstance(given, (str, os.PathLike)):
        given = Calibration.load(given)
    if given is not None and not isinstance(given, Calibration):
        raise ConfigError(f"calibration={given!r}; it is a Calibration, or the file of one")
    if method in _WITH_HESSIANS and (given is None or not given.hessian):
        lacks = "calibration=..." if given is None else f"Hessians, and {given.path} has none"
        raise ConfigError(
            f"method={method!r} needs {lacks}; make one with: qmoe calibrate MODEL DATA OUT "
            "--hessian"
        )
    return given


def _check_block_size(size: object) -> None:
    is_int = isinstance(size, int) and not isinstance(size, bool)
    if not is_int or (size and (size < 16 or size & (size - 1))):  # type: ignore[operator]
        raise ConfigError(
            f"block_size={size!r}; it may be 0 (one scale per row) or a power of two from 16"
        )
