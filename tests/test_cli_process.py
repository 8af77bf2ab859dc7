"""The `qmoe` command in a process of its own: full disks, signals, closed pipes, odd terminals."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest

from qmoe_rules import quantize
from tests.command import Run, rename_first_moe
from tests.saves import snapshot


def process(
    *arguments: str | Path, before: str = "", stdout: Any = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own, after some lines of Python."""
    code = f"{before}\nimport sys\nfrom qmoe_rules.cli import main\nsys.exit(main(sys.argv[1:]))"
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        check=False,
    )


# The limit ends with the command: coverage writes later.
LIMITED = """
import atexit, resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
least, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, ({0}, most))
atexit.register(resource.setrlimit, resource.RLIMIT_FSIZE, (least, most))
"""


@pytest.mark.parametrize("limit", [500_000, 1_000])
def test_file_that_cannot_grow_exits_2_and_leaves_nothing(
    source: Path, tmp_path: Path, limit: int
) -> None:
    before = snapshot(tmp_path)
    done = process("quantize", source, tmp_path / "new" / "out", before=LIMITED.format(limit))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"qmoe: cannot write to {tmp_path}/new/out: File too large\n"
    assert snapshot(tmp_path) == before


def test_graph_that_cannot_be_written_keeps_the_old_model(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.onnx"
    proto = onnx.load(source, load_external_data=False)
    proto.doc_string = "x" * 3_000_000  # larger than the data file
    source.write_bytes(proto.SerializeToString())
    quantize(source, path, bits=8)
    before = snapshot(tmp_path)
    done = process("quantize", source, path, before=LIMITED.format(2_000_000))
    assert done.returncode == 2
    assert done.stderr == f"qmoe: cannot write to {path.parent}: File too large\n"
    assert snapshot(tmp_path) == before


def test_side_file_that_cannot_grow_exits_2(source: Path, tmp_path: Path) -> None:
    source.with_name("tokenizer.bin").write_bytes(bytes(3_000_000))
    before = snapshot(tmp_path)
    limit = LIMITED.format(2_000_000)
    done = process("quantize", source.parent, tmp_path / "out", before=limit)
    assert snapshot(tmp_path) == before
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


# What a shell starts in the background ignores SIGINT, and so do its children.
KILLED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from qmoe_rules import quantizers
rtn, calls = quantizers.METHODS["rtn"], iter(range(100))
def kill(weight, spec, statistics=None):
    if next(calls) == 20:
        os.kill(os.getpid(), signal.{0})
    return rtn(weight, spec, statistics)
quantizers.METHODS["rtn"] = kill
"""


@pytest.mark.parametrize("overwrites", [True, False])
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signal_exits_130_and_leaves_nothing(
    source: Path, tmp_path: Path, name: str, overwrites: bool
) -> None:
    destination = tmp_path / "new" / "out"
    if overwrites:
        quantize(source, destination, bits=8)
    before = snapshot(tmp_path)
    done = process("quantize", source, destination, "--workers", "1", before=KILLED.format(name))
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "qmoe: interrupted; nothing was written\n"
    assert snapshot(tmp_path) == before


def test_ctrl_c_while_everything_is_imported_is_one_line(tiny_fp32: Path) -> None:
    """Numpy is the first thing that the command imports from elsewhere."""
    early = """if True:
        import builtins, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
        ours = builtins.__import__
        def interrupted(name, *rest):
            if name == "numpy":
                signal.raise_signal(signal.SIGINT)
            return ours(name, *rest)
        builtins.__import__ = interrupted"""
    done = process("plan", tiny_fp32, before=early)
    assert (done.returncode, done.stderr) == (130, "qmoe: interrupted; nothing was written\n")


def test_handler_of_sigterm_is_given_back(qmoe: Run, source: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    qmoe("plan", source)
    qmoe("plan", tmp_path / "absent")
    assert signal.getsignal(signal.SIGTERM) is before


def closed_pipe() -> int:
    """Returns the writing end of a pipe that nobody reads, as after `| head -0`."""
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan",),
        ("plan", "--json"),
    ],
    ids=" ".join,
)
def test_closed_pipe_is_no_error(tiny_fp32: Path, arguments: tuple[str, ...]) -> None:
    writing = closed_pipe()
    done = process(*arguments, tiny_fp32, stdout=writing)
    os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("plan",), ("plan", "--json")], ids=" ".join)
def test_full_disk_behind_stdout_is_one_line(tiny_fp32: Path, arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        done = process(*arguments, tiny_fp32, stdout=full)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1


def test_name_that_stdout_cannot_spell_is_no_traceback(source: Path) -> None:
    rename_first_moe(source, "größe")
    ascii_only = "import sys; sys.stdout.reconfigure(encoding='ascii')"
    done = process("plan", source, before=ascii_only)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") <= 1


def test_no_stdout_at_all_is_no_traceback(source: Path, tmp_path: Path) -> None:
    done = process("quantize", source, tmp_path / "out", before="import sys; sys.stdout = None")
    assert done.stderr == ""
    assert done.returncode == 0
    assert (tmp_path / "out" / "model.onnx").exists()


def test_installed_command_and_module_are_the_same(source: Path) -> None:
    command = shutil.which("qmoe")
    runs = [[sys.executable, "-m", "qmoe_rules.cli"], *([[command]] if command else [])]
    for run in runs:
        done = subprocess.run(
            [*run, "inspect", str(source)], capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "layers.1.moe" in done.stdout
