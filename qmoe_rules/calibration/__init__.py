"""`calibrate`: runs the float model on real inputs and keeps what every expert has seen of them.

The model is cut at its MoE nodes. What lies between them runs in ONNX Runtime, for all feeds, one
part after the other; the MoE nodes run in numpy, one expert at a time, which is also where the
statistics come from. So every weight is read once, however many feeds there are, a model may be
larger than memory, and MoE nodes need no kernel. Memory holds one part's weights without experts,
and one expert's weights and Hessians. What the feeds have become so far lies on disk.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.calibration._run import Run
from qmoe_rules.calibration._stages import layers_of, stages_of
from qmoe_rules.errors import ConfigError, SaveError, SourceError
from qmoe_rules.feeds import drop_caches, require_feed
from qmoe_rules.loading import load, locate
from qmoe_rules.mappings import told_when_lost
from qmoe_rules.passes import prepare
from qmoe_rules.rules import apply_rules, fuse_experts_rules, normalize_moe_rules
from qmoe_rules.saving import guard
from qmoe_rules.staging import Staging, naming_errors, resolved
from qmoe_rules.statistics import Calibration

__all__ = ["Calibration", "calibrate"]

logger = logging.getLogger(__name__)


def calibrate(
    model: ir.Model | str | os.PathLike[str],
    feeds: Iterable[Mapping[str, npt.NDArray[Any]]],
    destination: str | os.PathLike[str] | None = None,
    *,
    hessian: bool = False,
    progress: Callable[[int, int], None] | None = None,
    resume: bool = True,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Calibration:
    """Runs a float model on real inputs and collects statistics of what every expert sees.

    Args:
        model: The model, an .onnx file, or a folder that holds one. It is not changed.
        feeds: Dictionaries of arrays by input name, as ONNX Runtime takes them (see `feeds`).
            Masks, positions and empty caches may be left out.
        destination: The file to write; a temporary one, which goes with the result, where it is
            left out.
        hessian: Whether to collect Hessians, which error feedback needs: 4 * K * K bytes for
            every projection of every expert.
        progress: Called with (steps done, steps in all).
        resume: Whether to go on from where the same calibration was interrupted. What is there
            already is kept in a hidden folder beside the destination.
        providers: ONNX Runtime's execution providers, for what is not a MoE.

    Returns:
        The statistics.

    Raises:
        SourceError: The model cannot be run, has no MoE, or computes an infinity or a NaN.
        ConfigError: A feed does not fit the model, or there is none.
        SaveError: The destination cannot be written; nothing is there then.
        TypeError: The feeds are no dictionaries, or `model` is neither a model nor a path.

    Example:
        >>> # calibration = calibrate("model.onnx", [{"input_ids": tokens}], "calibration.st")
        >>> # quantize("model.onnx", "model-int4", method="search", calibration=calibration)
    """
    if isinstance(feeds, Mapping | str | os.PathLike):
        raise TypeError(
            f"feeds are dictionaries of arrays, one per run, not one {type(feeds).__name__}; a "
            "list of one will do, and qmoe_rules.feeds.read_feeds reads files"
        )
    whole = _prepared(model)
    feeds = iter(feeds)
    first = list(itertools.islice(feeds, 1))
    dropped: set[str] = set()
    for feed in first:
        require_feed(feed)
        dropped = drop_caches(whole, feed)
    layers, left = layers_of(whole)
    for node, reason in left.items():
        logger.warning("%s is not calibrated: %s", node, reason)
    stages = stages_of(whole, layers)

    @told_when_lost()
    def run(folder: Path) -> Path:
        work = Run(whole, stages, folder, hessian, tuple(providers), progress or _ignore)
        return work(_without(dropped, itertools.chain(first, feeds)))

    if destination is None:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qmoe-")))
            with naming_errors(folder):
                calibration = Calibration.load(run(folder))
            weakref.finalize(calibration, stack.pop_all().close)
        return calibration
    path = resolved(Path(destination))
    guard(whole, path)
    _refuse_to_replace(path)
    with Staging(path.parent, kept_as=path.name) as stage:
        work = stage.unfinished("calibration")
        if not resume:
            shutil.rmtree(work)
            work.mkdir()
        try:
            with naming_errors(path):
                run(work).replace(stage.path / path.name)
        except (SourceError, ConfigError):  # which would come again
            shutil.rmtree(stage.path.parent, ignore_errors=True)
            raise
        stage.commit(path.name)
    return Calibration.load(path)


def _refuse_to_replace(path: Path) -> None:
    """Raises SaveError where there is something else than a calibration, such as the data."""
    if path.is_file() and path.stat().st_size:
        try:
            Calibration.load(path)
        except SourceError as error:
            raise SaveError(
                f"refusing to replace {path}, which is no calibration; remove it, or name another "
                "file to write"
            ) from error


def _prepared(model: ir.Model | str | os.PathLike[str]) -> ir.Model:
    """Returns a copy whose MoE nodes are those that quantization will find."""
    whole = model.clone() if isinstance(model, ir.Model) else load(locate(model).model)
    prepare(whole)
    apply_rules(whole, [*fuse_experts_rules(), *normalize_moe_rules()])
    whole.graph.sort()
    return whole


def _without(
    dropped: set[str], feeds: Iterable[Mapping[str, npt.NDArray[Any]]]
) -> Iterator[Mapping[str, npt.NDArray[Any]]]:
    """Yields the feeds without the caches that were empty in the first one.

    Raises:
        ConfigError: One of them is not empty in another feed.
        TypeError: A feed is no dictionary.
    """
    for index, feed in enumerate(feeds):
        require_feed(feed)
        for name, array in feed.items():
            if name in dropped and np.asarray(array).size:
                raise ConfigError(
                    f"feed {index}: input {name!r} is a cache that holds something, and the first "
                    "feed has none; begin with a feed that has one"
                )
        yield {name: array for name, array in feed.items() if name not in dropped}


def _ignore(_done: int, _total: int) -> None:
    pass
