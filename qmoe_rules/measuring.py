"""How far the stored weights of every expert are from the float ones: what quantization costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import SourceError
from qmoe_rules.lazy import PlannedTensor, Projection
from qmoe_rules.mappings import told_when_lost
from qmoe_rules.report import Report
from qmoe_rules.stored import StoredProjection, stored_projections
from qmoe_rules.writing import Progress, processors

__all__ = ["measure", "measured_bytes", "relative_error"]


def relative_error(weight: npt.NDArray[Any], real: npt.NDArray[np.float32]) -> float:
    """Returns ||real - weight|| / ||weight||; where the weight is zero, ||real||."""
    wide = weight.astype(np.float32)
    norm = float(np.linalg.norm(wide))
    return float(np.linalg.norm(real - wide)) / (norm or 1.0)


def measured_bytes(planned: ir.Model) -> int:
    """Returns how many bytes of float weights `measure` reads."""
    return sum(projection.weights.nbytes for projection in _projections(planned))


@told_when_lost()
def measure(
    planned: ir.Model,
    written: ir.Model,
    report: Report,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Compares the experts that were written with the float ones, and adds that to a report.

    Both are read once more, one expert per worker at a time.

    Args:
        planned: The planned model, which still reads the float weights.
        written: The same model as it was saved.
        report: Has a row for every node; those that were planned get the errors.
        workers: Threads; all processors where it is left out.
        progress: Called with (bytes of float weights read, bytes in all).

    Raises:
        SourceError: The weights cannot be read.
    """
    total, done = measured_bytes(planned), 0
    known: dict[Projection, tuple[float, ...]] = {}
    with ExitStack() as stack:
        threads = ThreadPoolExecutor(workers or processors())
        stack.callback(threads.shutdown, cancel_futures=True)
        pairs = (tuple(ops.nodes(model, "QMoE")) for model in (planned, written))
        for node, saved in zip(*pairs, strict=True):
            projections = dict(_planned_of(node))
            for name, projection in projections.items():
                if projection in known:
                    continue
                stored = stored_projections(saved)
                if isinstance(stored, str):
                    raise SourceError(f"{ops.label(saved)}: cannot be read back: {stored}")
                errors = []
                for error in threads.map(
                    _Comparison(projection, stored[name]), range(projection.experts)
                ):
                    errors.append(error)
                    done += projection.weights.nbytes // projection.experts
                    if progress is not None:
                        progress(done, total)
                known[projection] = tuple(errors)
            _record(report, node, {name: known[each] for name, each in projections.items()})


def _record(report: Report, node: ir.Node, errors: dict[str, tuple[float, ...]]) -> None:
    row = report.row(node)
    if row is None:
        raise AssertionError(f"{ops.label(node)} has no row")
    projections = tuple(
        dataclasses.replace(each, errors=errors.get(each.projection, ()))
        for each in row.projections
    )
    report.record(node, dataclasses.replace(row, projections=projections))


def _planned_of(node: ir.Node) -> Iterator[tuple[str, Projection]]:
    given = ops.inputs(node)
    for name in ops.projections(given):
        value = given[f"{name}_experts_weights"]
        tensor = None if value is None else value.const_value
        if isinstance(tensor, PlannedTensor):
            yield name, tensor.projection


def _projections(model: ir.Model) -> set[Projection]:
    return {each for node in ops.nodes(model, "QMoE") for _, each in _planned_of(node)}


@dataclasses.dataclass(frozen=True)
class _Comparison:
    """Float and stored weights of one projection."""

    projection: Projection
    stored: StoredProjection

    def __call__(self, expert: int) -> float:
        """Returns the error of an expert."""
        weights = self.projection.weights
        error = relative_error(weights.expert(expert), self.stored.expert(expert).dequantize())
        weights.release(expert)
        self.stored.release(expert)
        return error
