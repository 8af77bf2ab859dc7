"""Graphs that are nearly a layer with gathered weights: one node or one size decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.report import SKIPPED
from tests.batched_graphs import GPT_OSS, MIXTRAL, Form, batched
from tests.expert_graphs import ROUTERS, Layer
from tests.fusions import fused
from tests.moe_models import nodes_of, relative_error, run, the_node
from tests.test_fuse_adversaries import float32_router

Edit = Callable[[ir.Model], None]


def node_of(model: ir.Model, op_type: str, index: int = -1) -> ir.Node:
    return [node for node in model.graph if node.op_type == op_type][index]


def given(model: ir.Model, numbers: Any, home: str = "initializer") -> ir.Value:
    """Adds integers to a model."""
    name, array = f"given{len(model.graph.initializers)}", np.array(numbers, np.int64)
    value = ir.val(name, ir.DataType.INT64, array.shape)
    value.const_value = ir.tensor(array, name=name)
    model.graph.initializers.add(value)
    if home == "overridable":
        model.graph.inputs.append(value)
    return value


def axis(op_type: str, numbers: Any, index: int = -1, home: str = "initializer") -> Edit:
    """Changes the axes, or the shape, of a node."""

    def edit(model: ir.Model) -> None:
        node = node_of(model, op_type, index)
        node.replace_input_with(1, given(model, numbers, home))

    return edit


def attribute(op_type: str, name: str, number: int | None, index: int = -1) -> Edit:
    """Changes an attribute of a node, or removes it."""

    def edit(model: ir.Model) -> None:
        node = node_of(model, op_type, index)
        if number is None:
            del node.attributes[name]
        else:
            node.attributes[name] = ir.AttrInt64(name, number)

    return edit


def operator(op_type: str, other: str, index: int = -1) -> Edit:
    """Makes a node another operator, which has the same inputs."""

    def edit(model: ir.Model) -> None:
        node_of(model, op_type, index).op_type = other

    return edit


def without_axes(op_type: str) -> Edit:
    def edit(model: ir.Model) -> None:
        node_of(model, op_type).resize_inputs(1)

    return edit


def shape(name: str, *sizes: int) -> Edit:
    """Gives a weight another shape."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(np.ones(sizes, np.float32), name=name)
        value.shape = ir.Shape(sizes)

    return edit


def several(*edits: Edit) -> Edit:
    def edit(model: ir.Model) -> None:
        for each in edits:
            each(model)

    return edit


def unshaped(*names: str) -> Edit:
    """Forgets the shapes of values."""

    def edit(model: ir.Model) -> None:
        for node in model.graph:
            for value in node.outputs:
                if value.name in names or node.op_type in names:
                    value.shape = None

    return edit


def folded(*shape: int | str | None) -> Edit:
    """Folds by a shape that is computed, to a declared one."""

    def edit(model: ir.Model) -> None:
        fold = node_of(model, "ReduceSum").inputs[0]
        assert fold is not None
        node = fold.producer()
        assert node is not None
        numbers = ir.node("Abs", [given(model, [7, 2, 64])])
        model.graph.insert_before(node, numbers)
        node.replace_input_with(1, numbers.outputs[0])
        fold.shape = ir.Shape(shape)

    return edit


def edited(form: Form, edit: Edit) -> ir.Model:
    model, _ = batched(form)
    edit(model)
    return model


GATHER = replace(MIXTRAL, gather="Gather")
PAIRS = replace(MIXTRAL, pairs=1)
K_MAJOR = replace(GPT_OSS, pairs=0)
BIASED = Form(Layer(experts=5, bias=True))
SIGMOID = Layer(experts=5, router="sigmoid")

SAME: dict[str, tuple[Form, Edit]] = {
    "weights in a column": (
        MIXTRAL,
        several(axis("Unsqueeze", [-1, 1]), operator("Unsqueeze", "Reshape")),
    ),
    "no batches": (MIXTRAL, attribute("GatherND", "batch_dims", 0)),
    "the default axis": (GATHER, attribute("Gather", "axis", None)),
    "folded to a size": (MIXTRAL, folded("T", 2, 64)),
    "folded to a known size": (MIXTRAL, axis("Reshape", [7, 2, 64], -2)),
    "unsqueezed and squeezed twice": (replace(MIXTRAL, pairs=2), several()),
    # What meets the weights of several experts per token is as many tokens.
    "other tokens": (Form(reads="other"), several()),
    "other tokens, encoded": (Form(SIGMOID, reads="other"), several()),
}


@pytest.mark.parametrize("name", SAME)
def test_what_is_the_same_in_other_words(name: str) -> None:
    form, edit = SAME[name]
    before, after = (edited(form, edit) for _ in range(2))
    assert fused(after).rows == []
    the_node(after, "MoE")
    rng = np.random.default_rng(1)
    shapes = {"x": (1, 7, 64), "z": (7, 64)}
    feeds = {
        str(value.name): rng.standard_normal(shapes[str(value.name)]).astype(np.float32)
        for value in before.graph.inputs
    }
    assert relative_error(run(after, feeds)[0], run(before, feeds)[0]) < 1e-5


# Where nothing says that it is a layer of experts.
OTHER_SUMS: dict[str, tuple[Form, Edit]] = {
    "keeps its axis": (MIXTRAL, attribute("ReduceSum", "keepdims", 1)),
    "keeps its axis by default": (MIXTRAL, attribute("ReduceSum", "keepdims", None)),
    **{f"along {number}": (MIXTRAL, axis("ReduceSum", [number])) for number in (0, 2, -1, -3)},
    "along two": (MIXTRAL, axis("ReduceSum", [1, 2])),
    "along all": (MIXTRAL, without_axes("ReduceSum")),
    "along a default": (MIXTRAL, axis("ReduceSum", [1], home="overridable")),
    "of no folding": (MIXTRAL, operator("Reshape", "Expand", -2)),
    "of four axes": (MIXTRAL, folded("T", 2, 64, 1)),
    "of two axes": (MIXTRAL, folded("T", 2)),
    "of an unknown count": (MIXTRAL, folded("T", None, 64)),
    "of unknown axes": (MIXTRAL, several(folded("T", 2, 64), unshaped("Reshape"))),
    "of no product": (MIXTRAL, operator("Mul", "Div")),
    "weights in a row": (MIXTRAL, axis("Unsqueeze", [0])),
    "weights not in order": (MIXTRAL, axis("Reshape", [1, -1], -3)),
    **{
        f"squeezed along {number}": (MIXTRAL, axis("Squeeze", [number]))
        for number in (0, 1, -2, -3)
    },
    **{
        f"squeezed along {number} of [1, N]": (K_MAJOR, axis("Squeeze", [number]))
        for number in (0, 2, -1, -3)
    },
    "squeezed along all": (MIXTRAL, without_axes("Squeeze")),
    **{
        f"unsqueezed along {number}": (MIXTRAL, axis("Unsqueeze", [number], -2))
        for number in (0, 1, -2, -3)
    },
    **{
        f"unsqueezed along {number} for [1, N]": (K_MAJOR, axis("Unsqueeze", [number], -3))
        for number in (0, 2, -1, -3)
    },
    "not unsqueezed": (MIXTRAL, operator("Unsqueeze", "Expand", -2)),
    "not squeezed": (MIXTRAL, operator("Squeeze", "Expand")),
    "no matrix product": (MIXTRAL, operator("MatMul", "MatMulInteger")),
    "indices in a row": (MIXTRAL, axis("Unsqueeze", [0], -3)),
    "gathered in batches": (MIXTRAL, attribute("GatherND", "batch_dims", 1)),
    "gathered along another axis": (GATHER, attribute("Gather", "axis", 1)),
    "not gathered": (GATHER, operator("Gather", "GatherElements")),
    "less a bias": (BIASED, operator("Add", "Sub")),
    "a bias gathered in batches": (BIASED, attribute("GatherND", "batch_dims", 1)),
    "unsqueezed and squeezed": (PAIRS, axis("Squeeze", [0])),
    "unsqueezed twice": (
        PAIRS,
        several(axis("Unsqueeze", [0, 1], -2), without_axes("Squeeze")),
    ),
}


@pytest.mark.parametrize("name", OTHER_SUMS)
def test_sums_that_are_not_of_experts(name: str) -> None:
    model = edited(*OTHER_SUMS[name])
    assert fused(model).rows == []
    assert nodes_of(model, "MoE") == []


APART = Form(Layer(experts=5, bias=True), apart=True)
OTHERS = "one map takes the experts l0.indices_6, and another l0.indices_13"
AT_HAND = "is a graph input, so its default may be overridden at run time"

REASONS: dict[str, tuple[Form, Edit, str]] = {
    **{
        f"another expert's {name}": (replace(APART, others=(name,)), several(), OTHERS)
        for name in ("up", "fc2", "gate_bias", "up_bias", "fc2_bias")
    },
    "halves": (
        MIXTRAL,
        axis("Reshape", [-1, 2, 32], -2),
        "the results are summed in groups that are not 2 experts",
    ),
    "groups of an unknown size": (
        MIXTRAL,
        folded("T", 2, None),
        "the results are summed in groups that are not 2 experts",
    ),
    "more than were chosen": (
        MIXTRAL,
        several(axis("Expand", [1, 4, 1], 0), axis("Reshape", [-1, 4, 64], -2)),
        "4 results are summed for 2 experts per token",
    ),
    "weights without a shape": (
        Form(Layer(experts=5, homes={"fc1": "computed"})),
        unshaped("Abs"),
        "the weights have an unknown shape",
    ),
    "weights without a size": (
        Form(Layer(experts=5, homes={"fc1": "computed"})),
        lambda m: setattr(node_of(m, "Abs").outputs[0], "shape", ir.Shape([None, 192, 64])),
        "the weights have an unknown shape",
    ),
    "a weight with more axes": (
        MIXTRAL,
        shape("l0.fc2", 5, 64, 96, 1),
        "l0.fc2 has shape [5, 64, 96, 1], not [E, N, K]",
    ),
    "more experts": (
        Form(Layer(experts=5, activation="silu")),
        shape("l0.fc2", 6, 64, 96),
        "gate is [5, 96, 64], which asks for down [5, 64, 96], and it is [6, 64, 96]",
    ),
    "weights of other tokens": (
        Form(Layer(experts=5, k=1), reads="other"),
        several(),
        "l0.indices_6 is not known to have one row per token of l0.Reshape_2",
    ),
    "deep weights": (
        Form(SIGMOID, reads="deep"),
        several(),
        "the weights l0.values_6 are not [T, k], and its routing is not the MoE's own",
    ),
    "a bias that may be another": (
        Form(Layer(experts=5, bias=True, homes={"fc2_bias": "overridable"})),
        several(),
        f"l0.fc2_bias {AT_HAND}",
    ),
}


def test_deep_weights_of_a_router_in_another_type_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its logits are not handed over in the end, and its sums would meet other tokens."""
    monkeypatch.setitem(ROUTERS, "wide", float32_router)
    form = Form(Layer(experts=5, router="wide", dtype=np.float16), reads="deep")
    model = edited(form, lambda model: None)
    (row,) = fused(model).rows
    assert row.reason.endswith(" are not [T, k], and its routing is not the MoE's own")
    assert nodes_of(model, "MoE") == []


@pytest.mark.parametrize("name", REASONS)
def test_why_experts_stay(name: str) -> None:
    form, edit, reason = REASONS[name]
    model = edited(form, edit)
    (row,) = fused(model).rows
    assert (row.status, row.reason) == (SKIPPED, reason)
    assert nodes_of(model, "MoE") == []
