"""Tables and a plot of what quality.py measured.

    python benchmarks/quality_tables.py results.json ... [--svg docs/quality.svg]

Prints Markdown, and draws the first file's first model.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quality import PLAIN

Row = Mapping[str, Any]

_COLOURS = ("#888888", "#d98200", "#4c9be8", "#1a5fb4", "#1b8a3a", "#a1329c")
_WIDTH, _HEIGHT, _MARGIN = 380, 340, 56
_BITS, _NATS = (2, 9), (-4, 0)  # from and to: bits per weight, and powers of ten of the KL


def methods(rows: Iterable[Row]) -> list[str]:
    """Returns the methods, in the order in which they were measured."""
    return list(dict.fromkeys(row["method"] for row in rows))


def by_storage(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """Returns the rows by storage, the widest codes first, and by method."""
    found: dict[str, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: -row["bits"]):
        found.setdefault(row["storage"], {})[row["method"]] = row
    return found


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yields the lines of a Markdown table, and an empty one."""
    yield f"| {' | '.join(heads)} |"
    yield f"|{'---|' * len(heads)}"
    for line in lines:
        yield f"| {' | '.join(line)} |"
    yield ""


def divergences(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a table of the KL, and how many times plain round to nearest's it is."""
    names = methods(rows)
    lines = []
    for storage, found in by_storage(rows).items():
        size = next(iter(found.values()))
        plain = found.get(PLAIN) or by_storage(rows).get(symmetric(storage), {}).get(PLAIN)
        cells = [kl(found[name], plain) if name in found else "" for name in names]
        lines.append([storage, f"{size['bits']:.2f}", f"{size['ratio']:.2f}x", *cells])
    yield from table(["experts", "bits per weight", "file", *names], lines)


def symmetric(storage: str) -> str:
    """Returns the storage without zero points that another is held to."""
    return storage.replace(" asymmetric", "")


def kl(row: Row, plain: Row | None) -> str:
    """Returns a cell of the KL."""
    value = row["quality"]["divergence"]
    if plain is None or plain is row:
        return f"{value:.5f}"
    return f"{value:.5f} ({value / plain['quality']['divergence']:.2f})"


def others(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a table of the change of the loss and the agreement."""
    names = methods(rows)
    lines = []
    for storage, found in by_storage(rows).items():
        cells = [
            f"{found[name]['quality']['loss_change']:+.5f}, "
            f"{found[name]['quality']['agreement']:.2%}"
            if name in found
            else ""
            for name in names
        ]
        lines.append([storage, *cells])
    yield from table(["experts", *names], lines)


def budgets(rows: Sequence[Row]) -> Iterator[str]:
    """Yields a table of budgets, each with the best uniform recipes within it."""
    lines = []
    for budget in dict.fromkeys(row["budget"] for row in rows):
        for name in methods(rows):
            mine = [row for row in rows if (row["budget"], row["method"]) == (budget, name)]
            for row in [mine[0], *sorted(mine[1:], key=lambda row: _kl(row))[:3]]:
                kind = f"budget {budget:g}" if row is mine[0] else "uniform"
                lines.append([name, kind, row["storage"], f"{row['bits']:.3f}", f"{_kl(row):.5f}"])
    yield from table(["method", "", "experts", "bits per weight", "KL"], lines)


def _kl(row: Row) -> float:
    return float(row["quality"]["divergence"])


def plot(rows: Sequence[Row]) -> str:
    """Returns an SVG: KL by bits per weight, blocks and rows side by side."""
    names = methods(rows)
    parts = [_panel(0, "blocks of 32", "block 32", rows), _panel(1, "rows", "row", rows)]
    for index, name in enumerate(names):
        x, y = _MARGIN + 200 * (index % 4), _HEIGHT + 18 * (1 + index // 4)
        parts.append(
            f'<path d="M{x} {y - 4}h18" stroke="{_COLOURS[index]}" stroke-width="2"/>'
            f'<text x="{x + 24}" y="{y}">{name}</text>'
        )
    wide, high = 2 * _WIDTH + 2 * _MARGIN, _HEIGHT + 64
    note = f'<text x="{_MARGIN}" y="{high - 8}">dashed: asymmetric, with zero points</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" '
        'font-family="sans-serif" font-size="12" fill="#333">'
        f'<rect width="{wide}" height="{high}" fill="#fff"/>{"".join(parts)}{note}</svg>\n'
    )


def _panel(number: int, title: str, reach: str, rows: Sequence[Row]) -> str:
    left = _MARGIN + number * (_WIDTH + _MARGIN // 2)
    parts = [f'<text x="{left}" y="20" font-weight="bold">KL, nats per byte: {title}</text>']
    for power in range(_NATS[0], _NATS[1] + 1):
        y = _y(10.0**power)
        label = f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g}</text>'
        parts.append(f'<path d="M{left} {y:.1f}h{_WIDTH - 60}" stroke="#ddd"/>{label}')
    for bits in range(_BITS[0], _BITS[1] + 1):
        x = _x(bits, left)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 20}" text-anchor="middle">{bits}</text>')
    parts.append(f'<text x="{left}" y="{_HEIGHT - 4}">bits per weight, scales included</text>')
    for index, name in enumerate(methods(rows)):
        for asymmetric in (False, True):
            chosen = [
                row
                for row in rows
                if row["method"] == name
                and row["storage"].endswith(reach)
                and row["storage"].startswith("int")
                and ("asymmetric" in row["storage"]) == asymmetric
            ]
            parts.append(_line(chosen, left, _COLOURS[index], asymmetric))
    return "".join(parts)


def _line(rows: Sequence[Row], left: float, colour: str, dashed: bool) -> str:
    points = [(_x(row["bits"], left), _y(_kl(row))) for row in rows]
    points.sort()
    if not points:
        return ""
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5"/>' for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    line = f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"{dash}/>'
    return f'<g fill="{colour}">{line}{dots}</g>'


def _x(bits: float, left: float) -> float:
    return left + (_WIDTH - 60) * (bits - _BITS[0]) / (_BITS[1] - _BITS[0])


def _y(nats: float) -> float:
    share = (math.log10(nats) - _NATS[0]) / (_NATS[1] - _NATS[0])
    return (_HEIGHT - 40) - (_HEIGHT - 70) * share


def main() -> None:
    """Prints the tables, and draws the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--svg", type=Path)
    arguments = parser.parse_args()
    for path in arguments.results:
        found = json.loads(path.read_text())
        print(
            f"ONNX Runtime {found['onnxruntime']}, {found['machine']}, {found['date']}, "
            f"{found['windows']} windows; seconds: {found['seconds']}\n"
        )
        for model in dict.fromkeys(row["model"] for row in found["results"]):
            mine = [row for row in found["results"] if row["model"] == model]
            alike = [row for row in mine if row["budget"] is None]
            print(f"### {model}\n")
            for lines in (divergences(alike), others(alike)):
                print("\n".join(lines))
            if shared := [row for row in mine if row["budget"] is not None]:
                print("\n".join(budgets(shared)))
            if arguments.svg and path == arguments.results[0] and model == mine[0]["model"]:
                arguments.svg.write_text(plot(alike))
                arguments.svg = None


if __name__ == "__main__":
    main()
