"""The `qmoe` command, run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import onnx
import pytest

from qmoe_rules.cli import main


class Result(NamedTuple):
    status: int
    out: str
    err: str


class Run:
    """Runs the command in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: str | Path) -> Result:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as stop:  # argparse
            status = int(stop.code or 0)
        out, err = self._capsys.readouterr()
        return Result(status, out, err)


def rename_first_moe(path: Path, name: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    next(node for node in proto.graph.node if node.op_type == "MoE").name = name
    path.write_bytes(proto.SerializeToString())
