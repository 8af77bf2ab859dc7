"""The rewrite as onnx-ir passes."""

from __future__ import annotations

import dataclasses
from typing import Any

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.budget import within_budget
from qmoe_rules.errors import SourceError
from qmoe_rules.kernels import RIGHT
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report, row_of
from qmoe_rules.rules import (
    apply_rules,
    fuse_experts_rules,
    moe_to_qmoe_rules,
    normalize_moe_rules,
)
from qmoe_rules.statistics import Calibration

__all__ = ["QuantizeMoEPass", "prepare"]


def prepare(model: ir.Model) -> ir.Model:
    """Inlines, in place, the model-local functions that hold a MoE node, and no others.

    A function holds no initializers, so a MoE inside one cannot be quantized there. Functions
    that merely define a fallback for a fused operator stay, so that the runtime still sees it.

    Raises:
        SourceError: They cannot be inlined: they call themselves, or are called with other inputs
            than they have.
        TypeError: `model` is no `onnx_ir.Model`.
    """
    _inline(model)
    return model


def _inline(model: ir.Model) -> bool:
    ops.require_model(model)
    holders = _functions_with_moe(model)
    if holders:
        try:
            InlinePass(criteria=lambda function: function.identifier() in holders)(model)
        except (ir.passes.PassError, KeyError, ValueError) as error:
            raise SourceError(
                f"the functions that hold a MoE cannot be inlined: {error.__cause__ or error}"
            ) from error
    return bool(holders)


def _functions_with_moe(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Returns the functions that contain a MoE, or call a function that does."""
    holders = {
        identifier
        for identifier, function in model.functions.items()
        if any(ops.is_op(node, "MoE") for node in function.all_nodes())
    }
    grown = bool(holders)
    while grown:
        callers = {
            identifier
            for identifier, function in model.functions.items()
            if any(node.op_identifier() in holders for node in function.all_nodes())
        }
        grown = not callers <= holders
        holders |= callers
    return holders


def _audit(node: ir.Node, recipe: Recipe) -> tuple[str, ...]:
    """Returns what is wrong with a QMoE that somebody else made, for the recipe's target."""
    found = audit(node, recipe.target)
    if found.verdict == RIGHT:
        return ()
    mended = f"; {found.remedy}" if found.remedy else ""
    return (f"{ops.label(node)} {found.verdict}: {found.reason}{mended}",)


class QuantizeMoEPass(ir.passes.InPlacePass):
    """Prepares a model and plans the quantization of every MoE node.

    Attributes:
        report: One row per MoE and QMoE node of the model that was passed last.

    Example:
        >>> import onnx_ir as ir
        >>> quantize = QuantizeMoEPass(bits=4, block_size=32)
        >>> # model = quantize(ir.load("model.onnx")).model
    """

    def __init__(self, recipe: Recipe | None = None, **recipe_fields: Any) -> None:
        """Makes the pass.

        Args:
            recipe: What to do; the default recipe where it is left out.
            **recipe_fields: Fields of `Recipe` that differ from `recipe`.

        Raises:
            ConfigError: The recipe is wrong.
            TypeError: `recipe` is no recipe.
        """
        super().__init__()
        self.recipe = Recipe.of(recipe, **recipe_fields)
        self.report = Report()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Plans the quantization in place; nothing is computed before the model is saved.

        Raises:
            ConfigError: The calibration is of another model, or the budget cannot be kept.
            SourceError: The functions that hold a MoE cannot be inlined, or the weights that a
                budget weighs cannot be read.
            TypeError: `model` is no `onnx_ir.Model`.
        """
        self.report = Report()
        inlined = _inline(model)
        for node in ops.nodes(model, "QMoE"):
            warnings = _audit(node, self.recipe)
            self.report.record(node, dataclasses.replace(row_of(node), warnings=warnings))
        rules = [
            *fuse_experts_rules(report=self.report, target=self.recipe.target),
            *normalize_moe_rules(report=self.report),
        ]
        recipe, rewritten = self.recipe, False
        if recipe.budget is not None:  # what it is shared among must be there first
            rewritten = apply_rules(model, rules)
            recipe, rules = within_budget(model, recipe), []
        rules += moe_to_qmoe_rules(recipe, report=self.report)
        rewritten |= apply_rules(model, rules)
        self._refuse_calibration()
        return ir.passes.PassResult(model, inlined or rewritten)

    def _refuse_calibration(self) -> None:
        """Raises ConfigError where the recipe's calibration has none of the nodes that were found.

        A node that it lacks is skipped; a file without any is of another model.
        """
        calibration = self.recipe.calibration
        found = [row.node for row in self.report.rows if row.status == SKIPPED]
        if (
            isinstance(calibration, Calibration)
            and not self.report.count(CONVERTED)
            and calibration.fingerprints.keys().isdisjoint(found)
        ):
            calibration.check(dict.fromkeys(found, ""))
