"""What a router does is recognized, or encoded so that MoE does the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRule

from qmoe_rules import reference
from qmoe_rules.rules import apply_rules
from qmoe_rules.rules._routing import (
    Routing,
    emit_routing,
    refuse_routing,
    routing_of,
    settled,
)
from tests import expert_graphs
from tests.expert_graphs import ROUTERS, Builder, Layer
from tests.moe_models import Array, Graph, relative_error, run

K, EXPERTS = 3, 6


def read(router: str, **fields: Any) -> Routing | str:
    """Builds a router and reads it back."""
    layer = Layer(router=router, **fields)
    builder = Builder(layer)
    x = expert_graphs.source(builder.graph, layer)
    return routing_of(*ROUTERS[router](builder, x), layer.experts, x)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("router", "normalize"),
    [("softmax_topk", False), ("softmax_topk_norm", True), ("topk_softmax", True)],
)
def test_moes_own_routing_hands_over_its_logits(
    router: str, normalize: bool, flat: bool, swapped: bool
) -> None:
    found = read(router, flat=flat, swapped=swapped)
    assert isinstance(found, Routing)
    assert found.logits is not None
    assert found.logits.producer().op_type == "MatMul"  # type: ignore[union-attr]
    assert (found.k, found.experts, found.normalize) == (2, 4, normalize)


def test_logits_that_were_widened_for_the_softmax_are_handed_over_as_they_were() -> None:
    found = read("float32", dtype=np.float16)
    assert isinstance(found, Routing)
    assert found.logits is not None
    assert found.logits.producer().op_type == "MatMul"  # type: ignore[union-attr]


@pytest.mark.parametrize("router", ["scaled", "sigmoid", "sigmoid_corrected", "mixer"])
def test_other_routing_is_encoded(router: str) -> None:
    found = read(router)
    assert isinstance(found, Routing)
    assert found.logits is None
    assert (found.k, found.experts, found.normalize) == (2, 4, True)


def test_logits_are_handed_over_flat() -> None:
    graph = Graph()
    logits = graph.input("logits", np.float32, ("batch", "sequence", EXPERTS))
    values = graph.input("weights", np.float32, ("batch", "sequence", K))
    routing = Routing(values, values, K, EXPERTS, logits)
    router = graph.op("Route", values, values, out="router", domain="test")
    router.type, router.shape = logits.type, ir.Shape(["tokens", EXPERTS])
    model = graph.model(router)
    assert apply_rules(model, [RewriteRule(_pattern, _emitter(routing, ir.DataType.FLOAT))])
    given = np.random.default_rng(0).standard_normal((2, 5, EXPERTS)).astype(np.float32)
    feeds = {"logits": given, "weights": given[..., :K]}
    np.testing.assert_array_equal(run(model, feeds)[0], given.reshape(-1, EXPERTS))


def test_logits_of_another_type_are_not_rounded() -> None:
    logits = ir.val("logits", ir.DataType.FLOAT, ["t", 4])
    indices = ir.val("indices", ir.DataType.INT64, ["t", 2])
    weights = ir.val("weights", ir.DataType.FLOAT, ["t", 2])
    routing = Routing(indices, weights, 2, 4, logits, normalize=False)
    assert settled(routing, ir.DataType.FLOAT) is routing
    encoded = settled(routing, ir.DataType.FLOAT16)
    assert (encoded.logits, encoded.normalize) == (None, True)
    assert refuse_routing(routing, 13) is None
    assert refuse_routing(routing, 12) == "its routing needs opset 13, and the model imports 12"
    assert refuse_routing(encoded, 15) == "its routing needs opset 16, and the model imports 15"


# What cannot be proven


def scores(graph: Graph, experts: int = EXPERTS) -> ir.Value:
    return graph.input("scores", np.float32, ("tokens", experts))


def topped(builder: Builder, value: ir.Value, **attributes: Any) -> tuple[ir.Value, ir.Value]:
    values, indices = builder.top(value, K)
    node = indices.producer()
    assert node is not None
    node.attributes.update({name: ir.AttrInt64(name, value) for name, value in attributes.items()})
    return indices, values


def test_weights_that_may_be_negative() -> None:
    assert read("signed") == "the weights l0.values_3 may be negative"


@pytest.mark.parametrize(
    ("change", "is_negative"),
    [
        (lambda b, v: b.op("Mul", v, b.number(2.0)), False),
        (lambda b, v: b.op("Mul", v, b.number(-2.0)), True),
        (lambda b, v: b.op("Add", v, b.number(0.1)), False),
        (lambda b, v: b.op("Sub", v, b.number(0.1)), True),
        (lambda b, v: b.op("Neg", v), True),
        (lambda b, v: b.op("Log", v), True),
        (lambda b, v: b.op("Sqrt", v), False),
        (lambda b, v: b.op("Mul", v, b.op("Relu", b.op("Neg", v))), False),
        (lambda b, v: b.op("Where", b.op("Less", v, v), v, b.number(0.0)), False),
        (lambda b, v: b.op("Where", b.op("Less", v, v), v, b.number(-1.0)), True),
        (lambda b, v: b.op("Mul", v, b.weight("given", np.ones(1, np.float32))), True),
    ],
)
def test_signs(change: Any, is_negative: bool) -> None:
    builder = Builder(Layer(homes={"given": "overridable"}))
    indices, values = topped(builder, builder.op("Sigmoid", scores(builder.graph)))
    weights = change(builder, values)
    weights.type = ir.TensorType(ir.DataType.FLOAT)
    builder.graph.model(weights)
    found = routing_of(indices, weights, EXPERTS)
    reason = f"the weights {weights.name} may be negative"
    assert found == reason if is_negative else isinstance(found, Routing)


def test_a_long_way_back_ends() -> None:
    """Every step doubles the paths; each value is looked at once."""
    builder = Builder(Layer())
    indices, value = topped(builder, builder.op("Sigmoid", scores(builder.graph)))
    for _ in range(2000):
        value = builder.op("Add", value, value)
    value.shape = ir.Shape(["tokens", K])
    assert isinstance(routing_of(indices, value, EXPERTS), Routing)


@pytest.mark.parametrize(
    ("attributes", "is_read"),
    [
        ({}, True),
        ({"axis": 0}, False),
        ({"largest": 0}, False),
    ],
)
def test_only_the_largest_of_each_token(attributes: dict[str, int], is_read: bool) -> None:
    builder = Builder(Layer())
    value = builder.op("Sigmoid", scores(builder.graph))
    indices, weights = topped(builder, value, **attributes)
    found = routing_of(indices, weights, EXPERTS)
    reason = f"{indices.name} does not come from TopK with a constant k"
    assert isinstance(found, Routing) if is_read else found == reason


def test_a_router_of_more_experts_than_there_are() -> None:
    builder = Builder(Layer())
    indices, weights = topped(builder, builder.op("Softmax", scores(builder.graph)))
    assert routing_of(indices, weights, 5) == "the router ranks 6 experts, and there are 5"
    unknown = builder.graph.input("unknown", np.float32, ("tokens", "experts"))
    indices, weights = topped(builder, builder.op("Softmax", unknown))
    assert routing_of(indices, weights, 6) == (
        f"how many experts {indices.name} ranks is not known"
    )


def test_a_router_that_chooses_no_expert() -> None:
    """ONNX Runtime runs it, and would not load a MoE with k=0."""
    assert read("softmax_topk", k=0) == "l0.indices_4 chooses no expert"
    assert isinstance(read("softmax_topk", k=1), Routing)


def test_softmax_along_another_axis_is_not_moes() -> None:
    builder = Builder(Layer())
    value = builder.op("Softmax", scores(builder.graph), axis=0)
    found = routing_of(*topped(builder, value), EXPERTS)
    assert isinstance(found, Routing)
    assert found.logits is None


def test_logits_with_ties_are_not_handed_over() -> None:
    """MoE prefers the last of equal logits, and TopK the first."""
    builder = Builder(Layer())
    logits = builder.op("Relu", scores(builder.graph))
    values, indices = builder.top(builder.op("Softmax", logits), K)
    found = routing_of(indices, values, EXPERTS)
    assert isinstance(found, Routing)
    assert found.logits is None
    values, indices = builder.top(logits, K)
    found = routing_of(indices, builder.op("Softmax", values), EXPERTS)
    assert isinstance(found, Routing)
    assert found.logits is None


def test_a_sum_that_is_not_of_the_chosen_is_not_moes() -> None:
    builder = Builder(Layer())
    softmax = builder.op("Softmax", scores(builder.graph))
    indices, values = topped(builder, softmax)
    total = builder.op("ReduceSum", softmax, builder.constant([-1]), keepdims=1)
    found = routing_of(indices, builder.op("Div", values, total), EXPERTS)
    assert isinstance(found, Routing)
    assert found.logits is None


# The encoding


def _pattern(op: Any, indices: Any, weights: Any) -> Any:
    return op.Route(indices, weights, _domain="test", _outputs=["routed"])


def _emitter(routing: Routing, dtype: ir.DataType) -> Any:
    def emit(op: Any, routed: ir.Value, **bindings: Any) -> ir.Value:
        found = emit_routing(op, routing, dtype)[0 if routed.name == "router" else 1]
        assert found is not None
        return found

    return emit


def encoded(indices: Array, weights: Array, dtype: ir.DataType) -> tuple[Array, Array]:
    """Runs the encoding of a routing."""
    graph = Graph()
    shape = [f"d{axis}" for axis in range(indices.ndim - 1)]
    routing = Routing(
        graph.input("indices", np.int64, (*shape, K)),
        graph.input("weights", weights.dtype, (*shape, K)),
        K,
        EXPERTS,
    )
    outputs = [
        graph.op("Route", *graph.inputs, out="router", domain="test"),
        graph.op("Route", *graph.inputs, out="scale", domain="test"),
    ]
    for index, value in enumerate(outputs):
        out = graph.op("Cast", value, out=f"{value.name}32", to=ir.DataType.FLOAT)
        out.type = ir.TensorType(ir.DataType.FLOAT)
        out.shape = ir.Shape(["a", "b"] if index == 0 else [*shape, 1])
        outputs[index] = out
    model = graph.model(*outputs)
    apply_rules(model, [RewriteRule(_pattern, _emitter(routing, dtype))])
    router_array, scale_array = run(model, {"indices": indices, "weights": weights})
    return router_array, scale_array


def dense(indices: Array, weights: Array) -> Array:
    """Returns each expert's weight for each token, added up where it was chosen twice."""
    table = np.zeros((indices.size // K, EXPERTS))
    flat, values = indices.reshape(-1, K), weights.reshape(-1, K).astype(np.float64)
    for slot in range(K):
        np.add.at(table, (np.arange(len(table)), flat[:, slot]), values[:, slot])
    return table


def check_encoding(
    indices: Array, weights: Array, tolerance: float, dtype: ir.DataType = ir.DataType.FLOAT
) -> None:
    router, scale = encoded(indices, weights, dtype)
    chosen, shares = reference.route(router, K, normalize=True)
    found = dense(chosen, shares) * scale.reshape(-1, 1)
    assert np.isfinite(router).all()
    expected = dense(indices, weights)
    if expected.any():
        assert relative_error(found, expected) < tolerance
    else:
        assert not found.any()


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(ir.DataType.FLOAT, 1e-6), (ir.DataType.FLOAT16, 1e-3), (ir.DataType.BFLOAT16, 1e-2)],
)
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
@pytest.mark.parametrize("size", [1.0, 2.5, 1e-3, 100.0])
def test_encoding(
    size: float, shape: tuple[int, ...], dtype: ir.DataType, tolerance: float
) -> None:
    rng = np.random.default_rng(0)
    indices = np.argsort(rng.random((*shape, EXPERTS)))[..., :K].astype(np.int64)
    weights = (rng.random((*shape, K)) * size).astype(np.float32)
    check_encoding(indices, weights, tolerance, dtype)


@pytest.mark.parametrize(
    "row",
    [
        [0.5, 0.25, 0.0],
        [1.0, 0.0, 0.0],
        [0.0, 0.0, 0.0],
        [1.0, 1e-30, 1e-44],
        [1e-40, 1e-41, 1e-42],
        [1e30, 1.0, 1e-30],
    ],
)
def test_weights_of_all_sizes(row: list[float]) -> None:
    indices = np.array([[4, 0, 2], [1, 2, 3]], np.int64)
    check_encoding(indices, np.array([row, [0.5, 0.3, 0.2]], np.float32), 1e-3)
    check_encoding(indices, np.array([row, row[::-1]], np.float32), 1e-3)


def test_an_expert_chosen_twice_counts_twice() -> None:
    indices = np.array([[4, 4, 2], [1, 1, 1], [0, 5, 0]], np.int64)
    weights = np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0]], np.float32)
    check_encoding(indices, weights, 1e-6)


def test_experts_that_are_almost_never_chosen() -> None:
    """What was not chosen weighs nothing even beside the smallest chosen weights."""
    router, _ = encoded(
        np.array([[0, 1, 2]], np.int64),
        np.array([[1.0, 1e-38, 1e-38]], np.float32),
        ir.DataType.FLOAT16,
    )
    assert (router[0, 3:] == -1e4).all()
    assert (router[0, :3] > -100).all()
