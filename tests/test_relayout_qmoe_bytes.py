"""QMoE from one layout to another: the same codes, to the byte, and nothing else touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import ops, reference
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, Report
from qmoe_rules.rules import moe_to_qmoe_rules
from qmoe_rules.saving import save
from qmoe_rules.stored import StoredProjection
from tests.moe_models import Experts, nodes_of, relative_error, run, single, the_node
from tests.qmoe_models import Codes, constants, reference_options, spec_of
from tests.qmoe_rewrites import PREPACKED, RAW, SM80, WEIGHTS, attributes_of, relayout
from tests.test_real_models import random_feeds, run_alone


def saved(model: ir.Model, path: Path) -> ir.Model:
    save(model, path)
    return ir.load(path)


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


def test_packed_2_bit_codes_become_raw() -> None:
    packed, raw = (Codes(fc1=spec_of(2, 32), layout=layout).arrays() for layout in (SM80, RAW))
    model = Codes(fc1=spec_of(2, 32), layout=SM80).model()
    found = constants(the_node(relayout(model, RAW)))
    for slot in WEIGHTS[:2]:
        assert packed[slot].tobytes() != raw[slot].tobytes()
        np.testing.assert_array_equal(found[slot], raw[slot])


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


def test_layouts_are_those_of_the_operator() -> None:
    assert {name: LAYOUTS[name].prepacked for name in PREPACKED} == PREPACKED
