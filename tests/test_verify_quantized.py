"""`verify` is green for what `quantize` writes, whatever the recipe and the node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import quantize, verify
from qmoe_rules.formats import SCALE_DTYPES
from tests import expert_graphs
from tests.expert_graphs import Layer
from tests.moe_models import Experts, Graph, branches, single
from tests.verifications import INT4, TINY, Draft, checked, converted, failed, saved

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
