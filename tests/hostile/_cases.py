"""What a hostile model is: the good one, the cases that spoil it, and how they do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx import ModelProto, NodeProto, TensorProto, helper

from tests.moe_models import Experts, single

__all__ = [
    "CASES",
    "EXPERTS",
    "OUTPUT",
    "OUTSIDE",
    "SECRET",
    "Case",
    "behind",
    "case",
    "good_model",
    "moe_of",
    "place",
    "proto_case",
    "set_attribute",
    "tensor_of",
]

EXPERTS = Experts(experts=2, hidden=64, inter=64, activation="silu")
SECRET = b"secret " * 20_000
"""What lies outside, long enough to pass for any tensor of the model."""

OUTSIDE = "outside the model's folder"
"""What is said of a place there."""

OUTPUT = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)


@dataclass(frozen=True)
class Case:
    """One way to spoil the model.

    Attributes:
        name: What it is.
        spoil: Does it, given the model's folder.
        message: What the one error says, as a regular expression; None where the model is one like
            any other, and its nodes are converted or skipped.
        rare: Whether it is much like others, and is left to the long lane.
    """

    name: str
    spoil: Callable[[Path], object]
    message: str | None
    rare: bool = False


def good_model(folder: Path) -> Path:
    """Writes the model to `folder / "model"`, and what is secret to `folder / "outside"`."""
    (folder / "outside").mkdir()
    (folder / "outside" / "secret.data").write_bytes(SECRET)
    model = folder / "model"
    model.mkdir()
    (model / "zeros.data").write_bytes(bytes(70_000))
    ir.save(single(EXPERTS), model / "model.onnx", external_data="model.onnx.data")
    return model


CASES: list[Case] = []


Add = Callable[[Callable[..., object]], object]


def case(message: str | None, name: str = "", *, rare: bool = False) -> Add:
    """Adds a function of the folder as a case."""

    def add(spoil: Callable[..., object]) -> object:
        CASES.append(Case(name or _title(spoil), spoil, message, rare))
        return spoil

    return add


def proto_case(message: str | None, name: str = "", *, rare: bool = False) -> Add:
    """Adds a function of the ModelProto as a case."""

    def add(change: Callable[..., object]) -> object:
        def spoil(folder: Path) -> None:
            proto = onnx.load(folder / "model.onnx", load_external_data=False)
            change(proto)
            (folder / "model.onnx").write_bytes(proto.SerializeToString())

        return case(message, name or _title(change), rare=rare)(spoil)

    return add


def _title(function: Callable[..., object]) -> str:
    return function.__name__.strip("_").replace("_", " ")


def tensor_of(proto: ModelProto, name: str = "fc1") -> TensorProto:
    found: TensorProto = next(each for each in proto.graph.initializer if each.name == name)
    return found


def place(proto: ModelProto, name: str = "fc1", **entries: Any) -> None:
    """Changes where a tensor is said to lie."""
    tensor = tensor_of(proto, name)
    merged = {each.key: each.value for each in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in merged.items():
        tensor.external_data.add(key=key, value=str(value))


def moe_of(proto: ModelProto) -> NodeProto:
    found: NodeProto = next(node for node in proto.graph.node if node.op_type == "MoE")
    return found


def set_attribute(proto: ModelProto, name: str, value: object) -> None:
    node = moe_of(proto)
    kept = [each for each in node.attribute if each.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])


def behind(proto: ModelProto, nodes: list[NodeProto], value: str) -> None:
    """Lets fc1 come from nodes."""
    moe = moe_of(proto)
    moe.input[2] = value
    others = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*nodes, *others])
