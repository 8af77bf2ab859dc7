"""What the experts of a model see, by the float64 reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import Calibration, reference
from tests.moe_models import Array, Arrays, Experts, Graph
from tests.moe_models import expected as expected_output

SMALL = Experts(experts=4, hidden=32, inter=48)
FLOAT32 = 2e-6  # of means that are summed up in float32 and float64


@dataclass(frozen=True)
class Seen:
    """What one expert sees, in float64: rows x of fc1 and of fc2, and the routing weights."""

    fc1: Array
    fc2: Array
    weights: Array

    def hessian(self, projection: str) -> Array:
        """Returns X^T X / n of the rows, each times its routing weight."""
        rows = getattr(self, projection) * self.weights[:, None]
        return np.asarray(rows.T @ rows / len(rows))

    def mean_square(self, projection: str) -> Array:
        return np.asarray((getattr(self, projection) ** 2).mean(axis=0))


def seen(
    arrays: Mapping[str, Array], x: Array, logits: Array, k: int = 1, **attributes: Any
) -> list[Seen]:
    """Returns what every expert sees, by the reference's routing and activation."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    normalize = attributes.get("normalize_routing_weights", 0)
    indices, weights = reference.route(logits, k, normalize=normalize)
    fc1 = arrays["fc1"].astype(np.float64)
    bias = arrays.get("fc1_bias", np.zeros(fc1.shape[:2])).astype(np.float64)
    found = []
    for expert in range(len(fc1)):
        token, slot = np.nonzero(indices == expert)
        active = reference.activate(
            rows[token] @ fc1[expert].T + bias[expert],
            attributes.get("activation_type", "relu"),
            alpha=attributes.get("activation_alpha", 1.0),
            beta=attributes.get("activation_beta", 0.0),
            limit=attributes.get("swiglu_limit"),
            fusion=attributes.get("swiglu_fusion", 0),
        )
        found.append(Seen(rows[token], active, weights[token, slot]))
    return found


def moe(arrays: Arrays, x: Array, logits: Array, **attributes: Any) -> Array:
    """Returns what a MoE computes in float64."""
    return expected_output(arrays, {"x": x, "router_probs": logits}, None, **attributes)


def joined(feeds: Sequence[Arrays], name: str) -> Array:
    """Returns the rows of all feeds."""
    return np.concatenate([feed[name].reshape(-1, feed[name].shape[-1]) for feed in feeds])


def assert_close(actual: Array, expected: Array, tolerance: float = FLOAT32) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-30)
    assert np.abs(actual - expected).max(initial=0) <= tolerance * scale


def assert_seen(
    calibration: Calibration, node: str, expected: Sequence[Seen], tolerance: float = FLOAT32
) -> None:
    for expert, each in enumerate(expected):
        for projection in ("fc1", "fc2"):
            known = calibration.statistics(node, projection, expert)
            assert known.tokens == len(each.weights)
            if known.tokens == 0:
                assert known.hessian is None
                assert not known.mean_square.any()
                continue
            assert_close(known.mean_square, each.mean_square(projection), tolerance)
            assert (known.hessian is not None) == calibration.hessian
            if known.hessian is not None:
                assert_close(known.hessian, each.hessian(projection), tolerance)
    if calibration.hessian:
        counts = [len(each.weights) for each in expected]
        some = [each for each in expected if len(each.weights)]
        pooled = np.average([each.hessian("fc1") for each in some], 0, [n for n in counts if n])
        assert_close(calibration.pooled_hessian(node), pooled, tolerance)


def several(experts: Experts, count: int, shape: Sequence[int] = (40,)) -> list[Arrays]:
    return [Experts(**{**vars(experts), "seed": seed}).feeds(shape) for seed in range(count)]


def residual(middle: bool = True, dtype: Any = np.float32) -> ir.Model:
    """Returns x -> norm -> moe0, + x, -> norm -> moe1, + x, with routers and a shape computation.

    The first residual is used after both layers, a constant by both norms, and Shape reaches over
    the first layer.
    """
    experts = Experts(4, 32, 48, dtype=dtype)
    graph = Graph()
    x = graph.input("x", dtype, ("batch", "time", 32))
    graph.input("unused", np.int64, ("batch",))
    gain = graph.weight("gain", np.linspace(0.5, 1.5, 32).astype(dtype))
    doubled = graph.op("Add", gain, gain, out="doubled")
    shape = graph.op("Shape", x, out="shape")
    stream = x
    for index in range(2):
        arrays = Experts(**{**vars(experts), "seed": index}).arrays()
        weights = graph.weights(arrays, f"layer{index}_")
        router = graph.weight(
            f"router{index}",
            np.random.default_rng(50 + index).standard_normal((32, 4)).astype(dtype) / 8,
        )
        scaled = graph.op("Mul", stream, doubled, out=f"scaled{index}", like=x)
        logits = graph.op("MatMul", scaled, router, out=f"logits{index}")
        flat = graph.weight(f"flat{index}", np.array([-1, 4]))
        flat_logits = graph.op("Reshape", logits, flat, out=f"router_probs{index}")
        y = graph.moe(
            scaled,
            flat_logits,
            weights,
            out=f"y{index}",
            name=f"moe{index}",
            k=2,
            **experts.attributes,
        )
        y.type = y.shape = None  # as rules may leave it
        restored = graph.op("Reshape", y, shape, out=f"restored{index}") if middle else y
        stream = graph.op(
            "Add", graph.op("Add", restored, x, out=f"half{index}"), stream, out=f"sum{index}"
        )
    stream.type, stream.shape = x.type, x.shape
    head = graph.op("Nonsense", stream, out="head", like=x, domain="nowhere")
    return graph.model(head, opsets={"": 21, "com.microsoft": 1, "nowhere": 1})
