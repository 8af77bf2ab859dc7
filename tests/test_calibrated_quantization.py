"""Quantization by a calibration: which statistics reach a quantizer, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import (
    Calibration,
    QuantizeMoEPass,
    Recipe,
    Report,
    calibrate,
    moe_to_qmoe_rules,
    ops,
    plan,
    quantize,
    save,
)
from qmoe_rules.cli import main
from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.feeds import inputs_of, read_feeds
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.lazy import Projection
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import METHODS, rtn
from qmoe_rules.report import CONVERTED, SKIPPED
from qmoe_rules.rules import apply_rules
from qmoe_rules.slabs import FileSlice, FileStatistics, SlabWork
from qmoe_rules.statistics import ProjectionStatistics, Statistics
from tests.moe_models import Array, Experts, Graph, layers, single
from tests.moe_models import inputs_of as graph_inputs

SMALL = Experts(experts=4, hidden=32, inter=48)

Call = tuple[Array, Statistics | None]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the methods are called with; they are round-to-nearest of weights scaled by x^2."""
    seen: list[Call] = []

    def method(weight: Array, spec: Spec, statistics: Statistics | None) -> QuantizedWeights:
        seen.append((np.array(weight), statistics))
        return rtn.rtn(weight, spec)

    for name in ("gptq", "search"):
        monkeypatch.setitem(METHODS, name, method)
    return seen


def feeds(count: int = 4) -> list[dict[str, Array]]:
    return [Experts(**{**vars(SMALL), "seed": seed}).feeds((40,)) for seed in range(count)]


def planned(model: ir.Model, **fields: Any) -> tuple[ir.Model, Report]:
    run = QuantizeMoEPass(block_size=16, target="cpu", **fields)
    run(model)
    return model, run.report


@pytest.mark.parametrize(("method", "hessian"), [("gptq", True), ("search", False)])
def test_every_expert_gets_its_own_statistics(
    method: str, hessian: bool, calls: list[Call], tmp_path: Path
) -> None:
    model = layers(2, SMALL, k=2)
    calibration = calibrate(model, feeds(), hessian=True)
    converted, report = planned(model, method=method, calibration=calibration)
    assert report.count(CONVERTED) == 2
    assert not calls  # nothing is computed before the model is saved
    save(converted, tmp_path / "model.onnx", workers=1)
    sources = {
        own.arrays()[name][expert].tobytes(): (f"moe{seed}", name, expert)
        for seed in range(2)
        for own in [Experts(**{**vars(SMALL), "seed": seed})]
        for name in ("fc1", "fc2")
        for expert in range(4)
    }
    asked = {sources[weight.tobytes()]: statistics for weight, statistics in calls}
    assert len(asked) == 16
    for (node, name, expert), known in asked.items():
        expected = calibration.for_expert(node, name, expert, hessian=hessian)
        assert known is not None
        assert expected is not None
        assert known.tokens == expected.tokens
        np.testing.assert_array_equal(known.mean_square, expected.mean_square)
        assert (known.hessian is None) == (expected.hessian is None)
        if known.hessian is not None:
            np.testing.assert_array_equal(known.hessian, expected.hessian)
    assert any(known and known.hessian is not None for known in asked.values()) == hessian


def test_a_method_that_does_not_ask_is_given_nothing_and_told_so(calls: list[Call]) -> None:
    model = single(SMALL)
    calibration = calibrate(model, feeds())
    _, report = planned(model, calibration=calibration)
    (row,) = report.rows
    assert "method 'rtn' does not go by the calibration" in row.warnings
    (node,) = ops.nodes(model, "QMoE")
    tensor = ops.inputs(node)["fc1_experts_weights"]
    assert tensor is not None
    assert tensor.const_value.projection.statistics is None  # type: ignore[union-attr]


def test_experts_that_fall_back_are_counted_in_the_report(calls: list[Call]) -> None:
    model, data = single(SMALL), feeds(2)
    for feed in data:
        feed["router_probs"][:, 2] = -1e9
    calibration = calibrate(model, data, hessian=True)
    counts = calibration.counts("moe", "fc1")
    few = {name: int((counts < enough).sum()) for name, enough in (("fc1", 64), ("fc2", 96))}
    assert 1 <= few["fc1"] < few["fc2"] <= 4 or few["fc1"] == few["fc2"]
    _, report = planned(model, method="gptq", calibration=calibration)
    (row,) = report.rows
    for name, enough in (("fc1", 64), ("fc2", 96)):
        assert (
            f"moe: {name} of {few[name]} of 4 experts saw fewer than {enough} tokens and falls "
            "back to its mean squares"
        ) in row.warnings


def test_experts_without_enough_tokens_for_a_mean_have_that_of_all(calls: list[Call]) -> None:
    model, data = single(SMALL), feeds(2)
    for feed in data:
        feed["router_probs"][:, 2] = -1e9
    calibration = calibrate(model, data)
    few = int((calibration.counts("moe", "fc1") < 64).sum())
    assert few
    _, report = planned(model, method="search", calibration=calibration)
    (row,) = report.rows
    assert (
        f"moe: fc1 of {few} of 4 experts saw fewer than 64 tokens and falls back to the mean "
        "squares of all"
    ) in row.warnings


def shared_weights() -> ir.Model:
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    weights = graph.weights(SMALL.arrays())
    first = graph.moe(x, router, weights, out="y0", name="moe0", k=2, **SMALL.attributes)
    second = graph.moe(first, router, weights, out="y1", name="moe1", k=2, **SMALL.attributes)
    return graph.model(second)


@pytest.mark.parametrize(("method", "copies"), [("rtn", 1), ("search", 2)])
def test_a_shared_weight_is_quantized_for_everyone_that_sees_something_else(
    method: str, copies: int, calls: list[Call]
) -> None:
    model = shared_weights()
    calibration = calibrate(model, feeds())
    converted, _ = planned(model, method=method, calibration=calibration)
    stored = {ops.inputs(node)["fc1_experts_weights"] for node in ops.nodes(converted, "QMoE")}
    assert len(stored) == copies


def test_equal_calibrations_share_and_clones_keep_theirs(calls: list[Call], tmp_path: Path) -> None:
    """One weight in two nodes that see the same, by the same file opened twice."""
    calibrate(single(SMALL), feeds(), tmp_path / "c")
    first, second = (Calibration.load(tmp_path / "c") for _ in range(2))
    model = single(SMALL)
    apply_rules(model, moe_to_qmoe_rules(Recipe(method="search", calibration=first, target="cpu")))
    clone = model.clone()
    (node,) = ops.nodes(clone, "QMoE")
    value = ops.inputs(node)["fc1_experts_weights"]
    assert value is not None
    projection: Projection = value.const_value.projection  # type: ignore[union-attr]
    same = Recipe(method="search", calibration=second, target="cpu").statistics("moe", "fc1")
    assert projection.statistics == same
    assert hash(projection.statistics) == hash(same)
    assert repr(first) in repr(projection)


def test_other_processes_get_the_statistics(tmp_path: Path) -> None:
    """They read them: the work that is handed to them is smaller than a Hessian."""
    model = single(SMALL)
    calibration = calibrate(model, feeds(16), tmp_path / "c", hessian=True)
    converted, _ = planned(model, method="rtn", calibration=calibration)
    (node,) = ops.nodes(converted, "QMoE")
    value = ops.inputs(node)["fc1_experts_weights"]
    assert value is not None
    before: Projection = value.const_value.projection  # type: ignore[union-attr]
    known = ProjectionStatistics(calibration, "moe", "fc1", hessian=True)
    after = Projection(before.weights, before.spec, before.layout, before.method, known)
    work = after.portable_work(1)
    assert isinstance(work.statistics, FileStatistics)
    assert len(pickle.dumps(work.statistics)) < SMALL.hidden**2 * 4
    with ProcessPoolExecutor(1) as pool:
        read = pool.submit(work.statistics.read).result()
        slab = pool.submit(work.compute).result()
        changed = dataclasses.replace(work.statistics, identity=())
        with pytest.raises(SourceError, match="is another calibration than the one that was"):
            pool.submit(changed.read).result()
    expected = known(1)
    assert read is not None
    assert expected is not None
    assert read.tokens == expected.tokens
    assert read.hessian is not None
    np.testing.assert_array_equal(read.hessian, expected.hessian)
    np.testing.assert_array_equal(read.mean_square, expected.mean_square)
    np.testing.assert_array_equal(slab["weights"], before.slab(1)["weights"])


# What is refused.


@pytest.fixture
def means(tmp_path: Path) -> Calibration:
    return calibrate(single(SMALL), feeds(), tmp_path / "means")


def test_a_method_that_needs_hessians_says_how_to_make_them(
    means: Calibration, calls: list[Call]
) -> None:
    make = "make one with: qmoe calibrate MODEL DATA OUT --hessian"
    with pytest.raises(ConfigError) as error:
        Recipe(method="gptq")
    assert str(error.value) == f"method='gptq' needs calibration=...; {make}"
    with pytest.raises(ConfigError) as error:
        Recipe(method="gptq", calibration=means)
    assert str(error.value) == f"method='gptq' needs Hessians, and {means.path} has none; {make}"
    with pytest.raises(ConfigError, match=r"override for '\*': method='gptq' needs calibration"):
        Recipe(overrides=["*:method=gptq"])
    assert Recipe(method="search").calibration is None


def test_a_calibration_is_opened_when_the_recipe_is_made(means: Calibration) -> None:
    assert Recipe(calibration=means.path) == Recipe(calibration=str(means.path))
    assert Recipe(calibration=means.path).calibration == means
    with pytest.raises(SourceError, match="nowhere does not exist"):
        Recipe(calibration="nowhere")
    with pytest.raises(ConfigError, match="calibration=3; it is a Calibration, or the file of one"):
        Recipe(calibration=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["gptq", "search"])
def test_moments_that_no_inputs_have_are_no_fault_of_the_weights(
    method: str, tmp_path: Path
) -> None:
    hessian = np.eye(32, dtype=np.float32)
    hessian[3, 5] = 2
    known = Statistics(100, np.ones(32, np.float32), hessian)
    work = SlabWork(
        np.ones((4, 32), np.float32), Spec(FORMATS["int4"]), "raw", method, known, "weight 'w'"
    )
    message = r"^weight 'w': the calibration does not fit: hessian\[3, 5\] is 2, more than its "
    with pytest.raises(SourceError, match=message):
        work.compute()
    (tmp_path / "short").write_bytes(bytes(12))
    short = FileSlice(str(tmp_path / "short"), 0, (4, 32), np.dtype(np.float32))
    with pytest.raises(SourceError, match=r"^weight 'w': cannot be read: .*short ends before the"):
        dataclasses.replace(work, source=short).compute()


def test_another_models_file_is_refused(means: Calibration, calls: list[Call]) -> None:
    others = {
        "weights": single(Experts(**{**vars(SMALL), "seed": 7})),
        "type": single(Experts(**{**vars(SMALL), "dtype": np.float16})),
        "attributes": single(SMALL, k=2),
        "last expert": single(SMALL),
        "name": layers(1, SMALL),
    }
    last = others["last expert"].graph.initializers["fc2"]
    array = last.const_value.numpy().copy()  # type: ignore[union-attr]
    array[-1, -1, -1] += 1
    last.const_value = ir.tensor(array, name="fc2")
    for model in others.values():
        with pytest.raises(ConfigError, match="is of another model"):
            planned(model, method="search", calibration=means)
    rules = moe_to_qmoe_rules(method="search", calibration=means, target="cpu")
    with pytest.raises(ConfigError, match="node moe are not those that were calibrated"):
        apply_rules(others["weights"], rules)


def test_a_node_that_the_file_lacks_is_skipped(calls: list[Call]) -> None:
    both = layers(2, SMALL)
    second = list(ops.nodes(both, "MoE"))[1]
    second.name = "new"
    known = calibrate(layers(1, SMALL), feeds())
    (first,) = known.nodes
    _, report = planned(both, method="search", calibration=known)
    rows = {row.node: row for row in report.rows}
    assert rows[first].status == CONVERTED
    assert rows["new"].status == SKIPPED
    assert rows["new"].reason == f"calibration {known.path.name} has no node new"


def test_weights_stored_in_halves_or_apart_are_the_same_node(means: Calibration) -> None:
    """The file is of the nodes that quantization sees, whatever the model looked like before."""
    arrays = SMALL.arrays()
    fc1, bias = arrays.pop("fc1"), arrays.pop("fc1_bias")
    graph = Graph()
    x, router = graph_inputs(graph, SMALL)
    arrays |= {"fc1": fc1[:, 0::2], "fc3": fc1[:, 1::2]}
    arrays |= {"fc1_bias": bias[:, 0::2], "fc3_bias": bias[:, 1::2]}
    apart = graph.moe(x, router, graph.weights(arrays), name="moe", activation_type="swiglu")
    model = graph.model(apart)
    assert calibrate(model, feeds()).fingerprints == means.fingerprints


# The command.


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_fp32.parent, tmp_path / "model")
    return tmp_path / "model"


def test_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[Call]
) -> None:
    out = tmp_path / "calibration"
    data = [str(source), __file__, str(out)]
    assert main(["calibrate", *data, "--window", "100", "--windows", "9", "--hessian"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    lines = printed.out.splitlines()
    assert lines[0].split()[:5] == ["node", "E", "fewest", "median", "most"]
    assert lines[-1].startswith(f"{out}: Hessians of 900 tokens; ")
    assert main(["calibrate", *data, "--window", "100", "--windows", "9", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    calibration = Calibration.load(out)
    assert (summary["file"], summary["tokens"], summary["hessian"]) == (str(out), 900, False)
    for row, node in zip(summary["nodes"], calibration.nodes, strict=True):
        assert row["node"] == node
        assert row["tokens"] == calibration.counts(node, "fc1").tolist()
        assert row["never"] == [e for e, n in enumerate(row["tokens"]) if not n]
        assert row["few"]["fc1"] == {
            "enough": 64,
            "experts": [e for e, n in enumerate(row["tokens"]) if n < 64],
        }
    inputs = inputs_of(ir.load(source / "model.onnx"))
    same = calibrate(source, read_feeds(__file__, inputs, window=100, windows=9))
    assert same == calibration


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ""])
def test_the_command_reads_any_kind_of_data(
    suffix: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    tokens = np.frombuffer(Path(__file__).read_bytes()[:320], np.uint8).reshape(5, 64)
    path = tmp_path / f"data{suffix}"
    if suffix == ".npy":
        np.save(path, tokens)
    elif suffix == ".npz":
        np.savez(path, input_ids=tokens)
    elif suffix == ".safetensors":
        save_file({"input_ids": tokens.copy()}, path)
    else:
        path.write_bytes(tokens.astype("<u2").tobytes())
    more = ["--window", "64", "--dtype", "uint16"] if not suffix else []
    assert main(["calibrate", str(source), str(path), str(tmp_path / "out"), *more]) == 0
    capsys.readouterr()
    feeds_ = [{"input_ids": row[None].astype(np.int64)} for row in tokens]
    assert Calibration.load(tmp_path / "out") == calibrate(source, feeds_)


def test_the_command_quantizes_by_a_calibration(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], calls: list[Call]
) -> None:
    out = tmp_path / "calibration"
    assert main(["calibrate", str(source), __file__, str(out), "--hessian", "--windows", "2"]) == 0
    quantized = ["quantize", str(source), str(tmp_path / "int4"), "--block-size", "32"]
    assert main([*quantized, "--method", "gptq", "--calibration", str(out)]) == 0
    assert "experts saw fewer than 256 tokens and falls back" in capsys.readouterr().out
    assert len(calls) == 2 * 2 * 8
    assert all(known is not None for _, known in calls)
    assert main([*quantized, "--method", "gptq"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qmoe: method='gptq' needs calibration=...; make one with: qmoe cal")
    by_path = quantize(source, tmp_path / "again", method="gptq", calibration=out, block_size=32)
    assert plan(source, method="gptq", calibration=out, block_size=32).rows == by_path.rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input", "x"], "the model has no input 'x'; it has input_ids"),
        (["--window", "300"], "ONNX Runtime cannot run the model"),
    ],
)
def test_what_the_command_refuses(
    arguments: list[str],
    message: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "folder" / "calibration"
    assert main(["calibrate", str(source), __file__, str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.parent.exists()


def test_an_interrupted_command_says_that_it_can_go_on(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_arguments: Any, **_options: Any) -> Iterator[None]:
        raise KeyboardInterrupt

    monkeypatch.setattr("qmoe_rules.calibration._run.observe", interrupted)
    command = ["calibrate", str(source), __file__, str(tmp_path / "out")]
    assert main(command) == 130
    assert "the same command goes on from them" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    assert main(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
