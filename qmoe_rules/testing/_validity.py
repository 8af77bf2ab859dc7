"""`assert_valid`: a model that other tools accept, and a provider runs right."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.errors import ConfigError
from qmoe_rules.facts import constant_weights
from qmoe_rules.feeds import random_feeds
from qmoe_rules.kernels import RIGHT
from qmoe_rules.passes import prepare
from qmoe_rules.providers import TARGETS
from qmoe_rules.testing._evaluation import AnyModel, copied, run_on_cpu, stored

__all__ = ["assert_valid"]


def assert_valid(model: AnyModel, *, runs_on: str | None = None) -> None:
    """Asserts that a model is valid.

    That is: `onnx.checker` accepts it, shape inference included, and the shapes and attributes of
    every MoE and QMoE fit together.

    Args:
        model: The model, which is not changed.
        runs_on: A target, such as `"cpu"`, all of whose providers must run every MoE and QMoE
            right by their tables. Where the CPU is among them, ONNX Runtime runs the model once,
            on random inputs.

    Raises:
        AssertionError: It is not; the message says which node, and why.
        ConfigError: There is no such target, or the inputs are not known from the model.

    Example:
        >>> assert_valid(build_model(ModelDesign()), runs_on="portable")
    """
    if runs_on is not None and runs_on not in TARGETS:
        raise ConfigError(f"runs_on={runs_on!r}; it may be {', '.join(map(repr, TARGETS))}")
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise AssertionError(f"onnx.checker: {error}") from None
    plain = prepare(copied(model))
    for node in ops.nodes(plain, "MoE", "QMoE"):
        if reason := _refuse(node):
            raise AssertionError(f"{ops.label(node)}: {reason}")
        if runs_on is not None and (found := audit(node, runs_on)).verdict != RIGHT:
            raise AssertionError(f"{ops.label(node)} {found.verdict}: {found.reason}")
    if runs_on is not None and any(each.is_cpu for each in TARGETS[runs_on].providers):
        run_on_cpu(model, random_feeds(plain, tokens=2, seed=0))


def _refuse(node: ir.Node) -> str | None:
    """Returns how the shapes and attributes of a node disagree, or None."""
    if unknown := ops.refuse_unknown(node):
        return unknown
    if ops.is_op(node, "QMoE"):
        found = stored(node)
        return found if isinstance(found, str) else None
    given = ops.inputs(node)
    weights = constant_weights(given)
    if isinstance(weights, str):
        return None  # weights that are computed have no shapes that are known
    shapes = {name: view.shape for name, view in weights.items()}
    values = ops.attributes(node)
    return ops.refuse_shapes(shapes["fc1"], shapes["fc2"], given, values, shapes.get("fc3"))
