"""What `verify` finds outside the experts: any change that something uses, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.verification._comparison import Comparison
from tests.moe_models import Array, Graph

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def model(
    *,
    weight: Array = W,
    operator: str = "MatMul",
    slope: float = 0.1,
    middle: str = "h",
    body: str = "Neg",
    inner: str = "Abs",
    opset: int = 21,
    home: str = "initializer",
    outputs: int = 1,
    unused: bool = False,
    bias: bool = False,
) -> ir.Model:
    """Returns y = If(flag, -h, h) + f(h) with h = LeakyRelu(x W), or something near to it."""
    graph = Graph()
    flag, x = graph.input("flag", np.bool_, ()), graph.input("x", np.float32, ("n", 3))
    w = graph.weight("w", weight, home)
    product = graph.op(operator, x, w, *([graph.weight("b", W[0])] if bias else []), out="p")
    h = graph.op("LeakyRelu", product, out=middle, alpha=slope)
    bodies: dict[str, Any] = {}
    for name, op_type in (("then_branch", body), ("else_branch", "Identity")):
        branch = Graph()
        bodies[name] = branch.done(branch.op(op_type, h, out=f"{name}_out"))
    chosen = graph.op("If", flag, out="chosen", **bodies)
    called = graph.op("F", h, out="called", domain="local")
    y = graph.op("Add", chosen, called, out="y", like=x)
    if unused:
        graph.op("Exp", graph.weight("nothing", W), out="unused")
    function = Graph()
    a = function.input("a", np.float32, ())
    made = ir.Function(
        "local",
        "F",
        graph=function.done(function.op(inner, a, out="b"), opsets={"": opset}),
        attributes=[],
    )
    opsets = {"": opset, "local": 1}
    return graph.model(*[y, h][:outputs], opsets=opsets, functions=[made])


SAME: dict[str, dict[str, Any]] = {
    "names of intermediate values": {"middle": "another"},
    "what nothing uses": {"unused": True},
    "a constant's home": {"home": "constant"},
    "the precision of a Python float": {"slope": float(np.float32(0.1))},
}


@pytest.mark.parametrize("change", SAME)
def test_what_means_the_same_is_the_same(change: str) -> None:
    assert Comparison(model(), model(**SAME[change])).differences == []


DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "values": ({"weight": W + 1}, "constant w has other values in the converted model"),
    "one bit": (
        {"weight": np.where(W == 5, np.nextafter(W, 9), W)},
        "constant w has other values in the converted model",
    ),
    "the sign of a zero": (
        {"weight": np.where(W == 0, -W, W)},
        "constant w has other values in the converted model",
    ),
    "shape": (
        {"weight": W.reshape(3, 2, 2)},
        "constant w is FLOAT [3, 4], and FLOAT [3, 2, 2] in the converted model",
    ),
    "type": (
        {"weight": W.astype(np.float16)},
        "constant w is FLOAT [3, 4], and FLOAT16 [3, 4] in the converted model",
    ),
    "operator": ({"operator": "Gemm"}, "node_MatMul_0 is MatMul, and Gemm in the converted model"),
    "attribute": (
        {"slope": 0.2},
        "attribute alpha of node_LeakyRelu_1 is 0.1, and 0.2 in the converted model",
    ),
    "more inputs": (
        {"bias": True},
        "node_MatMul_0 has inputs [0, 1], and [0, 1, 2] in the converted model",
    ),
    "a subgraph": ({"body": "Abs"}, "node_Neg_0 is Neg, and Abs in the converted model"),
    "a function": ({"inner": "Neg"}, "node_Abs_0 is Abs, and Neg in the converted model"),
    "opset": ({"opset": 20}, "opset ai.onnx 21, and 20 in the converted model"),
    "outputs": ({"outputs": 2}, "graph outputs y, and y, h in the converted model"),
    "a constant that is computed": (
        {"home": "computed"},
        "w is a constant, and w comes from Abs in the converted model",
    ),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_every_change_is_found(change: str) -> None:
    fields, text = DIFFERENT[change]
    assert [each.text for each in Comparison(model(), model(**fields)).differences] == [text]


@pytest.mark.parametrize("change", [name for name in DIFFERENT if name != "outputs"])
def test_and_in_the_other_direction(change: str) -> None:
    fields, _ = DIFFERENT[change]
    assert len(Comparison(model(**fields), model()).differences) == 1


def test_inputs_with_a_default() -> None:
    """Old models list every initializer as a graph input too."""
    before = model(home="overridable")
    assert Comparison(before, model(home="overridable")).differences == []
    (changed,) = Comparison(before, model(home="overridable", weight=W + 1)).differences
    assert changed.text == "constant w has other values in the converted model"
    inputs, value = Comparison(before, model()).differences
    assert inputs.text == "graph inputs flag, x, w, and flag, x in the converted model"
    assert value.text == "w is a graph input, and w is a constant in the converted model"


def test_differences_are_taken_by_the_place_where_they_are() -> None:
    before, after = model(), model(weight=W + 1, inner="Neg")
    comparison = Comparison(before, after)
    called = next(node for node in before.graph if node.op_type == "F")
    x = before.graph.inputs[1]
    taken = comparison.take([called.inputs[0]], x)
    assert ["constant w" in each.text for each in taken] == [True]
    assert ["node_Abs_0 is Abs" in each.text for each in comparison.differences] == [True]
    assert comparison.take([called.inputs[0]], x) == []
    assert comparison.take([called.outputs[0]], called.outputs[0]) == []


def _strings(words: list[str]) -> Callable[[Graph], ir.Value]:
    def add(graph: Graph) -> ir.Value:
        value = ir.val("words", ir.DataType.STRING, [len(words)])
        value.const_value = ir.StringTensor(
            np.array([word.encode() for word in words], object), shape=ir.Shape([len(words)])
        )
        graph.initializers.append(value)
        return graph.op("Identity", value, out="y", like=value)

    return add


def test_strings() -> None:
    models = []
    for words in (["a", "b"], ["a", "b"], ["a", "c"]):
        graph = Graph()
        models.append(graph.model(_strings(words)(graph)))
    first, same, other = models
    assert Comparison(first, same).differences == []
    assert len(Comparison(first, other).differences) == 1
