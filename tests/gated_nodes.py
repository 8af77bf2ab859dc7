"""MoE nodes whose gate and linear rows lie apart, and what they should become."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleSet, rewrite

from qmoe_rules import moe_to_qmoe_rules, normalize_moe_rules, ops, reference
from qmoe_rules.report import Report
from tests.moe_models import SLOTS, Array, Arrays, Experts, Graph, inputs_of

FP32 = 1e-6
INT4 = 0.2  # round-to-nearest, one scale per row, of normal weights

EXPERTS, HIDDEN, INTER = 3, 128, 192
SEPARATE = ("swiglu", "silu", "gelu", "geglu")
HALVES = ("swiglu", "geglu")
# The form of a node, the activation, and which of the fc1 and fc3 biases it has.
FORMS = [
    *itertools.product(["fc3"], SEPARATE, [(), ("fc1",), ("fc3",), ("fc1", "fc3")]),
    *itertools.product(["halves"], HALVES, [(), ("fc1",)]),
]
ALPHA: dict[str, Any] = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.8}


def arrays_of(form: str, biases: tuple[str, ...] = (), dtype: npt.DTypeLike = np.float32) -> Arrays:
    """Returns the weights of a node that is not normal."""
    rng = np.random.default_rng(7)
    rows = INTER if form == "fc3" else 2 * INTER
    arrays = {
        "fc1": rng.standard_normal((EXPERTS, rows, HIDDEN)) / HIDDEN**0.5,
        "fc2": rng.standard_normal((EXPERTS, HIDDEN, INTER)) / INTER**0.5,
        "fc2_bias": rng.standard_normal((EXPERTS, HIDDEN)),
    }
    if form == "fc3":
        arrays["fc3"] = rng.standard_normal((EXPERTS, INTER, HIDDEN)) / HIDDEN**0.5
    arrays |= {f"{name}_bias": rng.standard_normal((EXPERTS, rows)) for name in biases}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def attributes_of(form: str, activation: str, **more: Any) -> dict[str, Any]:
    fusion = 0 if form == "fc3" else 2
    return {"activation_type": activation, "swiglu_fusion": fusion, "k": 2, **more}


def apart(
    form: str = "fc3",
    activation: str = "swiglu",
    biases: tuple[str, ...] = (),
    dtype: npt.DTypeLike = np.float32,
    homes: Mapping[str, str] | None = None,
    **more: Any,
) -> ir.Model:
    """Returns a model of one node, `moe`, that is not normal."""
    graph = Graph()
    x, router = inputs_of(graph, Experts(dtype=dtype))
    weights = graph.weights(arrays_of(form, biases, dtype), homes=homes)
    y = graph.moe(x, router, weights, **attributes_of(form, activation, **more))
    return graph.model(y)


def normalize(model: ir.Model, report: Report | None = None) -> ir.Model:
    return rewrite(model, normalize_moe_rules(report=report))


def interleaved(gate: Array, linear: Array) -> Array:
    out = np.empty((len(gate), 2 * gate.shape[1], *gate.shape[2:]), gate.dtype)
    out[:, 0::2], out[:, 1::2] = gate, linear
    return out


def normal(arrays: Arrays) -> Arrays:
    """Returns what the arrays of a node should become."""
    arrays = dict(arrays)
    if "fc3" not in arrays:
        for name in {"fc1", "fc1_bias"} & set(arrays):
            arrays[name] = interleaved(*np.split(arrays[name], 2, axis=1))
        return arrays
    arrays["fc1"] = interleaved(arrays["fc1"], arrays.pop("fc3"))
    biases = [arrays.pop(name, None) for name in ("fc1_bias", "fc3_bias")]
    present = next((bias for bias in biases if bias is not None), None)
    if present is not None:
        gate, linear = (np.zeros_like(present) if b is None else b for b in biases)
        arrays["fc1_bias"] = interleaved(gate, linear)
    return arrays


def constants(node: ir.Node) -> dict[str, Any]:
    """Returns the weights and biases of a MoE node, by their short names."""
    given = ops.inputs(node)
    tensors = {
        name: ir.convenience.get_const_tensor(value)
        for name, slot in SLOTS.items()
        if (value := given[slot]) is not None
    }
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def meaning(node: ir.Node, feeds: Arrays) -> Array:
    """Returns what a node computes, from its attributes and constants as they are in the graph."""
    values = {key: value for key, value in ops.attributes(node).items() if value is not None}
    if values["activation_type"] == "gelu":  # the reference knows gelu(gate) * linear as geglu
        values["activation_type"] = "geglu"
    return reference.moe(feeds["x"], feeds["router_probs"], **constants(node), **values)


def written(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def both(report: Report | None = None, **fields: Any) -> RewriteRuleSet:
    return RewriteRuleSet(
        [*normalize_moe_rules(report=report), *moe_to_qmoe_rules(report=report, **fields)]
    )
