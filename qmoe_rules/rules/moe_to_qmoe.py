"""MoE(x, router, fc1, fc2) -> QMoE(x, router, q(fc1), q(fc2)), with constant weights.

The rule only plans: the new initializers are computed when the model is saved.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError
from qmoe_rules.facts import FloatMoE
from qmoe_rules.fingerprints import refuse_calibration
from qmoe_rules.kernels import GATED, Facts
from qmoe_rules.lazy import Projection, plan_values
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, ProjectionRow, Report, Row, row_of
from qmoe_rules.rules._leftovers import Leftovers, carry_notes
from qmoe_rules.rules.normalize_moe import REFUSED
from qmoe_rules.statistics import ProjectionStatistics

__all__ = ["moe_to_qmoe_rules"]

logger = logging.getLogger(__name__)


def moe_to_qmoe_rules(
    recipe: Recipe | None = None, *, report: Report | None = None, **recipe_fields: Any
) -> RewriteRuleSet:
    """Returns the rule that turns every float MoE with constant weights into a QMoE.

    Each call makes a fresh rule; use it for one model at a time. A node that cannot be converted
    stays as it was, with a logged warning and a row in the report. Rules that make nodes
    convertible belong before it in the list.

    Args:
        recipe: What to do; the default recipe where it is left out.
        report: Collects one row per MoE node.
        **recipe_fields: Fields of `Recipe` that differ from `recipe`.

    Returns:
        A rule set for `onnxscript.rewriter.rewrite`; it can be spliced into a list of rules.

    Raises:
        ConfigError: The recipe is wrong, or has a budget.
        TypeError: `recipe` is no recipe, or `report` no report.

    Example:
        >>> from onnxscript import rewriter
        >>> rules = moe_to_qmoe_rules(bits=4, block_size=32)
        >>> # quantized = rewriter.rewrite(model, [*rules, *other_rules])
    """
    recipe = Recipe.of(recipe, **recipe_fields)
    if recipe.budget is not None:
        raise ConfigError(
            f"budget={recipe.budget!r} with a rule, which sees one node at a time; plan, quantize "
            "and QuantizeMoEPass see them all"
        )
    rule = MoEToQMoE.rule(recipe, Report.of(report))  # type: ignore[no-untyped-call]
    return RewriteRuleSet([rule])


@dataclass(frozen=True)
class _Conversion:
    """What `check` found out about a node and `rewrite` needs."""

    recipe: Recipe
    moe: FloatMoE
    projections: Mapping[str, Projection]


class MoEToQMoE(RewriteRuleClassBase):
    """The rule behind `moe_to_qmoe_rules`."""

    def __init__(self, recipe: Recipe, report: Report) -> None:
        super().__init__("MoEToQMoE")
        self._recipe = recipe
        self._report = report
        self._conversion: _Conversion | None = None
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
        told: str | None = node.meta.pop(REFUSED, None)
        found = self._examine(node, ops.in_function(op.model, node), told)
        row = _row(node, found)
        self._report.record(node, row)
        for warning in row.warnings:
            logger.info("%s: %s", row.node, warning)
        if isinstance(found, str):
            if found != told:
                logger.warning("%s stays in float: %s", row.node, found)
            return result.fail(found, node)
        self._conversion = found
        return result

    def rewrite(self, op: Any, *args: Any, **bindings: Any) -> ir.Value:
        """Builds the QMoE node and registers the planned initializers."""
        conversion = self._conversion
        if conversion is None:
            raise AssertionError("rewrite was called without a successful check")
        moe: ir.Value = bindings["moe"]
        node = ops.producer(moe)
        given = ops.inputs(node)
        inputs: dict[str, ir.Value | None] = {
            name: given[name] for name in ("input", "router_probs")
        }
        for name, projection in conversion.projections.items():
            source = given[f"{name}_experts_weights"]
            if source is None:
                raise AssertionError(f"{name} was there when the node was checked")
            planned = plan_values(source, projection)
            inputs |= {ops.slot(name, part): value for part, value in planned.items()}
            inputs[f"{name}_experts_bias"] = given[f"{name}_experts_bias"]
            self._leftovers.replaced(source)
            self._leftovers.made(*planned.values())
        recipe = conversion.recipe
        honoured = recipe.provider_target.reads_normalize(recipe.specs)
        if not conversion.moe.attributes["normalize_routing_weights"] and not honoured:
            # The CPU's integers are always renormalized over the top-k, unless it has the weights.
            # The rewriter's own names are those of one graph, and may be taken in an outer one.
            inputs["router_weights"] = op.Softmax(
                given["router_probs"], axis=-1, _outputs=[f"{moe.name}_router_weights"]
            )
        quantized: ir.Value = op.QMoE(
            *ops.slots("QMoE", inputs),
            _domain=ops.DOMAIN,
            _name=node.name,
            **_qmoe_attributes(conversion),
        )
        carry_notes(moe, quantized)
        self._report.replace(node, ops.producer(quantized))
        weights, spec = conversion.projections["fc1"].weights, conversion.projections["fc1"].spec
        if spec.format.scale is not None:  # the scales do not tell it
            quantized.type = ir.TensorType(ir.DataType.from_numpy(weights.dtype))
        return quantized

    def cleanup(self) -> None:
        """Removes the float weights that no node uses any more."""
        self._leftovers.sweep()

    def _examine(self, node: ir.Node, in_function: bool, told: str | None) -> _Conversion | str:
        """Returns the conversion of a node, or the reason why there is none.

        `told` is why the node could not be normalized, where that was tried.
        """
        recipe = self._recipe
        if recipe.excludes(ops.label(node)):
            return "excluded by the recipe"
        recipe = recipe.resolve(ops.label(node))
        if in_function:
            return "it is inside a function, which holds no initializers; inline it (see prepare)"
        if told and "fc3" in ops.projections(ops.inputs(node)):
            return told
        moe = FloatMoE.of(node)
        if isinstance(moe, str):
            return moe
        if reason := _refuse(moe.facts, recipe):
            return reason
        label, layout = ops.label(node), recipe.storage.name
        known = {name: recipe.statistics(label, name) for name in moe.weights}
        fc1 = known["fc1"]
        if fc1 and (reason := refuse_calibration(fc1.calibration, label, moe)):
            return reason
        projections = {
            name: Projection(view, recipe.specs[name], layout, recipe.method, known[name])
            for name, view in moe.weights.items()
        }
        return _Conversion(recipe, moe, projections)


def _refuse(facts: Facts, recipe: Recipe) -> str | None:
    """Returns why the recipe's target cannot take a node, and what could, or None."""
    reason = recipe.refuse(facts)
    advice = recipe.advise(facts) if reason else None
    return f"{reason}; {advice}" if advice else reason


def _qmoe_attributes(conversion: _Conversion) -> dict[str, Any]:
    """Returns every attribute written out, because defaults have differed between versions."""
    recipe = conversion.recipe
    fc1, fc2 = recipe.specs.values()
    attributes = {
        name: value for name, value in conversion.moe.attributes.items() if value is not None
    }
    attributes["expert_weight_bits"] = fc1.format.bits
    if fc2.format != fc1.format:
        attributes["fc2_expert_weight_bits"] = fc2.format.bits
    if fc1.block_size and not fc1.format.block_size:  # written only where it is free to vary,
        attributes["block_size"] = fc1.block_size  # and absent for rows: the CPU refuses -1
    attributes["quant_type"] = fc1.format.quant_type
    if recipe.provider_target.reads_prepacked:
        attributes["weights_prepacked"] = recipe.storage.prepacked
    if recipe.provider_target.wants_limit and attributes["activation_type"] in GATED:
        attributes.setdefault("swiglu_limit", math.inf)
    return attributes


def _row(node: ir.Node, found: _Conversion | str) -> Row:
    row = row_of(node)
    if isinstance(found, str):
        return dataclasses.replace(row, status=SKIPPED, reason=found)
    return dataclasses.replace(
        row,
        status=CONVERTED,
        stored=found.recipe.describe(),
        bytes_after=sum(projection.nbytes for projection in found.projections.values()),
        warnings=_warnings(node, found),
        projections=tuple(
            ProjectionRow(name, str(each.spec), math.prod(each.weights.shape), each.bits_per_weight)
            for name, each in found.projections.items()
        ),
    )


def _warnings(node: ir.Node, found: _Conversion) -> tuple[str, ...]:
    recipe = found.recipe
    warnings = list(recipe.provider_target.warnings(found.moe.facts, recipe.specs))
    if ops.routes_by_softmax(node):
        warnings.append(
            "router_probs comes from a Softmax, and MoE applies softmax to it again; the float "
            "model does the same, so it is kept, but the exporter may not have meant it"
        )
    if recipe.calibration is not None and recipe.statistics(ops.label(node), "fc1") is None:
        warnings.append(f"method {recipe.method!r} does not go by the calibration")
    for name, projection in found.projections.items():
        known = projection.statistics
        if isinstance(known, ProjectionStatistics) and (few := known.fallbacks()):
            warnings.append(
                f"{ops.label(node)}: {name} of {len(few)} of {projection.experts} experts saw "
                f"fewer than {known.enough} tokens and falls back to "
                f"{'its mean squares' if known.hessian else 'the mean squares of all'}"
            )
    return tuple(warnings)
