"""`State`: how far a calibration has come, in a folder, so that it can be interrupted.

A small file names the tapes that are still needed and the statistics that are written. It is
replaced in one step when a stage is done; whatever it does not name is left over and removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.calibration._tapes import Tape
from qmoe_rules.calibration._writer import Entry
from qmoe_rules.slices import SlicedTensor

__all__ = ["State", "fingerprint_of", "new_tape"]

_FILE, _STATISTICS = "state.json", "statistics"


@dataclass
class State:
    """How far a calibration has come.

    Attributes:
        folder: Where everything lies.
        key: What it is a calibration of: of equal keys one goes on from the other.
        stage: The stage that comes next.
        tokens: How many tokens go through the model.
        tapes: The values that are still needed, by name.
        written: The tensors that are in the file of the statistics.
    """

    folder: Path
    key: str
    stage: int = 0
    tokens: int = 0
    tapes: dict[str, Tape] = field(default_factory=dict)
    written: list[Entry] = field(default_factory=list)

    @classmethod
    def load(cls, folder: Path, key: str) -> State | None:
        """Returns what an interrupted calibration has left in a folder, None where it is other."""
        try:
            found: dict[str, Any] = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            if found["key"] != key:
                return None
            tapes = {
                name: Tape(folder / file, np.dtype(dtype), shapes)
                for name, (file, dtype, shapes) in found["tapes"].items()
            }
            written = [(name, dtype, tuple(shape)) for name, dtype, shape in found["written"]]
            state = cls(folder, key, found["stage"], found["tokens"], tapes, written)
            whole = state.statistics.stat().st_size >= found["size"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # there is none, or it is broken: begin anew
        return state if whole and all(tape.is_whole() for tape in tapes.values()) else None

    @property
    def statistics(self) -> Path:
        """The file of the statistics."""
        return self.folder / _STATISTICS

    def save(self) -> None:
        """Makes this the state to go on from, and removes what it does not need."""
        tapes = {
            name: [tape.path.name, tape.dtype.name, tape.shapes]
            for name, tape in self.tapes.items()
        }
        text = json.dumps(
            {
                "key": self.key,
                "stage": self.stage,
                "tokens": self.tokens,
                "tapes": tapes,
                "written": self.written,
                "size": self.statistics.stat().st_size,
            }
        )
        fresh = self.folder / f"{_FILE}.new"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, self.folder / _FILE)
        self.tidy()

    def tidy(self) -> None:
        """Removes the files that nobody needs."""
        needed = {tape.path for tape in self.tapes.values()}
        needed |= {self.folder / _FILE, self.statistics}
        for file in self.folder.iterdir():
            if file.is_dir():
                shutil.rmtree(file)
            elif file not in needed:
                file.unlink()


def new_tape(folder: Path, dtype: np.dtype, shapes: Sequence[Sequence[int]] = ()) -> Tape:
    """Returns a tape in a file of its own."""
    return Tape(folder / f"tape-{secrets.token_hex(8)}", dtype, shapes)


def fingerprint_of(model: ir.Model, facts: Mapping[str, object]) -> str:
    """Returns a hash of a model as it lies on disk, and of whatever else decides the result.

    Weights in files go in with the place, the size and the time of their files.
    """
    digest = hashlib.blake2b(json.dumps(facts).encode(), digest_size=16)
    for graph in ops.graphs(model):
        for node in graph:
            digest.update(f"{node.op_identifier()} {node.name} {list(node.attributes)}".encode())
        for value in graph.initializers.values():
            for tensor in _tensors(value.const_value):
                digest.update(_fingerprint_of_tensor(tensor))
    return digest.hexdigest()


def _tensors(tensor: ir.TensorProtocol | None) -> Iterator[ir.TensorProtocol]:
    if isinstance(tensor, SlicedTensor):
        yield from tensor.slices.tensors
    elif tensor is not None:
        yield tensor


def _fingerprint_of_tensor(tensor: ir.TensorProtocol) -> bytes:
    if isinstance(tensor, ir.ExternalTensor):
        status = os.stat(tensor.path)
        place = [str(tensor.path), tensor.offset, tensor.length]
        return json.dumps([*place, status.st_size, status.st_mtime_ns]).encode()
    return hashlib.blake2b(tensor.tobytes(), digest_size=16).digest()
