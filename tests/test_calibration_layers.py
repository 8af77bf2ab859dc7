"""`calibrate` several layers: each sees what those before it, and what lies between, compute."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qmoe_rules import calibrate, ops
from qmoe_rules.errors import ConfigError
from tests.calibrations import SMALL, Seen, assert_seen, joined, moe, residual, seen, several
from tests.moe_models import Arrays, Experts, Graph, attending, branches, layers
from tests.moe_models import inputs_of as graph_inputs


def chain(count: int, feeds: Sequence[Arrays], **attributes: Any) -> Iterator[list[Seen]]:
    """Yields what the experts of every layer of `layers` see, each fed by the one before."""
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    for seed in range(count):
        arrays = Experts(**{**vars(SMALL), "seed": seed}).arrays()
        options = {**SMALL.attributes, **attributes}
        yield seen(arrays, x, logits, **options)
        x = moe(arrays, x, logits, **options)


def test_layers_see_what_the_layers_before_them_compute() -> None:
    feeds = several(SMALL, 3)
    calibration = calibrate(layers(3, SMALL, k=2), feeds, hessian=True)
    assert calibration.nodes == ("moe0", "moe1", "moe2")
    for index, expected in enumerate(chain(3, feeds, k=2)):
        assert_seen(calibration, f"moe{index}", expected, 1e-5)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_what_lies_between_layers_runs_in_onnxruntime(dtype: Any) -> None:
    """Compared with the whole model in ONNX Runtime, its MoE kernel included.

    The head, which nothing that is measured depends on, has no kernel at all.
    """
    rng = np.random.default_rng(3)
    feeds = [{"x": rng.standard_normal((2, n, 32)).astype(dtype)} for n in (5, 9, 1)]
    calibration = calibrate(residual(dtype=dtype), feeds, hessian=True)
    runnable = residual()
    nodes = [node for node in runnable.graph if node.op_type != "Nonsense"]
    proto = ir.to_proto(runnable)
    del proto.graph.node[len(nodes) :]
    del proto.graph.output[:]
    names = [f"{name}{index}" for index in range(2) for name in ("scaled", "router_probs")]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    unused = np.zeros(2, np.int64)
    runs = [
        dict(
            zip(
                names,
                session.run(names, {"x": f["x"].astype(np.float32), "unused": unused}),
                strict=True,
            )
        )
        for f in feeds
    ]
    for index in range(2):
        arrays = Experts(4, 32, 48, seed=index).arrays()
        x, logits = joined(runs, f"scaled{index}"), joined(runs, f"router_probs{index}")
        expected = seen(arrays, x, logits, 2, **SMALL.attributes)
        if dtype == np.float32:
            assert_seen(calibration, f"moe{index}", expected, 1e-5)
        counts = calibration.counts(f"moe{index}", "fc1")
        assert counts.sum() == 2 * 2 * 15
        off = np.abs(counts - [len(each.weights) for each in expected]).sum()
        assert off <= {np.float32: 0, np.float16: 2, ml_dtypes.bfloat16: 4}[dtype]


def test_weights_that_two_nodes_share_are_seen_twice() -> None:
    graph, arrays, feeds = Graph(), SMALL.arrays(), several(SMALL, 2)
    x, router = graph_inputs(graph, SMALL)
    weights = graph.weights(arrays)
    first = graph.moe(x, router, weights, out="y0", name="moe0", k=2, **SMALL.attributes)
    second = graph.moe(first, router, weights, out="y1", name="moe1", k=2, **SMALL.attributes)
    calibration = calibrate(graph.model(second), feeds, hessian=True)
    rows, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    options = {**SMALL.attributes, "k": 2}
    assert_seen(calibration, "moe0", seen(arrays, rows, logits, **options))
    after = moe(arrays, rows, logits, **options)
    assert_seen(calibration, "moe1", seen(arrays, after, logits, **options), 1e-5)


def test_layers_side_by_side() -> None:
    """Both are of one stage; a third sees both."""
    graph, feeds = Graph(), several(SMALL, 2)
    x, router = graph_inputs(graph, SMALL)
    outputs = []
    for index in range(2):
        own = Experts(**{**vars(SMALL), "seed": index})
        weights = graph.weights(own.arrays(), f"l{index}_")
        outputs.append(
            graph.moe(x, router, weights, out=f"y{index}", name=f"moe{index}", **own.attributes)
        )
    both = graph.op("Add", *outputs, out="both", like=x)
    own = Experts(**{**vars(SMALL), "seed": 2})
    last = graph.moe(
        both, router, graph.weights(own.arrays(), "l2_"), out="y2", name="moe2", **own.attributes
    )
    calibration = calibrate(graph.model(last), feeds)
    rows, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    drawn = [Experts(**{**vars(SMALL), "seed": index}).arrays() for index in range(3)]
    total = sum(moe(arrays, rows, logits, **SMALL.attributes) for arrays in drawn[:2])
    for index in range(2):
        assert_seen(
            calibration, f"moe{index}", seen(drawn[index], rows, logits, **SMALL.attributes)
        )
    assert_seen(
        calibration, "moe2", seen(drawn[2], np.asarray(total), logits, **SMALL.attributes), 1e-5
    )


def test_a_node_in_a_subgraph_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    experts = Experts()
    outer = Graph()
    weights = outer.weights(experts.arrays())

    def body(graph: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        return graph.moe(
            x, router, weights, out=f"y{id(graph)}", name="inner", **experts.attributes
        )

    model = branches(body, lambda graph, x, _: graph.op("Identity", x, out="z", like=x), outer)
    router = model.graph.inputs[2]
    node = ir.node(
        "MoE",
        [model.graph.outputs[0], router, *next(iter(ops.nodes(model, "MoE"))).inputs[2:]],
        dict(experts.attributes),
        domain="com.microsoft",
        name="outer",
    )
    node.outputs[0].name = "last"
    model.graph.append(node)
    feed = {**experts.feeds(), "flag": np.array(True)}
    with caplog.at_level(logging.WARNING, "qmoe_rules.calibration"):
        calibration = calibrate(model, [feed])
    assert calibration.nodes == ("outer",)
    assert "inner is not calibrated: it is inside a subgraph" in caplog.text
    arrays = experts.arrays()
    inner = moe(arrays, feed["x"], feed["router_probs"], **experts.attributes)
    expected = seen(arrays, inner, feed["router_probs"], **experts.attributes)
    assert_seen(calibration, "outer", expected, 1e-5)


@pytest.mark.parametrize("width", [64, 0])
def test_empty_caches_are_like_none(width: int) -> None:
    """Whichever feed has them, and however wide it says they are."""
    model, rng = attending(), np.random.default_rng(0)
    plain: list[Arrays] = [
        {
            "inputs_embeds": rng.standard_normal((1, length, 128)).astype(np.float32),
            "router_probs": rng.standard_normal((length, 3)).astype(np.float32),
        }
        for length in (5, 9)
    ]
    cache = [f"past_key_values.0.{part}" for part in ("key", "value")]
    empty: Arrays = {name: np.zeros((1, 2, 0, width), np.float32) for name in cache}
    expected = calibrate(model, plain)
    for feeds in ([{**plain[0], **empty}, plain[1]], [plain[0], {**plain[1], **empty}]):
        found = calibrate(model, feeds)
        assert found == expected
        for name in ("fc1", "fc2"):
            np.testing.assert_array_equal(found.pooled("moe", name), expected.pooled("moe", name))
    full = {name: np.ones((1, 2, 3, 64), np.float32) for name in cache[:1]}
    message = (
        "feed 1: input 'past_key_values.0.key' is a cache that holds something, and the first "
    )
    with pytest.raises(ConfigError, match=message):
        calibrate(model, [plain[0], {**plain[1], **full}])
