"""A save that is killed leaves no model, the whole old one or the whole new one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from qmoe_rules import quantize
from tests.saves import OPTIONS, RECIPE, SLABS, copied, logits, snapshot, tensors

DEFAULT, ALL = 6, 66
SHARD = 300_000

# Counts what the process does to files below a folder, and kills it at one of these events or a
# moment later: its number and the moment are given. Without them it prints how many there were.
CHILD = """
import itertools, os, random, signal, sys, threading
folder, number, delay, *arguments = sys.argv[1:]
events = itertools.count()
def kill():
    os.kill(os.getpid(), signal.SIGKILL)
def watch(event, given):
    about_files = event == "open" or event.startswith(("os.", "shutil."))
    if about_files and (folder in str(given) or event in ("os.remove", "os.rmdir")):
        if next(events) == int(number):
            threading.Timer(float(delay), kill).start() if float(delay) else kill()
from qmoe_rules.cli import main
from qmoe_rules.quantizers import METHODS
sys.addaudithook(watch)
status = main(arguments)
print(next(events))
sys.exit(status)
"""


def child(
    folder: Path, source: Path, number: int, delay: float, *options: str
) -> subprocess.CompletedProcess[str]:
    arguments = ["quantize", str(source), str(folder / "out"), *OPTIONS, "--workers", "2", *options]
    return subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(number), str(delay), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


def check_done(done: subprocess.CompletedProcess[str]) -> None:
    """Checks that a save went well; it may tell of the side file that differs."""
    assert done.returncode == 0, done.stderr
    assert all("tokenizer.json is replaced by" in line for line in done.stderr.splitlines())


def events(folder: Path, source: Path, *options: str) -> int:
    """Returns how many events there are in a save that nobody kills."""
    done = child(folder, source, -1, 0, *options)
    check_done(done)
    return int(done.stdout.splitlines()[-1])


def own(folder: Path) -> dict[str, bytes | None]:
    """Returns what is in a folder, but for the hidden folders of saves."""
    return {name: data for name, data in snapshot(folder).items() if ".qmoe-" not in name}


@pytest.fixture(scope="module")
def counts() -> dict[tuple[str, ...], int]:
    return {}


@pytest.mark.parametrize(
    "seed",
    [*range(DEFAULT), *(pytest.param(n, marks=pytest.mark.slow) for n in range(DEFAULT, ALL))],
)
def test_killed_save_leaves_all_or_nothing(
    tiny_fp32: Path, tmp_path: Path, seed: int, counts: dict[tuple[str, ...], int]
) -> None:
    source = copied(tiny_fp32, tmp_path / "source").parent
    (source / "tokenizer.json").write_text("new")
    overwrites = bool(seed & 1)
    options = ["--resume"] * (seed >> 1 & 1) + ["--max-shard-size", str(SHARD)] * (seed % 3 == 0)
    key = (str(overwrites), *options)

    def old_model(folder: Path) -> None:
        if overwrites:
            quantize(source, folder / "out", bits=8)
            (folder / "out" / "tokenizer.json").write_text("old")

    if key not in counts:
        old_model(tmp_path / "count")
        counts[key] = events(tmp_path / "count", source, *options)
    quantize(source, tmp_path / "new", max_shard_size=SHARD if seed % 3 == 0 else None, **RECIPE)
    new = tensors(tmp_path / "new" / "model.onnx")
    folder = tmp_path / "killed"
    folder.mkdir()
    old_model(folder)
    before, before_source = own(folder), snapshot(source)

    # The golden ratio spreads the events evenly, however many seeds there are.
    number = int(counts[key] * (seed * 0.6180339887 % 1))
    killed = child(folder, source, number, (seed % 4) * 0.001, *options)
    assert killed.returncode in (-signal.SIGKILL, 0)

    assert snapshot(source) == before_source
    path = folder / "out" / "model.onnx"
    left = own(folder)
    if not path.exists():
        assert not overwrites
        assert left == {}
    elif overwrites and path.read_bytes() == before["out/model.onnx"]:
        both = ["out/model.onnx", "out/model.onnx.data"]
        assert {name: left[name] for name in both} == {name: before[name] for name in both}
        assert left["out/tokenizer.json"] in (b"old", b"new")
    else:
        assert tensors(path) == new
        assert left["out/tokenizer.json"] == b"new"
        assert logits(path).shape == (2, 20, 256)

    again = child(folder, source, -1, 0, *options)
    check_done(again)
    assert tensors(path) == new
    assert snapshot(source) == before_source
    if "--resume" in options:
        assert not list(folder.rglob(".qmoe-*"))
    if not left:
        assert own(folder / "out") == snapshot(tmp_path / "new")


def test_kills_strike_in_the_middle_of_a_save(tiny_fp32: Path, tmp_path: Path) -> None:
    """Guards the test above against a child that is never killed, or before it has begun."""
    source = copied(tiny_fp32, tmp_path / "source").parent
    (tmp_path / "count").mkdir()
    count = events(tmp_path / "count", source)
    assert count > SLABS
    killed = child(tmp_path / "count", source, count // 2, 0)
    assert killed.returncode == -signal.SIGKILL
    (hidden,) = (tmp_path / "count" / "out").glob(".qmoe-*")
    (file,) = hidden.rglob("shard-0")
    assert any(file.read_bytes())
