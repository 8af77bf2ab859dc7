"""Fingerprints of MoE nodes: whether statistics of one model belong to another.

Of the weights only the ends of the first and of the last expert go in, so that a fingerprint costs
little however large the model is. They are read as the node sees them: how a model stores its
weights, transposed, split or in halves, makes no difference.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.facts import FloatMoE, constant_weights
from qmoe_rules.statistics import Calibration
from qmoe_rules.weights import ExpertWeights

__all__ = ["fingerprint", "fingerprints", "refuse_calibration"]

_SAMPLE_BYTES = 64 << 10


def fingerprint(attributes: Mapping[str, Any], weights: Mapping[str, ExpertWeights]) -> str:
    """Returns the fingerprint of one MoE node.

    Args:
        attributes: The node's attributes, from `ops.attributes`.
        weights: Its weights by projection.

    Raises:
        SourceError: The weights cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(sorted(attributes.items()), default=str).encode())
    for name, view in weights.items():
        digest.update(json.dumps([name, view.shape, view.dtype.name]).encode())
        for expert in sorted({0, view.shape[0] - 1}) if view.shape[0] else ():
            data = np.ascontiguousarray(view.expert(expert)).reshape(-1).view(np.uint8)
            digest.update(data[:_SAMPLE_BYTES].data)
            digest.update(data[-_SAMPLE_BYTES:].data)
            view.release(expert)
    return digest.hexdigest()


def fingerprints(model: ir.Model) -> dict[str, str]:
    """Returns the fingerprints of a model's MoE nodes whose weights are constant, by name.

    Those of a calibration are of nodes that have been fused and normalized, as `QuantizeMoEPass`
    does it before anything is quantized.

    Raises:
        SourceError: The weights cannot be read.
    """
    found = {}
    for node in ops.nodes(model, "MoE"):
        weights = constant_weights(ops.inputs(node))
        if not isinstance(weights, str):
            found[ops.label(node)] = fingerprint(ops.attributes(node), weights)
    return found


def refuse_calibration(calibration: Calibration, name: str, moe: FloatMoE) -> str | None:
    """Returns why nothing is known of a node, or None.

    Raises:
        ConfigError: The calibration is of another model.
        SourceError: The weights cannot be read, or the calibration is broken.
    """
    if name not in calibration.fingerprints:
        return f"calibration {calibration.path.name} has no node {name}"
    calibration.check({name: fingerprint(moe.attributes, moe.weights)})
    for projection, view in moe.weights.items():
        experts, _, columns = view.shape
        calibration.check_shape(name, projection, experts, columns)
    return None
