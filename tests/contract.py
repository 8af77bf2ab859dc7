"""The contract as data: one `Cell` is one QMoE node, what it stores and what it must compute.

A cell knows its float MoE, its feeds, the float64 answer on its quantized weights, and the QMoE
that the rules make of it for a target, or the reason why they make none. What no rule writes is
built by hand with `direct`: the traps, and what a target refuses.

Graph inputs and outputs are float32, with a Cast on both sides of the node, because neither numpy
nor every runtime carries bfloat16.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import reference
from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.kernels import GATED
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.rtn import rtn
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from tests.moe_models import Array, Arrays, Experts, Graph
from tests.qmoe_models import append

Weights = dict[str, QuantizedWeights]


@dataclass(frozen=True)
class Cell:
    """One node of the contract.

    Attributes:
        format: Name of fc1's format, as in `FORMATS`.
        fc2_format: Name of fc2's format, where it is another.
        block_size: Columns that share a scale, 0 for rows.
        symmetric: Whether there are no zero points.
        layout: Order of the stored bytes; None for the format's own on the target.
        dtype: The activation type.
        activation: The `activation_type`.
        fusion: The `swiglu_fusion` of gated activations; others have 0.
        alpha: The `activation_alpha`.
        beta: The `activation_beta`.
        limit: The `swiglu_limit`.
        bias: Whether there are biases.
        k: Experts per token.
        normalize: The `normalize_routing_weights`.
        sparse_mixer: The `use_sparse_mixer`.
        ties: Whether some logits of a token are equal.
        experts: E.
        hidden: H.
        inter: I.
        tokens: T.
        seed: Of everything random.
    """

    format: str = "int4"
    fc2_format: str | None = None
    block_size: int = 0
    symmetric: bool = True
    layout: str | None = None
    dtype: str = "float16"
    activation: str = "swiglu"
    fusion: int = 1
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    bias: bool = True
    k: int = 2
    normalize: int = 1
    sparse_mixer: int = 0
    ties: bool = False
    experts: int = 4
    hidden: int = 128
    inter: int = 192
    tokens: int = 6
    seed: int = 0

    def but(self, **fields: Any) -> Cell:
        """Returns the cell with some fields changed."""
        return dataclasses.replace(self, **fields)

    def __str__(self) -> str:
        """The cell in words: how it is stored, then every other field that is not the default."""
        fc1, fc2 = self.specs.values()
        return ", ".join([str(fc1) if fc1 == fc2 else f"{self.format}/{fc2}", *self.variations])

    @property
    def variations(self) -> list[str]:
        """The fields that are not the default, without those that say how it is stored."""
        values = {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}
        stored = ("format", "fc2_format", "block_size", "symmetric")
        changed = {n: v for n, (v, default) in values.items() if n not in stored and v != default}
        return [f"{name}={value}" for name, value in changed.items()]

    @property
    def formats(self) -> dict[str, str]:
        """Names of the formats, by projection."""
        return {"fc1": self.format, "fc2": self.fc2_format or self.format}

    @property
    def specs(self) -> dict[str, Spec]:
        """How the projections are stored, where no target has a say; scales may be negative."""
        size, symmetric = self.block_size, self.symmetric
        return {name: Spec(FORMATS[f], size, symmetric) for name, f in self.formats.items()}

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes that MoE and QMoE share, and `reference.moe` takes."""
        return {
            "k": self.k,
            "activation_type": self.activation,
            "activation_alpha": self.alpha,
            "activation_beta": self.beta,
            "swiglu_fusion": self.fusion if self.activation in GATED else 0,
            "swiglu_limit": self.limit,
            "normalize_routing_weights": self.normalize,
            "use_sparse_mixer": self.sparse_mixer,
        }

    @property
    def numpy_dtype(self) -> np.dtype:
        """The activation type in numpy."""
        return SCALE_DTYPES[self.dtype]

    @property
    def columns(self) -> dict[str, int]:
        """K of both projections."""
        return {"fc1": self.hidden, "fc2": self.inter}

    def arrays(self) -> Arrays:
        """Returns the float weights and biases, in the activation type."""
        return _arrays(
            Experts(
                self.experts,
                self.hidden,
                self.inter,
                self.activation,
                self.bias,
                self.numpy_dtype,
                self.seed,
            )
        )

    def feeds(self) -> Arrays:
        """Returns float32 x [T, H] and router_probs [T, E], exact in the activation type.

        The logits of a token lie half a step apart, so that rounding cannot swap experts; with
        `ties` every other pair of neighbours is equal.
        """
        rng = np.random.default_rng(self.seed + 1000)
        x = rng.standard_normal((self.tokens, self.hidden))
        step = min(0.8, 6 / self.experts)
        ranks = np.arange(self.experts) + rng.uniform(-0.25, 0.25, (self.tokens, self.experts))
        if self.ties:
            ranks = ranks.round() // 2 * 2
        logits = rng.permuted(ranks, axis=1) * step - 1.5
        feeds = {"x": x, "router_probs": logits}
        return {name: a.astype(self.numpy_dtype).astype(np.float32) for name, a in feeds.items()}

    def recipe(self, target: str) -> Recipe:
        """Returns the recipe that stores a node so.

        Raises:
            ConfigError: The target takes no node stored so.
        """
        fields: dict[str, Any] = {"target": target, "symmetric": self.symmetric}
        format = FORMATS[self.format]
        if format.element is None:
            fields |= {"bits": format.bits, "block_size": self.block_size}
        else:
            fields |= {"format": format.name, "block_size": self.block_size}
        if self.fc2_format:
            fields["fc2_bits"] = FORMATS[self.fc2_format].bits
        return Recipe(layout=self.layout, **fields)

    def quantized(self, specs: Mapping[str, Spec] | None = None) -> Weights:
        """Returns the projections [E, N, K], rounded to nearest."""
        arrays = self.arrays()
        return {
            name: _stack([rtn(expert, spec) for expert in arrays[name]])
            for name, spec in (specs or self.specs).items()
        }

    def expected(self, weights: Weights | None = None, lower: float = 0.0) -> Array:
        """Returns what the node computes in float64 on its quantized weights [T, H].

        Args:
            weights: The projections, where they are not the cell's own.
            lower: What the logits of an expert lose for each expert before it.
        """
        arrays, feeds = self.arrays(), self.feeds()
        router = feeds["router_probs"] - lower * np.arange(self.experts)
        given: dict[str, Any] = self.attributes | {"use_sparse_mixer": 0}  # no provider reads it
        for name, weight in (weights or self.quantized()).items():
            given |= {name: weight.dequantize(), f"{name}_bias": arrays.get(f"{name}_bias")}
        return reference.moe(feeds["x"], router, **given)

    def expected_float(self) -> Array:
        """Returns what the float MoE computes in float64 [T, H]."""
        given: dict[str, Any] = {**self.attributes, **self.arrays()}
        feeds = self.feeds()
        return reference.moe(feeds["x"], feeds["router_probs"], **given)

    def float_model(self, separate: bool = False) -> ir.Model:
        """Returns a model of one MoE node, `moe`; `separate` puts the linear rows into an fc3."""
        graph, arrays, attributes = Graph(), dict(self.arrays()), dict(self.attributes)
        x, router = self._inputs(graph)
        if separate:
            attributes["swiglu_fusion"] = 0
            for name in [name for name in arrays if name.startswith("fc1")]:
                fused = arrays[name]
                arrays[name] = fused[:, 0::2].copy()
                arrays[name.replace("fc1", "fc3")] = fused[:, 1::2].copy()
        weights = graph.weights(arrays)
        y = graph.moe(x, router, weights, out="y_t", **_present(attributes))
        return self._model(graph, y)

    def convert(self, target: str) -> ir.Model | str:
        """Returns what the rules make of the float model, or why they leave it."""
        try:
            recipe = self.recipe(target)
        except ConfigError as error:
            return str(error)
        report, model = Report(), self.float_model()
        apply_rules(model, moe_to_qmoe_rules(recipe, report=report))
        (row,) = report.rows
        return model if row.status == CONVERTED else row.reason

    def direct(
        self,
        layout: str = "raw",
        weights: Weights | None = None,
        extra: Mapping[str, Array | None] | None = None,
        **attributes: Any,
    ) -> ir.Model:
        """Returns a model of one QMoE node, `moe`, whatever any table says.

        Args:
            layout: Order of the stored bytes.
            weights: The projections, where they are not the cell's own.
            extra: Further constants by slot; None leaves one out.
            **attributes: Attributes that differ; those that are None are left out.
        """
        weights = weights or self.quantized()
        arrays: dict[str, Array | None] = {}
        for name, weight in weights.items():
            arrays |= _stored(name, weight, layout)
            arrays[f"{name}_experts_bias"] = self.arrays().get(f"{name}_bias")
        arrays |= extra or {}
        fc1, fc2 = weights["fc1"].spec, weights["fc2"].spec
        own = {
            **self.attributes,
            "expert_weight_bits": fc1.format.bits,
            "fc2_expert_weight_bits": None if fc1.format == fc2.format else fc2.format.bits,
            "block_size": None if fc1.format.block_size else fc1.block_size or None,
            "quant_type": fc1.format.quant_type,
            "weights_prepacked": LAYOUTS[layout].prepacked,
        }
        graph = Graph()
        x, router = self._inputs(graph)
        values = {slot: graph.weight(slot, a) for slot, a in arrays.items() if a is not None}
        given = _present({**own, **attributes})
        return self._model(graph, append(graph, x, router, values, out="y_t", name="moe", **given))

    def _inputs(self, graph: Graph) -> tuple[ir.Value, ir.Value]:
        sizes = {"x": self.hidden, "router_probs": self.experts}
        x, router = (
            self._cast(graph, graph.input(name, np.float32, ("tokens", size)), f"{name}_t")
            for name, size in sizes.items()
        )
        return x, router

    def _model(self, graph: Graph, y: ir.Value) -> ir.Model:
        result = graph.op("Cast", y, out="y", to=ir.DataType.FLOAT)
        result.type, result.shape = ir.TensorType(ir.DataType.FLOAT), y.shape
        return graph.model(result)

    def _cast(self, graph: Graph, value: ir.Value, out: str) -> ir.Value:
        dtype = ir.DataType.from_numpy(self.numpy_dtype)
        cast = graph.op("Cast", value, out=out, to=dtype)
        cast.type, cast.shape = ir.TensorType(dtype), value.shape
        return cast


@functools.lru_cache(maxsize=64)
def _arrays(experts: Experts) -> Arrays:
    return experts.arrays()


def _present(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _stack(experts: list[QuantizedWeights]) -> QuantizedWeights:
    def together(name: str) -> Any:
        arrays = [getattr(expert, name) for expert in experts]
        return None if arrays[0] is None else np.stack(arrays)

    names = ("packed", "scales", "zero_points", "global_scale")
    return dataclasses.replace(experts[0], **{name: together(name) for name in names})


def _stored(name: str, weight: QuantizedWeights, layout: str) -> Arrays:
    """Returns the constants of one projection, by slot."""
    parts = weight.parts()
    bits = weight.spec.format.bits
    stored = np.stack([LAYOUTS[layout].store(expert, bits) for expert in weight.packed])
    parts["weights"] = stored.view(parts["weights"].dtype)
    slot = {"weights": f"{name}_experts_weights"}
    return {slot.get(part, f"{name}_{part}"): array for part, array in parts.items()}


def serialized(model: ir.Model) -> bytes:
    """Returns a model as the bytes of a file, every weight inside."""
    return bytes(ir.to_proto(model).SerializeToString())
