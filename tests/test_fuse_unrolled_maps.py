"""A matrix that is cut out of a stack is read in every form, and the experts that have one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.report import Report
from qmoe_rules.rules import apply_rules
from qmoe_rules.rules._chain import Map
from qmoe_rules.rules._fusing import Block
from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from qmoe_rules.rules.fuse_unrolled_experts import FuseUnrolledExperts
from tests.expert_graphs import Layer
from tests.moe_models import nodes_of, relative_error, run
from tests.unrolled_graphs import Cut, E, Form, H, unrolled

# What the experts of `unrolled` are applied to.
SOURCE = "l0.Reshape_2"

RULE = FuseUnrolledExperts(Report())

MAPS: dict[str, tuple[Callable[[Cut], ir.Value], bool]] = {
    "a number": (lambda b: b.product(b.matrix()), True),
    "a vector": (lambda b: b.product(b.squeezed()), True),
    "transposed": (lambda b: b.product(b.op("Transpose", b.matrix())), False),
    "expressly": (lambda b: b.product(b.op("Transpose", b.squeezed(), perm=[1, 0])), False),
    "without an axis": (lambda b: b.product(b.op("Gather", b.stack, b.number_of(3))), True),
}


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_what_it_says(name: str) -> None:
    write, is_k_major = MAPS[name]
    builder = Cut()
    value = write(builder)
    linear = RULE.linear(value)
    assert linear is not None
    assert linear.source is builder.x
    assert linear.weight == Map((builder.stack,), (3, is_k_major))
    assert set(linear.weight.nodes) == {*builder.graph.nodes[2:]} - {
        node for node in builder.graph.nodes if node.op_type == "Constant"
    }
    assert RULE.claims(value)
    stack = builder.stack.const_value.numpy()[3]  # type: ignore[union-attr]
    expected = builder.feeds()["x"] @ (stack if is_k_major else stack.T)
    assert np.allclose(builder.result(value), expected, atol=1e-5)


NO_MAPS: dict[str, Callable[[Cut], ir.Value]] = {
    "an input": lambda b: b.x,
    "another operator": lambda b: b.op("Gemm", b.x, b.matrix()),
    "the other way round": lambda b: b.op("MatMul", b.matrix(), b.x),
    "of nothing": lambda b: b.op("MatMul", None, b.matrix()),
    "of no matrix": lambda b: b.product(None),
    "of one matrix": lambda b: b.product(b.random("one", H, H)),
    "along another axis": lambda b: b.product(b.matrix(axis=1)),
    "along the last axis": lambda b: b.product(b.op("Transpose", b.matrix(axis=2))),
    "of no stack": lambda b: b.product(b.op("Gather", None, b.number_of(3), axis=0)),
    "of several": lambda b: b.product(b.matrix([3, 2])),
    "of a batch": lambda b: b.product(b.matrix([3])),
    "of a batch, transposed": lambda b: b.product(b.op("Transpose", b.matrix([3]))),
    "squeezed out of a matrix": lambda b: b.product(b.squeezed(3)),
    "squeezed along another axis": lambda b: b.product(b.squeezed(axis=1)),
    "squeezed anyhow": lambda b: b.product(b.squeezed(axis=None)),
    "not transposed": lambda b: b.product(b.op("Transpose", b.matrix(), perm=[0, 1])),
    "computed": lambda b: b.product(b.op("Gather", b.stack, b.op("Abs", b.number_of(3)), axis=0)),
}


@pytest.mark.parametrize("name", NO_MAPS)
def test_what_only_looks_like_a_map_is_none(name: str) -> None:
    value = NO_MAPS[name](Cut())
    assert RULE.linear(value) is None
    assert not RULE.claims(value)


def test_all_maps_are_one_stack() -> None:
    builder = Cut()
    stack, other = builder.stack, builder.random("other", E, H, H)
    flat = builder.random("flat", E, H)
    late = builder.graph.weight("late", np.ones((E, H, H), np.float32), "computed")

    def maps(*attributes: tuple[int, bool]) -> list[Map]:
        return [Map((stack,), each) for each in attributes]

    array = stack.const_value.numpy()  # type: ignore[union-attr]
    for is_k_major, expected in ((False, array), (True, array.transpose(0, 2, 1))):
        for count in (1, 2):
            parts = RULE.parts(maps(*((index, is_k_major) for index in range(count))))
            assert not isinstance(parts, str)
            assert list(parts) == ["weights"]
            assert np.array_equal(parts["weights"].read(0, E), expected)
    assert RULE.parts(maps((0, True), (2, True))) == "expert 1 has the weights of expert 2"
    assert RULE.parts(maps((1, True), (1, True))) == "expert 0 has the weights of expert 1"
    mixed = "the weights of either expert 1 or expert 0 are transposed"
    assert RULE.parts(maps((0, True), (1, False))) == mixed
    different = "expert 1 and expert 0 are cut out of different weights"
    assert RULE.parts([*maps((0, True)), Map((other,), (1, True))]) == different
    assert RULE.parts([Map((flat,), (0, True))]) == "l0.flat has shape [5, 6], not [E, N, K]"
    assert RULE.parts([Map((late,), (0, True))]) == "late is not a constant"


# Experts


def found(model: ir.Model) -> Block | str | None:
    """Returns what the last Add of a model ends."""
    return RULE.find([node for node in model.graph if node.op_type == "Add"][-1])


def small(**fields: Any) -> ir.Model:
    layer = Layer(**{"experts": 3, "hidden": 8, "inter": 6, **fields.pop("layer", {})})
    return unrolled(Form(layer, **fields))[0]


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("shared", ["", "before"])
def test_a_block_is_all_nodes_of_the_experts(zeros: bool, shared: str) -> None:
    model = small(zeros=zeros, layer={"shared": shared, "numbers": (2, 0, 1)}, places=(2, 0, 1))
    block = found(model)
    assert isinstance(block, Block)
    assert {node.op_type for node in model.graph} - {node.op_type for node in block.nodes} == {
        "Constant", "Concat", "Div", "Identity", "ReduceSum", "Shape", "Softmax", "TopK",
    }  # fmt: skip
    zeros_of = [node for node in model.graph if node.op_type == "ConstantOfShape"]
    # What a shared expert is added to first is no part of the chain.
    assert len([node for node in zeros_of if node not in block.nodes]) == (zeros and bool(shared))
    if shared:
        assert block.rest is not None
        assert block.rest.producer() not in block.nodes
    else:
        assert block.rest is None
    assert block.experts.source.name == SOURCE
    assert block.name == "l0"
    assert [part.shape for part in block.experts.down.values()] == [(3, 8, 6)]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"layer": {"numbers": (0, 2)}, "places": (0, 2)}, "expert 1 is missing"),
        ({"places": (0, 2, 1)}, "expert 1 has the weights of expert 2"),
    ],
    ids=str,
)
def test_what_is_no_moe(fields: dict[str, Any], reason: str) -> None:
    assert found(small(**fields)) == reason


@pytest.mark.parametrize("which", [0, -1])  # of the sum, and of a weight
def test_zeros_of_another_size(which: int) -> None:
    model = small()
    zeros = [node for node in model.graph if node.op_type == "ConstantOfShape"][which]
    shape = next(n for n in model.graph if n.outputs[0] is zeros.inputs[0])
    shape.replace_input_with(0, model.graph.inputs[0])
    reason = f"the zeros {zeros.outputs[0].name} are not known to be like {SOURCE}"
    assert found(model) == reason


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        (None, f"the experts' input {SOURCE} is of unknown rank; MoE takes 2-D and 3-D"),
        (("B", "S", 8), f"l0.indices_6 is not known to have one row per token of {SOURCE}"),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_tokens_that_are_not_flat(shape: Any, reason: str, zeros: bool) -> None:
    model = small(zeros=zeros)
    source = next(node for node in model.graph if node.outputs[0].name == SOURCE).outputs[0]
    source.shape = None if shape is None else ir.Shape(shape)
    report = Report()
    apply_rules(model, fuse_experts_rules(report=report))
    assert [row.reason for row in report.rows] == [reason]


def test_a_sum_of_something_else() -> None:
    model = small()
    first = next(node for node in model.graph if node.op_type == "Add")
    assert RULE.find(first) is None


def test_a_layer_is_fused_and_computes_the_same() -> None:
    model, feeds = small(), {"x": np.ones((1, 3, 8), np.float32)}
    feeds["x"] *= np.arange(24).reshape(1, 3, 8) / 24
    before = run(model, feeds)[0]
    apply_rules(model, fuse_experts_rules())
    assert len(nodes_of(model, "MoE")) == 1
    assert relative_error(run(model, feeds)[0], before) < 1e-6
