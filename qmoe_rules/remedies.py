"""What would mend a node that a target does not run right: a call, another recipe or target."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import GATED, INTERLEAVED, Facts, Fault, Stored
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import TARGETS
from qmoe_rules.recipe import BLOCK_SIZES, Recipe

__all__ = ["remedy"]

_AS_LOGITS = (
    "compute the routing in the graph: scatter the logarithms of the chosen weights into "
    "router_probs, and set normalize_routing_weights=1"
)
# What mends a trap in the node itself.
_BY_HAND = {
    "computed_weights": "fold the weights into constants",
    "fused_without_gate": "set swiglu_fusion=0",
    "negative_block": "leave block_size out",
    "no_gate": "set swiglu_fusion to 1 (interleaved) or 2 (halves), as the rows of fc1 lie",
    "no_global_scale": "add fc1_global_scale and fc2_global_scale, all ones",
    "normalize": "add the input router_weights = Softmax(router_probs)",
    "router_weights": _AS_LOGITS,
    "scale_type": "cast the scales to the type of the input",
    "sparse_mixer": _AS_LOGITS,
    "swiglu_limit": "set swiglu_limit to infinity",
    "unknown_router_weights": _AS_LOGITS,
}
_OF_THE_GATE = frozenset({"activation", "fc3", "fc3_biases", "fused_fc3"})


def remedy(facts: Facts, stored: Stored | None, fault: Fault, target: str) -> str:
    """Returns what would make a node run right on a target, or elsewhere; empty where nothing is.

    Args:
        facts: The node.
        stored: How a QMoE's weights lie in the file; None for a MoE.
        fault: What is wrong with it on the target.
        target: Name of the target.
    """
    ways = [*_ways(facts, stored, fault, target)]
    others = [
        name
        for name, tables in TARGETS.items()
        if name != target and tables.judge(facts, stored) is None
    ]
    if others:
        ways.append(f"it is right as it stands for {', '.join(others)}")
    return "; or ".join(ways)


def _ways(facts: Facts, stored: Stored | None, fault: Fault, target: str) -> Iterator[str]:
    if fault.about in _BY_HAND:
        yield _BY_HAND[fault.about]
    elif stored and fault.about == "layout" and (way := _relayout(stored, target)):
        yield way
    else:
        if stored is None and fault.about in _OF_THE_GATE and _interleaved_is_right(facts, target):
            yield "normalize_moe_rules() interleaves gate and linear rows"
        yield from _requantized(facts, stored, target)


def _interleaved_is_right(facts: Facts, target: str) -> bool:
    return TARGETS[target].judge(_interleaved(facts), None) is None


def _interleaved(facts: Facts) -> Facts:
    """Returns the facts of a node as `normalize_moe_rules` leaves it."""
    activation = facts.activation
    if facts.fc3:
        activation = INTERLEAVED.get(activation, activation)
    fusion = int(activation in GATED)
    others = facts.others - {"fc3_biases"}
    return dataclasses.replace(
        facts, activation=activation, fusion=fusion, fc3=False, others=others
    )


def _relayout(stored: Stored, target: str) -> str | None:
    """Returns the call that moves integers into a layout that every provider reads, or None."""
    layouts, format = stored.layouts, stored.specs["fc1"].format
    kernels = [provider.kernel(stored.specs) for provider in TARGETS[target].providers]
    reads_raw = all(kernel and 0 in kernel.reads for kernel in kernels)
    if not reads_raw or LAYOUTS["raw"].refuse_format(format):
        return None
    if stored.prepacked in (0, 1) and len(layouts) == 1:
        (layout,) = layouts
        prepacked = LAYOUTS[layout].prepacked
        if prepacked != stored.prepacked:
            return f"set weights_prepacked={prepacked}, as the shape of the weights says"
        return "relayout_qmoe_rules('raw')"
    if len(layouts) == 1:
        (layout,) = layouts
        return f"relayout_qmoe_rules('raw', source_layout={layout!r})"
    if not layouts:
        return None
    return (
        "relayout_qmoe_rules('raw', source_layout='raw') where a CPU build wrote the weights, or "
        "source_layout='cutlass_sm80' where a CUDA build did"
    )


def _requantized(facts: Facts, stored: Stored | None, target: str) -> Iterator[str]:
    """Yields how to make the node anew; `quantize` interleaves gate and linear rows itself."""
    facts = dataclasses.replace(_interleaved(facts), scales=frozenset(), others=frozenset())
    recipe = next(_recipes(facts, stored, target), None)
    if recipe is None:
        return
    way = f"quantize with {_fields(recipe)}"
    if stored is None:
        yield way
    elif stored.specs["fc1"].format.element is not None:
        yield f"{way} from the float model"
    else:
        stated = stored.prepacked != -1 or len(stored.layouts) != 1
        source = "" if stated else f"source_layout={next(iter(stored.layouts))!r}"
        yield f"qmoe_to_moe_rules({source}), then {way}"


def _recipes(facts: Facts, stored: Stored | None, target: str) -> Iterator[Recipe]:
    """Yields the recipes that a target takes the node with, the nearest to what it has first."""
    for fields in _choices(stored):
        try:
            recipe = Recipe(target=target, **fields)
        except ConfigError:
            continue
        if not recipe.refuse(facts):
            yield recipe


def _choices(stored: Stored | None) -> Iterator[dict[str, Any]]:
    """Yields fields of recipes, beginning with how a QMoE is stored."""
    fc1 = stored.specs["fc1"] if stored else Spec(FORMATS["int4"], 32)
    fc2 = stored.specs["fc2"] if stored else fc1
    if fc1.format.element is not None:
        yield {"format": fc1.format.name}
        return
    widths = dict.fromkeys((fc2.format.bits, fc1.format.bits))
    signs = dict.fromkeys((fc1.symmetric, True))
    sizes = dict.fromkeys((fc1.block_size, *BLOCK_SIZES))
    for width, symmetric, size in itertools.product(widths, signs, sizes):
        yield {
            "bits": fc1.format.bits,
            "fc2_bits": width,
            "block_size": size,
            "symmetric": symmetric,
        }


def _fields(recipe: Recipe) -> str:
    names = ("format", "bits", "fc2_bits", "block_size", "symmetric", "target")
    default = Recipe()
    given = {name: getattr(recipe, name) for name in names}
    if given["fc2_bits"] == given["bits"]:
        del given["fc2_bits"]
    return ", ".join(
        f"{name}={value!r}"
        for name, value in given.items()
        if value != getattr(default, name) or name == "target"
    )
