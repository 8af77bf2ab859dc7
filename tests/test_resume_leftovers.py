"""What an interrupted save leaves behind, and who may go on with it."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from qmoe_rules import SaveError, save
from qmoe_rules.extents import lay_out
from tests.interruptions import expected, interrupt, resumed, stopped
from tests.saves import OPTIONS, SLABS, planned, snapshot

# What is left behind.


def test_without_resume_nothing_is_left(source: Path, path: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    stopped(20, save, planned(source), path)
    assert snapshot(tmp_path) == before


def test_what_is_kept_is_left_alone_by_other_saves(
    source: Path, path: Path, tmp_path: Path
) -> None:
    """Of other names, of other folders, and those that do not go on."""
    interrupt(planned(source), path, 20)
    for other in (path.with_name("other.onnx"), tmp_path / "out2" / "model.onnx"):
        assert resumed(planned(source), other) == SLABS
    shutil.rmtree(path.parent)
    save(planned(source), path)
    shutil.rmtree(path.parent)
    assert resumed(planned(source), path) == SLABS - 20


def test_two_names_in_a_folder_go_on_apart(source: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "a.onnx", tmp_path / "b.onnx"
    interrupt(planned(source), one, 20)
    interrupt(planned(source), two, 10)
    assert resumed(planned(source), two) == SLABS - 10
    assert resumed(planned(source), one) == SLABS - 20
    assert not list(tmp_path.glob(".qmoe-*"))


def test_longest_possible_names_can_be_resumed(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "new" / ("x" * 255) / ("y" * 235 + ".onnx")
    interrupt(planned(source), path, 20)
    assert resumed(planned(source), path) == SLABS - 20


def test_data_are_kept_where_they_cannot_be_put_in_place(source: Path, path: Path) -> None:
    """Another save takes the name while this one computes; this one need not compute again."""
    path.parent.mkdir()

    def take_the_name(done: int, total: int) -> None:
        if done == total:
            path.with_name("model.onnx.data").write_bytes(b"of another")

    with pytest.raises(SaveError, match=r"model\.onnx\.data: another save has written it"):
        save(planned(source), path, resume=True, progress=take_the_name)
    assert not path.exists()
    assert resumed(planned(source), path) == 0
    assert path.with_name("model.onnx.data").read_bytes() == b"of another"
    assert path.with_name("model.onnx.1.data").is_file()


def test_space_that_is_used_already_is_not_asked_for_again(
    source: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    interrupt(planned(source), path, SLABS - 1)
    size = sum(extent.tensor.nbytes for extent in lay_out(planned(source)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(size // 10))
    with pytest.raises(SaveError, match="no space"):
        save(planned(source), path)
    assert resumed(planned(source), path) == 1


# Two at a time.


def test_second_save_of_the_same_model_is_refused_while_the_first_goes_on(
    source: Path, path: Path, tmp_path: Path
) -> None:
    refusals: list[str] = []

    def save_again(done: int, total: int) -> None:
        if done < total / 2 or refusals:
            return
        with pytest.raises(SaveError, match=r"another process is saving .*model\.onnx") as caught:
            save(planned(source), path, resume=True)
        command = [sys.executable, "-m", "qmoe_rules.cli", "quantize", "--resume", *OPTIONS]
        found = subprocess.run(
            [*command, str(source), str(path)], capture_output=True, text=True, check=False
        )
        assert (found.returncode, found.stderr) == (2, f"qmoe: {caught.value}\n")
        refusals.append(found.stderr)

    save(planned(source), path, resume=True, workers=1, progress=save_again)
    assert refusals
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
    path.with_name("model.onnx.data").unlink()
    path.unlink()
    assert resumed(planned(source), path) == SLABS


# The command.

SIGNALLED = """
import os, signal, sys
from qmoe_rules import quantizers
from qmoe_rules.cli import main
rtn, calls = quantizers.METHODS["rtn"], iter(range(100))
def kill(*arguments):
    if next(calls) == 20:
        os.kill(os.getpid(), signal.SIGTERM)
    return rtn(*arguments)
quantizers.METHODS["rtn"] = kill
sys.exit(main(sys.argv[1:]))
"""


def test_command_that_is_stopped_goes_on(source: Path, path: Path, tmp_path: Path) -> None:
    arguments = ["quantize", str(source), str(path), *OPTIONS, "--workers", "1", "--resume"]
    stopped = subprocess.run(
        [sys.executable, "-c", SIGNALLED, *arguments], capture_output=True, text=True, check=False
    )
    assert stopped.stderr == "qmoe: interrupted; the same command goes on from here\n"
    assert stopped.returncode == 128 + signal.SIGINT
    assert not path.parent.exists()
    assert 0 < resumed(planned(source), path) <= SLABS - 20
    assert snapshot(path.parent) == expected(source, tmp_path / "expected")
