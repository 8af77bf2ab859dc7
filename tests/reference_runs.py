"""Inputs of the reference, and what the CPU kernels of onnxruntime make of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

from qmoe_rules import reference

Array = npt.NDArray[Any]
Inputs = dict[str, Any]  # arrays by name, and attributes, as `moe` takes them

# All different, so that a transposed or misread axis cannot go unnoticed.
TOKENS, EXPERTS, HIDDEN, INTER = 10, 6, 16, 12
EXACT = 1e-6
SWIGLU: Inputs = {"activation_type": "swiglu", "swiglu_fusion": 1}
TIES = np.array([[0, 0, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0, 2, 1, 2, 1, 1]], np.float32)
# Names of the inputs by position; "none" stands for the six that no test gives.
MOE_INPUTS = ("x", "router_probs", "fc1", "fc1_bias", "fc2", "fc2_bias")
QMOE_INPUTS = (
    *("x", "router_probs", "fc1", "fc1_scales", "fc1_bias", "fc2", "fc2_scales", "fc2_bias"),
    *["none"] * 6,
    "router_weights",
)


def run_ort(op_type: str, inputs: Inputs, attributes: Inputs) -> Array:
    """Runs one MoE or QMoE node on the CPU; weights are initializers, activations are inputs."""
    order = MOE_INPUTS if op_type == "MoE" else QMOE_INPUTS
    fed = {name: inputs[name] for name in ("x", "router_probs", "router_weights") if name in inputs}
    dtype = helper.np_dtype_to_tensor_dtype(inputs["x"].dtype)
    node = helper.make_node(
        op_type,
        [name if name in inputs else "" for name in order],
        ["y"],
        domain="com.microsoft",
        **attributes,
    )
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info(name, dtype, array.shape) for name, array in fed.items()],
        [helper.make_tensor_value_info("y", dtype, inputs["x"].shape)],
        [numpy_helper.from_array(inputs[name], name) for name in inputs if name not in fed],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, fed)[0])


def relative_error(actual: Array, expected: Array) -> float:
    assert actual.shape == expected.shape
    difference = actual.astype(np.float64) - expected.astype(np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(expected.astype(np.float64)))


def make_inputs(
    rows: int, *, bias: bool = True, shape: Sequence[int] = (TOKENS, HIDDEN), seed: int = 0
) -> Inputs:
    """Random float32 inputs whose hidden values have a spread of about one."""
    rng = np.random.default_rng(seed)
    inputs = {
        "x": rng.standard_normal(shape),
        "router_probs": 2 * rng.standard_normal((TOKENS, EXPERTS)),
        "fc1": rng.standard_normal((EXPERTS, rows, HIDDEN)) / HIDDEN**0.5,
        "fc2": rng.standard_normal((EXPERTS, HIDDEN, INTER)) / INTER**0.5,
    }
    if bias:
        inputs["fc1_bias"] = rng.standard_normal((EXPERTS, rows))
        inputs["fc2_bias"] = rng.standard_normal((EXPERTS, HIDDEN))
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def check_moe(inputs: Inputs, attributes: Inputs, bound: float = EXACT) -> None:
    given = {name: value for name, value in attributes.items() if value is not None}
    assert relative_error(run_ort("MoE", inputs, given), reference.moe(**inputs, **given)) <= bound


def interleave(gate: Array, linear: Array) -> Array:
    """[E, I, ...] twice -> [E, 2I, ...] with rows g0, l0, g1, l1, ..."""
    return np.stack([gate, linear], axis=2).reshape(gate.shape[0], -1, *gate.shape[2:])


def split_inputs() -> tuple[Inputs, Inputs]:
    """Inputs without fc1, and apart from them fc1 (the gate) and fc3 (the linear part)."""
    shared, other = make_inputs(INTER), make_inputs(INTER, seed=1)
    parts = {"fc1": shared.pop("fc1"), "fc1_bias": shared.pop("fc1_bias")}
    return shared, parts | {"fc3": other["fc1"], "fc3_bias": other["fc1_bias"]}
