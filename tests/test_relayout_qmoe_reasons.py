"""QMoE nodes whose bytes stay where they are, and why."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.report import CONVERTED, KEPT, SKIPPED, Report
from qmoe_rules.rules import relayout_qmoe_rules
from tests.moe_models import Experts, the_node
from tests.qmoe_models import Codes, spec_of
from tests.qmoe_rewrites import PREPACKED, RAW, SM80, attributes_of, relayout


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
