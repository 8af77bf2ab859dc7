"""Small models with `com.microsoft::QMoE` nodes, drawn code by code, and what they should mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import FORMATS, Spec, pack
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantized import QuantizedWeights
from tests.moe_models import Array, Arrays, Experts, Graph, inputs_of

SHARED_ATTRIBUTES = (
    "k",
    "activation_type",
    "activation_alpha",
    "activation_beta",
    "swiglu_fusion",
    "swiglu_limit",
    "normalize_routing_weights",
)


def spec_of(bits: int, block_size: int = 0) -> Spec:
    return Spec(FORMATS[f"int{bits}"], block_size)


@dataclass(frozen=True)
class Codes:
    """The codes of one QMoE node, drawn from a seed.

    Attributes:
        experts: Sizes, activation, biases, dtype and seed.
        fc1: How fc1 is stored, and fc3 where the node has it.
        fc2: How fc2 is stored; like fc1 where it is left out.
        zero_points: Whether zero points are given.
        layout: Order of the stored bytes.
        fc3: Whether the linear rows are in an fc3 of their own.
    """

    experts: Experts = field(default_factory=Experts)
    fc1: Spec = field(default_factory=lambda: spec_of(4))
    fc2: Spec | None = None
    zero_points: bool = False
    layout: str = "raw"
    fc3: bool = False

    def weights(self) -> dict[str, QuantizedWeights]:
        """Returns the projections [E, N, K] by name."""
        experts, hidden, inter = self.experts.experts, self.experts.hidden, self.experts.inter
        rows = inter * (2 if self.experts.gated and not self.fc3 else 1)
        sizes = {"fc1": (rows, hidden, self.fc1), "fc2": (hidden, inter, self.fc2 or self.fc1)}
        if self.fc3:
            sizes["fc3"] = (inter, hidden, self.fc1)
        rng = np.random.default_rng(self.experts.seed)
        return {
            name: self._drawn(rng, (experts, n, k), replace(spec, symmetric=not self.zero_points))
            for name, (n, k, spec) in sizes.items()
        }

    def arrays(self) -> Arrays:
        """Returns the node's constants by slot of the schema."""
        arrays: Arrays = {}
        for name, weight in self.weights().items():
            bits = weight.spec.format.bits
            parts = weight.parts()
            store = LAYOUTS[self.layout].store
            stored = np.stack([store(e, bits) for e in weight.packed])
            parts["weights"] = stored.view(parts["weights"].dtype)
            if weight.zero_points is not None:
                parts["zero_points"] = packed_points(weight.zero_points, bits)
            arrays |= {ops.slot(name, part): array for part, array in parts.items()}
        biases = self.experts.arrays()
        for name in ("fc1", "fc2") if self.experts.bias else ():
            arrays[f"{name}_experts_bias"] = biases[f"{name}_bias"]
        if self.fc3 and self.experts.bias:  # its rows are fc1's second half
            bias = arrays["fc1_experts_bias"]
            arrays["fc1_experts_bias"] = bias[:, : self.experts.inter]
        return arrays

    def attributes(self, **given: Any) -> dict[str, Any]:
        """Returns the node's attributes; those given as None are left out."""
        fc2 = self.fc2 or self.fc1
        own: dict[str, Any] = {
            **self.experts.attributes,
            "k": 2,
            "expert_weight_bits": self.fc1.format.bits,
            "fc2_expert_weight_bits": None if fc2 is self.fc1 else fc2.format.bits,
            "block_size": None if self.fc1.format.block_size else self.fc1.block_size or None,
            "quant_type": self.fc1.format.quant_type,
            "normalize_routing_weights": 1,
            "weights_prepacked": LAYOUTS[self.layout].prepacked,
        }
        if self.fc3:
            own["swiglu_fusion"] = 0
        return {name: value for name, value in {**own, **given}.items() if value is not None}

    def model(self, **attributes: Any) -> ir.Model:
        """Returns a model of one QMoE node, `qmoe`: x, router_probs -> y."""
        graph = Graph()
        x, router_probs = inputs_of(graph, self.experts)
        values = {slot: graph.weight(slot, array) for slot, array in self.arrays().items()}
        return graph.model(append(graph, x, router_probs, values, **self.attributes(**attributes)))

    def _drawn(
        self, rng: np.random.Generator, size: tuple[int, int, int], spec: Spec
    ) -> QuantizedWeights:
        top, (experts, n, k) = spec.format.max_code, size
        codes = rng.integers(0, top, size, np.uint8, endpoint=True)
        shape = (experts, *spec.scales_shape(n, k))
        if spec.format.element is not None:
            return _floating(rng, codes, shape, spec)
        scales = rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape) / (top * k**0.5)
        points = rng.integers(0, top, shape, np.uint8, endpoint=True)
        return QuantizedWeights(
            pack(codes, spec.format.bits),
            scales.astype(self.experts.dtype),
            spec,
            points if self.zero_points else None,
        )


def _floating(
    rng: np.random.Generator, codes: Array, shape: tuple[int, ...], spec: Spec
) -> QuantizedWeights:
    """Returns weights of floating-point codes with random scales."""
    format, (experts, _, k) = spec.format, codes.shape
    if format.bits == 8:
        codes[codes & 0x7F == 0x7F] = 0x7E  # no NaN
    unit = 1 / (format.max_value * k**0.5)
    scales: Array = rng.uniform(0.5, 1.5, shape)
    if format.name == "mxfp4":
        scales = np.exp2(rng.integers(-1, 1, shape, endpoint=True))
    factor = (unit * rng.uniform(0.5, 1.5, experts)).astype(np.float32)
    return QuantizedWeights(
        pack(codes, format.bits),
        (scales if format.global_scale else unit * scales).astype(format.scale),
        spec,
        global_scale=factor if format.global_scale else None,
    )


def append(
    graph: Graph,
    x: ir.Value,
    router_probs: ir.Value,
    values: Mapping[str, ir.Value | None],
    *,
    out: str = "y",
    name: str = "qmoe",
    **attributes: Any,
) -> ir.Value:
    """Appends a QMoE node whose constants are given by slot of the schema."""
    given = {"input": x, "router_probs": router_probs, **values}
    inputs = ops.slots("QMoE", given)
    return graph.op("QMoE", *inputs, out=out, like=x, name=name, domain=ops.DOMAIN, **attributes)


def packed_points(points: Array, bits: int) -> Array:
    """Packs zero points along their last axis, which is filled up to whole bytes."""
    short = -points.shape[-1] % (8 // bits)
    return pack(np.pad(points, [(0, 0)] * (points.ndim - 1) + [(0, short)]), bits)


def meant(weight: QuantizedWeights) -> Array:
    """Returns (code - zero point) * scale in float32, rounded to the scales' type, by hand."""
    codes, scales = weight.codes.astype(np.float32), weight.scales.astype(np.float32)
    shape = (*scales.shape[:2], -1)
    reach = codes.shape[-1] // scales.reshape(shape).shape[-1]
    zeros = np.full(scales.shape, 2 ** (weight.spec.format.bits - 1), np.float32)
    if weight.zero_points is not None:
        zeros = weight.zero_points.astype(np.float32)
    wide = (np.repeat(array.reshape(shape), reach, axis=-1) for array in (zeros, scales))
    zero, scale = wide
    real: Array = ((codes - zero) * scale).astype(weight.scales.dtype)
    return real


def constants(node: ir.Node) -> dict[str, Array]:
    """Returns the constant inputs of a MoE or QMoE node by slot of the schema."""
    return {
        slot: tensor.numpy()
        for slot, value in ops.inputs(node).items()
        if value is not None and (tensor := ir.convenience.get_const_tensor(value)) is not None
    }


def reference_options(node: ir.Node) -> dict[str, Any]:
    """Returns a node's attributes and biases as `reference.moe` takes them."""
    values, given = ops.attributes(node), constants(node)
    options = {name: values[name] for name in SHARED_ATTRIBUTES}
    biases = ("fc1", "fc2", "fc3")
    options |= {f"{name}_bias": given.get(f"{name}_experts_bias") for name in biases}
    return options
