"""`audit`: what an execution provider would make of a MoE or QMoE node, whoever wrote it.

The question is put to the same tables that decide what this library converts. What the tables need
is read from attributes and shapes; weights are not. A QMoE does not always state the order of its
bytes, but its shapes often tell it: the scales have N rows in every layout, and the weights are
[E, N, K*bits/8] or [E, K, N*bits/8].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.facts import facts_of
from qmoe_rules.formats import SCALE_DTYPES, Spec, format_of
from qmoe_rules.kernels import (
    GATED,
    REFUSED,
    RIGHT,
    UNKNOWN,
    Facts,
    Fault,
    Stored,
)
from qmoe_rules.providers import TARGETS
from qmoe_rules.remedies import remedy
from qmoe_rules.stored import STORED_LAYOUTS
from qmoe_rules.weights import resolve

__all__ = ["Audit", "audit"]

_TWICE = (
    "router_probs comes from a Softmax, and the operator applies softmax to it again; the exporter "
    "may not have meant it"
)

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Audit:
    """What a target would make of one node.

    Attributes:
        verdict: `RIGHT`, `GARBAGE`, `REFUSED` or `UNKNOWN` (see `kernels`).
        reason: Why it is not right; empty where it is.
        remedy: What would mend it; empty where nothing is known to.
        notes: What its owner should know all the same.
    """

    verdict: str
    reason: str = ""
    remedy: str = ""
    notes: tuple[str, ...] = ()


def audit(node: ir.Node, target: str) -> Audit:
    """Returns what a target would make of a MoE or QMoE node.

    Args:
        node: The node; its weights are not read, its scales only where their signs matter.
        target: Name of the target, a key of `TARGETS`.
    """
    tables = TARGETS[target]
    try:
        facts, stored = _read_qmoe(node) if ops.is_op(node, "QMoE") else _read_moe(node)
    except _FaultError as found:
        return Audit(found.fault.verdict, found.fault.reason)
    if stored and _asks_for_signs(target, stored) and _has_negative_scales(node):
        facts = dataclasses.replace(facts, others=facts.others | {"signed_scales"})
    fault = tables.judge(facts, stored)
    if fault is not None:
        return Audit(fault.verdict, fault.reason, remedy(facts, stored, fault, target))
    notes = tables.warnings(facts, stored.specs if stored else {})
    return Audit(RIGHT, notes=(*notes, _TWICE) if ops.routes_by_softmax(node) else notes)


class _FaultError(Exception):
    """What is wrong with a node for every provider."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(reason)
        self.fault = Fault(verdict, reason, "file")


def _read_moe(node: ir.Node) -> tuple[Facts, None]:
    given, values = ops.inputs(node), ops.attributes(node)
    _check_schema(node)
    shapes = {name: _shape(given, f"{name}_experts_weights") for name in ops.projections(given)}
    return _facts(node, given, values, shapes), None


def _read_qmoe(node: ir.Node) -> tuple[Facts, Stored]:
    given, values = ops.inputs(node), ops.attributes(node)
    _check_schema(node)
    specs = {name: _spec(name, given, values) for name in ops.projections(given)}
    for name, spec in specs.items():
        _check_types(name, given, spec)
    sides = {name: _sides(name, given, spec) for name, spec in specs.items()}
    shapes = {name: next(iter(found.values())) for name, found in sides.items()}
    orders = set.intersection(*(set(found) for found in sides.values()))
    layouts = _layouts(orders, values["quant_type"], values["weights_prepacked"])
    facts = _facts(node, given, values, shapes)
    scales = {
        _type_of(given[f"{name}_scales"])
        for name, spec in specs.items()
        if spec.format.scale is None or spec.format.square
    }
    facts = dataclasses.replace(
        facts,
        scales=frozenset(scales - {facts.dtype, ""}),
        others=facts.others | {*_traps(given, values, specs, shapes["fc2"][0])},
    )
    return facts, Stored(specs, values["weights_prepacked"], layouts)


def _check_schema(node: ir.Node) -> None:
    if unknown := ops.refuse_unknown(node):
        raise _FaultError(REFUSED, f"{unknown} in ONNX Runtime 1.32")
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            raise _FaultError(UNKNOWN, f"attribute {name} is what the caller of the function gives")


def _facts(
    node: ir.Node,
    given: Mapping[str, ir.Value | None],
    values: Mapping[str, Any],
    shapes: Mapping[str, Shape],
) -> Facts:
    """Returns the facts of a node whose weights are [E, N, K] by projection."""
    gated = values["activation_type"] in GATED
    biased = given["fc1_experts_bias"] is not None or given["fc3_experts_bias"] is not None
    # Which fusions a kernel takes, and whether it minds a limit without a gate, say the tables.
    asked = {**values, "swiglu_fusion": int(gated and "fc3" not in shapes)}
    if not gated:
        asked["swiglu_limit"] = None
    if reason := ops.refuse_shapes(shapes["fc1"], shapes["fc2"], given, asked, shapes.get("fc3")):
        raise _FaultError(REFUSED, reason)
    return dataclasses.replace(
        facts_of(_dtype(node, given), shapes["fc2"], values),
        fc3="fc3" in shapes,
        limited=values["swiglu_limit"] is not None or not gated,
        others=frozenset({"fc3_biases"} if "fc3" in shapes and biased else ()),
    )


def _shape(given: Mapping[str, ir.Value | None], slot: str) -> Shape:
    value = given[slot]
    if value is None:
        raise _FaultError(REFUSED, f"{slot}: it is missing")
    shape = ops.static_shape(value)
    if shape is None or None in shape:
        slices = resolve(value)
        shape = None if isinstance(slices, str) else slices.shape
    if shape is None:
        raise _FaultError(UNKNOWN, f"{slot}: its shape is not known")
    known = tuple(size for size in shape if size is not None)
    if slot.endswith("_weights") and (len(known) != 3 or 0 in known):
        raise _FaultError(REFUSED, f"{slot} is {list(known)}; it has three axes, none empty")
    return known


def _dtype(node: ir.Node, given: Mapping[str, ir.Value | None]) -> str:
    """Returns the activation type, which the inputs share that are not stored in another."""
    shared = ["input", "router_probs", "fc1_experts_bias", "fc2_experts_bias"]
    shared.append("fc1_scales" if ops.is_op(node, "QMoE") else "fc1_experts_weights")
    for value in (*node.outputs, *(given[slot] for slot in shared)):
        if known := _type_of(value):
            return known
    raise _FaultError(UNKNOWN, "the type of its input is not known")


def _type_of(value: ir.Value | None) -> str:
    """Returns the name of a value's type, empty where it is no activation type or not known."""
    if value is None or value.dtype in (None, ir.DataType.UNDEFINED):
        return ""
    name = str(value.dtype.numpy().name)
    return name if name in SCALE_DTYPES else ""


def _spec(name: str, given: Mapping[str, ir.Value | None], values: Mapping[str, Any]) -> Spec:
    own, size = values[f"{name}_expert_weight_bits"], values["block_size"]
    bits = values["expert_weight_bits"] if own is None else own
    quant_type = values["quant_type"]
    format = format_of(quant_type, bits)
    if format is None and quant_type == "int":
        raise _FaultError(REFUSED, f"{name} has {bits}-bit codes, and no kernel takes them")
    if format is None:
        raise _FaultError(UNKNOWN, f"what providers do with quant_type={quant_type!r} is not known")
    if bits != format.bits:
        raise _FaultError(
            REFUSED,
            f"{name} has {bits}-bit codes with {format.name}, whose codes have {format.bits}",
        )
    if format.block_size and (size or 0) > 0 and size != format.block_size:
        raise _FaultError(
            REFUSED,
            f"block_size={size} with {format.name}, whose blocks have {format.block_size} columns",
        )
    size = format.block_size or max(size or 0, 0)
    return Spec(format, size, symmetric=given[f"{name}_zero_points"] is None)


def _check_types(name: str, given: Mapping[str, ir.Value | None], spec: Spec) -> None:
    """Raises unless what a projection stores has the types that its format fixes."""
    for part, (_, dtype) in spec.parts(1, 1, np.dtype(np.float32)).items():
        slot = ops.slot(name, part)
        found = _type_of(given[slot])
        free = part == "scales" and (spec.format.scale is None or spec.format.square)
        if found and not free and found != dtype.name:
            raise _FaultError(REFUSED, f"{slot} is {found}; with {spec.format.name} it is {dtype}")


def _sides(
    name: str, given: Mapping[str, ir.Value | None], spec: Spec
) -> dict[bool, tuple[int, int, int]]:
    """Returns the (E, N, K) that a projection's shapes allow, by whether K comes before N."""
    slot, bits = f"{name}_experts_weights", spec.format.bits
    weights = _shape(given, slot)
    experts, first, last = weights
    codes = last * 8 // bits
    shapes = {
        part: _shape(given, ops.slot(name, part))
        for part in spec.parts(1, 1, np.dtype(np.float32))
        if part != "weights"
        and (part != "global_scale" or given[f"{name}_global_scale"] is not None)
    }
    found = {}
    for transposed in (False,) if spec.format.square or bits == 3 else (False, True):
        rows, columns = (codes, first) if transposed else (first, codes)
        parts = spec.parts(rows, columns, np.dtype(np.float32))
        wanted = {part: (experts, *parts[part][0]) for part in shapes}
        if not spec.block_size and shapes.get("scales") == (experts, rows, 1):
            wanted["scales"] = (experts, rows, 1)  # one scale per row, with an axis of its own
        if shapes == wanted:
            found[transposed] = (experts, rows, columns)
    if not found and spec.block_size and shapes["scales"][:2] == shapes["scales"]:
        reason = f"{name}_scales are one per row, and block_size={spec.block_size}"
        raise _FaultError(UNKNOWN, reason)
    if not found:
        others = ", ".join(f"{ops.slot(name, part)} {list(s)}" for part, s in shapes.items())
        raise _FaultError(REFUSED, f"{slot} {list(weights)} stored as {spec} does not fit {others}")
    return found


def _layouts(orders: set[bool], quant_type: str, prepacked: int) -> frozenset[str]:
    """Returns the layouts that bytes may have, given whether K may come before N."""
    if quant_type in ("fp4", "nvfp4"):
        allowed = {"n_packed" if transposed else "k_packed" for transposed in orders}
        if len(allowed) > 1:
            return frozenset({"k_packed" if prepacked == 1 else "n_packed"})
        # 1.32 declares K-packed nvfp4 bytes with the shape of N-packed ones.
        both = quant_type == "nvfp4" and prepacked == 1 and "n_packed" in allowed
        return frozenset(allowed | {"k_packed"} if both else allowed)
    allowed = {"cutlass_sm80" if transposed else "raw" for transposed in orders}
    stated = dict(enumerate(STORED_LAYOUTS)).get(prepacked)
    return frozenset({stated} if stated in allowed else allowed)


def _traps(
    given: Mapping[str, ir.Value | None],
    values: Mapping[str, Any],
    specs: Mapping[str, Spec],
    experts: int,
) -> Iterator[str]:
    """Yields what a QMoE asks for that only some kernels do."""
    weights = given["router_weights"]
    if weights is not None:
        yield from _router_traps(weights, given["router_probs"])
    elif not values["normalize_routing_weights"] and values["k"] < experts:
        yield "normalize"
    if (values["block_size"] or 0) < 0:
        yield "negative_block"
    is_raw = values["quant_type"] == "int" and values["weights_prepacked"] == 0
    sources = [given[f"{name}_experts_weights"] for name in specs]
    if is_raw and any(isinstance(resolve(value), str) for value in sources if value):
        yield "computed_weights"
    if any(
        spec.has_global_scale and given[f"{name}_global_scale"] is None
        for name, spec in specs.items()
        if name != "fc3"  # the schema has none for it
    ):
        yield "no_global_scale"


def _router_traps(weights: ir.Value, logits: ir.Value | None) -> Iterator[str]:
    """Yields what is to be said of `router_weights`, unless they are Softmax(router_probs)."""
    softmax = _uncast(weights).producer()
    if softmax is None and weights.const_value is None:
        yield "unknown_router_weights"
        return
    same = (
        softmax is not None
        and (softmax.domain, softmax.op_type) == ("", "Softmax")
        and softmax.inputs[0] is not None
        and logits is not None
        and _uncast(softmax.inputs[0]) is _uncast(logits)
        and softmax.attributes.get_int("axis", -1) in (-1, 1)
    )
    if not same:
        yield "router_weights"


def _uncast(value: ir.Value) -> ir.Value:
    """Returns what a value is before it was cast or passed on."""
    node = value.producer()
    while node is not None and (node.domain, node.op_type) in (("", "Cast"), ("", "Identity")):
        source = node.inputs[0]
        if source is None:
            break
        value, node = source, source.producer()
    return value


def _asks_for_signs(target: str, stored: Stored) -> bool:
    """Returns whether a provider of the target minds negative scales."""
    kernels = [provider.kernel(stored.specs) for provider in TARGETS[target].providers]
    return any(kernel and kernel.outcomes.get("signed_scales") != RIGHT for kernel in kernels)


def _has_negative_scales(node: ir.Node) -> bool:
    for slot, value in ops.inputs(node).items():
        slices = resolve(value) if value is not None and slot.endswith("_scales") else ""
        if isinstance(slices, str):
            continue
        for expert in range(slices.shape[0]):
            negative = bool((slices.read(expert, expert + 1).astype(np.float32) < 0).any())
            slices.release(expert, expert + 1)
            if negative:
                return True
    return False
