"""`Report`: counts, sizes, words."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from qmoe_rules import QuantizeMoEPass, Report, UnsupportedNodeError
from qmoe_rules.report import (
    CONVERTED,
    KEPT,
    SKIPPED,
    ProjectionRow,
    Row,
    human_bytes,
    row_of,
)


def node(name: str, output: str = "") -> ir.Node:
    found = ir.node("MoE", [], domain="com.microsoft", name=name)
    found.outputs[0].name = output or f"{name}_out"
    return found


def report_of(*rows: Row) -> Report:
    report = Report()
    for row in rows:
        report.record(node(row.node), row)
    return report


MIXED = (
    Row(
        "a",
        CONVERTED,
        stored="int4 row, raw",
        bytes_before=80,
        bytes_after=12,
        warnings=("w",),
        projections=(ProjectionRow("fc1", "int4 row", 20, 4.8, (0.5, 0.25)),),
    ),
    Row("b", SKIPPED, reason="excluded by the recipe", bytes_before=80, bytes_after=80),
    Row("c", KEPT, reason="it is QMoE already"),
    Row("d", CONVERTED),
)


def test_rows_stay_in_the_order_found_and_are_counted() -> None:
    report = report_of(*MIXED)
    assert report.rows == list(MIXED)
    counts = [report.count(status) for status in (CONVERTED, SKIPPED, KEPT)]
    assert counts == [2, 1, 1]


def test_later_row_of_the_same_node_replaces_the_earlier_in_its_place() -> None:
    report, first, second = Report(), node("a"), node("b")
    report.record(first, Row("a", SKIPPED, reason="not yet"))
    report.record(second, Row("b", CONVERTED))
    report.record(first, Row("a", CONVERTED))
    assert [(row.node, row.status) for row in report.rows] == [("a", CONVERTED), ("b", CONVERTED)]


def test_reports_that_say_the_same_are_equal() -> None:
    assert report_of(*MIXED) == report_of(*MIXED)


def test_nodes_of_one_name_have_a_row_each() -> None:
    report = Report()
    report.record(node("moe", "x"), Row("moe", CONVERTED))
    report.record(node("moe", "y"), Row("moe", SKIPPED, reason="no"))
    assert [row.status for row in report.rows] == [CONVERTED, SKIPPED]


def test_nodes_of_one_name_and_output_in_two_subgraphs_have_a_row_each() -> None:
    report = Report()
    nodes = node("moe", "y"), node("moe", "y")
    for found in nodes:
        report.record(found, Row("moe", CONVERTED))
    assert report.count(CONVERTED) == 2


def test_ratio_is_before_over_after_and_unknown_without_sizes() -> None:
    report = Report(file_bytes_before=300, file_bytes_after=100)
    assert report.ratio == 3.0
    assert Report(file_bytes_before=300).ratio is None
    assert Report(file_bytes_after=300).ratio is None


def row_from(data: dict[str, Any]) -> Row:
    projections = (
        ProjectionRow(**{**each, "errors": tuple(each["errors"])}) for each in data["projections"]
    )
    lists = {"warnings": tuple(data["warnings"]), "projections": tuple(projections)}
    return Row(**{**data, **lists})


def test_json_holds_everything_and_comes_back() -> None:
    report = report_of(*MIXED)
    report.file_bytes_before, report.file_bytes_after = 5000, 2000
    report.warnings.append("pattern 'lm.*' matches no node")
    data = json.loads(report.to_json())
    rows = [row_from(row) for row in data.pop("nodes")]
    assert rows == report.rows
    assert data == {
        "converted": 2,
        "skipped": 1,
        "kept": 1,
        "file_bytes_before": 5000,
        "file_bytes_after": 2000,
        "ratio": 2.5,
        "warnings": ["pattern 'lm.*' matches no node"],
    }
    assert json.loads(report.to_json()) == json.loads(json.dumps(report.to_dict()))


def test_json_of_an_empty_report_is_valid() -> None:
    data = json.loads(Report().to_json())
    assert data["nodes"] == []
    assert data["ratio"] is None


@pytest.mark.parametrize(
    ("rows", "sizes", "sentence"),
    [
        ((), (0, 0), "no com.microsoft::MoE or QMoE node found; nothing to quantize"),
        (MIXED, (0, 0), "2 converted, 1 skipped, 1 kept"),
        (MIXED[1:2], (0, 0), "1 skipped"),
        (MIXED[:1], (4083492, 1358439), "1 converted; model 4.08 MB -> 1.36 MB (3.01x smaller)"),
        (
            (),
            (1000, 1000),
            "no com.microsoft::MoE or QMoE node found; nothing to quantize; "
            "model 1 kB -> 1 kB (same size)",
        ),
    ],
)
def test_summary(rows: tuple[Row, ...], sizes: tuple[int, int], sentence: str) -> None:
    report = report_of(*rows)
    report.file_bytes_before, report.file_bytes_after = sizes
    assert report.summary() == sentence


def test_summary_does_not_call_a_larger_file_smaller() -> None:
    assert "smaller" not in Report(file_bytes_before=100, file_bytes_after=200).summary()


def test_skipped_nodes_become_one_error_that_names_each_with_its_reason() -> None:
    report = report_of(*MIXED, Row("e", SKIPPED, reason="fc3 is present"))
    with pytest.raises(UnsupportedNodeError) as caught:
        report.raise_if_skipped()
    message = str(caught.value)
    assert message.startswith("2 MoE nodes were not converted: ")
    assert message.endswith("excluded by the recipe (b); fc3 is present (e)")


def test_nothing_skipped_raises_nothing() -> None:
    report_of(*(row for row in MIXED if row.status != SKIPPED)).raise_if_skipped()


def test_a_model_without_any_moe_does_not_pass_for_converted() -> None:
    with pytest.raises(UnsupportedNodeError, match=r"holds no com\.microsoft::MoE node"):
        Report().raise_if_skipped()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (1_500_000_000, "1.5 GB"),
        (40_000_000, "40 MB"),
        (2_000_000_000_000, "2 TB"),
        (123_000_000_000_000, "123 TB"),
    ],
)
def test_human_bytes(count: int, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize("count", [999_900, 999_999_999, 5_000_000_000_000_000])
def test_human_bytes_never_uses_an_exponent(count: int) -> None:
    assert "e" not in human_bytes(count)


def test_row_of_a_float_node_and_of_the_qmoe_it_becomes(tiny_fp32: Path) -> None:
    model = ir.load(tiny_fp32)
    before = [row_of(found) for found in model.graph if found.op_type == "MoE"]
    assert before[0] == Row(
        node="layers.0.moe",
        status=SKIPPED,
        experts=8,
        hidden=128,
        inter=128,
        bytes_before=1048576 + 524288,
        bytes_after=1048576 + 524288,
        projections=(
            ProjectionRow("fc1", "float32", 8 * 256 * 128, 32.0),
            ProjectionRow("fc2", "float32", 8 * 128 * 128, 32.0),
        ),
    )
    quantize = QuantizeMoEPass(bits=8, block_size=64)
    quantize(model)
    codes, scales = 8 * (256 + 128) * 128, 4 * 8 * (256 + 128) * 2
    for row, planned in zip(before, quantize.report.rows, strict=True):
        assert planned == dataclasses.replace(
            row,
            status=CONVERTED,
            stored="int8 block 64, raw",
            bytes_after=codes + scales,
            warnings=planned.warnings,
            projections=(
                ProjectionRow("fc1", "int8 block 64", 8 * 256 * 128, 8.5),
                ProjectionRow("fc2", "int8 block 64", 8 * 128 * 128, 8.5),
            ),
        )
        assert planned.warnings  # blockwise int8 is approximate on the CPU
    after = [row_of(found) for found in model.graph if found.op_type == "QMoE"]
    assert [row.status for row in after] == [KEPT, KEPT]
    assert [(row.experts, row.hidden, row.inter) for row in after] == [(8, 128, 128)] * 2
    assert [row.bytes_before for row in after] == [codes + scales] * 2
    assert [row.projections for row in after] == [planned.projections] * 2
