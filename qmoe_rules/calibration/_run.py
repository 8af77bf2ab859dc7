"""Running a model on feeds, stage by stage and layer by layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.calibration._experts import Layer, observe
from qmoe_rules.calibration._segment import Segment
from qmoe_rules.calibration._stages import Stage
from qmoe_rules.calibration._state import State, fingerprint_of, new_tape
from qmoe_rules.calibration._tapes import Tape
from qmoe_rules.calibration._writer import Entry, StatisticsWriter
from qmoe_rules.errors import ConfigError
from qmoe_rules.feeds import complete, inputs_of
from qmoe_rules.fingerprints import fingerprint
from qmoe_rules.statistics import Calibration

__all__ = ["Run"]

Array = npt.NDArray[Any]

_LONGEST = 10**18  # a number of tokens
_VERSION = version("qmoe-rules")


@dataclass(frozen=True)
class Run:
    """A calibration to be run.

    Attributes:
        model: The model, fused and normalized.
        stages: Its stages.
        folder: Where everything is kept that is needed on the way.
        hessian: Whether Hessians are wanted.
        providers: Who runs what is not a layer.
        progress: Is told of (steps done, steps in all).
    """

    model: ir.Model
    stages: Sequence[Stage]
    folder: Path
    hessian: bool
    providers: Sequence[str]
    progress: Callable[[int, int], None]

    @property
    def layers(self) -> list[Layer]:
        """All layers, in order."""
        return [layer for stage in self.stages for layer in stage.layers]

    def __call__(self, feeds: Iterable[Mapping[str, Array]]) -> Path:
        """Runs the model, or what is left of it after an interruption, on every feed.

        Returns:
            The file of the statistics.

        Raises:
            ConfigError: A feed does not fit the model, or there is none.
            SourceError: The model cannot be run, or a value is not finite.
        """
        inputs, data, count = self._record(feeds)
        prints = {layer.name: fingerprint(layer.attributes, layer.weights) for layer in self.layers}
        facts = {"nodes": prints, "data": data, "hessian": self.hessian, "version": _VERSION}
        key = fingerprint_of(self.model, facts)
        state = State.load(self.folder, key) or State(self.folder, key, tapes=inputs)
        state.tidy()
        writer = StatisticsWriter(
            state.statistics,
            Calibration.metadata(prints, data=data, tokens=_LONGEST, hessian=self.hessian),
            self._possible(),
            state.written,
        )
        steps = _Steps(self.stages, count, self.progress)
        steps.advance(steps.of(self.stages[: state.stage]))
        for stage in self.stages[state.stage :]:
            self._run_stage(stage, state, writer, steps)
            state.stage, state.written = state.stage + 1, writer.entries
            state.save()
        writer.finish(
            Calibration.metadata(prints, data=data, tokens=state.tokens, hessian=self.hessian)
        )
        return writer.path

    def _record(self, feeds: Iterable[Mapping[str, Array]]) -> tuple[dict[str, Tape], str, int]:
        """Puts the feeds on tapes; returns those, by input, a hash of them, and their number."""
        known = inputs_of(self.model)
        needed = {str(value.name) for stage in self.stages for value in stage.needs}
        inputs = {name: each for name, each in known.items() if name in needed}
        tapes = {name: new_tape(self.folder, each.dtype) for name, each in inputs.items()}
        digest, index = hashlib.blake2b(digest_size=8), -1
        for index, feed in enumerate(feeds):
            try:
                given = complete(feed, inputs, known)
            except ConfigError as error:
                raise ConfigError(f"feed {index}: {error}") from None
            for name, array in given.items():
                tapes[name].append(array)
                digest.update(json.dumps([name, array.dtype.name, array.shape]).encode())
                digest.update(np.ascontiguousarray(array).data)
        if index < 0:
            raise ConfigError("there are no feeds to calibrate with")
        return tapes, digest.hexdigest(), index + 1

    def _possible(self) -> list[Entry]:
        """Returns every tensor that the file may hold."""
        entries: list[Entry] = []
        for layer in self.layers:
            for name in layer.weights:
                head, columns = f"{layer.name}/{name}", layer.columns(name)
                entries.append((f"{head}/tokens", "int64", (layer.experts,)))
                entries.append((f"{head}/mean_square", "float32", (layer.experts, columns)))
                if not self.hessian:
                    continue
                for expert in range(layer.experts):
                    entries.append((f"{head}/hessian/{expert}", "float32", (columns, columns)))
                if name == "fc1":
                    entries.append((f"{head}/hessian", "float32", (columns, columns)))
        return entries

    def _run_stage(
        self, stage: Stage, state: State, writer: StatisticsWriter, steps: _Steps
    ) -> None:
        if stage.outputs:
            self._run_segment(stage, state.tapes, steps)
        for layer in stage.layers:
            x, router = (state.tapes[str(value.name)] for value in layer.sees)
            state.tokens = max(state.tokens, len(x.rows()))
            name, output = str(layer.node.outputs[0].name), None
            if name in stage.kept:
                state.tapes[name] = new_tape(self.folder, np.dtype(np.float32), x.shapes)
                output = state.tapes[name].new_rows()
            put = partial(_put, writer, layer.name)
            for _ in observe(layer, x, router, output, hessian=self.hessian, sink=put):
                steps.advance()
        state.tapes = {name: tape for name, tape in state.tapes.items() if name in stage.kept}

    def _run_segment(self, stage: Stage, tapes: dict[str, Tape], steps: _Steps) -> None:
        """Runs what is before the layers of a stage on every feed."""
        inputs = {str(value.name): tapes[str(value.name)] for value in stage.inputs}
        dtypes = {name: tape.dtype for name, tape in inputs.items()}
        with Segment(stage.model(self.model), dtypes, self.folder, self.providers) as segment:
            for index in range(steps.feeds):
                outputs = segment({name: tape[index] for name, tape in inputs.items()})
                for name, array in outputs.items():
                    if not index:
                        tapes[name] = new_tape(self.folder, array.dtype)
                    tapes[name].append(array)
                steps.advance()


@dataclass
class _Steps:
    """What there is to do, and what is done: every feed of a stage, and every expert."""

    stages: Sequence[Stage]
    feeds: int
    progress: Callable[[int, int], None]
    done: int = 0

    def of(self, stages: Sequence[Stage]) -> int:
        """Returns the steps of some stages."""
        experts = sum(layer.experts for stage in stages for layer in stage.layers)
        return experts + self.feeds * sum(bool(stage.outputs) for stage in stages)

    def advance(self, steps: int = 1) -> None:
        """Says that some steps are done."""
        self.done += steps
        self.progress(self.done, self.of(self.stages))


def _put(writer: StatisticsWriter, node: str, name: str, array: Array) -> None:
    writer.put(f"{node}/{name}", array)
