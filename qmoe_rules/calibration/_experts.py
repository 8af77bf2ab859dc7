"""One MoE layer in numpy: its output, and what its experts see.

Matrix products are float32, as in ONNX Runtime's CPU kernel; routing and activations are the
float64 reference's. Rows are taken some thousands at a time, so memory holds one expert's weights
and Hessians, whatever the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.calibration._tapes import Tape
from qmoe_rules.errors import SourceError
from qmoe_rules.facts import FloatMoE
from qmoe_rules.reference import activate, route
from qmoe_rules.slices import Slices
from qmoe_rules.statistics import PROJECTIONS
from qmoe_rules.weights import ExpertWeights, resolve

__all__ = ["Layer", "Sink", "observe"]

Array = npt.NDArray[Any]
Float32Array = npt.NDArray[np.float32]

Sink = Callable[[str, Any], None]
"""Takes a tensor of the statistics: its name behind the node's, and the array."""

_ACTIVATIONS = ("relu", "silu", "identity", "gelu", "swiglu", "geglu")
_ROWS = 1024  # at a time; so many are summed up in float32, and their sums in float64


@dataclass(frozen=True)
class Layer:
    """A MoE node that can be computed here.

    Attributes:
        node: The node.
        attributes: Its attributes.
        weights: Its weights by projection.
        biases: Its biases, [E, N], by projection, those that it has.
    """

    node: ir.Node
    attributes: Mapping[str, Any]
    weights: Mapping[str, ExpertWeights]
    biases: Mapping[str, Slices]

    @classmethod
    def of(cls, node: ir.Node) -> Layer | str:
        """Returns the layer of a MoE node, or the reason why it is not computed here."""
        moe = FloatMoE.of(node)
        if isinstance(moe, str):
            return moe
        given, values = ops.inputs(node), moe.attributes
        for name in ("use_sparse_mixer", "swiglu_limit_after_activation"):
            if values[name]:
                return f"{name}={values[name]} is not computed here"
        if values["activation_type"] not in _ACTIVATIONS:
            return f"activation {values['activation_type']!r} is not computed here"
        biases = {}
        for name in PROJECTIONS:
            if (bias := given[f"{name}_experts_bias"]) is not None:
                slices = resolve(bias)
                if isinstance(slices, str):
                    return f"{name}_experts_bias: {slices}"
                biases[name] = slices
        return cls(node, values, moe.weights, biases)

    @property
    def name(self) -> str:
        """What to call it."""
        return ops.label(self.node)

    @property
    def experts(self) -> int:
        """E."""
        return self.weights["fc1"].shape[0]

    def columns(self, projection: str) -> int:
        """Returns K of a projection."""
        return self.weights[projection].shape[2]

    @property
    def sees(self) -> tuple[ir.Value, ir.Value]:
        """Its `input` and its `router_probs`."""
        x, router = self.node.inputs[:2]
        if x is None or router is None:
            raise AssertionError(f"{self.name} has no input, or no router_probs")
        return x, router

    def activate(self, hidden: Float32Array) -> Float32Array:
        """Applies the activation to rows [n, N] of fc1."""
        active = activate(
            hidden,
            self.attributes["activation_type"],
            alpha=self.attributes["activation_alpha"],
            beta=self.attributes["activation_beta"],
            limit=self.attributes["swiglu_limit"],
            fusion=self.attributes["swiglu_fusion"],
        )
        return active.astype(np.float32)


@dataclass
class _Moments:
    """Sums over the rows that one projection of one expert sees."""

    columns: int
    wants_hessian: bool
    tokens: int = 0
    square: npt.NDArray[np.float64] = field(init=False)
    hessian: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        self.square = np.zeros(self.columns)
        if self.wants_hessian:
            self.hessian = np.zeros((self.columns, self.columns))

    def add(self, rows: Float32Array, weights: Float32Array) -> None:
        """Adds rows [n, K] of routing weights [n]."""
        self.tokens += len(rows)
        self.square += np.square(rows, dtype=np.float64).sum(axis=0)
        if self.hessian is not None:
            weighted = rows * weights[:, None]
            with np.errstate(over="ignore", invalid="ignore"):
                self.hessian += weighted.T @ weighted

    def join(self, other: _Moments) -> None:
        """Adds the rows of another."""
        self.tokens += other.tokens
        self.square += other.square
        if self.hessian is not None and other.hessian is not None:
            self.hessian += other.hessian

    def means(self) -> tuple[Float32Array, Float32Array | None]:
        """Returns the mean of x^2 and the Hessian, which may be infinite in float32."""
        with np.errstate(over="ignore"):
            square = (self.square / max(self.tokens, 1)).astype(np.float32)
            if self.hessian is None or not self.tokens:
                return square, None
            self.hessian /= self.tokens
            return square, self.hessian.astype(np.float32)


def observe(
    layer: Layer, x: Tape, router: Tape, output: Array | None, *, hessian: bool, sink: Sink
) -> Iterator[None]:
    """Runs a layer on everything that its inputs have been, and says what its experts saw.

    Args:
        layer: The layer.
        x: What its `input` has been.
        router: What its `router_probs` have been.
        output: float32 [rows, H], zeros, which the layer's output is added to; None where nothing
            needs it.
        hessian: Whether the Hessians are wanted.
        sink: Takes the statistics.

    Yields:
        None, after every expert.

    Raises:
        SourceError: A value is an infinity or a NaN.
    """
    routed = _Routed(layer, x, router)
    everyone = _Moments(layer.columns("fc1"), hessian)
    counts = np.zeros(layer.experts, np.int64)
    squares = {
        name: np.zeros((layer.experts, layer.columns(name)), np.float32) for name in PROJECTIONS
    }
    for expert in range(layer.experts):
        moments = {name: _Moments(layer.columns(name), hessian) for name in PROJECTIONS}
        run = _Expert(layer, expert)
        for rows, weights in routed.blocks(expert):
            taken = x.rows()[rows].astype(np.float32)
            if (bad := _bad_row(taken)) is not None:
                raise _not_finite(_place(layer, "input", x, rows[bad]))
            active = run.active(taken)
            moments["fc1"].add(taken, weights)
            moments["fc2"].add(active, weights)
            if output is not None:
                output[rows] += weights[:, None] * run.output(active)
        counts[expert] = moments["fc1"].tokens
        everyone.join(moments["fc1"])
        for name, sums in moments.items():
            squares[name][expert], second = sums.means()
            if any(_bad_row(each) is not None for each in (squares[name][expert], second)):
                raise _not_finite(f"{layer.name}: the sum of squares that {name} of {expert} sees")
            if second is not None:
                sink(f"{name}/hessian/{expert}", second)
        yield
    _, pooled = everyone.means()
    if pooled is not None:
        sink("fc1/hessian", pooled)
    for name in PROJECTIONS:
        sink(f"{name}/tokens", counts)
        sink(f"{name}/mean_square", squares[name])


class _Routed:
    """Which rows go to which expert, and with what weight."""

    def __init__(self, layer: Layer, x: Tape, router: Tape) -> None:
        logits, k, count = router.rows(), layer.attributes["k"], len(x.rows())
        if len(logits) != count:
            raise SourceError(
                f"{layer.name}: router_probs has {len(logits)} rows where input has {count}"
            )
        indices = np.empty((count, k), np.int32)
        weights = np.empty((count, k), np.float32)
        for start in range(0, count, _ROWS):
            stop = start + _ROWS
            with np.errstate(invalid="ignore"):  # what is not finite is refused below
                indices[start:stop], weights[start:stop] = route(
                    logits[start:stop], k, normalize=layer.attributes["normalize_routing_weights"]
                )
            if (bad := _bad_row(weights[start:stop])) is not None:
                raise _not_finite(_place(layer, "router_probs", router, start + bad))
        indices[weights == 0] = layer.experts  # one that adds nothing has not been chosen
        order = np.argsort(indices, axis=None, kind="stable")
        self._bounds = np.searchsorted(indices.reshape(-1)[order], range(layer.experts + 1))
        self._rows = order // k
        self._weights = weights.reshape(-1)[order]

    def blocks(self, expert: int) -> Iterator[tuple[npt.NDArray[np.intp], Float32Array]]:
        """Yields the rows that go to an expert, some at a time and in order, and their weights."""
        end = self._bounds[expert + 1]
        for start in range(self._bounds[expert], end, _ROWS):
            stop = min(start + _ROWS, end)
            yield self._rows[start:stop], self._weights[start:stop]


class _Expert:
    """One expert, its weights in float32, each read when it is first needed."""

    def __init__(self, layer: Layer, expert: int) -> None:
        self._layer = layer
        self._expert = expert
        self._weights: dict[str, Float32Array] = {}
        self._biases = {
            name: slices.read(expert, expert + 1)[0].astype(np.float32)
            for name, slices in layer.biases.items()
        }

    def active(self, x: Float32Array) -> Float32Array:
        """Returns what fc2 sees, [n, I]."""
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused
            active = self._layer.activate(self._linear("fc1", x))
        return self._checked(active, "the activation")

    def output(self, active: Float32Array) -> Float32Array:
        """Returns the expert's output, [n, H]."""
        with np.errstate(over="ignore", invalid="ignore"):
            output = self._linear("fc2", active)
        return self._checked(output, "the output")

    def _linear(self, name: str, x: Float32Array) -> Float32Array:
        if name not in self._weights:
            view = self._layer.weights[name]
            self._weights[name] = np.ascontiguousarray(view.expert(self._expert), np.float32)
            view.release(self._expert)
        y: Float32Array = x @ self._weights[name].T
        return y + self._biases[name] if name in self._biases else y

    def _checked(self, values: Float32Array, what: str) -> Float32Array:
        if _bad_row(values) is not None:
            raise _not_finite(f"{self._layer.name}: {what} of expert {self._expert}")
        return values


def _bad_row(values: Array | None) -> int | None:
    """Returns the first row, or element of one row, that holds an infinity or a NaN, or None."""
    if values is None or np.isfinite(values).all():
        return None
    return int(np.argwhere(~np.isfinite(values))[0, 0])


def _not_finite(place: str) -> SourceError:
    return SourceError(f"{place} holds an infinity or a NaN")


def _place(layer: Layer, slot: str, tape: Tape, row: int) -> str:
    value = dict(zip(("input", "router_probs"), layer.sees, strict=True))[slot]
    return f"{layer.name}: its {slot}, {value.name}, in feed {tape.feed_of(row)}"
