"""Nodes and ways to store them, as targets are asked about them."""

from __future__ import annotations

import dataclasses
from typing import Any

from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import Facts, Specs

# A node that every target takes; the tables below say what they change of it.
PLAIN = Facts(dtype="float16", activation="swiglu", fusion=1, hidden=128, inter=192)
BLOCKS = (0, 8, 16, 32, 48, 64, 128, 256, 512)
SPECS = [
    Spec(format, block, symmetric)
    for format in FORMATS.values()
    for block in BLOCKS
    for symmetric in (True, False)
    if symmetric or format.element is None
]


def specs_of(fc1: str, block: int = 0, *, fc2: str | None = None, symmetric: bool = True) -> Specs:
    """Both projections in one way, but for the format of fc2."""
    return {
        name: Spec(FORMATS[format], block, symmetric)
        for name, format in (("fc1", fc1), ("fc2", fc2 or fc1))
    }


def both(spec: Spec) -> Specs:
    return {"fc1": spec, "fc2": spec}


INT4_128 = specs_of("int4", 128)


def changed(**fields: Any) -> Facts:
    return dataclasses.replace(PLAIN, **fields)
