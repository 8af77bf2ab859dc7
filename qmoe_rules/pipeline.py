"""`plan` and `quantize`: from a model on disk to a report, and to a quantized model on disk."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import SaveError, SourceError
from qmoe_rules.installed import installed
from qmoe_rules.loading import Source, data_files, load, locate
from qmoe_rules.mappings import told_when_lost
from qmoe_rules.measuring import measure, measured_bytes
from qmoe_rules.overrides import idle
from qmoe_rules.passes import QuantizeMoEPass
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, KEPT, Report
from qmoe_rules.saving import (
    Progress,
    SaveOptions,
    guard,
    saved_bytes,
    stage_for,
    write_model,
)
from qmoe_rules.side_files import copy_side_files
from qmoe_rules.staging import resolved
from qmoe_rules.statistics import Calibration

__all__ = ["plan", "quantize"]

logger = logging.getLogger(__name__)


def plan(
    source: str | os.PathLike[str], recipe: Recipe | None = None, **recipe_fields: Any
) -> Report:
    """Says what `quantize` would do, node by node and byte by byte, without computing anything.

    Only a budget asks for some experts of every node to be quantized.

    Args:
        source: An .onnx file, or a folder that holds one.
        recipe: What to do; the default recipe where it is left out.
        **recipe_fields: Fields of `Recipe` that differ from `recipe`.

    Returns:
        The report, with the exact size of what would be written as model.onnx.

    Raises:
        ConfigError: The recipe is wrong.
        SourceError: The model cannot be used.
        TypeError: `source` is no path, or `recipe` no recipe.

    Example:
        >>> # print(plan("model.onnx", bits=4, block_size=32).summary())
    """
    recipe = Recipe.of(recipe, **recipe_fields)
    model, report = _planned(locate(source), recipe)
    report.file_bytes_after = saved_bytes(model)
    return report


def quantize(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: Recipe | None = None,
    *,
    workers: int | None = None,
    executor: Executor | None = None,
    max_shard_size: int | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    strict: bool = False,
    measured: bool = False,
    **recipe_fields: Any,
) -> Report:
    """Quantizes the experts of a model on disk and writes the result.

    The source is only read. A node that cannot be converted stays as it was and has a row in the
    report that says why; everything outside the experts keeps its bytes.

    Args:
        source: An .onnx file, or a folder that holds one. A folder's other files
            (configuration, tokenizer) are copied along, but not a repository's history.
        destination: An .onnx file, or a folder, which takes a model of the source's name.
        recipe: What to do; the default recipe where it is left out.
        workers: Threads that compute and write; all processors where it is left out.
        executor: Who computes and writes the slabs in place of threads (see `save`).
        max_shard_size: Bytes after which another data file begins; one file where it is left out.
        resume: Keep what is written where the work is interrupted, and go on from there.
        progress: Called as bytes are written, and then as they are compared.
        strict: Refuse to write anything where a MoE node cannot be converted.
        measured: Compare every expert that was written with the float one, for the errors in the
            report. That reads both once more, which takes longer than quantizing by `"rtn"`.
        **recipe_fields: Fields of `Recipe` that differ from `recipe`.

    Returns:
        The report.

    Raises:
        ConfigError: The recipe is wrong.
        SourceError: The model cannot be used.
        SaveError: The destination cannot be written; nothing has changed then.
        UnsupportedNodeError: `strict`, and some MoE node cannot be converted.
        TypeError: `source` is no path, or `recipe` no recipe.

    Example:
        >>> # quantize("model.onnx", "model-int4", bits=4, block_size=32)
    """
    recipe = Recipe.of(recipe, **recipe_fields)
    found = locate(source)
    if not os.fspath(destination):
        raise SaveError("the destination is empty; name a folder, or a file that ends in .onnx")
    path = _destination_file(found, Path(destination))
    _refuse_inside(found, path)
    model, report = _planned(found, recipe)
    if strict:
        report.raise_if_skipped()
    compared = measured_bytes(model) if measured else 0
    writing = progress and _Part(progress, after=compared)
    options = SaveOptions(workers, executor, max_shard_size, resume, writing)
    guard(model, path, frozenset({found.model.resolve()}))
    with stage_for(path, options) as stage:
        if found.folder is not None and path.parent != found.folder.resolve():
            apart = _model_files(found, model)
            if isinstance(recipe.calibration, Calibration):
                apart.add(Path(recipe.calibration.path).resolve())
            copy_side_files(found.folder, apart, stage, path)
        written = write_model(model, stage, path.name, options)
        stage.commit(path.name)
    report.file_bytes_after = written
    if measured:
        comparing = progress and _Part(progress, before=written)
        _measure(model, path, report, workers, comparing)
    return report


@dataclass(frozen=True)
class _Part:
    """The progress of a part of the work, as that of the whole.

    Attributes:
        whole: Is told.
        before: Bytes of the parts that are done.
        after: Bytes of the parts that follow.
    """

    whole: Progress
    before: int = 0
    after: int = 0

    def __call__(self, done: int, total: int) -> None:
        """Tells of it."""
        self.whole(self.before + done, self.before + total + self.after)


def _measure(
    model: ir.Model, path: Path, report: Report, workers: int | None, progress: Progress | None
) -> None:
    try:
        measure(model, load(path), report, workers=workers, progress=progress)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted while measuring; {path} is written") from None
    except SourceError as error:
        raise SourceError(f"{path} is written, but not measured: {error}") from error


@told_when_lost()
def _planned(source: Source, recipe: Recipe) -> tuple[ir.Model, Report]:
    model = load(source.model)
    before = sum(file.stat().st_size for file in _model_files(source, model))
    quantize_moe = QuantizeMoEPass(recipe)
    quantize_moe(model)
    report = quantize_moe.report
    present = sum(1 for _ in ops.nodes(model, "QMoE"))
    if present != report.count(CONVERTED) + report.count(KEPT):
        raise AssertionError(f"{present} QMoE nodes in the model, but: {report.summary()}")
    names = [row.node for row in report.rows]
    report.warnings += [f"pattern {each!r} {why}" for each, why in idle(recipe.patterns, names)]
    if runtime := installed():
        report.warnings += runtime.remarks(ops.nodes(model, "QMoE"), recipe.provider_target)
    for warning in report.warnings:
        logger.warning("%s", warning)
    report.file_bytes_before = before
    return model, report


def _model_files(source: Source, model: ir.Model) -> set[Path]:
    return {source.model.resolve(), *data_files(model)}


def _destination_file(source: Source, destination: Path) -> Path:
    """Returns the .onnx file to write; a destination without that ending is a folder."""
    real = resolved(destination)
    if destination.suffix == ".onnx" and not real.is_dir():
        return real
    return resolved(real / source.model.name)


def _refuse_inside(source: Source, path: Path) -> None:
    """Raises SaveError where the files of a folder would be copied into a folder inside it."""
    folder = source.folder and source.folder.resolve()
    if folder and folder in path.parent.parents:
        raise SaveError(
            f"refusing to write to {path.parent}, which is inside {folder}: its files would be "
            f"copied into it; name a folder elsewhere, or the model as {source.model}, which comes "
            "without other files"
        )
