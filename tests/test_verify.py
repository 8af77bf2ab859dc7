"""`verify`: green for what `quantize` writes, and red, with the right check, for what is broken."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from qmoe_rules import (
    ConfigError,
    SourceError,
    VerificationError,
    VerificationReport,
    quantize,
    verification,
    verify,
)
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import TARGETS
from qmoe_rules.rules import apply_rules, relayout_qmoe_rules
from qmoe_rules.testing import LayerDesign, ModelDesign, WeightDesign, build_model
from qmoe_rules.verification._execution import captured_inputs, random_inputs, relative_error
from qmoe_rules.verification._tolerances import PROVIDERS, runs_on, tolerance_of
from tests import expert_graphs
from tests.conftest import MODELS
from tests.expert_graphs import Layer
from tests.moe_models import (
    Array,
    Experts,
    Graph,
    attending,
    branches,
    inputs_of,
    layers,
    single,
)
from tests.qmoe_models import Codes, spec_of

TINY = {name: MODELS / f"bytelm-tiny8-{name}" for name in ("fp32", "fp16")}
INT4: dict[str, Any] = {"block_size": 32}
FIRST = "layers.0.moe"


class Draft:
    """A model file that a test changes: constants by name, nodes by operator."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.onnx"
        self.proto = onnx.load(self.path)

    def __getitem__(self, name: str) -> Array:
        return numpy_helper.to_array(self._tensor(name)).copy()

    def __setitem__(self, name: str, array: Array) -> None:
        self._tensor(name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def node(self, op_type: str = "QMoE") -> onnx.NodeProto:
        nodes: list[onnx.NodeProto] = list(self.proto.graph.node)
        return next(node for node in nodes if node.op_type == op_type)

    def set(self, **attributes: Any) -> None:
        """Sets attributes of the first QMoE; None removes one."""
        node = self.node()
        kept = [each for each in node.attribute if each.name not in attributes]
        del node.attribute[:]
        given = {name: value for name, value in attributes.items() if value is not None}
        made = [onnx.helper.make_attribute(name, value) for name, value in given.items()]
        node.attribute.extend([*kept, *made])

    def save(self) -> None:
        onnx.save(self.proto, self.path)

    def _tensor(self, name: str) -> onnx.TensorProto:
        tensors: list[onnx.TensorProto] = list(self.proto.graph.initializer)
        return next(tensor for tensor in tensors if tensor.name == name)


def saved(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    return folder


def converted(before: Path, after: Path, **recipe: Any) -> Path:
    report = quantize(before, after, **recipe)
    assert {row.status for row in report.rows} == {"converted"}
    return after


def checked(before: Path, after: Path, **options: Any) -> VerificationReport:
    return verify(before, after, **{"whole_model": False, **options})


def failed(report: VerificationReport) -> set[str]:
    return {failure.check for failure in report.failed}


# What `quantize` writes passes.

CPU: list[dict[str, Any]] = [
    {"bits": bits, "block_size": size, "symmetric": symmetric}
    for bits in (2, 4, 8)
    for size in (0, 32)
    for symmetric in (True, False)
]
CPU += [{"format": "nvfp4"}, {"format": "mxfp4"}, {"bits": 4, "block_size": 16}]


@pytest.mark.parametrize("recipe", CPU, ids=str)
@pytest.mark.parametrize("model", TINY)
def test_what_quantize_writes_passes(model: str, recipe: dict[str, Any], tmp_path: Path) -> None:
    before = TINY[model]
    report = checked(before, converted(before, tmp_path / "out", target="cpu", **recipe))
    assert report.passed, report.summary()
    assert [node.status for node in report.nodes] == ["converted"] * 2
    for node in report.nodes:
        assert node.notes == ()
        assert node.execution_error is not None
        assert node.tolerance is not None
        # Round to nearest is its own measure: the bound is 2.25 times its error, and a little more.
        assert all(each.error <= 0.5 * each.bound for each in node.projections)
        assert all(each.follow == pytest.approx(1) for each in node.projections)


EXECUTION = [("fp32", {"bits": 4}, 1e-6), ("fp32", {"bits": 8}, 1e-6), ("fp16", {"bits": 4}, 5e-4)]


@pytest.mark.parametrize(("model", "recipe", "limit"), EXECUTION)
def test_exact_paths_are_far_below_their_tolerance(
    model: str, recipe: dict[str, Any], limit: float, tmp_path: Path
) -> None:
    report = checked(TINY[model], converted(TINY[model], tmp_path / "out", **recipe))
    assert all((node.execution_error or 1) < limit for node in report.nodes)


REFERENCE_ALONE = [
    ({"target": "cuda", "layout": "cutlass_sm80", "bits": 8}, "takes the bytes for raw ones"),
    ({"target": "cuda", "format": "nvfp4"}, "weights_prepacked"),
    ({"target": "cuda", "format": "mxfp4"}, "weights_prepacked"),
    ({"target": "cuda", "fc2_bits": 8, "block_size": 32}, "does not take int4 in fc1 and int8"),
    ({"target": "webgpu", "format": "fp8"}, "has no kernel for fp8"),
]


@pytest.mark.parametrize(("recipe", "why"), REFERENCE_ALONE, ids=str)
def test_what_the_cpu_cannot_run_is_checked_with_the_reference(
    recipe: dict[str, Any], why: str, tmp_path: Path
) -> None:
    report = verify(TINY["fp16"], converted(TINY["fp16"], tmp_path / "out", **recipe))
    assert report.passed, report.summary()
    for node in report.nodes:
        (note,) = node.notes
        assert note.startswith("checked with the reference alone: the CPU provider ")
        assert why in note
        assert node.execution_error is None
        assert node.output_error is not None
    assert report.outputs == ()  # a misread layout would compute garbage
    assert why in report.whole_model


@pytest.mark.parametrize(
    ("experts", "why"),
    [
        (Experts(dtype=SCALE_DTYPES["bfloat16"], inter=128), "has no bfloat16 kernel"),
        (Experts(dtype=np.float16, inter=128, activation="geglu"), "activation 'geglu'"),
    ],
    ids=["bfloat16", "geglu"],
)
def test_types_and_activations_without_a_cpu_kernel(
    experts: Experts, why: str, tmp_path: Path
) -> None:
    model = single(experts, k=2, normalize_routing_weights=1)
    before = saved(model, tmp_path / "before")
    report = checked(before, converted(before, tmp_path / "out", target="cuda", **INT4))
    assert report.passed, report.summary()
    assert why in report.nodes[0].notes[0]


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "swiglu"])
def test_every_activation_and_routing(activation: str, normalize: int, tmp_path: Path) -> None:
    experts = Experts(activation=activation, experts=6)
    model = single(experts, k=3, normalize_routing_weights=normalize)
    before = saved(model, tmp_path / "before")
    report = checked(before, converted(before, tmp_path / "out", **INT4))
    assert report.passed, report.summary()
    assert (report.nodes[0].execution_error or 1) < 1e-6


def test_halves_are_compared_as_interleaved_rows(tmp_path: Path) -> None:
    model = single(k=2, normalize_routing_weights=1, swiglu_fusion=2)
    before = saved(model, tmp_path / "before")
    after = converted(before, tmp_path / "out", **INT4)
    assert checked(before, after).passed
    draft = Draft(after)
    draft["fc1_bias_interleaved"] = np.roll(draft["fc1_bias_interleaved"], 1, axis=1)
    draft.save()
    assert failed(checked(before, after)) == {"biases"}


def test_subgraphs(tmp_path: Path) -> None:
    graph = Graph()
    experts = Experts(bias=False)
    weights = graph.weights(experts.arrays())

    def moe(body: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        return body.moe(x, router, weights, out="inner", **experts.attributes, k=2)

    def same(body: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        return body.op("Identity", x, out="other", like=x)

    before = saved(branches(moe, same, graph), tmp_path / "before")
    after = converted(before, tmp_path / "out", **INT4)
    assert checked(before, after).passed
    draft = Draft(after)
    branch = next(
        each.g
        for node in draft.proto.graph.node
        for each in node.attribute
        if each.name == "else_branch"
    )
    branch.node[0].op_type = "Neg"
    draft.save()
    (failure,) = checked(before, after).failed
    assert (failure.check, "is Identity, and Neg" in failure.reason) == ("outside", True)


@pytest.mark.parametrize("bits", [0, 4])
def test_experts_that_were_fused(bits: int, tmp_path: Path) -> None:
    layer = Layer(bits=bits, inter=128)
    before = saved(expert_graphs.model(layer), tmp_path / "before")
    report = quantize(before, tmp_path / "out", **INT4)
    assert [row.status for row in report.rows] == ["converted"]
    found = verify(before, tmp_path / "out", inputs=expert_graphs.feeds(layer))
    assert found.passed, found.summary()
    assert [node.status for node in found.nodes] == ["kept" if bits else "converted"]
    assert found.outputs[0].error < (1e-5 if bits else 0.5)
    if not bits:
        assert found.nodes[0].inputs == "captured"


# What is broken fails, with the check that says how.


@dataclass(frozen=True)
class Broken:
    """A way to break a converted model.

    Attributes:
        name: What it does, in words.
        edit: Does it.
        checks: The checks that must fail, no more and no fewer.
        recipe: Of the conversion.
        model: Which of the tiny models.
    """

    name: str
    edit: Callable[[Draft], None]
    checks: frozenset[str]
    recipe: tuple[tuple[str, Any], ...] = (("block_size", 32),)
    model: str = "fp32"


def _on(suffix: str, function: Callable[[Array], Array]) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        name = f"{FIRST}.{suffix}"
        draft[name] = function(draft[name])

    return edit


def _both(*edits: Callable[[Draft], None]) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        for each in edits:
            each(draft)

    return edit


def _pairs_swapped(rows: Array) -> Array:
    pairs = rows.reshape(rows.shape[0], -1, 2, *rows.shape[2:])
    return pairs[:, :, ::-1].reshape(rows.shape)


def _next_expert(stack: Array) -> Array:
    return np.roll(stack, 1, axis=0)


def _nibbles(packed: Array) -> Array:
    return (packed >> 4) | (packed << 4)


def _relaid(source: str, target: str) -> Callable[[Array], Array]:
    def move(stored: Array) -> Array:
        codes = (LAYOUTS[source].load(each, 4) for each in stored)
        return np.stack([LAYOUTS[target].store(each, 4) for each in codes])

    return move


def _without_zero_points(draft: Draft) -> None:
    for index, name in enumerate(draft.node().input):
        if name.endswith("_zero_points"):
            draft.node().input[index] = ""


def _one_value(name: str) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        array = draft[name]
        array.flat[7] += 2.0**-10
        draft[name] = array

    return edit


def _softmax_before_the_router(draft: Draft) -> None:
    node = draft.node()
    draft.proto.graph.node.insert(
        list(draft.proto.graph.node).index(node),
        onnx.helper.make_node("Softmax", [node.input[1]], ["probabilities"], axis=-1),
    )
    node.input[1] = "probabilities"


def _renamed(draft: Draft) -> None:
    draft.node().name = "another"
    old = draft.node().output[0]
    draft.node().output[0] = "other"
    for node in draft.proto.graph.node:
        node.input[:] = ["other" if name == old else name for name in node.input]


BOTH = frozenset({"weights", "scales"})
WEIGHTS, SCALES, ROUTING = (frozenset({name}) for name in ("weights", "scales", "routing"))
ROWS = (("bits", 4),)
ASYMMETRIC = (("block_size", 32), ("symmetric", False))
PACKED = (("target", "cuda"), ("layout", "cutlass_sm80"))

BROKEN = [
    Broken("gate and up codes swapped", _on("fc1_quantized", _pairs_swapped), WEIGHTS),
    Broken(
        "gate and up rows swapped",
        _both(_on("fc1_quantized", _pairs_swapped), _on("fc1_scales", _pairs_swapped)),
        BOTH,
    ),
    Broken("nibbles swapped", _on("fc2_quantized", _nibbles), WEIGHTS),
    Broken("scales of another expert", _on("fc1_scales", _next_expert), BOTH),
    Broken("row scales of another expert", _on("fc2_scales", _next_expert), BOTH, ROWS),
    Broken(
        "int2 scales of another expert",
        _on("fc1_scales", lambda scales: abs(_next_expert(scales)) * np.sign(scales)),
        SCALES,
        (("bits", 2), ("block_size", 32)),
    ),
    Broken("int8 scales of another expert", _on("fc2_scales", _next_expert), BOTH, (("bits", 8),)),
    Broken("scales doubled", _on("fc1_scales", lambda scales: 2 * scales), WEIGHTS),
    Broken("a scale that is no number", _on("fc1_scales", lambda s: s * np.inf), WEIGHTS),
    Broken(
        "experts swapped",
        _both(_on("fc1_quantized", _next_expert), _on("fc1_scales", _next_expert)),
        BOTH,
    ),
    Broken("experts of codes swapped", _on("fc2_quantized", _next_expert), WEIGHTS),
    Broken(
        "sm90 bytes",
        _on("fc1_quantized", _relaid("cutlass_sm80", "cutlass_sm90")),
        WEIGHTS,
        PACKED,
        "fp16",
    ),
    Broken(
        "raw bytes declared packed",
        lambda draft: draft.set(weights_prepacked=1),
        frozenset({"stored"}),
    ),
    Broken(
        "packed bytes declared raw",
        lambda draft: draft.set(weights_prepacked=0),
        frozenset({"stored"}),
        PACKED,
        "fp16",
    ),
    Broken("zero points dropped", _without_zero_points, WEIGHTS, ASYMMETRIC),
    Broken("int2 zero points dropped", _without_zero_points, WEIGHTS, (("bits", 2), *ASYMMETRIC)),
    Broken("zero points shifted", _on("fc2_zero_points", _next_expert), WEIGHTS, ASYMMETRIC),
    Broken("normalize", lambda draft: draft.set(normalize_routing_weights=0), ROUTING),
    Broken("k", lambda draft: draft.set(k=1), ROUTING),
    Broken("sparse mixer", lambda draft: draft.set(use_sparse_mixer=1), ROUTING),
    Broken("router weight", _one_value("layers.0.router.weight"), ROUTING),
    Broken("softmax before the router", _softmax_before_the_router, ROUTING),
    Broken("alpha", lambda draft: draft.set(activation_alpha=1.5), frozenset({"attributes"})),
    Broken("limit", lambda draft: draft.set(swiglu_limit=7.0), frozenset({"attributes"})),
    Broken("attention", _one_value("layers.1.o.weight"), frozenset({"outside"})),
    Broken("norm", _one_value("layers.0.norm2.bias"), frozenset({"outside"})),
    Broken("embedding", _one_value("embedding.weight"), frozenset({"outside"})),
    Broken(
        "global scale",
        _on("fc1_global_scale", lambda scales: 2 * scales),
        WEIGHTS,
        (("target", "cpu"), ("format", "nvfp4")),
    ),
    Broken(
        "block scales of nvfp4",
        _on("fc1_scales", _next_expert),
        BOTH,
        (("target", "cpu"), ("format", "nvfp4")),
    ),
    Broken("another name", _renamed, frozenset()),
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Broken], Path]:
    """Converts the model of a case; once, and it passes, for all cases that share it."""

    @functools.cache
    def convert(model: str, recipe: tuple[tuple[str, Any], ...]) -> Path:
        after = converted(TINY[model], tmp_path_factory.mktemp("whole") / "out", **dict(recipe))
        assert checked(TINY[model], after).passed
        return after

    return lambda case: convert(case.model, case.recipe)


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_every_fault_fails_its_check(
    case: Broken, whole: Callable[[Broken], Path], tmp_path: Path
) -> None:
    before = TINY[case.model]
    after = shutil.copytree(whole(case), tmp_path / "out")
    draft = Draft(after)
    case.edit(draft)
    draft.save()
    report = checked(before, after)
    assert failed(report) == case.checks, report.summary()
    nodes = {failure.node for failure in report.failed} - {""}
    assert nodes <= {FIRST}
    if case.checks and "outside" not in case.checks:
        assert nodes == {FIRST}
        with pytest.raises(VerificationError, match=f"{min(case.checks)}: {FIRST}: "):
            report.raise_if_failed()


@pytest.mark.parametrize(("stated", "actual"), [(1, "raw"), (0, "cutlass_sm80")])
def test_a_wrong_layout_that_no_shape_tells(stated: int, actual: str, tmp_path: Path) -> None:
    """Where N equals K both layouts have the same shape, and the CPU runs either."""
    experts = Experts(activation="relu", hidden=128, inter=128, bias=False, dtype=np.float16)
    before = saved(single(experts, k=2, normalize_routing_weights=1), tmp_path / "before")
    after = converted(before, tmp_path / "out", target="cuda", layout=actual, **INT4)
    assert checked(before, after).passed
    draft = Draft(after)
    draft.set(weights_prepacked=stated)
    draft.save()
    report = checked(before, after)
    assert failed(report) == {"weights"}
    assert min(each.error for each in report.nodes[0].projections) > 1


def test_a_provider_that_computes_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU takes packed int8 bytes for raw ones; here the tables do not know it."""
    recipe = {"target": "cuda", "layout": "cutlass_sm80", "bits": 8}
    after = converted(TINY["fp16"], tmp_path / "out", **recipe)
    monkeypatch.setattr(verification._conversion, "obstacle", lambda *_: None)
    report = checked(TINY["fp16"], after)
    assert failed(report) == {"execution"}
    assert all((node.execution_error or 0) > 0.3 for node in report.nodes)


def test_a_provider_that_refuses_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    after = converted(TINY["fp16"], tmp_path / "out", target="webgpu", format="fp8")
    monkeypatch.setattr(verification._conversion, "obstacle", lambda *_: None)
    report = checked(TINY["fp16"], after)
    assert failed(report) == {"execution"}
    assert "QMoE" in report.failed[0].reason


def test_a_bias_is_compared(tmp_path: Path) -> None:
    before = saved(single(k=2, normalize_routing_weights=1), tmp_path / "before")
    after = converted(before, tmp_path / "out", **INT4)
    draft = Draft(after)
    draft["fc2_bias"] = -draft["fc2_bias"]
    draft.save()
    (failure,) = checked(before, after).failed
    assert str(failure) == "biases: moe: constant fc2_bias has other values in the converted model"


def test_another_model_altogether(tmp_path: Path) -> None:
    before = saved(layers(2, Experts(bias=False), k=2), tmp_path / "before")
    other = saved(layers(3, Experts(bias=False, hidden=64), k=2), tmp_path / "other")
    report = checked(before, converted(other, tmp_path / "out", **INT4))
    assert {"stored", "pairing"} <= failed(report)
    reasons = {failure.reason for failure in report.failed}
    assert "fc1 is [3, 384, 64], and [3, 384, 128] in the float model" in reasons
    assert "nothing in the float model, QMoE in the other" in reasons


# Nodes that were not converted.


def test_a_model_without_any_conversion_fails(tmp_path: Path) -> None:
    report = verify(TINY["fp32"], TINY["fp32"])
    assert [node.status for node in report.nodes] == ["stays in float"] * 2
    assert [str(failure) for failure in report.failed] == [
        "pairing: the converted model has no QMoE"
    ]
    assert report.outputs[0].error == 0


def test_nodes_that_stay_in_float_are_the_same(tmp_path: Path) -> None:
    after = tmp_path / "out"
    quantize(TINY["fp32"], after, nodes_to_exclude=[FIRST], **INT4)
    report = checked(TINY["fp32"], after)
    assert [node.status for node in report.nodes] == ["stays in float", "converted"]
    assert report.passed
    draft = Draft(after)
    _one_value(f"{FIRST}.fc2")(draft)
    draft.save()
    assert [str(failure) for failure in checked(TINY["fp32"], after).failed] == [
        f"kept: {FIRST}: constant {FIRST}.fc2 has other values in the converted model"
    ]


def _kept(tmp_path: Path) -> tuple[Path, Path]:
    """Returns a model of one QMoE, twice."""
    codes = Codes(Experts(dtype=np.float16, inter=128), spec_of(4, 32))
    paths = [saved(codes.model(), tmp_path / name) for name in ("before", "after")]
    return paths[0], paths[1]


def test_kept_nodes_are_the_same(tmp_path: Path) -> None:
    before, after = _kept(tmp_path)
    report = checked(before, after)
    assert [(node.status, node.failures) for node in report.nodes] == [("kept", ())]
    draft = Draft(after)
    draft["fc1_scales"] = np.roll(draft["fc1_scales"], 1)
    draft.save()
    assert failed(checked(before, after)) == {"kept"}


def test_kept_nodes_may_have_another_layout(tmp_path: Path) -> None:
    before, after = _kept(tmp_path)
    model = ir.load(after / "model.onnx")
    apply_rules(model, relayout_qmoe_rules("cutlass_sm80"))
    ir.save(model, after / "model.onnx")
    assert checked(before, after).passed
    draft = Draft(after)
    name = draft.node().input[2]
    draft[name] = np.roll(draft[name], 1)
    draft.save()
    assert failed(checked(before, after)) == {"kept"}


def test_bytes_that_do_not_state_their_layout(tmp_path: Path) -> None:
    after = converted(TINY["fp16"], tmp_path / "out", **INT4)
    draft = Draft(after)
    draft.set(weights_prepacked=None)
    draft.save()
    report = checked(TINY["fp16"], after)
    assert report.passed
    assert report.nodes[0].notes == ("weights_prepacked is not stated: taken for raw bytes",)
    assert failed(checked(TINY["fp16"], after, source_layout="cutlass_sm80")) == {"stored"}


# What the nodes and the whole models are fed with.

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


def test_inputs_that_came_to_nothing_are_told(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    report = verify(TINY["fp32"], after, inputs={"input_ids": np.full((1, 300), 9)})
    assert report.whole_model.startswith("not run, the float model: ")
    assert report.whole_model.endswith(
        "; the nodes were fed with random values, not with the given inputs"
    )


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


def test_what_a_type_holds_only_as_subnormals_is_no_error() -> None:
    half, zero = SCALE_DTYPES["float16"], np.zeros((2, 3))
    small = np.full((2, 3), 6e-5)
    assert relative_error(zero, small) == 1.0
    assert relative_error(zero, small, half) == 0.0
    assert relative_error(zero, 10 * small, half) == 1.0
    assert relative_error(np.full((2, 3), 1.055e-3), np.full((2, 3), 1e-3), half) > 0.05
    assert relative_error(np.full((2, 3), 1e-3), small, half) > 10
    assert relative_error(np.full((2, 3), np.nan), small, half) == float("inf")


def test_every_kernel_path_has_a_tolerance_below_any_layout_bug() -> None:
    for provider, target in PROVIDERS.items():
        for name, kernel in TARGETS[target].providers[0].kernels.items():
            for dtype in SCALE_DTYPES:
                for size in kernel.blocks:
                    for rescaled in (False, True):
                        spec = Spec(FORMATS[name], size)
                        row = tolerance_of(provider, spec, dtype, rescaled=rescaled)
                        assert 0 < row.error < 0.05


def test_a_lower_accuracy_level_has_its_own_tolerance(tmp_path: Path) -> None:
    after = converted(TINY["fp32"], tmp_path / "out", **INT4)
    draft = Draft(after)
    draft.set(accuracy_level=4)
    draft.save()
    report = checked(TINY["fp32"], after)
    assert report.passed
    first, second = report.nodes
    assert (first.tolerance, second.tolerance) == (2.5e-2, 1e-5)
    assert (first.execution_error or 0) > 1e-3


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize(
    ("scale", "tolerance", "least", "most"),
    [(1.0, 1e-5, 0.0, 1e-6), (2.0**-12, 1e-5, 0.0, 1e-6), (1.1, 2.5e-2, 1e-3, 2.5e-2)],
)
def test_the_cpu_rounds_global_scales(
    format: str, scale: float, tolerance: float, least: float, most: float, tmp_path: Path
) -> None:
    weights = WeightDesign(base="normal", seed=6)
    layer = LayerDesign(experts=2, k=2, activation="swiglu", form="interleaved", weights=weights)
    before = saved(build_model(ModelDesign(layers=(layer,), hidden=64)), tmp_path / "before")
    after = converted(before, tmp_path / "after", format=format, target="cpu")
    draft = Draft(after)
    for name in ("fc1", "fc2"):
        draft[f"l0_{name}_global_scale"] = np.full(2, scale, np.float32)
    draft.save()
    (node,) = checked(before, after).nodes  # whose weights may be far from the float ones
    assert node.tolerance == tolerance
    assert least <= (node.execution_error or 0.0) <= most


def test_what_cuda_hands_to_the_cpu_is_judged_as_the_cpu() -> None:
    cpu, cuda = "CPUExecutionProvider", "CUDAExecutionProvider"
    assert [runs_on(cuda, dtype) for dtype in SCALE_DTYPES] == [cpu, cuda, cuda]
    assert [runs_on(cpu, dtype) for dtype in SCALE_DTYPES] == [cpu] * 3


# Other people's models.

CPU_ONLY, ANY, CUDA_ONLY = ("cpu", "portable"), ("cpu", "portable", "cuda"), ("cuda",)
REAL = {
    "bytelm-swiglu16-fp32": CPU_ONLY,
    "genai-gemma4-fp16-cuda": CUDA_ONLY,
    "genai-gptoss-bf16-cuda": CUDA_ONLY,
    "genai-gptoss-fp16-cuda": ANY,
    "genai-gptoss-fp32-cpu": CPU_ONLY,
    "genai-qwen3_5_moe-fp16-cuda": ANY,
    "mobius-deepseek_v3-fp32-cpu": CPU_ONLY,
    "mobius-gemma4-fp32-cpu": CPU_ONLY,
    "mobius-gptoss-fp32-cpu": CPU_ONLY,
    "mobius-mixtral-fp32-cpu": CPU_ONLY,
    "mobius-phimoe-fp32-cpu": CPU_ONLY,
    "torch-deepseek_v3-batched_mm-fp32-none": CPU_ONLY,
    "torch-mixtral-batched_mm-fp32-none": CPU_ONLY,
}
WIDTHS = [(bits, symmetric) for bits in (2, 4, 8) for symmetric in (True, False)]


@pytest.mark.parametrize(("bits", "symmetric"), WIDTHS)
@pytest.mark.parametrize(
    ("model", "target"), [(model, target) for model, found in REAL.items() for target in found]
)
def test_real_models_pass(
    model: str, target: str, bits: int, symmetric: bool, shared: Path, tmp_path: Path
) -> None:
    before = shared / "models" / model
    recipe: dict[str, Any] = {"bits": bits, "block_size": 32, "symmetric": symmetric}
    after = converted(before, tmp_path / "out", target=target, **recipe)
    found = verify(before, after, whole_model=bits == 4 and symmetric)
    assert found.passed, found.summary()
    for node in found.nodes:
        told = [note.startswith("checked with the reference alone") for note in node.notes]
        assert told == ([] if node.execution_error is not None else [True])
        assert (node.execution_error is None) == (REAL[model] == CUDA_ONLY)
    if bits == 4 and symmetric and REAL[model] != CUDA_ONLY:
        assert found.whole_model == "ran on random inputs"


def test_a_router_that_another_tool_quantized_is_found(shared: Path) -> None:
    before, after = (shared / "models" / f"genai-gptoss-{kind}-cpu" for kind in ("fp32", "int4"))
    report = checked(before, after)
    assert failed(report) == {"outside", "routing"}
    assert all("is MatMul, and com.microsoft::MatMulNBits" in f.reason for f in report.failed)
    assert all((node.execution_error or 1) < 1e-6 for node in report.nodes)


def test_packed_bytes_that_a_cpu_would_take_for_raw_ones(shared: Path) -> None:
    before, after = (shared / "models" / f"genai-gptoss-{kind}-cuda" for kind in ("fp16", "int4"))
    assert "stored" in failed(checked(before, after))
    told = checked(before, after, source_layout="cutlass_sm80")
    assert failed(told) == {"outside", "routing"}
    assert "their shape says cutlass_sm80" in told.nodes[0].notes[1]
