"""`calibrate`: what every expert sees, against the float64 reference and ONNX Runtime."""

from __future__ import annotations

import itertools
import logging
import tracemalloc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from safetensors.numpy import load_file

from qmoe_rules import Calibration, SaveError, SourceError, calibrate, ops, prepare, reference
from qmoe_rules.cli import main
from qmoe_rules.errors import ConfigError
from qmoe_rules.feeds import inputs_of, read_feeds
from qmoe_rules.fingerprints import fingerprints
from qmoe_rules.rules import apply_rules, normalize_moe_rules
from tests.moe_models import (
    Array,
    Arrays,
    Experts,
    Graph,
    attending,
    branches,
    layers,
    single,
)
from tests.moe_models import expected as expected_output
from tests.moe_models import inputs_of as graph_inputs

SMALL = Experts(experts=4, hidden=32, inter=48)
FLOAT32 = 2e-6  # of means that are summed up in float32 and float64
OPTIONS = (
    "activation_alpha",
    "activation_beta",
    "activation_type",
    "k",
    "normalize_routing_weights",
    "swiglu_fusion",
    "swiglu_limit",
)


@dataclass(frozen=True)
class Seen:
    """What one expert sees, in float64: rows x of fc1 and of fc2, and the routing weights."""

    fc1: Array
    fc2: Array
    weights: Array

    def hessian(self, projection: str) -> Array:
        """Returns X^T X / n of the rows, each times its routing weight."""
        rows = getattr(self, projection) * self.weights[:, None]
        return np.asarray(rows.T @ rows / len(rows))

    def mean_square(self, projection: str) -> Array:
        return np.asarray((getattr(self, projection) ** 2).mean(axis=0))


def seen(
    arrays: Mapping[str, Array], x: Array, logits: Array, k: int = 1, **attributes: Any
) -> list[Seen]:
    """Returns what every expert sees, by the reference's routing and activation."""
    rows = x.reshape(-1, x.shape[-1]).astype(np.float64)
    normalize = attributes.get("normalize_routing_weights", 0)
    indices, weights = reference.route(logits, k, normalize=normalize)
    fc1 = arrays["fc1"].astype(np.float64)
    bias = arrays.get("fc1_bias", np.zeros(fc1.shape[:2])).astype(np.float64)
    found = []
    for expert in range(len(fc1)):
        token, slot = np.nonzero(indices == expert)
        active = reference.activate(
            rows[token] @ fc1[expert].T + bias[expert],
            attributes.get("activation_type", "relu"),
            alpha=attributes.get("activation_alpha", 1.0),
            beta=attributes.get("activation_beta", 0.0),
            limit=attributes.get("swiglu_limit"),
            fusion=attributes.get("swiglu_fusion", 0),
        )
        found.append(Seen(rows[token], active, weights[token, slot]))
    return found


def moe(arrays: Arrays, x: Array, logits: Array, **attributes: Any) -> Array:
    """Returns what a MoE computes in float64."""
    return expected_output(arrays, {"x": x, "router_probs": logits}, None, **attributes)


def joined(feeds: Sequence[Arrays], name: str) -> Array:
    """Returns the rows of all feeds."""
    return np.concatenate([feed[name].reshape(-1, feed[name].shape[-1]) for feed in feeds])


def assert_close(actual: Array, expected: Array, tolerance: float = FLOAT32) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    scale = np.abs(expected).max(initial=1e-30)
    assert np.abs(actual - expected).max(initial=0) <= tolerance * scale


def assert_seen(
    calibration: Calibration, node: str, expected: Sequence[Seen], tolerance: float = FLOAT32
) -> None:
    for expert, each in enumerate(expected):
        for projection in ("fc1", "fc2"):
            known = calibration.statistics(node, projection, expert)
            assert known.tokens == len(each.weights)
            if known.tokens == 0:
                assert known.hessian is None
                assert not known.mean_square.any()
                continue
            assert_close(known.mean_square, each.mean_square(projection), tolerance)
            assert (known.hessian is not None) == calibration.hessian
            if known.hessian is not None:
                assert_close(known.hessian, each.hessian(projection), tolerance)
    if calibration.hessian:
        counts = [len(each.weights) for each in expected]
        some = [each for each in expected if len(each.weights)]
        pooled = np.average([each.hessian("fc1") for each in some], 0, [n for n in counts if n])
        assert_close(calibration.pooled_hessian(node), pooled, tolerance)


def several(experts: Experts, count: int, shape: Sequence[int] = (40,)) -> list[Arrays]:
    return [Experts(**{**vars(experts), "seed": seed}).feeds(shape) for seed in range(count)]


ACTIVATIONS = ["relu", "silu", "gelu", "identity", "swiglu", "geglu"]  # geglu runs nowhere on CPU
PRECISION = {np.float32: FLOAT32, np.float16: FLOAT32, ml_dtypes.bfloat16: FLOAT32}


@pytest.mark.parametrize("dtype", list(PRECISION), ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_statistics_are_those_of_the_reference(activation: str, normalize: int, dtype: Any) -> None:
    experts = Experts(4, 32, 48, activation, dtype=dtype)
    options = {**experts.attributes, "k": 2, "normalize_routing_weights": normalize}
    options |= {"activation_alpha": 1.7, "activation_beta": 0.5, "swiglu_limit": 1.5}
    feeds = several(experts, 3)
    calibration = calibrate(single(experts, **options), feeds, hessian=True)
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    assert calibration.nodes == ("moe",)
    assert calibration.tokens == 120
    assert_seen(calibration, "moe", seen(experts.arrays(), x, logits, **options), PRECISION[dtype])


def test_more_rows_than_are_taken_at_a_time() -> None:
    feeds = several(SMALL, 3, (7, 130))
    calibration = calibrate(single(SMALL, shape=(1, 1), k=3), feeds, hessian=True)
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    assert_seen(calibration, "moe", seen(SMALL.arrays(), x, logits, 3, **SMALL.attributes))


def test_without_hessians_the_means_are_the_same() -> None:
    feeds = several(SMALL, 2)
    with_them, without = (calibrate(single(SMALL), feeds, hessian=h) for h in (True, False))
    for expert, projection in itertools.product(range(4), ("fc1", "fc2")):
        first = with_them.statistics("moe", projection, expert)
        second = without.statistics("moe", projection, expert)
        np.testing.assert_array_equal(first.mean_square, second.mean_square)
        assert second.hessian is None


def test_one_token() -> None:
    (feed,) = several(SMALL, 1, (1,))
    calibration = calibrate(single(SMALL), [feed], hessian=True)
    expected = seen(SMALL.arrays(), feed["x"], feed["router_probs"], **SMALL.attributes)
    assert sorted(calibration.counts("moe", "fc1")) == [0, 0, 0, 1]
    assert_seen(calibration, "moe", expected)


def test_one_expert_of_a_long_name() -> None:
    """Most of the header is names: it has room for every one of them."""
    one, model = replace(SMALL, experts=1), single(replace(SMALL, experts=1))
    next(ops.nodes(model, "MoE")).name = name = "moe" * 100
    (feed,) = several(one, 1)
    calibration = calibrate(model, [feed], hessian=True)
    expected = seen(one.arrays(), feed["x"], feed["router_probs"], **one.attributes)
    assert_seen(calibration, name, expected)


@pytest.mark.parametrize("masked", [-1e9, -np.inf])
def test_an_expert_that_never_fires(masked: float, tmp_path: Path) -> None:
    feeds = several(SMALL, 2)
    for feed in feeds:
        feed["router_probs"][:, 2] = masked
    path = tmp_path / "calibration.safetensors"
    calibration = calibrate(single(SMALL, k=2), feeds, path, hessian=True)
    idle = calibration.statistics("moe", "fc2", 2)
    assert idle.tokens == 0
    assert not idle.mean_square.any()
    assert idle.hessian is None
    stored = load_file(path)
    assert {name for name in stored if "hessian" in name} == {
        f"moe/{projection}/hessian/{expert}"
        for projection in ("fc1", "fc2")
        for expert in (0, 1, 3)
    } | {"moe/fc1/hessian"}
    fallback = calibration.for_expert("moe", "fc2", 2)
    assert fallback is not None
    assert fallback.tokens == 0
    np.testing.assert_array_equal(fallback.mean_square, calibration.pooled("moe", "fc2"))
    assert fallback.mean_square.all()


def test_masked_experts_that_are_chosen_all_the_same_have_not_fired() -> None:
    feeds = several(SMALL, 1)
    feeds[0]["router_probs"][:, 1:] = -np.inf
    calibration = calibrate(single(SMALL, k=3), feeds)
    assert list(calibration.counts("moe", "fc1")) == [40, 0, 0, 0]


# Forms of a node that CPU has no kernel for.


@pytest.mark.parametrize("activation", ["swiglu", "silu", "geglu"])
def test_separate_gate_and_up_weights_are_interleaved_first(activation: str) -> None:
    arrays, rng = Experts(4, 32, 48, "silu").arrays(), np.random.default_rng(9)
    arrays["fc3"] = rng.standard_normal(arrays["fc1"].shape).astype(np.float32)
    feeds = several(SMALL, 2)
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    y = graph.moe(x, router, graph.weights(arrays), activation_type=activation, k=2)
    calibration = calibrate(graph.model(y), feeds, hessian=True)
    together = {
        "fc1": np.stack((arrays["fc1"], arrays["fc3"]), axis=2).reshape(4, 96, 32),
        "fc1_bias": np.stack((arrays["fc1_bias"], 0 * arrays["fc1_bias"]), 2).reshape(4, 96),
    }
    fused = "geglu" if activation == "geglu" else "swiglu"
    expected = seen(
        together,
        joined(feeds, "x"),
        joined(feeds, "router_probs"),
        2,
        activation_type=fused,
        swiglu_fusion=1,
    )
    assert_seen(calibration, "moe", expected)


def test_halves_of_fc1_are_interleaved_first() -> None:
    feeds = several(SMALL, 2)
    calibration = calibrate(single(SMALL, swiglu_fusion=2), feeds, hessian=True)
    x, logits = joined(feeds, "x"), joined(feeds, "router_probs")
    options = {**SMALL.attributes, "swiglu_fusion": 2}
    assert_seen(calibration, "moe", seen(SMALL.arrays(), x, logits, **options))


# Several layers.


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


def residual(middle: bool = True, dtype: Any = np.float32) -> ir.Model:
    """Returns x -> norm -> moe0, + x, -> norm -> moe1, + x, with routers and a shape computation.

    The first residual is used after both layers, a constant by both norms, and Shape reaches over
    the first layer.
    """
    experts = Experts(4, 32, 48, dtype=dtype)
    graph = Graph()
    x = graph.input("x", dtype, ("batch", "time", 32))
    graph.input("unused", np.int64, ("batch",))
    gain = graph.weight("gain", np.linspace(0.5, 1.5, 32).astype(dtype))
    doubled = graph.op("Add", gain, gain, out="doubled")
    shape = graph.op("Shape", x, out="shape")
    stream = x
    for index in range(2):
        arrays = Experts(**{**vars(experts), "seed": index}).arrays()
        weights = graph.weights(arrays, f"layer{index}_")
        router = graph.weight(
            f"router{index}",
            np.random.default_rng(50 + index).standard_normal((32, 4)).astype(dtype) / 8,
        )
        scaled = graph.op("Mul", stream, doubled, out=f"scaled{index}", like=x)
        logits = graph.op("MatMul", scaled, router, out=f"logits{index}")
        flat = graph.weight(f"flat{index}", np.array([-1, 4]))
        flat_logits = graph.op("Reshape", logits, flat, out=f"router_probs{index}")
        y = graph.moe(
            scaled,
            flat_logits,
            weights,
            out=f"y{index}",
            name=f"moe{index}",
            k=2,
            **experts.attributes,
        )
        y.type = y.shape = None  # as rules may leave it
        restored = graph.op("Reshape", y, shape, out=f"restored{index}") if middle else y
        stream = graph.op(
            "Add", graph.op("Add", restored, x, out=f"half{index}"), stream, out=f"sum{index}"
        )
    stream.type, stream.shape = x.type, x.shape
    head = graph.op("Nonsense", stream, out="head", like=x, domain="nowhere")
    return graph.model(head, opsets={"": 21, "com.microsoft": 1, "nowhere": 1})


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


def test_the_model_is_not_changed() -> None:
    model = single(SMALL, swiglu_fusion=2)
    before = ir.to_proto(model).SerializeToString()
    calibrate(model, several(SMALL, 1))
    assert ir.to_proto(model).SerializeToString() == before


# What cannot be calibrated.


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: f["x"].__setitem__((7, 3), np.nan), "moe1: its input, x, in feed 1 holds"),
        (lambda f: f["x"].__setitem__((7, 3), np.inf), "moe1: its input, x, in feed 1 holds"),
        (
            lambda f: f["router_probs"].__setitem__((5, 1), np.nan),
            "moe1: its router_probs, router_probs, in feed 1 holds",
        ),
        (
            lambda f: f["router_probs"].__setitem__(5, -np.inf),
            "moe1: its router_probs, router_probs, in feed 1 holds",
        ),
        (lambda f: f["x"].__setitem__((7, 3), 1e38), "moe1: the "),
    ],
    ids=["NaN", "infinity", "NaN in the router", "nothing to choose", "overflow"],
)
def test_what_is_not_finite_is_named(spoil: Any, message: str, tmp_path: Path) -> None:
    feeds = several(SMALL, 3)
    spoil(feeds[1])
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    y = graph.moe(x, router, graph.weights(SMALL.arrays()), name="moe1", **SMALL.attributes)
    with pytest.raises(SourceError) as error:
        calibrate(graph.model(y), feeds, tmp_path / "out" / "c", hessian=True)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith("holds an infinity or a NaN")
    assert not list(tmp_path.iterdir())


def test_weights_that_are_not_finite_are_named() -> None:
    arrays = SMALL.arrays()
    arrays["fc1"][2, 5, 5] = np.inf
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    model = graph.model(graph.moe(x, router, graph.weights(arrays), **SMALL.attributes))
    with pytest.raises(SourceError, match=r"^moe: the activation of expert 2 holds an infinity"):
        calibrate(model, several(SMALL, 1))


def test_an_operator_without_a_kernel_is_named() -> None:
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    odd = graph.op("Nonsense", x, out="odd", like=x, domain="nowhere", name="culprit")
    y = graph.moe(odd, router, graph.weights(SMALL.arrays()), **SMALL.attributes)
    model = graph.model(y, opsets={"": 21, "com.microsoft": 1, "nowhere": 1})
    with pytest.raises(SourceError, match=r"cannot run the model with CPU.*Nonsense"):
        calibrate(model, several(SMALL, 1))


def test_a_feed_that_onnxruntime_refuses_is_an_error() -> None:
    graph = Graph()
    ids = graph.input("ids", np.int64, ("tokens",))
    table = graph.weight("table", np.ones((5, 32), np.float32))
    _, router = graph_inputs(graph, SMALL)
    later = graph.op("Add", ids, ids, out="later", like=ids)
    like = np.ones((1, 32), np.float32)
    x = graph.op("Gather", table, later, out="rows", like=like, name="lookup")
    y = graph.moe(x, router, graph.weights(SMALL.arrays()), **SMALL.attributes)
    feed = {"ids": np.array([3]), "router_probs": np.ones((1, 4), np.float32)}
    message = "ONNX Runtime cannot run the model: node 'lookup' looks up row 6 of a table of 5; is "
    with pytest.raises(SourceError, match=message):
        calibrate(graph.model(y), [feed])


def test_a_router_of_another_length_is_an_error() -> None:
    (feed,) = several(SMALL, 1)
    feed["router_probs"] = feed["router_probs"][:-1]
    with pytest.raises(SourceError, match="moe: router_probs has 39 rows where input has 40"):
        calibrate(single(SMALL), [feed])


@pytest.mark.parametrize(
    ("activation", "attributes", "reason"),
    [
        ("swiglu", {"use_sparse_mixer": 1}, "use_sparse_mixer=1 is not computed here"),
        ("relu", {"activation_type": "relu2"}, "activation 'relu2' is not computed"),
        ("swiglu", {"k": 9}, "k=9 with 4 experts"),
    ],
)
def test_nodes_that_are_not_understood_are_refused(
    activation: str, attributes: dict[str, Any], reason: str
) -> None:
    experts = replace(SMALL, activation=activation)
    with pytest.raises(SourceError, match=rf"^there is no MoE node to calibrate: moe: {reason}"):
        calibrate(single(experts, **attributes), several(experts, 1))


def test_a_model_without_experts_is_refused() -> None:
    graph = Graph()
    x = graph.input("x", np.float32, (1,))
    with pytest.raises(SourceError, match=r"^there is no MoE node to calibrate$"):
        calibrate(graph.model(graph.op("Relu", x, out="y", like=x)), [])


def test_two_nodes_of_one_name_are_refused() -> None:
    model = layers(2, SMALL)
    for node in ops.nodes(model, "MoE"):
        node.name = "same"
    with pytest.raises(SourceError, match="two MoE nodes are named 'same'"):
        calibrate(model, several(SMALL, 1))


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


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ([], "there are no feeds to calibrate with"),
        ([{"x": np.ones((2, 32), np.float32)}], "feed 0: input 'router_probs' is missing"),
        ([{**SMALL.feeds(), "y": np.ones(3)}], "feed 0: the model has no input 'y'; it has x, rou"),
        (
            [SMALL.feeds(), {**SMALL.feeds(), "x": np.ones((6, 31), np.float32)}],
            "feed 1: input 'x'",
        ),
        ([{**SMALL.feeds(), "x": np.ones((6, 32), complex)}], "feed 0: input 'x' is complex128"),
    ],
    ids=["none", "missing", "unknown", "shape", "type"],
)
def test_feeds_that_do_not_fit(feeds: list[Arrays], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        calibrate(single(SMALL), feeds)
    assert str(error.value).startswith(message)


def test_the_source_is_not_overwritten(tiny_fp32: Path) -> None:
    with pytest.raises(SaveError, match="refusing to overwrite"):
        calibrate(tiny_fp32, [], tiny_fp32.with_name("model.onnx.data"))


def test_only_a_calibration_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with path.open("wb") as file:
        np.savez(file, x=SMALL.feeds()["x"])
    before = path.read_bytes()
    with pytest.raises(SaveError, match=r"^refusing to replace .*data.npz, which is no calibratio"):
        calibrate(single(SMALL), [SMALL.feeds()], path)
    assert path.read_bytes() == before
    path.write_bytes(b"")
    for _ in range(2):
        assert calibrate(single(SMALL), [SMALL.feeds()], path).path == path


# Memory, interruptions.


def test_memory_does_not_grow_with_the_data() -> None:
    """80 more feeds hold 10.5 MB; of each token only its experts and their weights are kept."""
    experts = Experts(experts=4, hidden=512, inter=64)

    def peak(count: int) -> int:
        feeds = (Experts(**{**vars(experts), "seed": s}).feeds((64,)) for s in range(count))
        tracemalloc.start()
        calibrate(single(experts), feeds, hessian=True)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # imports and the like
    assert peak(160) - peak(80) < 2 << 20


class _StopError(BaseException):
    """As an interruption from outside."""


def stopping(after: int | None) -> tuple[list[int], Any]:
    told: list[int] = []

    def progress(done: int, total: int) -> None:
        told.append(done)
        if len(told) - 1 == after:
            raise _StopError
        assert done <= total

    return told, progress


def test_a_run_can_be_interrupted_anywhere_and_goes_on(tmp_path: Path) -> None:
    model, feeds = residual(), [{"x": SMALL.feeds((2, 6))["x"]}, {"x": SMALL.feeds((1, 9))["x"]}]
    whole = tmp_path / "whole"
    told, progress = stopping(None)
    calibrate(model, feeds, whole, hessian=True, progress=progress)
    steps = 2 * (2 + 4)  # of both stages: two feeds, four experts
    assert told == list(range(steps + 1))
    path = tmp_path / "folder" / "calibration"
    for after in range(steps + 1):
        _, progress = stopping(after)
        with pytest.raises(_StopError):
            calibrate(model, feeds, path, hessian=True, progress=progress)
        assert not path.exists()
        told, progress = stopping(None)
        calibrate(model, feeds, path, hessian=True, progress=progress)
        assert told[0] == (6 if after > 6 else 0)
        assert told[-1] == steps
        assert path.read_bytes() == whole.read_bytes()
        assert list(path.parent.iterdir()) == [path]
        path.unlink()


@pytest.mark.parametrize("change", ["data", "hessian", "model", "resume", "broken", "cut"])
def test_what_was_interrupted_is_not_used_for_something_else(change: str, tmp_path: Path) -> None:
    model, feeds, path = layers(3, SMALL), several(SMALL, 2), tmp_path / "calibration"
    _, progress = stopping(9)
    with pytest.raises(_StopError):
        calibrate(model, feeds, path, progress=progress)
    options: dict[str, Any] = {"hessian": change == "hessian", "resume": change != "resume"}
    if change == "data":
        feeds = feeds[::-1]
    elif change == "model":
        model = layers(3, SMALL, k=2)
    elif change == "broken":
        (state,) = tmp_path.rglob("state.json")
        state.write_text(state.read_text()[:-9])
    elif change == "cut":
        (statistics,) = tmp_path.rglob("statistics")
        statistics.write_bytes(statistics.read_bytes()[:-9])
    told, progress = stopping(None)
    calibrate(model, feeds, path, progress=progress, **options)
    assert told[0] == 0
    calibrate(model, feeds, tmp_path / "fresh", **options)
    assert path.read_bytes() == (tmp_path / "fresh").read_bytes()


def test_a_tape_that_is_gone_is_run_again(tmp_path: Path) -> None:
    model, feeds, path = layers(3, SMALL), several(SMALL, 2), tmp_path / "calibration"
    _, progress = stopping(9)
    with pytest.raises(_StopError):
        calibrate(model, feeds, path, progress=progress)
    for tape in tmp_path.rglob("tape-*"):
        tape.unlink()
    told, progress = stopping(None)
    calibrate(model, feeds, path, progress=progress)
    assert told[0] == 0


def test_what_a_killed_run_leaves_is_removed(tmp_path: Path) -> None:
    model, feeds, path = layers(3, SMALL), several(SMALL, 2), tmp_path / "calibration"
    kept = set()
    for after in (9, 1):  # in the third of three layers
        _, progress = stopping(after)
        with pytest.raises(_StopError):
            calibrate(model, feeds, path, progress=progress)
        (state,) = tmp_path.rglob("state.json")
        assert not (state.parent / "segment-killed").exists()
        kept.add(len(list(state.parent.iterdir())))
        (state.parent / "segment-killed").mkdir()
        (state.parent / "tape-killed").touch()
    assert len(kept) == 1


def test_an_output_that_nothing_needs_is_not_computed() -> None:
    arrays = SMALL.arrays()
    arrays["fc2"][:] = np.nan
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    y = graph.moe(x, router, graph.weights(arrays), **SMALL.attributes)
    assert calibrate(graph.model(y), several(SMALL, 1)).tokens == 40


# Real models.


def captured(path: Path, feeds: Sequence[Arrays]) -> dict[str, tuple[ir.Node, Array, Array]]:
    """Runs a whole model in ONNX Runtime; returns every MoE with what it sees."""
    proto = onnx.load(path)
    nodes = [node for node in proto.graph.node if node.op_type == "MoE"]
    names = [name for node in nodes for name in node.input[:2]]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]
    by_name = {ops.label(node): node for node in ops.nodes(ir.load(path), "MoE")}
    return {
        node.name: (by_name[node.name], joined(runs, node.input[0]), joined(runs, node.input[1]))
        for node in nodes
    }


def test_a_language_model(tiny_fp32: Path) -> None:
    """What the experts of a real model see in ONNX Runtime, where its own MoE kernel runs."""
    text = Path(__file__).read_bytes()
    feeds = [
        {"input_ids": np.frombuffer(text[i : i + 90], np.uint8)[None].astype(np.int64)}
        for i in (0, 500, 900)
    ]
    calibration = calibrate(tiny_fp32.parent, feeds, hessian=True)
    found = captured(tiny_fp32, feeds)
    assert calibration.nodes == tuple(found)
    for name, (node, x, logits) in found.items():
        given, values = ops.inputs(node), ops.attributes(node)
        arrays = {
            short: ir.convenience.get_const_tensor(value).numpy()  # type: ignore[union-attr]
            for short, slot in (("fc1", "fc1_experts_weights"), ("fc1_bias", "fc1_experts_bias"))
            if (value := given[slot]) is not None
        }
        expected = seen(arrays, x, logits, **{key: values[key] for key in OPTIONS})
        assert_seen(calibration, name, expected, 2e-5)


FLOAT_MODELS = [
    "bytelm-swiglu16-fp16",
    "genai-gemma4-fp16-cuda",
    "genai-gptoss-bf16-cuda",
    "genai-gptoss-fp16-cuda",
    "genai-gptoss-fp32-cpu",
    "genai-qwen3_5_moe-fp16-cuda",
    "mobius-deepseek_v3-fp32-cpu",
    "mobius-gemma4-fp32-cpu",
    "mobius-gptoss-fp32-cpu",
    "mobius-mixtral-fp32-cpu",
    "mobius-phimoe-fp32-cpu",
    "torch-deepseek_v3-batched_mm-fp32-none",
    "torch-mixtral-batched_mm-fp32-none",
]


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_models_of_exporters(name: str, shared: Path) -> None:
    """Models for every provider, with caches, masks and positions: the tokens are enough."""
    folder, rng = shared / "models" / name, np.random.default_rng(1)
    inputs = inputs_of(ir.load(folder / "model.onnx"))
    leading = next(key for key in ("input_ids", "inputs_embeds", "x") if key in inputs)
    shape = (1, 20) if leading == "input_ids" else (1, 20, 128)
    feeds: list[Arrays] = [
        {leading: rng.integers(0, 200, shape) if len(shape) == 2 else rng.standard_normal(shape)}
        for _ in range(2)
    ]
    calibration = calibrate(folder, feeds, hessian=True)
    assert calibration.tokens == 40
    for node in calibration.nodes:
        counts = calibration.counts(node, "fc1")
        assert counts.sum() % 40 == 0
        assert counts.sum() >= 40
        for projection in ("fc1", "fc2"):
            expert = int(counts.argmax())
            known = calibration.statistics(node, projection, expert)
            assert known.hessian is not None
            # The weights of the router are at most one, so H's diagonal is at most the mean of x^2.
            assert (np.diag(known.hessian) <= known.mean_square * (1 + 1e-5)).all()
            assert (np.linalg.eigvalsh(known.hessian) >= -1e-5 * known.mean_square.max()).all()


def test_precisions_of_one_model_agree(shared: Path) -> None:
    rng = np.random.default_rng(1)
    feeds = [{"input_ids": rng.integers(0, 200, (1, 30))} for _ in range(3)]
    exact, *others = (
        calibrate(shared / "models" / f"genai-gptoss-{kind}", feeds)
        for kind in ("fp32-cpu", "fp16-cuda", "bf16-cuda")
    )
    for other, tolerance in zip(others, (2e-2, 8e-2), strict=True):
        for node in exact.nodes:
            assert_close(other.pooled(node, "fc2"), exact.pooled(node, "fc2"), tolerance)


def test_the_nodes_are_those_that_quantization_finds(tiny_fp32: Path) -> None:
    feeds = read_feeds(__file__, inputs_of(ir.load(tiny_fp32)), window=64, windows=2)
    calibration = calibrate(tiny_fp32, feeds)
    model = prepare(ir.load(tiny_fp32))
    apply_rules(model, normalize_moe_rules())
    assert calibration.fingerprints == fingerprints(model)
    calibration.check(fingerprints(model))


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        (["--dtype", "uint16"], b"text", "input 'input_ids' holds 29816, and looks up a table of"),
        (["--window", "300"], b"t" * 300, "node 'posemb' looks up row 256 of a table of 256; is a"),
        ([], b"", "holds no data"),
        ([], None, "it is a folder; name a file of data"),
    ],
    ids=["dtype", "window", "empty", "folder"],
)
def test_data_that_do_not_fit_are_told_in_one_line(
    options: list[str],
    data: bytes | None,
    reason: str,
    tiny_fp32: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    else:
        (tmp_path / "text").mkdir()
    where = (tmp_path / "text", tmp_path / "calibration")
    assert main(["calibrate", *map(str, (tiny_fp32, *where)), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert reason in err
    assert list(tmp_path.iterdir()) == [tmp_path / "text"]
