"""`installed`: what the ONNX Runtime of this environment knows of MoE and QMoE.

A model may be right by the contract and still not load here: an older runtime refuses an attribute
that its schema lacks, or has no kernel for a format yet. onnxruntime is asked where it is installed
and does not need to be.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import format_of
from qmoe_rules.kernels import TRAPS
from qmoe_rules.targets import Target

__all__ = ["Installed", "installed"]


@dataclass(frozen=True)
class Installed:
    """An ONNX Runtime, as far as it concerns MoE and QMoE.

    Attributes:
        version: Its version.
        attributes: The attributes that its schemas know, by operator.
        inputs: How many inputs its schemas know, by operator.
    """

    version: str
    attributes: Mapping[str, frozenset[str]]
    inputs: Mapping[str, int]

    @classmethod
    def of(cls, version: str, schemas: Iterable[Any]) -> Installed:
        """Reads a runtime's schemas.

        Args:
            version: Its version.
            schemas: What `get_all_operator_schema()` returns: objects with `domain`, `name`,
                `attributes` (a mapping by name) and `inputs` (a sequence).
        """
        known = [
            schema
            for schema in schemas
            if schema.domain == ops.DOMAIN and schema.name in ("MoE", "QMoE")
        ]
        return cls(
            version,
            {schema.name: frozenset(schema.attributes) for schema in known},
            {schema.name: len(schema.inputs) for schema in known},
        )

    def older_than(self, version: str) -> bool:
        """Returns whether this runtime came out before another, by their first two numbers."""
        return _numbers(self.version) < _numbers(version)

    def remarks(self, nodes: Iterable[ir.Node], target: Target) -> list[str]:
        """Returns what this runtime does not know of some nodes, each thing once.

        Args:
            nodes: MoE and QMoE nodes.
            target: Where they shall run, whose tables tell what came with which version.
        """
        found: dict[str, None] = {}
        for node in nodes:
            found |= dict.fromkeys((*self._unknown(node), *self._newer(node, target)))
        return [f"onnxruntime {self.version}, which is installed here, {text}" for text in found]

    def _unknown(self, node: ir.Node) -> list[str]:
        operator = node.op_type
        if operator not in self.attributes:
            return [f"has no operator {operator}"]
        names = [name for name in node.attributes if name not in self.attributes[operator]]
        inputs = [name for name, value in list(ops.inputs(node).items()) if value is not None]
        known = list(ops.inputs(node))[: self.inputs[operator]]
        return [
            *(f"does not know {operator}'s attribute {name}" for name in names),
            *(f"does not know {operator}'s input {name}" for name in inputs if name not in known),
        ]

    def _newer(self, node: ir.Node, target: Target) -> list[str]:
        texts = []
        for name, since in _needs(node, target):
            if self.older_than(since):
                texts.append(f"is older than {since}, the first version with {name}")
        return texts


def _needs(node: ir.Node, target: Target) -> Iterable[tuple[str, str]]:
    """Yields what a node needs of a provider, and the first version that has it."""
    values = ops.attributes(node)
    wishes = {values["activation_type"]}
    if values["swiglu_limit_after_activation"]:
        wishes.add("limit_after_activation")
    for provider in target.providers:
        for wish in sorted(wishes & provider.newer.keys()):
            yield TRAPS[wish].what if wish in TRAPS else wish, provider.newer[wish]
        if ops.is_op(node, "MoE"):
            if provider.moe and provider.moe.since:
                yield f"MoE on {provider.name}", provider.moe.since
            continue
        format = format_of(values["quant_type"], values["expert_weight_bits"])
        kernel = provider.kernels.get(format.name) if format else None
        if format and kernel and kernel.since:
            yield f"{format.name} on {provider.name}", kernel.since


@functools.cache
def installed() -> Installed | None:
    """Returns the ONNX Runtime of this environment, None where there is none that can be asked."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    try:
        import onnxruntime
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

        return Installed.of(onnxruntime.__version__, get_all_operator_schema())
    except (ImportError, OSError, AttributeError):  # not usable here, or built without schemas
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])
