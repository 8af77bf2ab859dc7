"""One QMoE node alone: in ONNX Runtime, and in the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops, reference
from qmoe_rules.slices import SlicedTensor
from qmoe_rules.stored import StoredProjection
from qmoe_rules.verification import _runtime as runtime
from qmoe_rules.weights import ExpertWeights, resolve

__all__ = [
    "Inputs",
    "captured_inputs",
    "compute",
    "execute",
    "float_experts",
    "random_inputs",
    "relative_error",
    "stored_experts",
]

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

# Router logits by rank: 0, -1/4, -1/2, ... for the chosen experts, exact in bfloat16 too, and a gap
# below them.
_STEP, _GAP = 0.25, 1.0
# Experts whose logits are closer than this may be ranked otherwise by a provider.
_NEAR_TIE = 1e-3


@dataclass(frozen=True)
class Inputs:
    """What a node is fed with.

    Attributes:
        x: Hidden states, float32 [T, H], exact in the activation type.
        router: Router logits, float32 [T, E], exact in it too.
        origin: Where they come from, in words.
    """

    x: Floats
    router: Floats
    origin: str

    @property
    def softmax(self) -> Floats:
        """What `router_weights` holds where the node has it, float32 [T, E]."""
        powers = np.exp(self.router - self.router.max(axis=-1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def random_inputs(
    experts: int, hidden: int, k: int, dtype: np.dtype, tokens: int, seed: int
) -> Inputs:
    """Returns hidden states of unit variance and router logits that reach every expert.

    The k chosen experts are ranked clearly, and are far from the others.
    """
    rng = np.random.default_rng(seed)
    tokens = max(tokens, -(-experts // k))
    x = rng.standard_normal((tokens, hidden))
    by_rank = np.concatenate([-_STEP * np.arange(k), -_STEP * k - _GAP - rng.random(experts - k)])
    order = rng.permutation(experts)
    router = np.empty((tokens, experts))
    for token in range(tokens):
        router[token, np.roll(order, -token * k)] = by_rank
    return Inputs(_rounded(x, dtype), _rounded(router, dtype), "random")


def captured_inputs(x: Array, router: Array, k: int, dtype: np.dtype, tokens: int) -> Inputs | None:
    """Returns up to `tokens` evenly spaced rows of real inputs, or None where none is fit.

    Rows are left out that are not finite, and those whose k-th and next expert nearly tie, because
    providers may rank these differently.

    Args:
        x: Hidden states [..., H].
        router: Router logits [T, E].
        k: Experts per token.
        dtype: The activation type.
        tokens: The most rows to return.
    """
    rows = _rounded(x.reshape(-1, x.shape[-1]), dtype)
    logits = _rounded(router.reshape(-1, router.shape[-1]), dtype)
    if len(rows) != len(logits):
        return None
    fit = np.isfinite(rows).all(axis=1) & np.isfinite(logits).all(axis=1)
    if k < logits.shape[1]:
        ranked = np.sort(logits, axis=1)
        fit &= ranked[:, -k] - ranked[:, -k - 1] > _NEAR_TIE
    found = np.flatnonzero(fit)
    if not len(found):
        return None
    chosen = found[np.linspace(0, len(found) - 1, min(tokens, len(found))).astype(int)]
    return Inputs(rows[chosen], logits[chosen], "captured")


def _rounded(array: Array, dtype: np.dtype) -> Floats:
    with np.errstate(over="ignore"):
        return array.astype(dtype).astype(np.float32)


class _Experts:
    """Weights [E, N, K] that the reference reads one expert at a time."""

    ndim = 3

    def __init__(self, shape: tuple[int, int, int], read: Callable[[int], Array]) -> None:
        self.shape = shape
        self._read = read

    def __getitem__(self, expert: int) -> Array:
        return self._read(int(expert))


def stored_experts(stored: StoredProjection) -> Array:
    """Returns what a projection means, to be read one expert at a time."""

    def read(expert: int) -> Array:
        real = stored.expert(expert).dequantize()
        stored.release(expert)
        return real

    return cast(Array, _Experts(stored.shape, read))


def float_experts(weights: ExpertWeights) -> Array:
    """Returns float weights, to be read one expert at a time."""

    def read(expert: int) -> Array:
        weight = weights.expert(expert).astype(np.float32)
        weights.release(expert)
        return weight

    return cast(Array, _Experts(weights.shape, read))


def compute(node: ir.Node, weights: Mapping[str, Array], inputs: Inputs) -> npt.NDArray[np.float64]:
    """Computes a MoE or QMoE node in float64.

    Args:
        node: The node, for its attributes and biases.
        weights: fc1 and fc2, [E, N, K].
        inputs: What it is fed with.

    Returns:
        float64 [T, H].

    Raises:
        SourceError: The data cannot be read.
    """
    values, given = ops.attributes(node), ops.inputs(node)
    options = {name: values[name] for name in _OPTIONS}
    for name in ("fc1", "fc2"):
        bias = given[f"{name}_experts_bias"]
        if bias is not None:
            options[f"{name}_bias"] = _constant(bias)
    if given.get("router_weights") is not None:
        options["router_weights"] = inputs.softmax
    return reference.moe(inputs.x, inputs.router, weights["fc1"], weights["fc2"], **options)


_OPTIONS = (
    "k",
    "activation_type",
    "activation_alpha",
    "activation_beta",
    "swiglu_fusion",
    "swiglu_limit",
    "normalize_routing_weights",
    "use_sparse_mixer",
)


def _constant(value: ir.Value) -> Array:
    slices = resolve(value)
    if isinstance(slices, str):
        raise AssertionError(slices)
    return slices.read(0, slices.shape[0])


def execute(node: ir.Node, inputs: Inputs, dtype: np.dtype, folder: Path, provider: str) -> Floats:
    """Runs a QMoE node alone in ONNX Runtime.

    Args:
        node: The node; its constants are read where they are.
        inputs: What it is fed with.
        dtype: The activation type.
        folder: Where the model of the node is.
        provider: ONNX Runtime's name of the provider.

    Returns:
        float32 [T, H].

    Raises:
        RunError: ONNX Runtime does not load or run it.
        SourceError: The data cannot be read.
    """
    feeds = {"input": inputs.x, "router_probs": inputs.router, "router_weights": inputs.softmax}
    model = _alone(node, ir.DataType.from_numpy(dtype), inputs)
    feeds = {value.name: feeds[value.name] for value in model.graph.inputs if value.name}
    return runtime.run(ir.to_proto(model).SerializeToString(), folder, feeds, provider)["output"]


def _alone(node: ir.Node, dtype: ir.DataType, inputs: Inputs) -> ir.Model:
    """Returns a model of one node, whose inputs and output are float32 whatever its type."""
    tokens = len(inputs.x)
    nodes, feeds, constants = [], [], []
    slots: dict[str, ir.Value | None] = {}
    for name, value in ops.inputs(node).items():
        if value is None:
            continue
        if name in ("input", "router_probs", "router_weights"):
            width = (inputs.x if name == "input" else inputs.router).shape[1]
            feed = ir.val(name, ir.DataType.FLOAT, [tokens, width])
            feeds.append(feed)
            nodes.append(_cast(feed, dtype, f"{name}_cast"))
            slots[name] = nodes[-1].outputs[0]
        else:
            slots[name] = _initializer(name, value)
            constants.append(slots[name])
    copy = ir.Node(ops.DOMAIN, "QMoE", ops.slots("QMoE", slots), list(node.attributes.values()))
    nodes.append(copy)
    nodes.append(_cast(copy.outputs[0], ir.DataType.FLOAT, "output"))
    output = nodes[-1].outputs[0]
    output.shape = ir.Shape([tokens, inputs.x.shape[1]])
    graph = ir.Graph(
        feeds,
        [output],
        nodes=nodes,
        initializers=[value for value in constants if value is not None],
        opset_imports={"": 21, ops.DOMAIN: 1},
        name="alone",
    )
    return ir.Model(graph, ir_version=10)


def _cast(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype.value})
    node.outputs[0].name = name
    node.outputs[0].type = ir.TensorType(dtype)
    return node


def _initializer(name: str, value: ir.Value) -> ir.Value:
    """Returns a constant under another name; what is in a file stays there."""
    tensor = ir.convenience.get_const_tensor(value)
    if not isinstance(tensor, ir.ExternalTensor):
        slices = resolve(value)
        if isinstance(slices, str):
            raise AssertionError(slices)
        tensor = SlicedTensor(slices, name)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)


def relative_error(actual: Array, expected: Array, dtype: np.dtype | None = None) -> float:
    """Returns ||actual - expected|| / ||expected|| in float64; infinity for what is no number.

    Args:
        actual: Any numbers.
        expected: What they should be.
        dtype: A type that was computed in: where it holds both numbers as subnormals, which some
            kernels take for zero, there is no error.
    """
    wide, found = expected.astype(np.float64), actual.astype(np.float64)
    difference, norm = found - wide, float(np.linalg.norm(wide))
    if dtype is not None:
        least = float(ml_dtypes.finfo(dtype).smallest_normal)  # type: ignore[no-untyped-call]
        difference[(np.abs(wide) < least) & (np.abs(found) < least)] = 0.0
    error = float(np.linalg.norm(difference))
    if not np.isfinite(error):
        return float("inf")
    return error / norm if norm else error
