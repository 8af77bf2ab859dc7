"""What fails while a model is saved: the disk, the permissions, the source, the patience."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import SaveError, SourceError, files, quantize, save
from qmoe_rules.loading import load
from qmoe_rules.mappings import told_when_lost
from qmoe_rules.passes import QuantizeMoEPass
from tests.sandbox import Sandbox
from tests.saves import OPTIONS, RECIPE, SLABS, planned, snapshot, tensors

Progress = Callable[[int, int], None]


def halfway(act: Callable[[], object]) -> Progress:
    """Returns a progress callback that does something once, when half of a save is done."""
    done: list[object] = []

    def progress(written: int, total: int) -> None:
        if 2 * written > total and not done:
            done.append(act())

    return progress


# The disk.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB; skips where nothing can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Takes all the space that is left."""
    with (disk / "of another").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("overwrites", [False, True])
def test_disk_that_fills_up_halfway(
    source: Path, small_disk: Path, overwrites: bool, resume: bool
) -> None:
    path = small_disk / "out" / "model.onnx"
    model = load(source)
    QuantizeMoEPass(**RECIPE)(model)
    if overwrites:
        path.parent.mkdir()
        path.write_bytes(b"old")
    before = snapshot(small_disk)
    filling = halfway(lambda: fill(small_disk))
    with pytest.raises(SaveError, match=r"cannot write to .*out: No space left on device"):
        save(model, path, workers=1, resume=resume, progress=filling)
    (small_disk / "of another").unlink()
    left = {name: data for name, data in snapshot(small_disk).items() if ".qmoe-" not in name}
    assert left == before
    assert bool(list(small_disk.rglob(".qmoe-*"))) == resume
    save(model, path, resume=resume)
    assert tensors(path).keys() == tensors(source).keys() - _experts(source) | _quantized(model)


def _experts(source: Path) -> set[str]:
    return {name for name in tensors(source) if ".moe.fc" in name}


def _quantized(model: ir.Model) -> set[str]:
    return {name for name in model.graph.initializers if ".moe.fc" in name}


def test_full_disk_is_told_by_the_command(source: Path, small_disk: Path, sandbox: Sandbox) -> None:
    fill(small_disk)
    outcome = sandbox("quantize", source, small_disk / "out", folder=source.parent)
    assert outcome.status == 2
    assert "no space on the disk" in outcome.stderr.lower()
    assert outcome.stderr.count("\n") == 1
    assert [*small_disk.iterdir()] == [small_disk / "of another"]


# Permissions.


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder of a user who is not root, as whom the test goes on."""
    if not hasattr(os, "seteuid") or os.geteuid() != 0:
        pytest.skip("needs to be root, and another user in turn")
    folder = Path(tempfile.mkdtemp())
    os.chown(folder, 65534, 65534)
    os.seteuid(65534)
    yield folder
    os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("overwrites", [False, True])
def test_permission_that_is_lost_halfway(tiny_fp32: Path, nobody: Path, overwrites: bool) -> None:
    os.seteuid(0)
    model = load(tiny_fp32)
    QuantizeMoEPass(**RECIPE)(model)
    shutil.copy(tiny_fp32.with_name("model.onnx.data"), nobody / "model.onnx.data")
    os.chmod(nobody / "model.onnx.data", 0o644)
    for graph in model.graphs():
        ir.external_data.set_base_dir(graph, nobody)
    os.seteuid(65534)
    path = nobody / "parent" / "out" / "model.onnx"
    path.parent.mkdir(parents=True)
    if overwrites:
        path.write_bytes(b"old")
    locked = path.parent
    before = snapshot(nobody)
    losing = halfway(lambda: locked.chmod(0o500))
    with pytest.raises(SaveError, match=r"cannot write to .*out: Permission denied"):
        save(model, path, workers=1, progress=losing)
    locked.chmod(0o700)
    after = {name: data for name, data in snapshot(nobody).items() if ".qmoe-" not in name}
    assert after == before
    save(model, path)
    assert path.with_name("model.onnx.data").is_file()


def test_source_that_may_not_be_read(tiny_fp32: Path, nobody: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        (nobody / name).touch()
    (nobody / "model.onnx").chmod(0)
    with pytest.raises(SourceError, match=r"cannot read .*model\.onnx: Permission denied"):
        load(nobody / "model.onnx")


# The source.


def _touch(data: Path) -> None:
    status = data.stat()
    os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns + 1))


def _append(data: Path) -> None:
    with data.open("ab") as file:
        file.write(b"more")


def _replace(data: Path) -> None:
    copy = data.with_name("copy")
    shutil.copy2(data, copy)
    copy.replace(data)


def _rewrite(data: Path) -> None:
    with data.open("r+b") as file:
        file.write(bytes(1000))


def _remove(data: Path) -> None:
    data.unlink()


CHANGES = [_touch, _append, _replace, _rewrite, _remove]


@pytest.mark.parametrize("overwrites", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_source_that_changes_while_it_is_read_is_refused(
    source: Path, tmp_path: Path, change: Callable[[Path], None], overwrites: bool
) -> None:
    out = tmp_path / "out"
    if overwrites:
        quantize(source, out, bits=8)
    before = snapshot(tmp_path)
    changing = halfway(lambda: change(source.with_name("model.onnx.data")))
    with pytest.raises(SourceError, match=r"has changed while it was read|No such file"):
        quantize(source, out, workers=1, progress=changing, **RECIPE)
    after = snapshot(tmp_path)
    assert {name for name in after if not name.startswith("source")} == {
        name for name in before if not name.startswith("source")
    }
    assert all(after[name] == before[name] for name in after if name.startswith("out"))


@pytest.mark.parametrize("change", CHANGES[:-1])
def test_source_that_changes_between_plan_and_save_is_refused(
    source: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    model = load(source)
    QuantizeMoEPass(**RECIPE)(model)
    change(source.with_name("model.onnx.data"))
    with pytest.raises(SourceError, match="has changed"):
        save(model, tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


def test_source_that_only_others_read_may_change(source: Path, tmp_path: Path) -> None:
    """Of two data files, one of which the model does not read any more."""
    model = load(source)
    QuantizeMoEPass(**RECIPE)(model)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    _touch(source)
    save(model, tmp_path / "out" / "model.onnx")
    assert (tmp_path / "out" / "model.onnx").is_file()


TRUNCATING = """
import os, sys
from qmoe_rules import quantizers
from qmoe_rules.cli import main
number, data, *arguments = sys.argv[1:]
rtn, calls = quantizers.METHODS["rtn"], iter(range(100))
def truncate(weight, *others):
    if next(calls) == int(number):
        os.truncate(data, 5000)
    return rtn(weight, *others)
quantizers.METHODS["rtn"] = truncate
sys.exit(main(arguments))
"""


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_source_that_is_cut_off_under_the_kernels_is_no_crash(
    source: Path, tmp_path: Path, workers: int
) -> None:
    """The system ends a process that reads a mapped file behind its end."""
    data = source.with_name("model.onnx.data")
    command = ["quantize", str(source), str(tmp_path / "out"), *OPTIONS, "--workers", str(workers)]
    done = subprocess.run(
        [sys.executable, "-c", TRUNCATING, str(SLABS // 2), str(data), *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done
    assert done.stderr.startswith("qmoe: ")
    assert done.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


MEASURING = """
import os, sys
from qmoe_rules import SourceError, measuring, quantize
source, data, out = sys.argv[1:]
relative_error = measuring.relative_error
def truncate(*arrays):
    os.truncate(data, 0)
    return relative_error(*arrays)
measuring.relative_error = truncate
try:
    quantize(source, out, bits=4, block_size=32, measured=True)
except SourceError as error:
    print(error)
"""


def test_source_that_is_cut_off_while_it_is_measured_is_no_crash(
    source: Path, tmp_path: Path
) -> None:
    data, out = source.with_name("model.onnx.data"), tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", MEASURING, str(source), str(data), str(out)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    assert set(snapshot(out)) == {"model.onnx", "model.onnx.data"}


STRANGER = """
import mmap, os, sys
from qmoe_rules.mappings import told_when_lost
path = sys.argv[1]
with open(path, "rb") as file:
    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
with told_when_lost():
    os.truncate(path, 0)
    print(mapped[0], flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="others name the signal otherwise")
def test_page_that_somebody_else_has_mapped_is_not_made_up(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(1, 101)))
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(tmp_path / "file")], capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGBUS, b"")


@pytest.mark.skipif(sys.platform != "linux", reason="others end the process")
def test_file_whose_pages_were_lost_is_mapped_anew(tmp_path: Path) -> None:
    """Though its size, its time and its number are again what they were."""
    data, weights = tmp_path / "data", np.arange(1, 5001, dtype=np.float32)
    weights.tofile(data)
    status = data.stat()
    tensor = ir.ExternalTensor(
        "data", 0, weights.nbytes, ir.DataType.FLOAT, shape=ir.Shape([5000]), name="w",
        base_dir=tmp_path,
    )  # fmt: skip

    def cut_off() -> None:
        with told_when_lost():
            view = files.array(tensor)
            os.truncate(data, 0)
            assert view[2000] == 0

    with files.keeping():
        with pytest.raises(SourceError, match="became shorter"):
            cut_off()
        with data.open("r+b") as file:
            file.write(weights.tobytes())
        os.utime(data, ns=(status.st_atime_ns, status.st_mtime_ns))
        np.testing.assert_array_equal(files.array(tensor), weights)


# Interrupts.

# What a shell starts in the background ignores SIGINT, and so do its children.
INTERRUPTED = """
import itertools, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
number, *arguments = sys.argv[1:]
events = itertools.count()
from qmoe_rules.cli import main
import onnxruntime, safetensors
def watch(event, given):
    if event in ("open", "os.mkdir", "os.rename", "os.truncate") and next(events) == int(number):
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(watch)
status = main(arguments)
print(next(events))
sys.exit(status)
"""


def interrupted(number: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(number), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["plan", "inspect", "quantize", "verify"])
def test_ctrl_c_at_any_moment_is_130_and_one_line(
    source: Path, tmp_path: Path, command: str
) -> None:
    save(planned(source), tmp_path / "converted" / "model.onnx")
    more = {"quantize": [tmp_path / "out"], "verify": [tmp_path / "converted"]}.get(command, [])
    count = int(interrupted(-1, command, source, *more).stdout.splitlines()[-1])
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    before = snapshot(tmp_path)
    for step in range(8):
        done = interrupted(count * step // 8, command, source, *more)
        assert done.returncode == 130, done
        assert done.stderr == "qmoe: interrupted; nothing was written\n"
        assert len(done.stdout.splitlines()) == 1  # the number of events
        assert snapshot(tmp_path) == before


def test_ctrl_c_leaves_the_handler_of_the_caller_alone(source: Path) -> None:
    from qmoe_rules.cli import main

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["plan", str(source)]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
