"""What `verify` feeds nodes and whole models with, and what it tells of that."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules import ConfigError, SourceError, verify
from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.verification._execution import captured_inputs, random_inputs
from tests.moe_models import Experts, Graph, attending, inputs_of
from tests.verifications import INT4, TINY, Draft, converted, failed, saved

TEXT = b"And it came to pass in those days, that there went out a decree from the king. "
IDS = np.frombuffer(TEXT, np.uint8).astype(np.int64)[None]


def test_given_inputs_reach_the_nodes(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    given, made = (
        verify(TINY["fp32"], after, inputs=inputs) for inputs in ({"input_ids": IDS}, None)
    )
    assert given.passed
    assert {node.inputs for node in given.nodes} == {"captured"}
    assert {node.inputs for node in made.nodes} == {"random"}
    assert given.whole_model == "ran on the given inputs"
    assert made.whole_model == "ran on random inputs"
    (output,) = given.outputs
    assert output.name == "logits"
    assert 0 < (output.divergence or 0) < 0.05
    assert (output.agreement or 0) > 0.8


def test_the_same_seed_gives_the_same_figures(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    first, same, other = (verify(TINY["fp32"], after, seed=seed) for seed in (3, 3, 4))
    assert first.to_dict() == same.to_dict()
    assert first.nodes[0].output_error != other.nodes[0].output_error


def test_a_float_model_that_cannot_run_is_told(tmp_path: Path) -> None:
    graph = Graph()
    x, router = inputs_of(graph, Experts(bias=False))
    y = graph.moe(
        x, router, graph.weights(Experts(bias=False).arrays()), k=2, out="y", **Experts().attributes
    )
    flags = graph.input("flags", np.int64, ("tokens",))
    before = saved(
        graph.model(y, graph.op("Identity", flags, out="same", like=flags)), tmp_path / "before"
    )
    after = converted(before, tmp_path / "out", **INT4)
    report = verify(before, after)
    assert report.passed
    assert report.whole_model.startswith("not run: input 'flags' is missing")
    assert report.outputs == ()


def test_inputs_that_the_float_model_does_not_run_on_are_an_error(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    with pytest.raises(ConfigError, match=r"^the float model does not run on the given inputs: .*"):
        verify(TINY["fp32"], after, inputs={"input_ids": np.full((1, 300), 9)})


def test_a_model_larger_than_the_memory_is_not_run_and_its_nodes_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    memory = {"SC_PHYS_PAGES": 1, "SC_PAGE_SIZE": 1000}
    monkeypatch.setattr("os.sysconf", memory.__getitem__)
    report = verify(TINY["fp32"], after, inputs={"input_ids": IDS})
    assert report.passed
    assert "do not fit in 1 kB of memory; the nodes were fed with random" in report.whole_model


def test_a_converted_model_that_does_not_run_fails(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    file = after / "model.onnx"
    model = onnx.load(file, load_external_data=False)
    model.ir_version = 99
    file.write_bytes(model.SerializeToString())
    report = verify(TINY["fp32"], after)
    (failure,) = report.failed
    assert failure.check == "outputs"
    assert failure.reason.startswith("the float model runs, and the converted one does not: ")
    assert "IR version: 99" in report.whole_model
    assert verify(TINY["fp32"], after, whole_model=False).passed


def test_an_empty_cache_of_unknown_width_is_left_out(tmp_path: Path) -> None:
    before = saved(attending(), tmp_path / "before")
    report = verify(before, converted(before, tmp_path / "out", **INT4))
    assert report.whole_model == "ran on random inputs"
    assert {output.name: output.error for output in report.outputs} == {
        "y": pytest.approx(0.12, abs=0.08),
        "key": 0,
        "value": 0,
    }


def test_an_output_that_is_not_finite_fails(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    draft = Draft(after)
    draft["norm.weight"] = draft["norm.weight"] * np.inf
    draft.save()
    report = verify(TINY["fp32"], after)
    assert failed(report) == {"outside", "outputs"}
    assert report.to_dict()["outputs"][0]["error"] is None
    json.loads(report.to_json(), parse_constant=lambda word: pytest.fail(word))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"seed": -1}, "seed=-1; it is at least 0"),
        ({"tokens": 0}, "tokens=0; it is at least 1"),
        ({"provider": "OtherExecutionProvider"}, "this build of ONNX Runtime has .*CPU"),
        ({"source_layout": "cutlass_sm90"}, "it may be 'raw' or 'cutlass_sm80'"),
        ({"inputs": {"ids": IDS}}, "the model has no input 'ids'"),
        ({"inputs": {}}, "'input_ids' is missing"),
    ],
    ids=str,
)
def test_wrong_arguments(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        verify(TINY["fp32"], TINY["fp32"], **options)


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        verify(TINY["fp32"], tmp_path / "nothing")


@given(
    experts=st.integers(1, 96), k=st.integers(1, 12), tokens=st.integers(1, 8), seed=st.integers(0)
)
@settings(max_examples=40)
def test_random_router_logits_reach_every_expert_and_never_tie(
    experts: int, k: int, tokens: int, seed: int
) -> None:
    k = min(k, experts)
    inputs = random_inputs(experts, 4, k, SCALE_DTYPES["bfloat16"], tokens, seed)
    ranked = np.sort(inputs.router, axis=1)[:, ::-1]
    assert np.all(ranked[:, : k - 1] - ranked[:, 1:k] == 0.25)
    assert np.all(ranked[:, k - 1 : k] - ranked[:, k:] >= 0.99)
    chosen = np.argsort(inputs.router, axis=1)[:, -k:]
    assert set(chosen.ravel()) == set(range(experts))


def test_captured_rows_that_tie_are_left_out() -> None:
    router = np.array([[3.0, 2.0, 2.0], [3.0, 1.0, 2.0], [np.nan, 0.0, 1.0], [0.0, 4.0, 9.0]])
    x = np.arange(8.0).reshape(1, 4, 2)
    found = captured_inputs(x, router, 2, np.dtype(np.float32), 64)
    assert found is not None
    np.testing.assert_array_equal(found.x, [[2, 3], [6, 7]])
    assert captured_inputs(x, router[[0, 0, 2, 0]], 2, np.dtype(np.float32), 64) is None
    assert captured_inputs(x, router[:3], 2, np.dtype(np.float32), 64) is None


def test_ctrl_c_while_the_runtime_is_imported_is_no_missing_package(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its extension says "initialization failed", because of the interrupt."""
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    ours = builtins.__import__

    def interrupted(name: str, *rest: Any, **more: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("initialization failed") from KeyboardInterrupt()
        return ours(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        verify(TINY["fp32"], after)
