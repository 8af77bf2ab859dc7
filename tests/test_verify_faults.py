"""`verify` is red for what is broken, with the check that says how."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qmoe_rules import VerificationError, verification
from qmoe_rules.layouts import LAYOUTS
from tests.moe_models import Array, Experts, layers, single
from tests.verifications import (
    FIRST,
    INT4,
    TINY,
    Draft,
    checked,
    converted,
    failed,
    one_value,
    saved,
)


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


def _last_row_lost(scales: Array) -> Array:
    """Scales of 0 in one row of one expert, which is little of the whole."""
    lost = scales.copy()
    lost[2, -1] = 0
    return lost


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
    Broken("scales of a row lost", _on("fc1_scales", _last_row_lost), SCALES),
    Broken("the scale of a row lost", _on("fc2_scales", _last_row_lost), SCALES, ROWS),
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
    Broken("router weight", one_value("layers.0.router.weight"), ROUTING),
    Broken("softmax before the router", _softmax_before_the_router, ROUTING),
    Broken("alpha", lambda draft: draft.set(activation_alpha=1.5), frozenset({"attributes"})),
    Broken("limit", lambda draft: draft.set(swiglu_limit=7.0), frozenset({"attributes"})),
    Broken("attention", one_value("layers.1.o.weight"), frozenset({"outside"})),
    Broken("norm", one_value("layers.0.norm2.bias"), frozenset({"outside"})),
    Broken("embedding", one_value("embedding.weight"), frozenset({"outside"})),
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
