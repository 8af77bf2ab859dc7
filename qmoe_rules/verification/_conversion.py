"""The checks of a converted node: its weights, and what they compute."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.errors import SourceError
from qmoe_rules.facts import constant_weights
from qmoe_rules.formats import format_of
from qmoe_rules.installed import installed
from qmoe_rules.kernels import GARBAGE, RIGHT
from qmoe_rules.providers import TARGETS
from qmoe_rules.stored import STORED_LAYOUTS, StoredProjection, stored_projections
from qmoe_rules.verification import _execution as execution
from qmoe_rules.verification._pairing import Pair
from qmoe_rules.verification._report import Failure, NodeResult
from qmoe_rules.verification._runtime import RunError
from qmoe_rules.verification._tolerances import PROVIDERS, Tolerance, runs_on, tolerance_of
from qmoe_rules.verification._weights import check_projection
from qmoe_rules.weights import ExpertWeights

__all__ = ["Captured", "Settings", "check_conversion", "misread", "obstacle"]

Captured = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Hidden states and router logits of a whole model."""


@dataclass(frozen=True)
class Settings:
    """What all nodes are checked with.

    Attributes:
        folder: Where the converted model is.
        provider: ONNX Runtime's name of the execution provider.
        tokens: Rows that a node is fed with.
        seed: Of random inputs.
        source_layout: The layout of nodes that do not state theirs; None for what the provider
            takes them for.
    """

    folder: Path
    provider: str
    tokens: int
    seed: int
    source_layout: str | None

    def layout_of(self, node: ir.Node) -> str | None:
        """Returns the layout as which to read a QMoE that does not state its own."""
        values = ops.attributes(node)
        if self.source_layout or values["weights_prepacked"] != -1:
            return self.source_layout
        format = format_of(values["quant_type"], values["expert_weight_bits"])
        target = TARGETS[PROVIDERS.get(self.provider, "cpu")]
        kernel = target.providers[0].kernels.get(format.name) if format else None
        read = kernel.reads.get(-1) if kernel else None
        return next((layout for layout in read or () if layout in STORED_LAYOUTS), "raw")


@dataclass(frozen=True)
class _Conversion:
    """Both nodes, with their weights by projection."""

    before: ir.Node
    after: ir.Node
    weights: Mapping[str, ExpertWeights]
    stored: Mapping[str, StoredProjection]

    @property
    def dtype(self) -> np.dtype:
        """The activation type."""
        return self.weights["fc1"].dtype

    def inputs(self, captured: Captured | None, settings: Settings) -> execution.Inputs:
        """Returns what to feed both nodes with."""
        k, tokens = ops.attributes(self.after)["k"], settings.tokens
        found = captured and execution.captured_inputs(*captured, k, self.dtype, tokens)
        if found:
            return found
        experts, hidden, _ = self.weights["fc2"].shape
        return execution.random_inputs(experts, hidden, k, self.dtype, tokens, settings.seed)

    def expected(self, inputs: execution.Inputs) -> tuple[npt.NDArray[np.float64], ...]:
        """Returns what the float and what the stored weights compute in float64."""
        floats = {name: execution.float_experts(each) for name, each in self.weights.items()}
        reals = {name: execution.stored_experts(each) for name, each in self.stored.items()}
        return (
            execution.compute(self.before, floats, inputs),
            execution.compute(self.after, reals, inputs),
        )

    def tolerance(self, provider: str) -> Tolerance:
        """Returns the tolerance of the less exact projection."""
        level = ops.attributes(self.after)["accuracy_level"]
        rows = (
            tolerance_of(provider, each.spec, self.dtype.name, level, rescaled=each.is_rescaled)
            for each in self.stored.values()
        )
        return max(rows, key=lambda row: row.error)


def misread(node: ir.Node, provider: str) -> str | None:
    """Returns why a provider would compute garbage of a MoE or QMoE, or None."""
    if provider not in PROVIDERS:
        return None
    found = audit(node, PROVIDERS[provider])
    return found.reason if found.verdict == GARBAGE else None


def obstacle(pair: Pair, provider: str) -> str | None:
    """Returns why a provider does not compute a converted node as it is meant, or None.

    Args:
        pair: The nodes; whatever is no conversion has no obstacle.
        provider: ONNX Runtime's name of the execution provider.
    """
    if pair.before is None or pair.after is None or provider not in PROVIDERS:
        return None
    if not ops.is_op(pair.before, "MoE") or not ops.is_op(pair.after, "QMoE"):
        return None
    weights = constant_weights(ops.inputs(pair.before))
    output = pair.after.outputs[0]
    if output.dtype is None and not isinstance(weights, str):
        # Not every file tells the types of values, and the scales of some formats do not tell it.
        output.type = ir.TensorType(ir.DataType.from_numpy(weights["fc1"].dtype))
    found = audit(pair.after, PROVIDERS[provider])
    if found.verdict != RIGHT:
        return found.reason
    runtime = installed()
    remarks = runtime.remarks([pair.after], TARGETS[PROVIDERS[provider]]) if runtime else []
    return next(iter(remarks), None)


def check_conversion(
    result: NodeResult,
    before: ir.Node,
    after: ir.Node,
    captured: Captured | None,
    settings: Settings,
) -> NodeResult:
    """Adds to a result what is found of the weights of a converted node, and of what they compute.

    Args:
        result: What is known already.
        before: The MoE.
        after: The QMoE.
        captured: What reaches the node in the whole model, None for random values.
        settings: What to check with.

    Raises:
        SourceError: The data of a model cannot be read.
    """
    weights = constant_weights(ops.inputs(before))
    layout = settings.layout_of(after)
    stored = stored_projections(after, layout)
    if isinstance(weights, str):
        return result.failing(Failure("stored", f"{weights} (in the float model)"))
    if isinstance(stored, str):
        return result.failing(Failure("stored", stored))
    if reason := next(_disagreements(stored, weights), None):
        return result.failing(Failure("stored", reason))
    if ops.attributes(after)["weights_prepacked"] == -1 and layout:
        result = result.noting(f"weights_prepacked is not stated: taken for {layout} bytes")
    with np.errstate(over="ignore", invalid="ignore"):  # what is broken may be infinite
        for name, projection in stored.items():
            figures, failures = check_projection(name, weights[name], projection)
            result = replace(result, projections=(*result.projections, figures)).failing(*failures)
        if ops.attributes(after)["use_sparse_mixer"]:
            return result.noting("not computed: the reference has no sparse mixer")
        return _computed(result, _Conversion(before, after, weights, stored), captured, settings)


def _disagreements(
    stored: Mapping[str, StoredProjection], weights: Mapping[str, ExpertWeights]
) -> Iterator[str]:
    """Yields why stored weights cannot be those of the float model."""
    if stored.keys() != weights.keys():
        yield f"it has {', '.join(stored)}, and the float model {', '.join(weights)}"
    for name, projection in stored.items():
        view = weights.get(name)
        if view is None:
            continue
        if projection.shape != view.shape:
            yield f"{name} is {list(projection.shape)}, and {list(view.shape)} in the float model"
        found = None if projection.spec.format.scale else projection.dtype
        if found not in (None, view.dtype):
            yield f"{name}_scales is {found}, and the weights are {view.dtype} in the float model"


def _computed(
    result: NodeResult, conversion: _Conversion, captured: Captured | None, settings: Settings
) -> NodeResult:
    """Adds what quantization costs, and how exactly the provider computes."""
    try:
        inputs = conversion.inputs(captured, settings)
        exact, expected = conversion.expected(inputs)
    except SourceError:
        raise
    except ValueError as refusal:  # attributes that no provider takes
        return result.failing(Failure("execution", f"the reference cannot compute it: {refusal}"))
    error = execution.relative_error(expected, exact)
    result = replace(result, output_error=error, inputs=inputs.origin)
    if not np.isfinite(expected).all():
        return result.failing(Failure("weights", "what they compute is not finite"))
    provider = runs_on(settings.provider, conversion.dtype.name)
    if provider != settings.provider:
        result = result.noting(f"{provider} runs it: {settings.provider} has no such kernel")
    if reason := obstacle(Pair(conversion.before, conversion.after), provider):
        return result.noting(f"checked with the reference alone: {reason}")
    try:
        actual = execution.execute(
            conversion.after, inputs, conversion.dtype, settings.folder, provider
        )
    except RunError as refusal:
        return result.failing(Failure("execution", f"{provider}: {refusal}"))
    path = conversion.tolerance(provider)
    error = execution.relative_error(actual, expected, conversion.dtype)
    result = replace(result, execution_error=error, tolerance=path.error)
    if error <= path.error:
        return result
    return result.failing(
        Failure(
            "execution",
            f"{provider} is {error:.3g} off what the stored weights mean, relatively; "
            f"{path.error:g} is the most ({path.why})",
        )
    )
