"""MoE with a separate fc3, or with fc1 in halves -> MoE with gate and linear rows interleaved.

Row 2i of the new fc1 is gate row i, row 2i + 1 linear row i, and `swiglu_fusion` is 1: the one form
that every QMoE kernel reads. Nothing is lost and nothing is copied: the new initializers are
interleaved one expert at a time, when they are read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from qmoe_rules import ops
from qmoe_rules.facts import constant_weights
from qmoe_rules.kernels import GATED, INTERLEAVED
from qmoe_rules.lazy import register_beside
from qmoe_rules.report import SKIPPED, Report, row_of
from qmoe_rules.rules._leftovers import Leftovers, carry_notes
from qmoe_rules.slices import Combined, SlicedTensor, Slices
from qmoe_rules.weights import ExpertWeights, resolve

__all__ = ["REFUSED", "normalize_moe_rules"]

logger = logging.getLogger(__name__)

REFUSED = "qmoe_rules.not_normalized"
"""Where a node's `meta` says why it was not normalized, for the rules that come after."""

Array = npt.NDArray[Any]


def normalize_moe_rules(*, report: Report | None = None) -> RewriteRuleSet:
    """Returns the rule that interleaves the gate and the linear rows of every gated MoE.

    It changes nodes with an fc3, and nodes with `swiglu_fusion=2`. Each call makes a fresh rule;
    use it for one model at a time. A node that cannot be changed stays as it was, with a logged
    warning and a row in the report.

    Args:
        report: Collects one row per node that should have been changed and could not be.

    Returns:
        A rule set for `onnxscript.rewriter.rewrite`; it belongs before `moe_to_qmoe_rules`.

    Raises:
        TypeError: `report` is no report.

    Example:
        >>> from onnxscript import rewriter
        >>> from qmoe_rules import moe_to_qmoe_rules
        >>> rules = [*normalize_moe_rules(), *moe_to_qmoe_rules(bits=4)]
        >>> # quantized = rewriter.rewrite(model, rules)
    """
    report = Report.of(report)
    return RewriteRuleSet([NormalizeMoE.rule(report)])  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Interleaved:
    """A weight [E, 2I, H] or a bias [E, 2I] in the form to come.

    Attributes:
        sources: The constants it is made of; the new initializer goes beside the first.
        key: What is made of the first one.
        slices: How it is read.
    """

    sources: tuple[ir.Value, ...]
    key: tuple[object, ...]
    slices: Slices

    def register(self) -> ir.Value:
        """Returns the new initializer; nodes that share the sources share it too."""
        source = self.sources[0]
        tensor = SlicedTensor(self.slices, f"{source.name}_interleaved")
        return register_beside(source, self.key, {"interleaved": tensor})["interleaved"]


@dataclass(frozen=True)
class _Normalization:
    """What `check` found out about a node and `rewrite` needs."""

    attributes: Mapping[str, Any]
    fc1: Mapping[str, _Interleaved]


class NormalizeMoE(RewriteRuleClassBase):
    """The rule behind `normalize_moe_rules`."""

    def __init__(self, report: Report) -> None:
        super().__init__("NormalizeMoE")
        self._report = report
        self._normalization: _Normalization | None = None
        self._leftovers = Leftovers()

    def pattern(self, op: Any, x: Any, router_probs: Any, fc1: Any) -> Any:
        """Matches any MoE: missing and extra inputs are sorted out in `check`."""
        return op.MoE(
            x,
            router_probs,
            fc1,
            _allow_other_inputs=True,
            _domain=ops.DOMAIN,
            _outputs=["moe"],
        )

    def check(self, op: Any, *args: Any, **bindings: Any) -> MatchResult:
        """Accepts the node, or says why it stays; `op` is the match context here."""
        node = ops.producer(bindings["moe"])
        result = MatchResult()
        if not _is_apart(node):
            return result.fail("gate and linear rows are not apart", node)
        found = _examine(node, ops.in_function(op.model, node))
        if isinstance(found, str):
            node.meta[REFUSED] = found
            row = dataclasses.replace(row_of(node), status=SKIPPED, reason=found)
            self._report.record(node, row)
            logger.warning("%s stays as it is: %s", row.node, found)
            return result.fail(found, node)
        self._report.forget(node)
        self._normalization = found
        return result

    def rewrite(self, op: Any, *args: Any, **bindings: Any) -> ir.Value:
        """Builds the new MoE node and registers the interleaved initializers."""
        normalization = self._normalization
        if normalization is None:
            raise AssertionError("rewrite was called without a successful check")
        moe: ir.Value = bindings["moe"]
        node = ops.producer(moe)
        inputs = ops.inputs(node)
        inputs |= {"fc3_experts_weights": None, "fc3_experts_bias": None}
        for name, interleaved in normalization.fc1.items():
            value = interleaved.register()
            inputs[name] = value
            self._leftovers.made(value)
            self._leftovers.replaced(*interleaved.sources)
        normalized: ir.Value = op.MoE(
            *ops.slots("MoE", inputs),
            _domain=ops.DOMAIN,
            _name=node.name,
            **normalization.attributes,
        )
        carry_notes(moe, normalized)
        return normalized

    def cleanup(self) -> None:
        """Removes the old constants that no node uses any more."""
        self._leftovers.sweep()


def _is_apart(node: ir.Node) -> bool:
    """Returns whether the gate and the linear rows of a MoE are apart, in fc3 or in halves."""
    given, values = ops.inputs(node), ops.attributes(node)
    halves = values["activation_type"] in GATED and values["swiglu_fusion"] == 2
    return halves or "fc3" in ops.projections(given)


def _examine(node: ir.Node, in_function: bool) -> _Normalization | str:
    """Returns the normalization of a node, or the reason why there is none."""
    if in_function:
        return "it is inside a function, which holds no initializers; inline it (see prepare)"
    if unknown := ops.refuse_unknown(node):
        return unknown
    given, values = ops.inputs(node), ops.attributes(node)
    activation, fc3 = values["activation_type"], given["fc3_experts_weights"]
    if fc3 is None and given["fc3_experts_bias"] is not None:
        return "fc3_experts_bias is present without fc3_experts_weights"
    if fc3 is not None and activation not in INTERLEAVED:
        return f"activation {activation!r} has no meaning with fc3"
    weights = constant_weights(given)
    if isinstance(weights, str):
        return weights
    shapes = {name: view.shape for name, view in weights.items()}
    reason = ops.refuse_shapes(shapes["fc1"], shapes["fc2"], given, values, shapes.get("fc3"))
    if reason:
        return reason
    biases = _biases(given, weights["fc1"])
    if isinstance(biases, str):
        return biases
    slices = {name: view.slices for name, view in weights.items() if name != "fc2"}
    fc1 = {"fc1_experts_weights": _interleaved(given, "experts_weights", slices, fc3 is not None)}
    if biases:
        fc1["fc1_experts_bias"] = _interleaved(given, "experts_bias", biases, fc3 is not None)
    return _Normalization(_attributes(values, fc3 is not None), fc1)


def _biases(given: Mapping[str, ir.Value | None], weight: ExpertWeights) -> dict[str, Slices] | str:
    """Returns the constant biases of fc1 and fc3, those that are there, or why they do not fit."""
    biases = {}
    experts, rows, _ = weight.shape
    for name in ("fc1", "fc3"):
        value = given[f"{name}_experts_bias"]
        if value is None:
            continue
        slices = resolve(value)
        if isinstance(slices, str):
            return f"{name}_experts_bias: {slices}"
        if slices.shape != (experts, rows) or slices.dtype != weight.dtype:
            return (
                f"{name}_experts_bias is {slices.dtype.name} {list(slices.shape)}; the weights ask "
                f"for {weight.dtype.name} {[experts, rows]}"
            )
        biases[name] = slices
    return biases


def _interleaved(
    given: Mapping[str, ir.Value | None],
    part: str,
    slices: Mapping[str, Slices],
    separate: bool,
) -> _Interleaved:
    """Returns the interleaved weights or biases.

    Args:
        given: The node's inputs.
        part: `"experts_weights"` or `"experts_bias"`.
        slices: Those of fc1, fc3, or both; a missing one is zeros.
        separate: Whether fc3 holds the linear rows; else they are the second half of fc1's.
    """
    functions: dict[tuple[str, ...], Callable[..., Array]] = {
        ("fc1", "fc3"): _interleave,
        ("fc1",): lambda gate: _interleave(gate, np.zeros_like(gate)),
        ("fc3",): lambda linear: _interleave(np.zeros_like(linear), linear),
    }
    function = functions[tuple(slices)] if separate else _interleave_halves
    first = next(iter(slices.values()))
    rows = first.shape[1] * (2 if separate else 1)
    values = {name: given[f"{name}_{part}"] for name in slices}
    return _Interleaved(
        tuple(value for value in values.values() if value is not None),
        ("interleaved", separate, *values.items()),
        Combined(
            list(slices.values()), (first.shape[0], rows, *first.shape[2:]), first.dtype, function
        ),
    )


def _interleave(gate: Array, linear: Array) -> Array:
    """Returns [n, 2I, ...] with gate row i in row 2i, and linear row i in row 2i + 1."""
    pairs = np.stack((gate, linear), axis=2)
    return pairs.reshape(len(gate), 2 * gate.shape[1], *gate.shape[2:])


def _interleave_halves(block: Array) -> Array:
    """Returns the same for [n, 2I, ...] with every gate row before every linear row."""
    half = block.shape[1] // 2
    return _interleave(block[:, :half], block[:, half:])


def _attributes(values: Mapping[str, Any], separate: bool) -> dict[str, Any]:
    """Returns every attribute written out, because defaults have differed between versions."""
    activation = values["activation_type"]
    changed = {**values, "swiglu_fusion": 1}
    if separate:
        changed["activation_type"] = INTERLEAVED[activation]
    if activation == "silu":  # silu(gate) * linear is swiglu in its bare form
        changed |= {"activation_alpha": 1.0, "activation_beta": 0.0}
    if activation in ("gelu", "silu"):  # which never read them
        changed |= {"swiglu_limit": None, "swiglu_limit_after_activation": None}
    return {name: value for name, value in changed.items() if value is not None}
