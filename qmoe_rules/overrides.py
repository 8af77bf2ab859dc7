"""`Override`: other settings for some nodes, and the patterns that say which.

A pattern is a node's name, an fnmatch pattern, or `re:` and a regular expression that must match
the whole name. Expressions are RE2's, which has no look-around and needs no more than linear time:
names come from models, and models from anywhere.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qmoe_rules.errors import ConfigError

__all__ = [
    "OVERRIDABLE",
    "AnyOverride",
    "Override",
    "check_pattern",
    "exactly",
    "idle",
    "matches",
    "parse_overrides",
    "parse_patterns",
]

_MEMORY = 64 << 20  # bytes that a compiled expression may take

OVERRIDABLE = ("format", "bits", "fc2_bits", "block_size", "symmetric", "method")
"""The fields of a recipe that an override may set."""


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
        check_pattern(self.pattern)
        if not self.settings:
            raise ConfigError(f"override for {self.pattern!r} sets nothing")
        names = [name for name, _ in self.settings]
        for name in names:
            if name not in OVERRIDABLE:
                raise ConfigError(
                    f"override for {self.pattern!r} sets {name!r}; it may set "
                    f"{', '.join(OVERRIDABLE)}"
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


def parse_overrides(given: object) -> tuple[Override, ...]:
    """Reads a sequence of overrides, of any form that `Override.parse` takes.

    Raises:
        ConfigError: It is something else, or an override is wrong.
    """
    if isinstance(given, (str, Override)) or not isinstance(given, Iterable):
        raise ConfigError(f"overrides={given!r}; it is a sequence of overrides")
    return tuple(Override.parse(override) for override in given)


def parse_patterns(given: object) -> tuple[str, ...]:
    """Reads a sequence of patterns.

    Raises:
        ConfigError: It is something else, or a pattern is a broken regular expression.
    """
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ConfigError(f"nodes_to_exclude={given!r}; it is a sequence of names or patterns")
    patterns = tuple(str(pattern) for pattern in given)
    for pattern in patterns:
        check_pattern(pattern)
    return patterns


def check_pattern(pattern: str) -> None:
    """Raises ConfigError where a pattern is a broken regular expression."""
    if pattern.startswith("re:"):
        _expression(pattern[3:])


def exactly(name: str) -> str:
    """Returns a pattern that matches this name and no other."""
    plain = glob.escape(name) == name and not name.startswith("re:")
    return name if plain else f"re:{re.escape(name)}"


def matches(pattern: str, name: str) -> bool:
    """Returns whether a pattern matches a node's name."""
    if pattern.startswith("re:"):
        return _expression(pattern[3:]).fullmatch(name) is not None
    return name == pattern or fnmatch.fnmatchcase(name, pattern)


@functools.lru_cache
def _expression(text: str) -> Any:
    import re2

    options = re2.Options()
    options.log_errors = False
    options.dot_nl = False
    options.max_mem = _MEMORY
    try:
        return re2.compile(text, options)
    except (UnicodeEncodeError, re2.error) as error:
        given = error.args[0]
        reason = given.decode(errors="replace") if isinstance(given, bytes) else str(error)
        shown = reprlib.repr(f"re:{text}")
        raise ConfigError(f"pattern {shown} is no regular expression of RE2: {reason}") from None


def _value(text: str) -> int | bool | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text


def idle(patterns: Sequence[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields the patterns that do nothing, which are likely mistyped or misplaced, and why.

    Args:
        patterns: The patterns; the first that matches a name counts.
        names: The names of all nodes.
    """
    names = list(names)
    matched = [{name for name in names if matches(pattern, name)} for pattern in patterns]
    for place, (pattern, own) in enumerate(zip(patterns, matched, strict=True)):
        if not own:
            yield pattern, f"matches no node; they are {', '.join(names) or 'none'}"
        elif own <= set().union(*matched[:place]):
            yield pattern, "is never used: earlier ones match all its nodes"
