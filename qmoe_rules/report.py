"""`Report`: one row for every MoE that was found, and what became of it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import UnsupportedNodeError
from qmoe_rules.slices import Slices
from qmoe_rules.stored import stored_projections
from qmoe_rules.weights import resolve

__all__ = [
    "CONVERTED",
    "KEPT",
    "SKIPPED",
    "ProjectionRow",
    "Report",
    "Row",
    "human_bytes",
    "row_of",
]

_KEY = "qmoe_rules.row"

CONVERTED = "converted"
"""A node that a rule replaced: a float MoE by a QMoE, or a QMoE as the rule says."""
SKIPPED = "skipped"
"""A node that stays as it was, for a reason."""
KEPT = "kept"
"""A node that is what it should be already; nothing to do."""


@dataclass(frozen=True)
class ProjectionRow:
    """How one projection of a node is stored.

    Attributes:
        projection: `"fc1"`, `"fc2"` or `"fc3"`.
        stored: The format and the block size, such as `"int4 block 32"`, or the float type.
        weights: How many weights there are, of all experts.
        bits: Bits per weight, scales and zero points included.
        errors: ||stored - float|| / ||float|| of every expert; empty where it was not measured.
    """

    projection: str
    stored: str
    weights: int
    bits: float
    errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class Row:
    """What became of one node.

    Attributes:
        node: The node's name.
        status: `CONVERTED`, `SKIPPED` or `KEPT`.
        reason: Why it was skipped or kept; empty for a converted node.
        experts: E, or 0 where it is not known.
        hidden: H.
        inter: I.
        stored: How the experts are stored, such as `"int4 block 32, raw"`.
        bytes_before: Bytes of the expert weights as they were.
        bytes_after: Bytes of codes and scales as they will be; equal to `bytes_before` for a node
            that stays.
        warnings: Facts about the node that its owner should know.
        projections: How each projection is stored; empty where that cannot be read.
    """

    node: str
    status: str
    reason: str = ""
    experts: int = 0
    hidden: int = 0
    inter: int = 0
    stored: str = ""
    bytes_before: int = 0
    bytes_after: int = 0
    warnings: tuple[str, ...] = ()
    projections: tuple[ProjectionRow, ...] = ()


def row_of(node: ir.Node) -> Row:
    """Returns a row with a node's name, sizes and bytes; a QMoE is `KEPT`, a MoE `SKIPPED`."""
    given = ops.inputs(node)
    constants = {
        name: slices
        for name, value in given.items()
        if value and name in _EXPERT_INPUTS and not isinstance(slices := resolve(value), str)
    }
    nbytes = sum(slices.nbytes for slices in constants.values())
    experts, hidden, inter = _sizes(node, given)
    kept = ops.is_op(node, "QMoE")
    return Row(
        node=ops.label(node),
        status=KEPT if kept else SKIPPED,
        reason="it is QMoE already" if kept else "",
        experts=experts,
        hidden=hidden,
        inter=inter,
        bytes_before=nbytes,
        bytes_after=nbytes,
        projections=_stored(node) if kept else _float(constants),
    )


_EXPERT_INPUTS = frozenset(
    f"fc{index}_{part}"
    for index in (1, 2, 3)
    for part in ("experts_weights", "scales", "zero_points")
)


def _float(constants: Mapping[str, Slices]) -> tuple[ProjectionRow, ...]:
    return tuple(
        ProjectionRow(name[:3], each.dtype.name, math.prod(each.shape), 8.0 * each.dtype.itemsize)
        for name, each in constants.items()
        if name.endswith("_experts_weights")
    )


def _stored(node: ir.Node) -> tuple[ProjectionRow, ...]:
    stored = ops.refuse_unknown(node) or stored_projections(node)
    if isinstance(stored, str):
        return ()
    return tuple(
        ProjectionRow(name, str(each.spec), math.prod(each.shape), each.bits_per_weight)
        for name, each in stored.items()
    )


def _sizes(node: ir.Node, given: Mapping[str, ir.Value | None]) -> tuple[int, int, int]:
    """Returns (E, H, I), 0 for each that the shapes do not tell."""
    shape = ops.static_shape(given["fc2_experts_weights"])
    if shape is None or len(shape) != 3:
        return 0, 0, 0
    experts, hidden, inter = (size or 0 for size in shape)
    if ops.is_op(node, "QMoE"):
        # The scales tell H whatever the layout; the bytes of one expert are H * I * bits / 8.
        scales = ops.static_shape(given["fc2_scales"]) or ()
        values = ops.attributes(node)
        bits = values["fc2_expert_weight_bits"] or values["expert_weight_bits"]
        columns = hidden * inter
        hidden = (scales[1] or 0) if len(scales) > 1 else 0
        inter = columns * 8 // bits // hidden if hidden and bits > 0 else 0
    return experts, hidden, inter


@dataclass(eq=False)
class Report:
    """Every MoE of a model, in the order found.

    Attributes:
        rows: One row per node.
        file_bytes_before: Size of the source model with its external data, 0 where unknown.
        file_bytes_after: Size of the model as saved or planned, 0 where unknown.
        warnings: What is to be told of the model as a whole, such as a pattern that no node has.
    """

    file_bytes_before: int = 0
    file_bytes_after: int = 0
    warnings: list[str] = field(default_factory=list)
    # By a token that the node carries: names are unique within one scope only, and the node
    # itself would keep its whole graph alive.
    _rows: dict[object, Row] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, report: Report | None) -> Report:
        """Returns a report that was given, or an empty one where none was.

        Raises:
            TypeError: It is something else.
        """
        if not isinstance(report, cls | None):
            raise TypeError(f"report={report!r} is no Report; give one: report=Report()")
        return cls() if report is None else report

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Report) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    @property
    def rows(self) -> list[Row]:
        """The rows, in the order in which the nodes were found."""
        return list(self._rows.values())

    def record(self, node: ir.Node, row: Row) -> None:
        """Adds the row of a node, or replaces it: a later sweep knows better."""
        self._rows[node.meta.setdefault(_KEY, object())] = row

    def row(self, node: ir.Node) -> Row | None:
        """Returns the row of a node, None where it has none."""
        return self._rows.get(node.meta.get(_KEY))

    def replace(self, node: ir.Node, replacement: ir.Node) -> None:
        """Lets the row of a node be that of the one that takes its place."""
        if _KEY in node.meta:
            replacement.meta[_KEY] = node.meta[_KEY]

    def forget(self, node: ir.Node) -> None:
        """Drops the row of a node, which another node will take the place of."""
        self._rows.pop(node.meta.get(_KEY), None)

    def count(self, status: str) -> int:
        """Returns how many nodes have this status."""
        return sum(row.status == status for row in self.rows)

    @property
    def ratio(self) -> float | None:
        """File size before over after, or None where a size is unknown."""
        if not self.file_bytes_before or not self.file_bytes_after:
            return None
        return self.file_bytes_before / self.file_bytes_after

    def raise_if_skipped(self) -> None:
        """Turns skipped nodes, or a model without any MoE, into one error.

        Raises:
            UnsupportedNodeError: Some node was skipped, or none was found.
        """
        if not self.rows:
            raise UnsupportedNodeError("the model holds no com.microsoft::MoE node")
        skipped: dict[str, list[str]] = {}
        for row in self.rows:
            if row.status == SKIPPED:
                skipped.setdefault(row.reason, []).append(row.node)
        if skipped:
            reasons = "; ".join(f"{why} ({', '.join(names)})" for why, names in skipped.items())
            count = self.count(SKIPPED)
            nodes = "MoE node was" if count == 1 else "MoE nodes were"
            raise UnsupportedNodeError(f"{count} {nodes} not converted: {reasons}")

    def summary(self) -> str:
        """Returns one line that says what was found and what became of it."""
        if not self.rows:
            found = "no com.microsoft::MoE or QMoE node found; nothing to quantize"
        else:
            counts = ((self.count(status), status) for status in (CONVERTED, SKIPPED, KEPT))
            found = ", ".join(f"{count} {status}" for count, status in counts if count)
        if self.ratio is None:
            return found
        before, after = human_bytes(self.file_bytes_before), human_bytes(self.file_bytes_after)
        if f"{self.ratio:.2f}" == "1.00":
            change = "same size"
        elif self.ratio > 1:
            change = f"{self.ratio:.2f}x smaller"
        else:
            change = f"{1 / self.ratio:.2f}x larger"
        return f"{found}; model {before} -> {after} ({change})"

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data: counts, sizes, warnings and rows."""
        return {
            "converted": self.count(CONVERTED),
            "skipped": self.count(SKIPPED),
            "kept": self.count(KEPT),
            "file_bytes_before": self.file_bytes_before,
            "file_bytes_after": self.file_bytes_after,
            "ratio": self.ratio,
            "warnings": list(self.warnings),
            "nodes": [dataclasses.asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        """Returns `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


def human_bytes(count: int) -> str:
    """Returns a byte count as people read it, such as `"1.5 GB"` (powers of 1000)."""
    units = ["B", "kB", "MB", "GB", "TB"]
    size = float(count)
    while float(f"{size:.3g}") >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.0f} {units[0]}" if size >= 1000 else f"{size:.3g} {units[0]}"
