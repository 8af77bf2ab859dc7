"""The files that lie beside a model: which are copied along, and which stay behind."""

from __future__ import annotations

import filecmp
import logging
import os
import shutil
from collections.abc import Iterator, Set
from pathlib import Path

from qmoe_rules.errors import SaveError
from qmoe_rules.loading import data_files_at
from qmoe_rules.staging import HIDDEN, Staging, naming_errors

__all__ = ["copy_side_files"]

logger = logging.getLogger(__name__)

_REPOSITORIES = frozenset({".git", ".hg", ".svn"})  # copied, they would take another one's place


def copy_side_files(folder: Path, apart: Set[Path], stage: Staging, path: Path) -> None:
    """Copies what lies in the folder of a model into the staging folder.

    What another model in the destination reads stays as it is; so does what the model at `path`
    reads, which is whole until the new one is in its place.

    Args:
        folder: The folder of the source.
        apart: Resolved files that are no side files: those of the model.
        stage: Where the copies go.
        path: The model in the destination, resolved.

    Raises:
        SaveError: A copy would be inside the source or, unless it comes with a model that replaces
            the one at `path`, would replace another file.
    """
    root, target, is_new = folder.resolve(), path.parent, not path.exists()
    files = dict(_side_files(folder, apart))
    read_by = {
        data: model
        for model in sorted(target.glob("*.onnx"))
        if model == path or Path(model.name) not in files
        for data in data_files_at(model)
    }
    for name, file in files.items():
        goal = target / name
        if goal.is_relative_to(root):
            raise SaveError(f"refusing to write {goal}: it is inside the source")
        if goal in read_by:
            logger.warning("%s is not copied: %s reads %s", file, read_by[goal], goal)
            continue
        differs = goal.exists() and not _same(file, goal)
        if differs and not is_new:
            logger.warning("%s is replaced by %s", goal, file)
        elif differs:
            raise SaveError(
                f"refusing to replace {goal} by {file}; name another folder as the destination, or "
                "the .onnx file as the model, which comes without other files"
            )
        with naming_errors(target):
            copy = stage.path / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


def _side_files(folder: Path, apart: Set[Path]) -> Iterator[tuple[Path, Path]]:
    """Yields the files that may come along, by their names within the folder."""
    root = folder.resolve()
    for file in sorted(folder.rglob("*")):
        name, real = file.relative_to(folder), Path(os.path.realpath(file))
        if file.is_symlink() and root not in real.parents:
            logger.warning("%s is not copied: it leads outside %s", file, folder)
            continue
        if file.is_symlink() and file.is_dir():
            logger.warning("%s is not copied: it leads to a folder", file)
            continue
        # Of this save or of another, under way or killed.
        hidden = any(part.startswith(HIDDEN) or part in _REPOSITORIES for part in name.parts)
        if hidden or not file.is_file() or real in apart:
            continue
        if file.suffix == ".onnx" and not apart.isdisjoint(data_files_at(file)):
            logger.warning("%s is not copied: it shares data with the model", file)
            continue
        yield name, file


def _same(file: Path, other: Path) -> bool:
    with naming_errors(other):
        return other.is_file() and filecmp.cmp(file, other, shallow=False)
