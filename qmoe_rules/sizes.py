"""Sizes as people write them."""

from __future__ import annotations

import re

__all__ = ["parse_bytes"]

_MOST = 1 << 63


def parse_bytes(text: str) -> int | None:
    """Returns the bytes that a text spells, None where it spells none.

    A size is a number and a unit, of 1000s or, with an i, of 1024s.

    Example:
        >>> parse_bytes("2GB"), parse_bytes("500 MiB")
        (2000000000, 524288000)
    """
    pattern = r"([0-9]+(?:\.[0-9]+)?) *(?:([kmgt])(i?))?b?"
    found = re.fullmatch(pattern, text.strip().lower())
    if found is None:
        return None
    base = 1024 if found[3] else 1000
    size = float(found[1]) * base ** " kmgt".index(found[2] or " ")
    return int(size) or None if size < _MOST else None
