"""What the pages draw: numbers turned into positions and shades, and nothing about HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qmoe_rules.report import CONVERTED, Report, Row

if TYPE_CHECKING:
    from qmoe_rules.verification import NodeResult, VerificationReport

__all__ = [
    "SHADES",
    "Bar",
    "Cell",
    "Figures",
    "Layer",
    "Shades",
    "Size",
    "Spread",
    "Strip",
    "figure",
    "of_report",
    "of_verification",
]

SHADES = 9
"""Steps of the scale of colours."""
_LEAST_REACH = 1.1  # of the scale: what differs by less looks nearly alike
_WORST = 8  # experts that are listed


def figure(number: float | None) -> str:
    """Returns a number to three significant digits, empty where there is none."""
    return "" if number is None else f"{number:.3g}"


@dataclass(frozen=True)
class Bar:
    """What a weight of one projection takes.

    Attributes:
        label: The projection.
        value: Bits per weight.
        percent: The length of the bar.
        stored: The format.
    """

    label: str
    value: str
    percent: float
    stored: str


@dataclass(frozen=True)
class Size:
    """A file, as a bar of two parts.

    Attributes:
        label: Which one.
        total: Its bytes.
        experts: Bytes of the experts.
        percent: The length of the experts' part.
        rest: The length of the other part.
    """

    label: str
    total: int
    experts: int
    percent: float
    rest: float


@dataclass(frozen=True)
class Spread:
    """The errors of the experts of one projection, on an axis from 0 to 100.

    Attributes:
        label: The projection.
        least: The smallest error, `left` its place.
        mean: The mean error, `middle` its place.
        most: The largest error, `right` its place.
    """

    label: str
    least: float
    mean: float
    most: float
    left: float
    middle: float
    right: float


@dataclass(frozen=True)
class Cell:
    """One expert.

    Attributes:
        expert: Its index.
        error: Its error.
        shade: Its colour, from 0.
    """

    expert: int
    error: float
    shade: int


@dataclass(frozen=True)
class Strip:
    """The experts of one projection, side by side.

    Attributes:
        label: The projection.
        cells: The experts.
    """

    label: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Layer:
    """One node.

    Attributes:
        node: Its name.
        bits: A bar per projection: bits per weight.
        spreads: The errors of each projection, where they were measured.
        strips: The errors of every expert.
        row: The report's row, None on the page of a verification.
        result: What was verified, None on the page of a plan.
    """

    node: str
    bits: tuple[Bar, ...]
    spreads: tuple[Spread, ...]
    strips: tuple[Strip, ...]
    row: Row | None = None
    result: NodeResult | None = None


@dataclass(frozen=True)
class Shades:
    """A logarithmic scale of colours, for errors relative to the mean of their projection.

    Attributes:
        least: The number at its lower end.
        most: The number at its upper end.
    """

    least: float
    most: float

    @classmethod
    def over(cls, numbers: Iterable[float]) -> Shades:
        """Returns a scale that reaches over some numbers, the mean in its middle."""
        reach = max((max(n, 1 / n) for n in numbers if 0 < n < math.inf), default=1.0)
        reach = max(reach, _LEAST_REACH)
        return cls(1 / reach, reach)

    def shade(self, number: float) -> int:
        """Returns the step of a number, from 0; what is no number is the worst."""
        if not number < self.most:
            return SHADES - 1
        if number <= self.least:
            return 0
        place = math.log(number / self.least) / math.log(self.most / self.least)
        return min(int(place * SHADES), SHADES - 1)

    @property
    def ends(self) -> list[tuple[float, float]]:
        """The numbers between which each step lies."""
        step = (self.most / self.least) ** (1 / SHADES)
        return [(self.least * step**i, self.least * step ** (i + 1)) for i in range(SHADES)]


@dataclass(frozen=True)
class Figures:
    """What a page draws.

    Attributes:
        layers: Every node.
        shades: The scale of colours of the errors.
        most_error: The error at the right end of the axis of spreads.
        most_bits: The bits at the right end of the axis of bits.
        worst: The experts with the largest errors: node, projection, expert, error.
        sizes: The file before and after, empty where that is not known.
    """

    layers: tuple[Layer, ...]
    shades: Shades
    most_error: float
    most_bits: float
    worst: tuple[tuple[str, str, int, float], ...]
    sizes: tuple[Size, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether there are errors to show."""
        return any(layer.strips for layer in self.layers)

    @property
    def mean_error(self) -> float | None:
        """The mean over all experts of all projections that were measured."""
        errors = [cell.error for each in self.layers for s in each.strips for cell in s.cells]
        return math.fsum(errors) / len(errors) if errors else None

    def of_status(self, status: str) -> tuple[Layer, ...]:
        """Returns the layers whose report row has this status."""
        return tuple(each for each in self.layers if each.row and each.row.status == status)

    @property
    def bits_per_weight(self) -> float | None:
        """Of all experts that are quantized, what a weight takes on the average."""
        rows = [each.row for each in self.of_status(CONVERTED) if each.row]
        weights = sum(share.weights for row in rows for share in row.projections)
        return 8 * sum(row.bytes_after for row in rows) / weights if weights else None


@dataclass(frozen=True)
class _Share:
    """How one projection is stored: its name, the format, bits per weight, error per expert."""

    label: str
    stored: str
    bits: float
    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The mean error."""
        return math.fsum(self.errors) / len(self.errors)

    @property
    def relative(self) -> list[float]:
        """Every error over the mean; 1 where all are zero."""
        return [error / self.mean if self.mean else 1.0 for error in self.errors]


def of_report(report: Report) -> Figures:
    """Returns the figures of a plan or of a quantization."""
    rows = report.rows
    shares = [
        [_Share(each.projection, each.stored, each.bits, each.errors) for each in row.projections]
        for row in rows
    ]
    figures = _drawn([row.node for row in rows], shares)
    layers = (replace(each, row=row) for each, row in zip(figures.layers, rows, strict=True))
    return replace(figures, layers=tuple(layers), sizes=tuple(_sizes(report)))


def of_verification(report: VerificationReport) -> Figures:
    """Returns the figures of a verification."""
    shares = [
        [_Share(each.projection, each.stored, each.bits, each.errors) for each in node.projections]
        for node in report.nodes
    ]
    figures = _drawn([node.node for node in report.nodes], shares)
    layers = (
        replace(each, result=node) for each, node in zip(figures.layers, report.nodes, strict=True)
    )
    return replace(figures, layers=tuple(layers))


def _drawn(names: Sequence[str], shares: Sequence[Sequence[_Share]]) -> Figures:
    every = [share for of_node in shares for share in of_node]
    errors = [error for share in every for error in share.errors]
    finite = [error for error in errors if math.isfinite(error)]
    shades = Shades.over(number for share in every if share.errors for number in share.relative)
    most_error = max(finite, default=0.0) or 1.0
    most_bits = max((share.bits for share in every), default=0.0) or 1.0
    layers = tuple(
        Layer(
            name,
            tuple(_bits(share, most_bits) for share in of_node),
            tuple(_spread(share, most_error) for share in of_node if share.errors),
            tuple(_strip(share, shades) for share in of_node if share.errors),
        )
        for name, of_node in zip(names, shares, strict=True)
    )
    ranked = sorted(
        (
            (layer.node, strip.label, cell.expert, cell.error)
            for layer in layers
            for strip in layer.strips
            for cell in strip.cells
        ),
        key=lambda each: -each[3] if math.isfinite(each[3]) else -math.inf,
    )
    return Figures(layers, shades, most_error, most_bits, tuple(ranked[:_WORST]))


def _bits(share: _Share, most: float) -> Bar:
    return Bar(share.label, f"{share.bits:.4g}", 100 * share.bits / most, share.stored)


def _spread(share: _Share, most: float) -> Spread:
    figures = min(share.errors), share.mean, max(share.errors)
    places = (100 * each / most if each < most else 100.0 for each in figures)
    return Spread(share.label, *figures, *places)


def _strip(share: _Share, shades: Shades) -> Strip:
    pairs = zip(share.errors, share.relative, strict=True)
    cells = (Cell(i, error, shades.shade(number)) for i, (error, number) in enumerate(pairs))
    return Strip(share.label, tuple(cells))


def _sizes(report: Report) -> Iterator[Size]:
    """Yields the file before and after, where both are known."""
    before, after = report.file_bytes_before, report.file_bytes_after
    if not before or not after:
        return
    rows, longest = report.rows, max(before, after)
    for label, total, experts in (
        ("before", before, sum(row.bytes_before for row in rows)),
        ("after", after, sum(row.bytes_after for row in rows)),
    ):
        experts = min(experts, total)  # weights that nodes share are in the rows of each
        yield Size(
            label, total, experts, 100 * experts / longest, 100 * (total - experts) / longest
        )
