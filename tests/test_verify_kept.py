"""`verify` and nodes that were not converted: they are the same, whatever their layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from qmoe_rules import quantize, verify
from qmoe_rules.rules import apply_rules, relayout_qmoe_rules
from tests.moe_models import Experts
from tests.qmoe_models import Codes, spec_of
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
    one_value(f"{FIRST}.fc2")(draft)
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


def test_a_kept_node_that_the_provider_misreads_is_noted(tmp_path: Path) -> None:
    """Two models that compute the same garbage agree."""
    codes = Codes(Experts(dtype=np.float16, inter=128), spec_of(8), layout="cutlass_sm80")
    model = codes.model(weights_prepacked=None)
    paths = [saved(model, tmp_path / name) for name in ("before", "after")]
    (node,) = checked(*paths).nodes
    assert node.status == "kept"
    (note,) = node.notes
    assert note.startswith("CPUExecutionProvider computes garbage: the CPU provider takes the by")
