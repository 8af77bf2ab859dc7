"""Experts of MatMulNBits become one QMoE with the same bytes, or stay with the reason."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.report import CONVERTED, SKIPPED
from tests import expert_graphs
from tests.expert_graphs import Builder, Layer
from tests.fusions import fused
from tests.moe_models import Array, nodes_of, relative_error, run, the_node

INT4 = Layer(bits=4, hidden=64, inter=128)
# The kernel of blockwise int8 rounds the activations.
TOLERANCES = {4: 1e-6, 8: 0.03}


@pytest.mark.parametrize("router", ["softmax_topk", "softmax_topk_norm", "sigmoid", "mixer"])
@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_same_numbers_on_the_cpu(bits: int, zero_points: bool, router: str) -> None:
    layer = Layer(bits=bits, zero_points=zero_points, router=router, inter=128)
    model = expert_graphs.model(layer)
    feeds = [expert_graphs.feeds(layer, tokens) for tokens in ((1, 1), (4, 5))]
    before = [run(model, feed)[0] for feed in feeds]
    (row,) = fused(model).rows
    stored = f"int{bits} {'asymmetric ' if zero_points else ''}block 32, raw, as they were"
    assert (row.status, row.stored) == (CONVERTED, stored)
    node = the_node(model)
    assert ("router_weights" in _given(node)) == (router == "softmax_topk")
    for feed, expected in zip(feeds, before, strict=True):
        assert relative_error(run(model, feed)[0], expected) < TOLERANCES[bits]


def _given(node: ir.Node) -> set[str]:
    return {name for name, value in ops.inputs(node).items() if value is not None}


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": True},
        {"bias": True, "zero_points": True},
        {"limit": 7.0, "alpha": 1.702, "beta": 1.0, "bias": True},
        {"activation": "relu"},
        {"activation": "silu", "bias": True},
        {"flat": True, "shared": "before"},
        {"shared": "after", "swapped": True},
        {"block": 64},
        {"dtype": np.float16, "bias": True},
        {"experts": 16, "k": 4},
    ],
    ids=str,
)
def test_every_form_of_expert_is_kept(fields: dict[str, Any]) -> None:
    layer = Layer(**{"bits": 4, "inter": 128, **fields})
    model = expert_graphs.model(layer)
    feeds = expert_graphs.feeds(layer)
    before = run(model, feeds)[0]
    assert [row.status for row in fused(model).rows] == [CONVERTED]
    tolerance = 1e-6 if layer.dtype is np.float32 else 2e-3
    assert relative_error(run(model, feeds)[0], before) < tolerance


def arrays_of(values: Mapping[str, ir.Value | None]) -> dict[str, Array]:
    """Returns the constants among values."""
    tensors = {name: value.const_value for name, value in values.items() if value is not None}
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def test_bytes_are_the_experts_rows_in_turn() -> None:
    model = expert_graphs.model(INT4, zero_points=True, bias=True)
    old = arrays_of(model.graph.initializers)
    (row,) = fused(model).rows
    new = arrays_of(ops.inputs(the_node(model)))
    assert {name: (array.shape, array.dtype.name) for name, array in new.items()} == {
        "fc1_experts_weights": ((4, 256, 32), "uint8"),
        "fc1_scales": ((4, 256, 2), "float32"),
        "fc1_zero_points": ((4, 256, 1), "uint8"),
        "fc1_experts_bias": ((4, 256), "float32"),
        "fc2_experts_weights": ((4, 64, 64), "uint8"),
        "fc2_scales": ((4, 64, 4), "float32"),
        "fc2_zero_points": ((4, 64, 2), "uint8"),
        "fc2_experts_bias": ((4, 64), "float32"),
    }
    parts = {
        "{}_experts_weights": "codes",
        "{}_scales": "scales",
        "{}_zero_points": "zero_points",
        "{}_experts_bias": "bias",
    }
    for expert in range(4):
        for slot, part in parts.items():
            name = f"l0.experts.{expert}.{{}}.{part}"
            fc1, fc2 = new[slot.format("fc1")][expert], new[slot.format("fc2")][expert]
            assert fc1[0::2].tobytes() == old[name.format("gate")].tobytes()
            assert fc1[1::2].tobytes() == old[name.format("up")].tobytes()
            assert fc2.tobytes() == old[name.format("down")].tobytes()
    assert (
        row.bytes_before
        == row.bytes_after
        == sum(array.nbytes for name, array in new.items() if not name.endswith("bias"))
    )
    assert (row.experts, row.hidden, row.inter) == (4, 64, 128)


def test_attributes_are_all_written_out() -> None:
    model = expert_graphs.model(INT4, limit=7.0, alpha=1.702, beta=1.0)
    fused(model)
    values = {name: attribute.value for name, attribute in the_node(model).attributes.items()}
    assert values == {
        "activation_alpha": pytest.approx(1.702),
        "activation_beta": 1.0,
        "activation_type": "swiglu",
        "block_size": 32,
        "expert_weight_bits": 4,
        "k": 2,
        "normalize_routing_weights": 1,
        "quant_type": "int",
        "swiglu_fusion": 1,
        "swiglu_limit": 7.0,
        "use_sparse_mixer": 0,
        "weights_prepacked": 0,
    }


def test_scales_and_zero_points_may_be_flat() -> None:
    model = expert_graphs.model(INT4, zero_points=True)
    for name, value in model.graph.initializers.items():
        if name.endswith(("scales", "zero_points")) and value.const_value is not None:
            flat = value.const_value.numpy().reshape(-1)
            value.const_value = ir.tensor(flat, name=name)
            value.shape = ir.Shape(flat.shape)
    feeds = expert_graphs.feeds(INT4)
    before = run(model, feeds)[0]
    assert [row.status for row in fused(model).rows] == [CONVERTED]
    assert relative_error(run(model, feeds)[0], before) < 1e-6


def check_stays(
    model: ir.Model, reason: str, caplog: pytest.LogCaptureFixture, target: str = "portable"
) -> None:
    count = sum(1 for _ in model.graph)
    initializers = list(model.graph.initializers)
    with caplog.at_level(logging.WARNING):
        report = fused(model, target)
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]
    assert len(caplog.records) == 1
    assert sum(1 for _ in model.graph) == count
    assert list(model.graph.initializers) == initializers
    assert not nodes_of(model, "QMoE")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"inter": 96, "block": 64}, "96 columns are not whole blocks of 64"),
        (
            {"inter": 192, "block": 64, "zero_points": True, "dtype": np.float16},
            "the CUDA provider misreads the zero points of an odd number of blocks, and K=64 has "
            "1 of block_size=64",
        ),
        (
            {"inter": 96, "dtype": np.float16},
            "the CUDA provider needs hidden and inter sizes divisible by 64, and they are 64 and "
            "96",
        ),
        (
            {"block": 16},
            "the CUDA provider does not take block_size=16 with int4 (it takes 0, 32, 64, 128, "
            "256)",
        ),
        ({"odd": {1: {"bits": 8}}}, "the experts' MatMulNBits differ in their attributes"),
        (
            {"odd": {1: {"zero_points": True}}},
            "expert 0 has no zero_points, and others have",
        ),
        ({"numbers": [0, 2, 3]}, "expert 1 is missing"),
        (
            {"homes": {"experts.1.up.codes": "overridable"}},
            "l0.experts.1.up.codes is a graph input, so its default may be overridden at run time",
        ),
        (
            {"homes": {"experts.1.up.scales": "computed"}},
            "l0.experts.1.up.scales is not a constant",
        ),
    ],
    ids=str,
)
def test_what_qmoe_would_read_otherwise_stays(
    fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    check_stays(expert_graphs.model(INT4, **fields), reason, caplog)


@pytest.mark.parametrize(
    "fields",
    [
        {"inter": 192, "block": 64, "zero_points": True, "dtype": np.float16},
        {"inter": 96, "zero_points": True, "dtype": np.float16},
        {"block": 16},
    ],
    ids=str,
)
def test_what_only_the_cpu_takes(fields: dict[str, Any]) -> None:
    layer = replace(INT4, **fields)
    model = expert_graphs.model(layer)
    feeds = expert_graphs.feeds(layer)
    before = run(model, feeds)[0]
    assert [row.status for row in fused(model, "cpu").rows] == [CONVERTED]
    tolerance = 1e-6 if layer.dtype is np.float32 else 2e-3
    assert relative_error(run(model, feeds)[0], before) < tolerance


def _maps(model: ir.Model, which: str) -> list[ir.Node]:
    return [
        node
        for node in model.graph
        if node.op_type == "MatMulNBits" and f".{which}." in str(node.inputs[1].name)  # type: ignore[union-attr]
    ]


def _requantize(model: ir.Model) -> None:
    """Makes all up maps int8."""
    for node in _maps(model, "up"):
        codes = node.inputs[1]
        assert codes is not None
        assert codes.const_value is not None
        old = codes.const_value.numpy()
        new = np.concatenate([old, old], -1)
        codes.const_value = ir.tensor(new, name=codes.name)
        codes.shape = ir.Shape(new.shape)
        node.attributes["bits"] = ir.AttrInt64("bits", 8)


def _setting(name: str, value: int) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        for which in ("gate", "up", "down"):
            for node in _maps(model, which):
                node.attributes[name] = ir.AttrInt64(name, value)

    return change


def _float_zero_points(model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        if str(value.name).endswith("zero_points") and "experts" in str(value.name):
            rows = value.shape[0] if value.shape else 0
            blocks = 4 if "down" in str(value.name) else 2
            array = np.zeros((int(rows), blocks), np.float32)  # type: ignore[arg-type]
            value.const_value = ir.tensor(array, name=value.name)
            value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)


def _order(model: ir.Model) -> None:
    for node in _maps(model, "down"):
        order = ir.tensor(np.arange(128, dtype=np.int32), name=f"{node.outputs[0].name}.g_idx")
        value = ir.Value(name=order.name, const_value=order)
        model.graph.register_initializer(value)
        node.resize_inputs(5)
        node.replace_input_with(4, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_requantize, "both int4 block 32 and int8 block 32 weights"),
        (_setting("accuracy_level", 7), "MatMulNBits with accuracy_level=7"),
        (
            _setting("weight_prepacked", 1),
            "MatMulNBits with weight_prepacked=1, an order of its own",
        ),
        (
            _float_zero_points,
            "l0.experts.0.gate.zero_points is [128, 2], and its attributes ask for [128, 1]",
        ),
        (_order, "MatMulNBits has g_idx, which reorders its columns"),
    ],
)
def test_what_matmulnbits_can_and_qmoe_cannot_stays(
    change: Callable[[ir.Model], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = expert_graphs.model(INT4, zero_points=change is _float_zero_points)
    change(model)
    check_stays(model, reason, caplog)


def test_what_is_added_to_the_tokens_is_no_bias(caplog: pytest.LogCaptureFixture) -> None:
    """With as many tokens as outputs [128, 1] and [128] may both be added, and differ."""

    class PerToken(Builder):
        def nbits(self, x: ir.Value, name: str, rows: int, columns: int, layer: Layer) -> ir.Value:
            product = super().nbits(x, name, rows, columns, layer)
            if not name.endswith("gate"):
                return product
            return self.op("Add", product, self.random(f"{name}.added", rows, 1))

    builder = PerToken(INT4)
    x = builder.graph.input("x", np.float32, (128, INT4.hidden))
    model = expert_graphs.finished(builder, x, builder.experts(x))
    assert run(model, expert_graphs.feeds(Layer(flat=True), (128,)))[0].shape == (128, 64)
    reason = "l0.experts.0.gate.added is [128, 1], and its attributes ask for [128]"
    check_stays(model, reason, caplog)


def test_an_accuracy_level_is_a_permission_that_is_not_used() -> None:
    model = expert_graphs.model(INT4)
    feeds = expert_graphs.feeds(INT4)
    before = run(model, feeds)[0]
    _setting("accuracy_level", 4)(model)
    assert [row.status for row in fused(model).rows] == [CONVERTED]
    assert "accuracy_level" not in the_node(model).attributes
    assert relative_error(run(model, feeds)[0], before) < 1e-6


def test_kernels_that_are_less_exact_are_told() -> None:
    (row,) = fused(expert_graphs.model(INT4, bits=8)).rows
    assert row.warnings[0] == (
        "the CPU provider rounds activations to int8 with blockwise int8, 1 to 2 % off"
    )
    assert "float32" in row.warnings[1]
