"""What whole models compute: in ONNX Runtime, or else with the reference for the experts."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from qmoe_rules import ops, reference
from qmoe_rules.audit import audit
from qmoe_rules.kernels import RIGHT
from qmoe_rules.passes import prepare
from qmoe_rules.rules import apply_rules, qmoe_to_moe_rules
from qmoe_rules.saving import save
from qmoe_rules.stored import StoredProjection, stored_projections
from qmoe_rules.verification._runtime import RunError, run_file

__all__ = ["CPU", "AnyModel", "Evaluation", "copied", "evaluate", "run_on_cpu", "stored", "write"]

AnyModel = ir.Model | onnx.ModelProto
"""A model in memory; a `ModelProto` holds its weights."""

Arrays = Mapping[str, npt.NDArray[Any]]

CPU = "CPUExecutionProvider"


def copied(model: AnyModel) -> ir.Model:
    """Returns a copy in memory that may be changed."""
    return model.clone() if isinstance(model, ir.Model) else ir.from_proto(model)


def write(model: AnyModel, path: Path) -> Path:
    """Writes a model to a file and returns its path."""
    if isinstance(model, ir.Model):
        save(model, path)
    else:
        onnx.save(model, path)
    return path


def stored(node: ir.Node) -> Mapping[str, StoredProjection] | str:
    """Returns what a QMoE holds, raw bytes where it does not say, or why it cannot be read."""
    says = ops.attributes(node)["weights_prepacked"] != -1
    return stored_projections(node, None if says else "raw")


@dataclass(frozen=True)
class Evaluation:
    """What models compute.

    Attributes:
        where: Who ran them, in words.
        outputs: Arrays by name of the output, of every model.
    """

    where: str
    outputs: tuple[Arrays, ...]


def evaluate(models: Sequence[AnyModel], feeds: Arrays) -> Evaluation:
    """Runs models on the same inputs, all of them in the same place.

    That is ONNX Runtime's CPU provider where it computes every MoE and QMoE right; otherwise
    onnx's own evaluator, with the float64 reference for MoE, and QMoE dequantized before.

    Args:
        models: The models.
        feeds: Their inputs by name.

    Raises:
        AssertionError: A model does not run.
    """
    copies = [prepare(copied(model)) for model in models]
    nodes = [node for model in copies for node in ops.nodes(model, "MoE", "QMoE")]
    at_home = all(audit(node, "cpu").verdict == RIGHT for node in nodes)
    inputs = (value.dtype for model in copies for value in model.graph.inputs)
    if at_home and ir.DataType.BFLOAT16 not in inputs:  # which it cannot be fed with
        outputs = tuple(run_on_cpu(model, feeds) for model in models)
        return Evaluation("ONNX Runtime", outputs)
    outputs = tuple(_in_reference(model, feeds) for model in copies)
    return Evaluation("the float64 reference", outputs)


def run_on_cpu(model: AnyModel, feeds: Arrays) -> Arrays:
    """Runs a model in ONNX Runtime on the CPU.

    Raises:
        AssertionError: It does not load, or does not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = write(model, Path(folder) / "model.onnx")
        try:
            return run_file(path, feeds, CPU)
        except RunError as refusal:
            raise AssertionError(f"ONNX Runtime does not run the model: {refusal}") from None


def _in_reference(model: ir.Model, feeds: Arrays) -> Arrays:
    apply_rules(model, qmoe_to_moe_rules())
    for node in ops.nodes(model, "QMoE"):
        raise AssertionError(f"{ops.label(node)} cannot be dequantized, and no CPU kernel runs it")
    exact = {
        str(value.name): feeds[str(value.name)].astype(value.dtype.numpy())
        for value in model.graph.inputs
        if value.name in feeds and value.dtype is not None
    }
    evaluator = ReferenceEvaluator(ir.to_proto(model), new_ops=[MoE])
    names = [str(value.name) for value in model.graph.outputs]
    return dict(zip(names, map(np.asarray, evaluator.run(names, exact)), strict=True))


class MoE(OpRun):
    """`com.microsoft::MoE` for onnx's evaluator."""

    op_domain = ops.DOMAIN

    def _run(
        self,
        *inputs: npt.NDArray[Any] | None,
        k: int | None = None,
        activation_type: str | None = None,
        activation_alpha: float | None = None,
        activation_beta: float | None = None,
        swiglu_fusion: int | None = None,
        swiglu_limit: float | None = None,
        normalize_routing_weights: int | None = None,
        use_sparse_mixer: int | None = None,
    ) -> tuple[npt.NDArray[Any]]:
        given = {
            "k": k,
            "activation_type": activation_type,
            "activation_alpha": activation_alpha,
            "activation_beta": activation_beta,
            "swiglu_fusion": swiglu_fusion,
            "swiglu_limit": swiglu_limit,
            "normalize_routing_weights": normalize_routing_weights,
            "use_sparse_mixer": use_sparse_mixer,
        }
        arrays = dict(zip(_SLOTS, inputs, strict=False))
        options: dict[str, Any] = {
            name: each for name, each in (*arrays.items(), *given.items()) if each is not None
        }
        if "fc3" in options and options.get("activation_type") == "gelu":
            options["activation_type"] = "geglu"  # what the reference calls it
        x = options.pop("x")
        return (reference.moe(x, **options).astype(x.dtype),)


# The inputs of MoE by the names that the reference has for them.
_SLOTS = ("x", "router_probs", "fc1", "fc1_bias", "fc2", "fc2_bias", "fc3", "fc3_bias")
