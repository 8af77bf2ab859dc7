"""The recipe's fields as options, for the command line and for other tools' configurations."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import FORMAT_CHOICES, WIDTHS, Recipe

__all__ = ["OPTIONS", "Option"]


@dataclass(frozen=True)
class Option:
    """One field of the recipe.

    Attributes:
        name: The field.
        kind: The type of its values: int, str, bool, or list for a list of strings.
        help: What it says, in one sentence without a full stop.
        choices: The values it may have, where they are few.
        shown: What stands for its value in a list of options.
    """

    name: str
    kind: type
    help: str
    choices: tuple[Any, ...] = ()
    shown: str = ""

    @property
    def default(self) -> Any:
        """The value where it is left out; None where the format decides."""
        if self.kind is list:
            return []
        return next(f.default for f in dataclasses.fields(Recipe) if f.name == self.name)


# A layout that no target reads is refused with the reason, and not offered.
_READ = {
    layout
    for target in TARGETS.values()
    for provider in target.providers
    for kernel in provider.kernels.values()
    for layout in kernel.layouts
}

OPTIONS = (
    Option("format", str, "what the codes are (default: int)", FORMAT_CHOICES),
    Option("bits", int, "width of an integer code (default: 4)", WIDTHS),
    Option("fc2_bits", int, "width of fc2's codes (default: that of fc1's)", WIDTHS),
    Option(
        "block_size",
        int,
        "columns per scale, a power of two from 16; 0 for the whole row (default: 0 where the "
        "target takes it, else 32, or 128 for trt-rtx; mxfp4 has 32, nvfp4 16, fp8 squares of 128)",
        shown="B",
    ),
    Option("symmetric", bool, "no zero points: integer codes are centred on zero"),
    Option("method", str, "how codes are chosen (default: rtn)", tuple(METHODS)),
    Option(
        "calibration",
        str,
        "what the experts have seen (see qmoe calibrate), for methods that ask for it",
        shown="FILE",
    ),
    Option(
        "layout",
        str,
        "order of the stored bytes (default: raw, or what the target reads of the format)",
        tuple(name for name in LAYOUTS if name in _READ),
    ),
    Option("target", str, "where the model must run right (default: portable)", tuple(TARGETS)),
    Option(
        "nodes_to_exclude",
        list,
        "leave these nodes in float: a name, an fnmatch pattern or re:REGEX; repeatable",
        shown="PATTERN",
    ),
    Option(
        "overrides",
        list,
        "other settings for some nodes, such as '*layers.0*:bits=8,block_size=32'; repeatable, "
        "the first match wins",
        shown="PATTERN:FIELD=VALUE,...",
    ),
    Option(
        "budget",
        str,
        "choose widths and blocks node by node, for the least error in so many bits per weight "
        "(3.5), or bytes of all experts (12GB)",
        shown="SIZE",
    ),
)
