"""Fusing experts, and holding a model to have stayed as it was."""

from __future__ import annotations

import logging
from typing import Any

import onnx_ir as ir
import pytest

from qmoe_rules import Report, fuse_experts_rules
from qmoe_rules.report import SKIPPED
from qmoe_rules.rules import apply_rules

GPTOSS: dict[str, Any] = {"limit": 7.0, "alpha": 1.702, "beta": 1.0, "bias": True}
"""What an expert of gpt-oss has that a plain one has not."""


def fused(model: ir.Model, target: str = "portable") -> Report:
    """Fuses a model and returns the report."""
    report = Report()
    apply_rules(model, fuse_experts_rules(report=report, target=target))
    return report


def graph_of(model: ir.Model) -> list[bytes]:
    """Returns everything but the types, which the rewriter fills in for constants."""
    proto = ir.to_proto(model).graph
    fields = (proto.node, proto.initializer, proto.input, proto.output)
    return [each.SerializeToString() for field in fields for each in field]


def check_stays(model: ir.Model, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    before = graph_of(model)
    with caplog.at_level(logging.WARNING):
        report = fused(model)
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]
    assert [record.message for record in caplog.records] == [
        f"the experts before {report.rows[0].node} are not fused: {reason}"
    ]
    assert graph_of(model) == before
