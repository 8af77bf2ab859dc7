"""QMoE from one layout to another: the same codes, to the byte, and nothing else touched."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, rewrite

from qmoe_rules import ops, reference
from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, KEPT, SKIPPED, Report
from qmoe_rules.rules import moe_to_qmoe_rules, relayout_qmoe_rules
from qmoe_rules.saving import save
from qmoe_rules.slices import SlicedTensor
from qmoe_rules.stored import StoredProjection
from tests.moe_models import (
    Experts,
    Graph,
    branches,
    inputs_of,
    nodes_of,
    relative_error,
    run,
    single,
    the_node,
)
from tests.qmoe_models import Codes, append, constants, reference_options, spec_of
from tests.test_real_models import random_feeds, run_alone

RAW, SM80 = "raw", "cutlass_sm80"
PREPACKED = {RAW: 0, SM80: 1}
WEIGHTS = ("fc1_experts_weights", "fc2_experts_weights", "fc3_experts_weights")


def relayout(
    model: ir.Model, layout: str, source_layout: str | None = None, report: Report | None = None
) -> Any:
    rules = relayout_qmoe_rules(layout, source_layout=source_layout, report=report)
    return rewrite(model, [*rules])


def saved(model: ir.Model, path: Path) -> ir.Model:
    save(model, path)
    return ir.load(path)


# The bytes.


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("bits", "block_size"), [(4, 0), (4, 32), (8, 0), (8, 64)])
def test_moved_bytes_equal_those_of_quantizing_into_the_layout(
    bits: int, block_size: int, dtype: Any, tmp_path: Path
) -> None:
    for layout in (RAW, SM80):
        recipe = Recipe(bits=bits, block_size=block_size, layout=layout, target="cuda")
        model = rewrite(single(Experts(dtype=dtype)), [*moe_to_qmoe_rules(recipe)])
        save(model, tmp_path / f"{layout}.onnx")
    for source, layout, name in ((RAW, SM80, "there"), ("there", RAW, "back")):
        save(relayout(ir.load(tmp_path / f"{source}.onnx"), layout), tmp_path / f"{name}.onnx")

    for name, layout in (("there", SM80), ("back", RAW)):
        node, wanted = (the_node(ir.load(tmp_path / f"{file}.onnx")) for file in (name, layout))
        assert attributes_of(node) == attributes_of(wanted)
        found = constants(node)
        for slot, array in constants(wanted).items():
            assert found[slot].dtype == array.dtype
            assert found[slot].tobytes() == array.tobytes(), slot
    data = [(tmp_path / f"{name}.onnx.data").stat().st_size for name in (RAW, "there", "back")]
    assert len(set(data)) == 1


def attributes_of(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


@pytest.mark.parametrize(("written", "layout"), [(RAW, SM80), (SM80, RAW)])
@pytest.mark.parametrize("stated", [True, False])
def test_everything_but_the_bytes_stays(written: str, layout: str, stated: bool) -> None:
    fc2 = spec_of(8, 32) if layout == RAW else None  # CUDA reads two widths in raw bytes only
    codes = Codes(Experts(activation="silu"), spec_of(4, 32), fc2, True, written, fc3=True)
    extra = {"accuracy_level": 4, "activation_alpha": 1.5}
    model = codes.model(**extra, **({} if stated else {"weights_prepacked": None}))
    before = the_node(model)
    inputs, attributes = ops.inputs(before), attributes_of(before)
    node = the_node(relayout(model, layout, None if stated else written))
    assert attributes_of(node) == {**attributes, "weights_prepacked": PREPACKED[layout]}
    for slot, value in ops.inputs(node).items():
        if slot not in WEIGHTS:
            assert value is inputs[slot], slot
    moved = Codes(codes.experts, codes.fc1, codes.fc2, True, layout, fc3=True).arrays()
    for slot in WEIGHTS:
        np.testing.assert_array_equal(constants(node)[slot], moved[slot])
    used = {str(value.name) for value in node.inputs if value is not None}
    assert set(model.graph.initializers) == used - {"x", "router_probs"}
    assert used >= {f"{slot}_{layout}" for slot in WEIGHTS}


def test_router_weights_stay() -> None:
    model = rewrite(single(normalize_routing_weights=0), [*moe_to_qmoe_rules()])
    weights = ops.inputs(the_node(relayout(model, SM80)))["router_weights"]
    assert weights is not None
    assert ops.producer(weights).op_type == "Softmax"


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_moved_int4_runs_through_the_cpu_path_for_packed_bytes(block_size: int) -> None:
    codes = Codes(Experts(inter=256), spec_of(4, block_size))
    model = codes.model()
    feeds = codes.experts.feeds()
    (before,) = run(model, feeds)
    (after,) = run(relayout(model, SM80), feeds)
    assert relative_error(after, before) <= 1e-5


def test_moved_back_int8_with_zero_points_runs() -> None:
    codes = Codes(fc1=spec_of(8), zero_points=True, layout=SM80)
    feeds = codes.experts.feeds()
    model = relayout(codes.model(), RAW)
    (after,) = run(model, feeds)
    weights = codes.weights()
    expected = reference.qmoe(
        feeds["x"],
        feeds["router_probs"],
        weights["fc1"],
        weights["fc2"],
        **reference_options(the_node(model)),
    )
    assert relative_error(after, expected) <= 1e-5


# What is left alone.


@pytest.mark.parametrize("layout", [RAW, SM80])
@pytest.mark.parametrize("said", [True, False])
def test_a_node_that_states_the_layout_is_left_alone(
    layout: str, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    report = Report()
    model = Codes(layout=layout).model()
    node = the_node(model)
    relayout(model, layout, layout if said else None, report)
    assert the_node(model) is node
    (row,) = report.rows
    assert (row.status, row.reason) == (KEPT, f"it is stored in layout {layout} already")
    assert not caplog.messages


@pytest.mark.parametrize("layout", [RAW, SM80])
@pytest.mark.parametrize("stated", [None, -1])
def test_a_layout_that_was_not_stated_is_written_down(layout: str, stated: int | None) -> None:
    report = Report()
    model = Codes(layout=layout).model(weights_prepacked=stated)
    inputs = list(the_node(model).inputs)
    relayout(model, layout, layout, report)
    node = the_node(model)
    assert list(node.inputs) == inputs
    assert ops.attributes(node)["weights_prepacked"] == PREPACKED[layout]
    assert [(row.status, row.stored) for row in report.rows] == [(CONVERTED, layout)]


@pytest.mark.parametrize(
    "codes",
    [Codes(fc1=spec_of(2, 32)), Codes(fc1=spec_of(4, 32), fc2=spec_of(8, 32))],
    ids=["2 bits", "two widths"],
)
def test_what_cuda_reads_in_raw_bytes_only_is_never_packed(codes: Codes) -> None:
    for layout, expected in (
        (RAW, (KEPT, "it is stored in layout raw already")),
        (SM80, (SKIPPED, "the CUDA provider misreads layout 'cutlass_sm80' (it reads raw)")),
    ):
        report = Report()
        relayout(codes.model(), layout, report=report)
        assert [(row.status, row.reason) for row in report.rows] == [expected]


def test_packed_2_bit_codes_become_raw() -> None:
    packed, raw = (Codes(fc1=spec_of(2, 32), layout=layout).arrays() for layout in (SM80, RAW))
    model = Codes(fc1=spec_of(2, 32), layout=SM80).model()
    found = constants(the_node(relayout(model, RAW)))
    for slot in WEIGHTS[:2]:
        assert packed[slot].tobytes() != raw[slot].tobytes()
        np.testing.assert_array_equal(found[slot], raw[slot])


@pytest.mark.parametrize("layout", [RAW, SM80])
@pytest.mark.parametrize("stored", ["n_packed", "k_packed"])
def test_fp4_has_layouts_of_its_own(stored: str, layout: str) -> None:
    report = Report()
    codes = Codes(fc1=Spec(FORMATS["mxfp4"], 32), layout=stored)
    relayout(codes.model(), layout, report=report)
    reason = f"fc1_experts_weights: layout {layout} is not one of mxfp4's (n_packed, k_packed)"
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]


@pytest.mark.parametrize(
    ("codes", "attributes", "source_layout", "reason"),
    [
        (
            Codes(),
            {"weights_prepacked": None},
            None,
            "weights_prepacked is not stated, so the layout of its bytes is unknown; "
            "source_layout='raw' says that a CPU build wrote them, 'cutlass_sm80' a CUDA build",
        ),
        (Codes(), {}, SM80, "weights_prepacked=0 says raw, and source_layout='cutlass_sm80'"),
        (
            Codes(layout=SM80),
            {"weights_prepacked": None},
            RAW,
            "fc1_scales is [3, 384]; weights [N=128, K=384] stored as int4 row in layout raw ask "
            "for [3, 128]",
        ),
        (
            Codes(Experts(hidden=96, activation="relu"), spec_of(4, 32)),
            {},
            None,
            "fc1_experts_weights: layout cutlass_sm80 needs K divisible by 64, and K=96",
        ),
        (
            Codes(Experts(inter=64 * 3, hidden=64 * 3)),
            {"activation_type": "relu", "swiglu_fusion": 0},
            None,
            "fc1_experts_weights is [3, 384, 192]; fc2_experts_weights [3, 192, 192] with "
            "activation 'relu' asks for [3, 192, 192]",
        ),
        (
            Codes(),
            {"quant_type": "fp4"},
            None,
            "fc1_scales is [3, 384]; weights [N=128, K=384] stored as mxfp4 block 32 in layout "
            "n_packed ask for [3, 128, 12]",
        ),
        (Codes(), {"weight_order": 1}, None, "QMoE has no attribute 'weight_order'"),
    ],
    ids=["unknown", "contradiction", "shape", "indivisible", "disagreement", "fp4", "attribute"],
)
def test_a_refused_node_stays_as_it_was(
    codes: Codes,
    attributes: dict[str, Any],
    source_layout: str | None,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = codes.model(**attributes)
    node = the_node(model)
    before = (list(node.inputs), attributes_of(node), list(model.graph.initializers))
    report = Report()
    relayout(model, SM80, source_layout, report)
    assert [(row.node, row.status, row.reason) for row in report.rows] == [
        ("qmoe", SKIPPED, reason)
    ]
    assert caplog.record_tuples == [
        ("qmoe_rules.rules._stored", logging.WARNING, f"qmoe stays as it is: {reason}")
    ]
    assert the_node(model) is node
    assert (list(node.inputs), attributes_of(node), list(model.graph.initializers)) == before


@pytest.mark.parametrize("layout", ["cutlass_sm90", "RAW", ""])
def test_layouts_that_qmoe_never_reads_are_refused_at_once(layout: str) -> None:
    allowed = "it may be 'raw' or 'cutlass_sm80'"
    with pytest.raises(ConfigError) as caught:
        relayout_qmoe_rules(layout)
    assert str(caught.value) == f"layout={layout!r}; {allowed}"
    with pytest.raises(ConfigError) as caught:
        relayout_qmoe_rules(RAW, source_layout=layout)
    assert str(caught.value) == f"source_layout={layout!r}; {allowed}"


# The graph.


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_nodes_in_both_bodies_of_an_if(shared: bool) -> None:
    codes = Codes(fc1=spec_of(4, 32), layout=SM80)
    outer = Graph()
    common: dict[str, ir.Value] = {}

    def fill(graph: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        values = common if shared else {}
        if not values:
            home = outer if shared else graph
            values |= {slot: home.weight(slot, array) for slot, array in codes.arrays().items()}
        return append(graph, x, router, values, out="z", **codes.attributes())

    model = relayout(branches(fill, fill, outer), RAW)
    raw = Codes(fc1=spec_of(4, 32)).arrays()
    nodes = nodes_of(model, "QMoE")
    for node in nodes:
        for slot in WEIGHTS[:2]:
            np.testing.assert_array_equal(constants(node)[slot], raw[slot])
        home = model.graph if shared else node.graph
        assert isinstance(home, ir.Graph)
        moved = {f"{slot}_raw" for slot in WEIGHTS[:2]}
        assert set(home.initializers) == {*raw} - {*WEIGHTS} | moved
    assert (nodes[0].inputs[2] is nodes[1].inputs[2]) is shared


def test_bytes_that_two_nodes_read_in_two_widths_are_moved_twice() -> None:
    bytes_, narrow = Codes(Experts(activation="relu"), spec_of(8)), spec_of(4)
    halves = Codes(Experts(activation="relu", hidden=2 * bytes_.experts.hidden), narrow)
    graph = Graph()
    x, router = inputs_of(graph, bytes_.experts)
    wide = graph.input("wide", np.float32, ("tokens", halves.experts.hidden))
    shared = graph.weight("codes", bytes_.arrays()["fc1_experts_weights"])
    outputs = []
    for codes, source in ((bytes_, x), (halves, wide)):
        name = f"int{codes.fc1.format.bits}"
        values = {slot: graph.weight(f"{name}.{slot}", a) for slot, a in codes.arrays().items()}
        values["fc1_experts_weights"] = shared
        attributes = codes.attributes()
        outputs.append(append(graph, source, router, values, out=name, name=name, **attributes))
    for node in nodes_of(relayout(graph.model(*outputs), SM80), "QMoE"):
        bits = ops.attributes(node)["expert_weight_bits"]
        moved = [LAYOUTS[SM80].store(e, bits) for e in bytes_.arrays()["fc1_experts_weights"]]
        np.testing.assert_array_equal(constants(node)["fc1_experts_weights"], moved)


def test_codes_behind_other_nodes_are_moved() -> None:
    codes = Codes(Experts(activation="relu"))
    arrays = codes.arrays()
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values = {slot: graph.weight(slot, array) for slot, array in arrays.items()}
    stored = values["fc1_experts_weights"]
    values["fc1_experts_weights"] = graph.op("Identity", stored, out="same", like=stored)
    model = graph.model(append(graph, x, router, values, **codes.attributes()))
    node = the_node(relayout(model, SM80))
    assert [each.op_type for each in model.graph] == ["QMoE"]
    np.testing.assert_array_equal(
        constants(node)["fc1_experts_weights"],
        Codes(Experts(activation="relu"), layout=SM80).arrays()["fc1_experts_weights"],
    )


def test_the_node_keeps_its_name_documentation_and_metadata() -> None:
    model = Codes().model()
    node = the_node(model)
    node.doc_string, node.metadata_props["from"] = "experts", "layer 3"
    node.outputs[0].doc_string, node.outputs[0].metadata_props["to"] = "mixed", "layer 4"
    new = the_node(relayout(model, SM80))
    assert new is not node
    assert (new.name, new.doc_string, new.metadata_props["from"]) == ("qmoe", "experts", "layer 3")
    (output,) = new.outputs
    assert (output.name, output.doc_string, output.metadata_props["to"]) == (
        "y",
        "mixed",
        "layer 4",
    )


def test_the_report_tells_what_was_done() -> None:
    report = Report()
    codes = Codes(fc1=spec_of(8, 32), zero_points=True)
    relayout(codes.model(), SM80, report=report)
    (row,) = report.rows
    assert (row.node, row.status, row.reason, row.stored) == ("qmoe", CONVERTED, "", SM80)
    assert (row.experts, row.hidden, row.inter) == (3, 128, 192)
    arrays = codes.arrays()
    nbytes = sum(arrays[slot].nbytes for slot in arrays if not slot.endswith("bias"))
    assert (row.bytes_before, row.bytes_after) == (nbytes, nbytes)


def test_nothing_is_moved_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: StoredProjection, stored: Any) -> None:
        raise AssertionError("an expert was read")

    with monkeypatch.context() as patch:
        patch.setattr(StoredProjection, "_packed", refuse)
        model = relayout(Codes().model(), SM80)
    value = the_node(model).inputs[2]
    assert value is not None
    assert isinstance(value.const_value, SlicedTensor)
    assert value.const_value.numpy().any()


def test_a_dry_run_leaves_nothing_behind() -> None:
    model = Codes().model()
    before = list(model.graph.initializers)
    relayout_qmoe_rules(SM80).apply_to_model(model, tracer=MatchingTracer())
    assert list(model.graph.initializers) == before
    assert ops.attributes(the_node(model))["weights_prepacked"] == 0


def test_rules_that_undo_each_other_come_to_an_end() -> None:
    model = rewrite(Codes().model(), [*relayout_qmoe_rules(SM80), *relayout_qmoe_rules(RAW)])
    arrays = Codes().arrays()
    node = the_node(model)
    assert ops.attributes(node)["weights_prepacked"] == 0
    for slot in WEIGHTS[:2]:
        np.testing.assert_array_equal(constants(node)[slot], arrays[slot])


def test_a_second_sweep_finds_nothing_to_do() -> None:
    report = Report()
    rules = [*relayout_qmoe_rules(SM80, report=report)]
    model = rewrite(rewrite(Codes().model(), rules), rules)
    assert [row.status for row in report.rows] == [CONVERTED, KEPT]
    assert ops.attributes(the_node(model))["weights_prepacked"] == 1


# Real models.


def test_a_cuda_build_of_the_genai_builder_runs_on_the_cpu(shared: Path, tmp_path: Path) -> None:
    path = shared / "models" / "genai-gptoss-int4-cuda" / "model.onnx"
    report = Report()
    model = relayout(ir.load(path), RAW, SM80, report)
    assert [row.status for row in report.rows] == [CONVERTED] * 2
    model = saved(model, tmp_path / "model.onnx")
    # The same checkpoint, quantized by the same tool into raw bytes.
    cpu = ir.load(shared / "models" / "genai-gptoss-int4-cpu" / "model.onnx")
    before = ir.load(path)
    nodes = (nodes_of(each, "QMoE") for each in (model, cpu, before))
    for node, built, packed in zip(*nodes, strict=True):
        found, wanted = constants(node), constants(built)
        for slot in WEIGHTS[:2]:
            assert found[slot].tobytes() == wanted[slot].tobytes()
        feeds = random_feeds(node)
        weights = [StoredProjection.of(built, name, RAW) for name in ("fc1", "fc2")]
        real = [
            weight.dequantized(np.dtype(np.float32)).read(0, 4)
            for weight in weights
            if not isinstance(weight, str)
        ]
        expected = reference.moe(feeds["x"], feeds["router"], *real, **reference_options(node))
        assert relative_error(run_alone(node, feeds), expected) <= 2e-3
        assert relative_error(run_alone(packed, feeds), expected) > 0.5  # misread


def test_a_claim_that_the_shapes_of_a_real_model_contradict(shared: Path) -> None:
    path = shared / "models" / "genai-gptoss-int4-cuda" / "model.onnx"
    report = Report()
    relayout(ir.load(path), SM80, RAW, report)
    assert {(row.status, row.reason) for row in report.rows} == {
        (
            SKIPPED,
            "fc1_scales is [4, 256, 4]; weights [N=128, K=256] stored as int4 block 32 in layout "
            "raw ask for [4, 128, 8]",
        )
    }


@pytest.mark.parametrize("layout", [RAW, SM80])
def test_a_model_whose_shapes_disagree(layout: str, shared: Path) -> None:
    path = shared / "models" / "genai-phimoe-int4-cuda-raw" / "model.onnx"
    report = Report()
    relayout(ir.load(path), layout, report=report)
    assert {(row.status, row.reason) for row in report.rows} == {
        (SKIPPED, "input is [?, ?, 128]; the weights ask for [?, ?, 192]")
    }


def test_layouts_are_those_of_the_operator() -> None:
    assert {name: LAYOUTS[name].prepacked for name in PREPACKED} == PREPACKED
