"""Runs the grid of the contract on the CPU provider and writes docs/grid.md.

    python -m benchmarks.grid [--full] [--out docs/grid.md]

Run it from the project's root: the cells are those of the tests (`tests/grid.py`). A cell of the
table stands for many: it shows the largest error of those that run, or a number that says why the
target refuses them. What is refused is built by hand and run all the same.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from qmoe_rules.formats import FORMATS
from tests.contract import Cell, serialized
from tests.grid import DTYPES, PLAIN, STORAGES, Outcome, full, measure, reduced, run, tolerance
from tests.moe_models import relative_error

Storage = tuple[str, int, bool]

_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def column_of(cell: Cell) -> tuple[str, str]:
    """Returns the column of a cell: what is computed, and the type."""
    kind = "plain" if cell.activation in PLAIN else f"{cell.activation} {cell.fusion}"
    return kind, cell.dtype


COLUMNS = tuple(itertools.product(("plain", "swiglu 1"), DTYPES)) + tuple(
    (kind, "") for kind in ("swiglu 2", "geglu 1")
)


@dataclass
class Entry:
    """What became of the cells of one entry of the table.

    Attributes:
        errors: The errors of those that ran.
        complaints: What is wrong.
        reasons: Why those were refused that the target refuses.
        would_run: The errors of refused ones that ONNX Runtime computes right.
    """

    errors: list[float] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    reasons: dict[str, None] = field(default_factory=dict)
    would_run: list[float] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        """Counts a cell."""
        if outcome.complaint:
            self.complaints.append(outcome.complaint)
        if outcome.reason is not None:
            self.reasons[general(outcome.reason)] = None
            error = forced(outcome.cell)
            if error is not None and error <= tolerance(outcome.cell):
                self.would_run.append(error)
        elif outcome.error is not None:
            self.errors.append(outcome.error)

    def text(self, notes: dict[str, int]) -> str:
        """Returns the entry; `notes` numbers the reasons."""
        words = [f"{max(self.errors):.0e}"] if self.errors else []
        numbers = [str(notes.setdefault(reason, len(notes) + 1)) for reason in self.reasons]
        words += [f"[{', '.join(numbers)}]"] if numbers else []
        words += ["would run"] if self.would_run else []
        words += ["**WRONG**"] if self.complaints else []
        return " ".join(words)


def general(reason: str) -> str:
    """Returns a reason without what differs from cell to cell: advice, and plain activations."""
    short = reason.removeprefix("target 'cpu': ").split("; ")[0]
    return re.sub(f"activation '({'|'.join(PLAIN)})'", "plain activations", short)


def forced(cell: Cell) -> float | None:
    """Returns the error of a refused cell that is built by hand, None where it does not run."""
    layout = "raw" if FORMATS[cell.format].element is None else "k_packed"
    try:
        return relative_error(run(serialized(cell.direct(layout)), cell), cell.expected())
    except Exception:  # whatever the runtime says: it does not run
        return None


def measured(cells: Callable[[str, int, bool], Iterator[Cell]]) -> dict[Storage, list[Entry]]:
    """Returns the entries of every row."""
    rows = {}
    for storage in STORAGES:
        entries = {column: Entry() for column in COLUMNS}
        for cell in cells(*storage):
            kind, dtype = column_of(cell)
            entries[kind, dtype if (kind, dtype) in entries else ""].add(measure(cell))
        rows[storage] = list(entries.values())
    return rows


def page(rows: dict[Storage, list[Entry]], cells: str) -> str:
    """Returns the page in Markdown."""
    notes: dict[str, int] = {}
    titles = [f"{kind} {_SHORT.get(dtype, '')}".strip() for kind, dtype in COLUMNS]
    lines: list[Sequence[str]] = [["format", "block", "zero points", *titles]]
    for (format, block, symmetric), entries in rows.items():
        texts = [entry.text(notes) for entry in entries]
        lines.append([format, str(block or "row"), "" if symmetric else "yes", *texts])
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    table = "\n".join([head, "|" + "---|" * len(lines[0]), *body])
    numbered = "\n".join(f"{number}. {reason}" for reason, number in notes.items())
    entries = [entry for row in rows.values() for entry in row]
    wrong = [complaint for entry in entries for complaint in entry.complaints]
    made = (
        f"{datetime.datetime.now(datetime.UTC).date()}, onnxruntime {version('onnxruntime')} (CPU, "
        f"{platform.machine()}), numpy {version('numpy')}, {cells}"
    )
    return _PAGE.format(
        made=made,
        table=table,
        notes=numbered,
        ran=sum(len(entry.errors) for entry in entries),
        wrong="None was wrong." if not wrong else "Wrong:\n\n" + "\n".join(f"* {w}" for w in wrong),
    )


_PAGE = """# The grid: what the CPU provider computes, cell by cell

One QMoE node per cell: format x block size x zero points x type x activation x bias x routing x
sizes with an odd and with an even number of blocks. Where target `cpu` converts it, ONNX Runtime
must agree with the float64 reference within the tolerance of the kernel's path; where it does not,
the target must say why. `tests/test_grid.py` holds both in every test run, with the other factors
by turns, and in the full product with `pytest -m slow`. `python -m benchmarks.grid --full` writes
this page.

An entry is the largest relative error ||difference|| / ||expected|| of its cells, or the number of
the reason why they are refused. "Plain" is relu, gelu, silu and identity; "swiglu 1" is
interleaved, "swiglu 2" is halves. "Would run": refused, and a node built by hand came out right.

Measured {made}: {ran} cells ran. {wrong}

{table}

Refused, because target `cpu` says:

{notes}

What the errors are: float16 and bfloat16 round activations; blocks of int8 are multiplied with
activations rounded to int8; int2 in blocks of 32 or more goes through lookup tables of int8; nvfp4
weights are rounded to bfloat16 where activations are float32 or bfloat16, and to float16 otherwise.
"""


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="the full product; minutes")
    parser.add_argument("--out", type=Path, default=Path("docs/grid.md"))
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    cells, name = (full, "full product") if arguments.full else (reduced, "reduced product")
    arguments.out.write_text(page(measured(cells), name), encoding="utf-8")


if __name__ == "__main__":
    main()
