"""Both whole models on the same inputs: the user's, or what the signature allows to make."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.feeds import complete, inputs_of
from qmoe_rules.loading import data_files
from qmoe_rules.report import human_bytes
from qmoe_rules.verification._execution import relative_error
from qmoe_rules.verification._pairing import Source
from qmoe_rules.verification._report import Failure, OutputResult
from qmoe_rules.verification._runtime import RunError, run_file

__all__ = ["WholeRun", "given_feeds", "run_both"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class WholeRun:
    """What came of running both models.

    Attributes:
        told: Why they did not run, empty where they did.
        refused: What ONNX Runtime says where it does not run the float model.
        outputs: One result per output.
        failures: The checks that failed.
        values: Intermediate values by name, those of the float model and of the converted one.
    """

    told: str
    refused: str = ""
    outputs: tuple[OutputResult, ...] = ()
    failures: tuple[Failure, ...] = ()
    values: tuple[Arrays, Arrays] = field(default_factory=lambda: ({}, {}))


def given_feeds(model: ir.Model, inputs: Mapping[str, npt.ArrayLike]) -> Arrays:
    """Returns the user's inputs, and those that follow from them: a mask, positions, a cache.

    Raises:
        ConfigError: Some are missing or unknown, have another type or shape, or look up rows that
            are not there.
        TypeError: They are no dictionary.
        SourceError: The model has inputs that are no numbers.
    """
    needed = inputs_of(model)
    return complete(inputs, needed, list(needed))


def run_both(
    before: Source,
    after: Source,
    feeds: Arrays,
    extra: tuple[Sequence[str], Sequence[str]],
    provider: str,
    obstacle: str | None,
) -> WholeRun:
    """Runs both models and compares their outputs.

    What cannot run is told. It is no failure, unless the float model runs and ONNX Runtime refuses
    the converted one for a reason that the tables do not know.

    Args:
        before: The float model.
        after: The converted model.
        feeds: Their inputs by name.
        extra: Names of intermediate values to return, of each model.
        provider: ONNX Runtime's name of the execution provider.
        obstacle: Why the provider does not compute the converted model, or None.
    """
    found: list[dict[str, Array]] = []
    failures: list[Failure] = []
    refused = ""
    for name, source, names in (("float", before, extra[0]), ("converted", after, extra[1])):
        told = _too_large(source) or (obstacle if source is after else None) or ""
        if not told:
            try:
                found.append(run_file(source.path, feeds, provider, names))
            except RunError as refusal:
                told = str(refusal)
                if not found:
                    refused = told
                else:
                    reason = f"the float model runs, and the converted one does not: {told}"
                    failures.append(Failure("outputs", reason))
        if told:
            values: tuple[Arrays, Arrays] = (found[0] if found else {}, {})
            told = f"not run, the {name} model: {told}"
            return WholeRun(told, refused, failures=tuple(failures), values=values)
    outputs = []
    for name in (str(output.name) for output in before.model.graph.outputs):
        expected, actual = (each.get(name) for each in found)
        if expected is None or actual is None or expected.dtype.kind != "f" or not expected.size:
            continue
        if np.isfinite(expected).all() and not np.isfinite(actual).all():
            reason = f"{name} is not finite everywhere, and it is in the float model"
            failures.append(Failure("outputs", reason))
        outputs.append(_compared(name, expected, actual))
    return WholeRun("", "", tuple(outputs), tuple(failures), (found[0], found[1]))


def _too_large(source: Source) -> str | None:
    """Returns why a model cannot be held in memory, or None where it can, or nobody knows."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = sum(file.stat().st_size for file in data_files(source.model))
    if size <= memory:
        return None
    return f"its {human_bytes(size)} do not fit in {human_bytes(memory)} of memory"


def _compared(name: str, expected: Array, actual: Array) -> OutputResult:
    if expected.shape != actual.shape:
        return OutputResult(name, float("inf"))
    error = relative_error(actual, expected)
    if "logit" not in name.lower() or expected.shape[-1] < 2:
        return OutputResult(name, error)
    p, q = (_log_softmax(each.astype(np.float64)) for each in (expected, actual))
    return OutputResult(
        name,
        error,
        float((np.exp(p) * (p - q)).sum(axis=-1).mean()),
        float((p.argmax(axis=-1) == q.argmax(axis=-1)).mean()),
    )


def _log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return logs
