"""The meaning of ``com.microsoft::MoE`` and ``com.microsoft::QMoE`` in plain float64 numpy.

This is the yardstick that conversions are measured with: written to be read, not to be fast.
A formula marked *measured* was compared with the kernels of onnxruntime 1.32 (CPU); one marked
*read* comes from the operator schema of onnxruntime 1.32, since no CPU kernel runs it.

Letters: T tokens, H hidden, I inter, E experts. Weights are ``[E, rows, columns]``, with the input
features in the columns: a layer computes ``x @ W.T + b``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["DequantizableWeights", "activate", "moe", "qmoe", "route"]

Array = npt.NDArray[Any]
Float64Array = npt.NDArray[np.float64]
Shape = tuple[int, ...]


class DequantizableWeights(Protocol):
    """Quantized weights that know the real numbers they stand for."""

    def dequantize(self) -> Array:
        """Returns the weights as a float array ``[E, rows, columns]``."""


def _sigmoid(x: Float64Array) -> Float64Array:
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)))  # this form cannot overflow


def _gelu(x: Float64Array) -> Float64Array:
    return np.asarray(0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))))


_PLAIN: dict[str, Callable[[Float64Array], Float64Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "silu": lambda x: x * _sigmoid(x),
    "identity": lambda x: x,
    "gelu": _gelu,
}
_GATED = ("swiglu", "geglu")
_KNOWN = ", ".join((*_PLAIN, *_GATED))


def _split(hidden: Float64Array, fusion: int) -> tuple[Float64Array, Float64Array]:
    """Splits the columns of ``[T, 2I]`` into gate and linear, each ``[T, I]``."""
    if fusion not in (1, 2) or hidden.shape[-1] % 2:
        got = f"got {fusion} and {hidden.shape[-1]}"
        raise ValueError(f"swiglu and geglu need fusion 1 or 2 and an even width, {got}")
    if fusion == 1:
        return hidden[..., 0::2], hidden[..., 1::2]
    half = hidden.shape[-1] // 2
    return hidden[..., :half], hidden[..., half:]


def activate(
    hidden: Array,
    activation_type: str,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    limit: float | None = None,
    fusion: int = 0,
) -> Float64Array:
    """Applies the activation between the two matrix products of an expert.

    relu, silu, identity, gelu (tanh form) and swiglu with fusion 1 are measured; swiglu with
    fusion 2 and geglu (gelu(g) * l, without alpha, beta, limit) are read. swiglu clamps first, so
    the sigmoid sees the clamped gate: ``G = min(g, limit)``, ``L = clip(l, -limit, limit)``,
    ``G * sigmoid(alpha * G) * (L + beta)``.

    Args:
        hidden: ``[T, I]`` for a plain activation, ``[T, 2I]`` for swiglu and geglu; any float.
        activation_type: relu, silu, identity, gelu, swiglu or geglu.
        alpha: Slope inside the sigmoid of swiglu.
        beta: Offset of the linear part of swiglu.
        limit: Clamp of swiglu; None and infinity mean none.
        fusion: Columns of swiglu and geglu: 1 is g0, l0, g1, l1, ...; 2 is every g, then every l.
            Plain activations do not read it, and nor does the MoE kernel for them (measured).

    Returns:
        float64 ``[T, I]``.
    """
    hidden = hidden.astype(np.float64)
    if activation_type in _PLAIN:
        return _PLAIN[activation_type](hidden)
    if activation_type not in _GATED:
        raise ValueError(f"unknown activation_type {activation_type!r}, not in {_KNOWN}")
    gate, linear = _split(hidden, fusion)
    if activation_type == "geglu":
        return _gelu(gate) * linear
    bound = math.inf if limit is None else limit
    if not bound >= 0.0:
        raise ValueError(f"swiglu_limit must not be negative, got {limit}")
    gate = np.minimum(gate, bound)
    return np.asarray(gate * _sigmoid(alpha * gate) * (np.clip(linear, -bound, bound) + beta))


def _softmax(logits: Float64Array) -> Float64Array:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def route(
    router_probs: Array, k: int, *, normalize: bool | int, router_weights: Array | None = None
) -> tuple[npt.NDArray[np.intp], Float64Array]:
    """Chooses k experts for every token, and the weights that mix their outputs.

    ``router_probs`` holds logits despite its name: the kernels apply softmax to it (measured). Ties
    go to the higher expert index (measured). To normalise over the chosen experts is the same as
    a softmax over their logits alone. The CPU kernels differ in three ways (measured): QMoE always
    normalises unless it has `router_weights`; QMoE drops experts whose final router weight is not
    positive; MoE ranks the float32 softmax, so logits closer than its rounding are ties.

    Args:
        router_probs: Logits ``[T, E]``, any float.
        k: Experts per token, 1 to E.
        normalize: Whether the k weights of a token are made to sum to one.
        router_weights: Values ``[T, E]`` that mix in place of the softmax, so that the logits only
            choose. Input 14 of QMoE (measured for positive values).

    Returns:
        Expert indices ``[T, k]``, best first, and their float64 weights ``[T, k]``.
    """
    logits = router_probs.astype(np.float64)
    if logits.ndim != 2:
        raise ValueError(f"router_probs must be [tokens, experts], got shape {logits.shape}")
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k must be between 1 and {logits.shape[1]} experts, got {k}")
    # A stable ascending sort, read backwards, puts the higher index first among equal logits.
    indices = np.argsort(logits, axis=-1, kind="stable")[:, : -k - 1 : -1]
    _check_shape("router_weights", router_weights, logits.shape)
    mixing = _softmax(logits) if router_weights is None else router_weights.astype(np.float64)
    weights = np.take_along_axis(mixing, indices, axis=-1)
    if normalize:
        total = weights.sum(axis=-1, keepdims=True)
        weights = weights / np.where(total == 0.0, 1.0, total)  # zeros stay zeros (measured)
    return indices, weights


def _check_shape(name: str, array: Array | None, shape: Shape) -> None:
    if array is not None and array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")


def _check_layer(name: str, weights: Array | None, bias: Array | None, shape: Shape) -> None:
    if weights is None and bias is not None:
        raise ValueError(f"{name}_bias is given without {name}")
    _check_shape(name, weights, shape)
    _check_shape(f"{name}_bias", bias, shape[:2])


def _linear(x: Float64Array, weights: Array, bias: Array | None, expert: int) -> Float64Array:
    """Computes ``x @ W.T + b`` of one expert, and widens the weights of only that expert."""
    y: Float64Array = x @ weights[expert].astype(np.float64).T
    return y if bias is None else y + bias[expert].astype(np.float64)


def moe(
    x: Array,
    router_probs: Array,
    fc1: Array,
    fc2: Array,
    *,
    fc1_bias: Array | None = None,
    fc2_bias: Array | None = None,
    fc3: Array | None = None,
    fc3_bias: Array | None = None,
    router_weights: Array | None = None,
    k: int = 1,
    activation_type: str = "relu",
    activation_alpha: float = 1.0,
    activation_beta: float = 0.0,
    swiglu_fusion: int = 0,
    swiglu_limit: float | None = None,
    normalize_routing_weights: int = 0,
    use_sparse_mixer: int = 0,
) -> Float64Array:
    """Computes ``com.microsoft::MoE``: the weighted sum of the chosen experts of every token.

    An expert is ``fc2 @ activation(fc1 @ x + b1) + b2``, and its weight covers b2 too (measured).
    A separate fc3 gives the linear part of swiglu (read), of geglu and of silu(gate) * linear (by
    analogy: the schema knows no fc3 for geglu, and does not describe it for silu).

    Arrays have any float dtype, bfloat16 too. x is ``[T, H]`` or ``[batch, sequence, H]``; fc1 is
    ``[E, I, H]``, or ``[E, 2I, H]`` for swiglu and geglu without fc3; fc2 is ``[E, H, I]``; fc3 is
    ``[E, I, H]`` and wants swiglu_fusion 0; a bias is ``[E, rows of its weight]``. See `route` for
    router_probs, router_weights (an input of QMoE only), k and normalize_routing_weights, and
    `activate` for the rest. The CPU kernels accept use_sparse_mixer and ignore it (measured).
    The result is float64 and has the shape of x.
    """
    if use_sparse_mixer:
        raise ValueError("use_sparse_mixer=1: sparse mixer routing is missing, only top-k is here")
    if x.ndim not in (2, 3) or fc2.ndim != 3:
        raise ValueError(f"x must be 2-D or 3-D and fc2 3-D, got shapes {x.shape}, {fc2.shape}")
    if fc3 is not None and activation_type == "silu":  # silu(g) * l is swiglu in its bare form
        activation_type, activation_alpha, activation_beta, swiglu_limit = "swiglu", 1.0, 0.0, None
    gated = activation_type in _GATED
    if fc3 is not None and (not gated or swiglu_fusion):
        raise ValueError("fc3 needs activation_type swiglu, geglu or silu, and swiglu_fusion 0")

    tokens = x.reshape(-1, x.shape[-1]).astype(np.float64)
    (count, width), (experts, _, inter) = tokens.shape, fc2.shape
    rows = 2 * inter if gated and fc3 is None else inter
    _check_shape("router_probs", router_probs, (count, experts))
    _check_layer("fc1", fc1, fc1_bias, (experts, rows, width))
    _check_layer("fc2", fc2, fc2_bias, (experts, width, inter))
    _check_layer("fc3", fc3, fc3_bias, (experts, inter, width))

    act = partial(activate, alpha=activation_alpha, beta=activation_beta, limit=swiglu_limit)
    indices, weights = route(
        router_probs, k, normalize=normalize_routing_weights, router_weights=router_weights
    )
    output = np.zeros_like(tokens)
    for expert in np.unique(indices):
        chosen, slot = np.nonzero(indices == expert)
        hidden = _linear(tokens[chosen], fc1, fc1_bias, expert)
        if fc3 is not None:
            linear = _linear(tokens[chosen], fc3, fc3_bias, expert)
            hidden = np.concatenate([hidden, linear], axis=-1)
        hidden = act(hidden, activation_type, fusion=swiglu_fusion if fc3 is None else 2)
        output[chosen] += weights[chosen, slot, None] * _linear(hidden, fc2, fc2_bias, expert)
    return output.reshape(x.shape)


def qmoe(
    x: Array,
    router_probs: Array,
    fc1: DequantizableWeights,
    fc2: DequantizableWeights,
    *,
    fc3: DequantizableWeights | None = None,
    **keywords: Any,
) -> Float64Array:
    """Computes ``com.microsoft::QMoE``: `moe` on the real numbers that quantized weights stand for.

    Shapes (of the dequantized weights), keywords and result are those of `moe`.
    """
    real_fc3 = None if fc3 is None else fc3.dequantize()
    return moe(x, router_probs, fc1.dequantize(), fc2.dequantize(), fc3=real_fc3, **keywords)
