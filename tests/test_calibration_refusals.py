"""What cannot be calibrated, or not with these feeds, and which file is not replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qmoe_rules import SaveError, SourceError, calibrate, ops
from qmoe_rules.errors import ConfigError
from tests.calibrations import SMALL, several
from tests.moe_models import Arrays, Graph, layers, single
from tests.moe_models import inputs_of as graph_inputs
from tests.qmoe_models import Codes


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


def test_a_quantized_model_is_refused() -> None:
    reason = "its experts are quantized already; calibrate the float model"
    with pytest.raises(SourceError, match=rf"^there is no MoE node to calibrate: {reason}$"):
        calibrate(Codes().model(), [])


def test_two_nodes_of_one_name_are_refused() -> None:
    model = layers(2, SMALL)
    for node in ops.nodes(model, "MoE"):
        node.name = "same"
    with pytest.raises(SourceError, match="two MoE nodes are named 'same'"):
        calibrate(model, several(SMALL, 1))


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
