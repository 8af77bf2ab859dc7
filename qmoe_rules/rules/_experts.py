"""All experts of a layer, as the rules that fuse them find them, and the node they become.

As everywhere, a rewrite only plans: the new weights are `SlicedTensor`s, read from the old ones
when somebody asks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.kernels import GATED
from qmoe_rules.lazy import register_beside
from qmoe_rules.rules._mlp import ALL, EVEN, FIRST_HALF, MLP, ODD, SECOND_HALF
from qmoe_rules.rules._routing import Routing, emit_routing, refuse_routing, settled
from qmoe_rules.slices import Combined, Joined, Lifted, SlicedTensor, Slices
from qmoe_rules.weights import resolve

__all__ = [
    "Emitted",
    "Experts",
    "Parts",
    "assemble",
    "derived",
    "emit_moe",
    "refuse_experts",
    "rows_of",
    "stack",
    "transposed",
]

T = TypeVar("T", bound=Hashable)

Parts = Mapping[str, Slices]
"""A linear map of all experts, [E, rows, ...] each: weights [E, rows, columns], maybe a bias
[E, rows], and where it is quantized its scales and maybe zero_points."""


@dataclass(frozen=True)
class Experts:
    """All experts of a layer, and how tokens reach them.

    Attributes:
        source: The hidden states, [T, H] or [B, S, H].
        routing: How tokens reach the experts.
        gate: The map under the activation, [E, I, H].
        up: The map that the activation multiplies, [E, I, H], or None.
        down: The map back, [E, H, I].
        activation: What MoE calls the activation.
        alpha: swiglu's factor inside the sigmoid.
        beta: What swiglu adds to the linear half.
        limit: swiglu's clamp, or None.
        home: A constant of theirs; the new initializers go beside it.
        key: What the maps are made of, in order; equal keys mean equal experts.
        storage: QMoE's attributes where the maps are quantized, empty where they are float.
    """

    source: ir.Value
    routing: Routing
    gate: Parts
    up: Parts | None
    down: Parts
    activation: str
    alpha: float
    beta: float
    limit: float | None
    home: ir.Value
    key: tuple[Any, ...]
    storage: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> ir.DataType:
        """The type of the activations."""
        return ir.DataType.from_numpy(self.down["scales" if self.storage else "weights"].dtype)


def stack(values: Sequence[ir.Value]) -> Slices | str:
    """Returns one constant per expert as slices [E, ...], or why they cannot be stacked."""
    sources: list[Slices] = []
    for value in values:
        source = resolve(value)
        if isinstance(source, str):
            return source
        first = sources[0] if sources else source
        if source.shape != first.shape or source.dtype != first.dtype:
            return (
                f"{value.name} is {source.dtype.name} {list(source.shape)}, and "
                f"{values[0].name} is {first.dtype.name} {list(first.shape)}"
            )
        sources.append(source)
    return Joined([Lifted(source) for source in sources])


def derived(source: Slices, shape: Sequence[int], function: Callable[[Any], Any]) -> Slices:
    """Returns slices [E, *shape] that a function makes of blocks [n, ...] of a source."""
    return Combined([source], (source.shape[0], *shape), source.dtype, function)


def transposed(source: Slices) -> Slices:
    """Returns weights [E, K, N] as [E, N, K]."""
    _, columns, rows = source.shape
    return derived(source, (rows, columns), lambda block: block.transpose(0, 2, 1))


def rows_of(parts: Parts, columns: str) -> Parts | str:
    """Returns a map whose outputs are the chosen ones (`ALL`, `EVEN`, `FIRST_HALF`, ...)."""
    rows = parts["weights"].shape[1]
    if columns == ALL:
        return parts
    if rows % 2:
        return f"a map with {rows} outputs has no {columns} ones"
    cut = {
        EVEN: slice(None, None, 2),
        ODD: slice(1, None, 2),
        FIRST_HALF: slice(rows // 2),
        SECOND_HALF: slice(rows // 2, None),
    }[columns]
    return {
        name: derived(part, (rows // 2, *part.shape[2:]), lambda block: block[:, cut])
        for name, part in parts.items()
    }


def _interleaved(gate: Slices, up: Slices) -> Slices:
    """Returns the rows of both in turn: g0, u0, g1, u1, ..."""
    experts, rows, *rest = gate.shape

    def weave(first: Any, second: Any) -> Any:
        return np.stack([first, second], axis=2).reshape(len(first), 2 * rows, *rest)

    return Combined([gate, up], (experts, 2 * rows, *rest), gate.dtype, weave)


def assemble(
    mlps: Sequence[MLP[T]],
    routing: Routing,
    parts_of: Callable[[Sequence[T]], Parts | str],
    *,
    home: ir.Value,
    storage: Mapping[str, Any] | None = None,
) -> Experts | str:
    """Puts experts that were found one by one together, or returns why they differ.

    Args:
        mlps: The experts, in order. What they know about a map is hashable, and equal where the
            constants are.
        routing: How tokens reach them.
        parts_of: Stacks what the family knows about one map of all experts.
        home: See `Experts`.
        storage: See `Experts`.
    """
    first = mlps[0]
    for index, mlp in enumerate(mlps):
        if mlp.source is not first.source:
            return f"expert {index} is applied to {mlp.source.name}, not to {first.source.name}"
        if _structure(mlp) != _structure(first):
            return f"expert {index} computes {_shown(mlp)}, and expert 0 {_shown(first)}"
    maps: list[Parts | None] = []
    for side in ("gate", "up", "down"):
        ends = [getattr(mlp, side) for mlp in mlps]
        if ends[0] is None:
            maps.append(None)
            continue
        found = parts_of([end if side == "down" else end[0] for end in ends])
        if not isinstance(found, str) and side != "down":
            found = rows_of(found, ends[0][1])
        if isinstance(found, str):
            return found
        maps.append(found)
    gate, up, down = maps
    if gate is None or down is None:
        raise AssertionError("every expert has a gate and a down map")
    return Experts(
        first.source,
        routing,
        gate,
        up,
        down,
        first.activation,
        first.alpha,
        first.beta,
        first.limit,
        home,
        tuple((mlp.gate, mlp.up, mlp.down) for mlp in mlps),
        storage or {},
    )


def _structure(mlp: MLP[Any]) -> tuple[Any, ...]:
    columns = mlp.gate[1], None if mlp.up is None else mlp.up[1]
    return columns, mlp.activation, mlp.alpha, mlp.beta, mlp.limit


def _shown(mlp: MLP[Any]) -> str:
    text = mlp.activation if mlp.up is not None or mlp.activation not in GATED else "a bare gate"
    columns = f" of the {mlp.gate[1]} columns" if mlp.gate[1] != ALL else ""
    return f"{text}(alpha={mlp.alpha:g}, beta={mlp.beta:g}, limit={mlp.limit}){columns}"


def refuse_experts(experts: Experts, opset: int) -> str | None:
    """Returns why experts cannot be one MoE, or None.

    Args:
        experts: The experts.
        opset: The model's opset of the standard domain.
    """
    if (experts.activation in GATED) != (experts.up is not None):
        kind = "gated" if experts.up is not None else "plain"
        return f"MoE has no {kind} {experts.activation}"
    if experts.limit is not None and not experts.limit >= 0:
        return f"the clamp {experts.limit:g} is negative"
    return (
        _refuse_maps(experts)
        or _refuse_source(experts)
        or refuse_routing(settled(experts.routing, experts.dtype), opset)
    )


def _refuse_maps(experts: Experts) -> str | None:
    maps = {"gate": experts.gate, "down": experts.down}
    if experts.up is not None:
        maps["up"] = experts.up
    if experts.dtype.numpy().name not in SCALE_DTYPES:
        return f"the weights are {experts.dtype.name}"
    for name, parts in maps.items():
        wanted = experts.down if name == "down" else experts.gate
        if {key: part.dtype for key, part in parts.items() if key != "bias"} != {
            key: part.dtype for key, part in experts.gate.items() if key != "bias"
        }:
            return f"{name} and gate are stored differently"
        if {key: part.shape for key, part in parts.items()} != {
            key: part.shape for key, part in wanted.items()
        }:
            return f"{name} and gate have different shapes, or only one of them a bias"
        bias = parts.get("bias")
        if bias is not None and (
            bias.shape != parts["weights"].shape[:2]
            or ir.DataType.from_numpy(bias.dtype) != experts.dtype
        ):
            return f"{name} has a bias {bias.dtype.name} {list(bias.shape)}"
    if experts.gate["weights"].shape[0] != experts.routing.experts:
        return f"{experts.gate['weights'].shape[0]} experts, {experts.routing.experts} routed"
    if experts.storage:
        return None
    count, inter, hidden = experts.gate["weights"].shape
    if experts.down["weights"].shape != (count, hidden, inter):
        return (
            f"gate is {[count, inter, hidden]}, which asks for down "
            f"{[count, hidden, inter]}, and it is {list(experts.down['weights'].shape)}"
        )
    return None


def _refuse_source(experts: Experts) -> str | None:
    source = experts.source
    shape = ops.static_shape(source)
    if shape is None or len(shape) not in (2, 3):
        known = "of unknown rank" if shape is None else f"{len(shape)}-D"
        return f"the experts' input {source.name} is {known}; MoE takes 2-D and 3-D"
    if source.dtype is not None and source.dtype != experts.dtype:
        return f"{source.name} is {source.dtype.name}, and the experts are {experts.dtype.name}"
    return None


@dataclass(frozen=True)
class Emitted:
    """What `emit_moe` built.

    Attributes:
        output: What the experts compute, weighted and summed.
        node: The MoE or QMoE.
        planned: Its new initializers.
    """

    output: ir.Value
    node: ir.Node
    planned: tuple[ir.Value, ...]


# The names of a projection's inputs.
_SLOTS = {
    "weights": "{}_experts_weights",
    "bias": "{}_experts_bias",
    "scales": "{}_scales",
    "zero_points": "{}_zero_points",
}


def emit_moe(op: Any, experts: Experts, name: str) -> Emitted:
    """Builds the MoE, or the QMoE where the experts are quantized.

    Args:
        op: The rewriter's builder.
        experts: The experts, which `refuse_experts` let pass.
        name: What to call the node.
    """
    routing = settled(experts.routing, experts.dtype)
    router, scale = emit_routing(op, routing, experts.dtype)
    up = experts.up
    fc1 = experts.gate
    if up is not None:
        fc1 = {part: _interleaved(slices, up[part]) for part, slices in fc1.items()}
    tensors = {
        (slot := _SLOTS[part].format(fc)): SlicedTensor(slices, f"{name}.{slot}")
        for fc, parts in (("fc1", fc1), ("fc2", experts.down))
        for part, slices in parts.items()
    }
    planned = register_beside(experts.home, experts.key, tensors)
    inputs = {"input": experts.source, "router_probs": router, **planned}
    op_type = "QMoE" if experts.storage else "MoE"
    if experts.storage and not routing.normalize:
        # The CPU kernel always renormalizes over the top-k, unless it is given the weights.
        inputs["router_weights"] = op.Softmax(router)
    output: ir.Value = getattr(op, op_type)(
        *ops.slots(op_type, inputs),
        _domain=ops.DOMAIN,
        _name=name,
        **_attributes(experts, routing),
    )
    output.type, output.shape = experts.source.type, experts.source.shape
    node = ops.producer(output)
    return Emitted(
        output if scale is None else op.Mul(output, scale), node, tuple(planned.values())
    )


def _attributes(experts: Experts, routing: Routing) -> dict[str, Any]:
    """Returns every attribute written out, because defaults have differed between versions."""
    attributes = {
        "activation_type": experts.activation,
        "activation_alpha": experts.alpha,
        "activation_beta": experts.beta,
        "k": min(routing.k, routing.experts),  # an expert chosen twice counts once
        "normalize_routing_weights": int(routing.normalize),
        "swiglu_fusion": int(experts.up is not None),
        "use_sparse_mixer": 0,
        **experts.storage,
    }
    if experts.limit is not None:
        attributes["swiglu_limit"] = experts.limit
    return attributes
