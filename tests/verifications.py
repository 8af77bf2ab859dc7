"""What the tests of `verify` share: models that are converted, changed and verified."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper

from qmoe_rules import VerificationReport, quantize, verify
from tests.conftest import MODELS
from tests.moe_models import Array

TINY = {name: MODELS / f"bytelm-tiny8-{name}" for name in ("fp32", "fp16")}
INT4: dict[str, Any] = {"block_size": 32}
FIRST = "layers.0.moe"


class Draft:
    """A model file that a test changes: constants by name, nodes by operator."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.onnx"
        self.proto = onnx.load(self.path)

    def __getitem__(self, name: str) -> Array:
        return numpy_helper.to_array(self._tensor(name)).copy()

    def __setitem__(self, name: str, array: Array) -> None:
        self._tensor(name).CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), name))

    def node(self, op_type: str = "QMoE") -> onnx.NodeProto:
        nodes: list[onnx.NodeProto] = list(self.proto.graph.node)
        return next(node for node in nodes if node.op_type == op_type)

    def set(self, **attributes: Any) -> None:
        """Sets attributes of the first QMoE; None removes one."""
        node = self.node()
        kept = [each for each in node.attribute if each.name not in attributes]
        del node.attribute[:]
        given = {name: value for name, value in attributes.items() if value is not None}
        made = [onnx.helper.make_attribute(name, value) for name, value in given.items()]
        node.attribute.extend([*kept, *made])

    def save(self) -> None:
        onnx.save(self.proto, self.path)

    def _tensor(self, name: str) -> onnx.TensorProto:
        tensors: list[onnx.TensorProto] = list(self.proto.graph.initializer)
        return next(tensor for tensor in tensors if tensor.name == name)


def saved(model: ir.Model, folder: Path) -> Path:
    folder.mkdir()
    ir.save(model, folder / "model.onnx")
    return folder


def converted(before: Path, after: Path, **recipe: Any) -> Path:
    report = quantize(before, after, **recipe)
    assert {row.status for row in report.rows} == {"converted"}
    return after


def checked(before: Path, after: Path, **options: Any) -> VerificationReport:
    return verify(before, after, **{"whole_model": False, **options})


def failed(report: VerificationReport) -> set[str]:
    return {failure.check for failure in report.failed}


def one_value(name: str) -> Callable[[Draft], None]:
    def edit(draft: Draft) -> None:
        array = draft[name]
        array.flat[7] += 2.0**-10
        draft[name] = array

    return edit
