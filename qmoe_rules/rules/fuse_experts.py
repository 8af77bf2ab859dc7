"""Experts that are spelled out in a graph -> MoE, or QMoE where they are quantized."""

from __future__ import annotations

from onnxscript.rewriter import RewriteRuleSet

from qmoe_rules.errors import ConfigError
from qmoe_rules.providers import TARGETS
from qmoe_rules.report import Report
from qmoe_rules.rules.fuse_batched_experts import FuseBatchedExperts
from qmoe_rules.rules.fuse_dense_experts import FuseDenseExperts
from qmoe_rules.rules.fuse_nbits_experts import FuseNBitsExperts
from qmoe_rules.rules.fuse_unrolled_experts import FuseUnrolledExperts

__all__ = ["fuse_experts_rules"]


def fuse_experts_rules(*, report: Report | None = None, target: str = "portable") -> RewriteRuleSet:
    """Returns the rules that fuse experts which an exporter has written as many small nodes.

    Each family of such graphs has a rule. Float experts become `com.microsoft::MoE`; experts of
    MatMulNBits become `com.microsoft::QMoE`, byte for byte. What cannot be proven to be the same
    stays as it was, with a logged warning and a row in the report. Like all rules that make
    nodes convertible, they belong before `moe_to_qmoe_rules` in a list, and each call makes fresh
    rules for one model at a time.

    Args:
        report: Collects a row for experts that stay, and for those that become a QMoE.
        target: Where a QMoE must run right: `"portable"` (CPU and CUDA), `"cpu"` or `"cuda"`.

    Returns:
        A rule set for `onnxscript.rewriter.rewrite`; it can be spliced into a list of rules.

    Raises:
        ConfigError: The target is unknown.
        TypeError: `report` is no report.

    Example:
        >>> from onnxscript import rewriter
        >>> from qmoe_rules import moe_to_qmoe_rules
        >>> rules = [*fuse_experts_rules(), *moe_to_qmoe_rules(bits=4, block_size=32)]
        >>> # quantized = rewriter.rewrite(model, rules)
    """
    if target not in TARGETS:
        raise ConfigError(f"target={target!r}; choose one of {', '.join(TARGETS)}")
    report = Report.of(report)
    return RewriteRuleSet(
        [
            FuseDenseExperts.rule(report),  # type: ignore[no-untyped-call]
            FuseNBitsExperts.rule(report, TARGETS[target]),  # type: ignore[no-untyped-call]
            FuseUnrolledExperts.rule(report),  # type: ignore[no-untyped-call]
            FuseBatchedExperts.rule(report),  # type: ignore[no-untyped-call]
        ]
    )
