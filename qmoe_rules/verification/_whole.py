"""Both whole models on the same inputs: the user's, or what the signature allows to make."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.feeds import complete, inputs_of
from qmoe_rules.loading import data_files
from qmoe_rules.report import human_bytes
from qmoe_rules.verification._execution import relative_error
from qmoe_rules.verification._pairing import Source
from qmoe_rules.verification._report import Failure, OutputResult
from qmoe_rules.verification._runtime import RunError, run_file

__all__ = ["WholeRun", "given_feeds", "random_feeds", "run_both"]

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]

# In an input that is made up; more than that is better given.
_MOST_NUMBERS = 1 << 26

# What a token id may go through before it looks up a row.
_THROUGH = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class WholeRun:
    """What came of running both models.

    Attributes:
        told: What they were fed with, or why they did not run.
        outputs: One result per output.
        failures: The checks that failed.
        values: Intermediate values by name, those of the float model and of the converted one.
    """

    told: str
    outputs: tuple[OutputResult, ...] = ()
    failures: tuple[Failure, ...] = ()
    values: tuple[Arrays, Arrays] = field(default_factory=lambda: ({}, {}))


def given_feeds(model: ir.Model, inputs: Mapping[str, npt.ArrayLike]) -> Arrays:
    """Returns the user's inputs, and those that follow from them: a mask, positions, a cache.

    Raises:
        ConfigError: Some are missing or unknown, or have another type or shape.
        SourceError: The model has inputs that are no numbers.
    """
    needed = inputs_of(model)
    return complete(inputs, needed, list(needed))


def random_feeds(model: ir.Model, tokens: int, seed: int) -> Arrays | str:
    """Returns random inputs that fit a model's signature, or why they cannot be made.

    Args:
        model: The model.
        tokens: The length of its sequence.
        seed: Of the random values.
    """
    rng = np.random.default_rng(seed)
    try:
        needed = inputs_of(model)
        made = {}
        for value in model.graph.inputs:
            if value.name in needed and (array := _random(value, tokens, rng)) is not None:
                made[str(value.name)] = array
        return complete(made, needed, list(needed))
    except (ConfigError, SourceError) as error:
        return f"{error}; give inputs"


def run_both(
    before: Source,
    after: Source,
    feeds: Arrays,
    extra: tuple[Sequence[str], Sequence[str]],
    provider: str,
    obstacle: str | None,
) -> WholeRun:
    """Runs both models and compares their outputs; what cannot run is told, and no failure.

    Args:
        before: The float model.
        after: The converted model.
        feeds: Their inputs by name.
        extra: Names of intermediate values to return, of each model.
        provider: ONNX Runtime's name of the execution provider.
        obstacle: Why the provider does not compute the converted model, or None.
    """
    found: list[dict[str, Array]] = []
    told = ""
    for name, source, names in (("float", before, extra[0]), ("converted", after, extra[1])):
        told = _too_large(source) or (obstacle if source is after else None) or ""
        if not told:
            try:
                found.append(run_file(source.path, feeds, provider, names))
            except RunError as refusal:
                told = str(refusal)
        if told:
            values: tuple[Arrays, Arrays] = (found[0] if found else {}, {})
            return WholeRun(f"not run, the {name} model: {told}", values=values)
    outputs, failures = [], []
    for name in (str(output.name) for output in before.model.graph.outputs):
        expected, actual = (each.get(name) for each in found)
        if expected is None or actual is None or expected.dtype.kind != "f" or not expected.size:
            continue
        if np.isfinite(expected).all() and not np.isfinite(actual).all():
            reason = f"{name} is not finite everywhere, and it is in the float model"
            failures.append(Failure("outputs", reason))
        outputs.append(_compared(name, expected, actual))
    return WholeRun("", tuple(outputs), tuple(failures), (found[0], found[1]))


def _too_large(source: Source) -> str | None:
    """Returns why a model cannot be held in memory, or None where it can, or nobody knows."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", ()):
        return None
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = sum(file.stat().st_size for file in data_files(source.model))
    if size <= memory:
        return None
    return f"its {human_bytes(size)} do not fit in {human_bytes(memory)} of memory"


def _random(value: ir.Value, tokens: int, rng: np.random.Generator) -> Array | None:
    """Returns values for an input, None where they are unknown, or follow from others."""
    name = str(value.name).lower()
    if value.shape is None or value.dtype is None or name.startswith("past"):
        return None
    shape = [_size(size, tokens) for size in value.shape]
    if math.prod(shape) > _MOST_NUMBERS:
        raise ConfigError(f"input {value.name} has {math.prod(shape):.3g} numbers")
    if value.dtype.is_floating_point():
        return rng.standard_normal(shape).astype(value.dtype.numpy())
    rows = None if "mask" in name or "position" in name else _rows(value)
    return None if rows is None else rng.integers(0, rows, shape, value.dtype.numpy())


def _size(size: int | ir.SymbolicDim, tokens: int) -> int:
    """Returns a size for a dimension: one sequence of some tokens."""
    if isinstance(size, int):
        return size
    return 1 if "batch" in str(size.value).lower() else tokens


def _rows(value: ir.Value) -> int | None:
    """Returns how many rows the tables have that a value looks up, None where it looks up none."""
    sizes = []
    pending, seen = [value], {value}
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type in _THROUGH and index == 0:
                pending += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            table = ops.static_shape(node.inputs[0]) if node.op_type == "Gather" else None
            if index == 1 and table and table[0] and not node.attributes.get_int("axis", 0):
                sizes.append(table[0])
    return min(sizes, default=None)


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
