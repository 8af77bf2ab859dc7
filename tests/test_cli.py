"""The `qmoe` command: exit status, what it prints, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import Recipe, plan, quantize
from qmoe_rules.cli import _commands, main
from qmoe_rules.inspection import inspect


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Returns every file below a folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


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


@pytest.fixture
def qmoe(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    """A copy of the float32 model that a test may alter."""
    shutil.copytree(tiny_fp32.parent, tmp_path / "source")
    return tmp_path / "source" / "model.onnx"


def rename_first_moe(path: Path, name: str) -> None:
    proto = onnx.load(path, load_external_data=False)
    next(node for node in proto.graph.node if node.op_type == "MoE").name = name
    path.write_bytes(proto.SerializeToString())


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


# What it prints.


def test_plan_prints_nodes_sizes_and_total(qmoe: Run, source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    status, out, err = qmoe("plan", source, "--bits", "4", "--block-size", "32")
    assert (status, err) == (0, "")
    header, first, second, *rest = out.splitlines()
    assert header.split() == ["node", "E", "H", "I", "result", "before", "after"]
    row = ["8", "128", "128", "int4", "block", "32,", "raw", "1.57", "MB", "246", "kB"]
    assert first.split() == ["layers.0.moe", *row]
    assert second.split() == ["layers.1.moe", *row]
    report = plan(source, bits=4, block_size=32)
    notes = [f"note: {warning}" for warning in report.rows[0].warnings]
    assert rest == [*notes, report.summary()]
    assert "2 converted; model 4.08 MB -> " in out
    assert snapshot(tmp_path) == before


def test_reasons_and_notes_are_printed(qmoe: Run, source: Path) -> None:
    status, out, err = qmoe(
        "plan", source, "--bits", "8", "--block-size", "32", "--exclude", "layers.1.*"
    )
    assert (status, err) == (0, "")
    assert "skipped: excluded by the recipe" in out
    assert out.count("note: the CPU provider rounds activations to int8") == 1
    assert "1 converted, 1 skipped" in out


def test_quantize_prints_the_same_and_writes(qmoe: Run, source: Path, tmp_path: Path) -> None:
    planned = qmoe("plan", source)
    done = qmoe("quantize", source, tmp_path / "out")
    assert done == planned
    assert set(snapshot(tmp_path / "out")) == {"model.onnx", "model.onnx.data"}


def test_inspect_prints_the_nodes_of_both_kinds(qmoe: Run, source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out.onnx", block_size=32, nodes_to_exclude=["layers.1.*"])
    status, out, err = qmoe("inspect", tmp_path / "out.onnx")
    assert (status, err) == (0, "")
    _, *rows = (" ".join(line.split()) for line in out.splitlines())
    assert rows == [
        "layers.0.moe QMoE float 8 128 128 2 swiglu int4 block 32, raw 246 kB",
        "layers.1.moe MoE float 8 128 128 2 swiglu float 1.57 MB",
    ]


def without_moe(source: Path) -> None:
    """Makes the MoE nodes of a model those of a domain that nobody knows."""
    proto = onnx.load(source, load_external_data=False)
    for node in proto.graph.node:
        if node.op_type == "MoE":
            node.domain = "somewhere.else"
    source.write_bytes(proto.SerializeToString())


def test_model_without_moe_says_so(qmoe: Run, source: Path, tmp_path: Path) -> None:
    without_moe(source)
    failed = qmoe("plan", source, "--fail-if-skipped")
    assert (failed.status, failed.err) == (1, "qmoe: the model holds no com.microsoft::MoE node\n")
    assert "nothing to quantize" in qmoe("plan", source).out
    nothing = "no com.microsoft::MoE or QMoE node found; qmoe plan fuses experts of small nodes\n"
    assert qmoe("inspect", source) == (0, nothing, "")


def test_quantize_says_last_that_nothing_was_converted(
    qmoe: Run, source: Path, tmp_path: Path
) -> None:
    """`source` is in float32, which CUDA has no kernel for."""
    out = tmp_path / "out"
    done = qmoe("quantize", source, out, "--target", "cuda")
    assert done.status == 0
    assert done.err == (
        f"qmoe: nothing was converted; {out} computes what {source} does: the CUDA provider has no "
        "float32 kernel (it has bfloat16, float16); target='portable' takes it (2 of 2 nodes); "
        "--fail-if-skipped makes that an error\n"
    )
    done = qmoe("quantize", source, out, "--exclude", "*.0.*", "--target", "cuda", "--json")
    assert "excluded by the recipe (1 of 2 nodes)" in done.err
    assert json.loads(done.out)["converted"] == 0
    assert qmoe("quantize", source, out).err == ""
    done = qmoe("quantize", out, tmp_path / "again")
    assert done.err.endswith(f" computes what {out} does: it is QMoE already (2 of 2 nodes)\n")
    without_moe(source)
    done = qmoe("quantize", source, out)
    assert ": there is no com.microsoft::MoE node, nor experts that can be fused" in done.err
    assert qmoe("plan", source).err == ""


def test_json_is_the_python_report(qmoe: Run, source: Path, tmp_path: Path) -> None:
    arguments = ("--json", "--bits", "8", "--exclude", "layers.1.*")
    expected = plan(source, bits=8, nodes_to_exclude=["layers.1.*"]).to_json()
    planned = qmoe("plan", source, *arguments)
    assert (planned.status, planned.err) == (0, "")
    assert json.loads(planned.out) == json.loads(expected)
    assert qmoe("quantize", source, tmp_path / "out", *arguments) == planned
    listed = qmoe("inspect", tmp_path / "out", "--json")
    assert (listed.status, listed.err) == (0, "")
    summaries = inspect(tmp_path / "out")
    assert json.loads(listed.out) == [dataclasses.asdict(summary) for summary in summaries]


@pytest.mark.parametrize(
    "name",
    [
        "model[0].moe[bold]x[/bold]",
        "a[link=file:///]b",
        "[/]",
        "ends with a backslash\\",
        "a\\[bold]b",
        "blk:fire:moe",
    ],
)
@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_names_are_printed_as_they_are(qmoe: Run, source: Path, name: str, command: str) -> None:
    rename_first_moe(source, name)
    status, out, _ = qmoe(command, source)
    assert status == 0
    assert out.splitlines()[1].startswith(f"{name} ")


@pytest.mark.parametrize("command", ["plan", "inspect"])
def test_long_names_are_folded_and_not_cut(qmoe: Run, source: Path, command: str) -> None:
    name = "/model/" + "".join(f"layers.{index}/" for index in range(40)) + "moe"
    rename_first_moe(source, name)
    status, out, _ = qmoe(command, source)
    assert status == 0
    lines = out.splitlines()
    first = next(index for index, line in enumerate(lines) if line.startswith("/model/"))
    last = next(index for index, line in enumerate(lines) if line.startswith("layers.1.moe"))
    assert "".join(line.split()[0] for line in lines[first:last]) == name
    node = json.loads(qmoe(command, source, "--json").out)
    rows = node["nodes"] if command == "plan" else node
    assert rows[0]["node"] == name


def test_side_file_that_is_left_out_is_told(qmoe: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.txt").write_text("")
    (source.parent / "link.txt").symlink_to(tmp_path / "outside.txt")
    status, out, err = qmoe("quantize", source.parent, tmp_path / "out")
    assert status == 0
    assert "link.txt" in out + err


def test_progress_bar_needs_a_terminal(
    qmoe: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert qmoe("quantize", source, tmp_path / "plain").err == ""
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "writing" in qmoe("quantize", source, tmp_path / "colored").err
    assert snapshot(tmp_path / "plain") == snapshot(tmp_path / "colored")


# Options.


def test_every_recipe_field_is_an_option_of_both_commands(
    qmoe: Run, source: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, tuple[Sequence[str], Any]] = {
        "format": (["--format", "int"], "int"),
        "bits": (["--bits", "8"], 8),
        "fc2_bits": (["--fc2-bits", "4"], 4),
        "block_size": (["--block-size", "64"], 64),
        "symmetric": (["--asymmetric"], False),
        "method": (["--method", "rtn"], "rtn"),
        "layout": (["--layout", "raw"], "raw"),
        "target": (["--target", "cuda"], "cuda"),
        "nodes_to_exclude": (["--exclude", "a*", "--exclude", "re:b.*"], ("a*", "re:b.*")),
        "overrides": (
            ["--override", "re:c:d:bits=4,block_size=32"],
            ("re:c:d:bits=4,block_size=32",),
        ),
    }
    fields = [field.name for field in dataclasses.fields(Recipe)]
    # A calibration is a file, which no test here has; a budget goes with no bits.
    assert list(given) == [name for name in fields if name not in ("calibration", "budget")]
    expected = Recipe(**{name: value for name, (_, value) in given.items()})
    seen: list[Recipe] = []
    workers: list[int | None] = []

    def record(*arguments: Any, **settings: Any) -> Any:
        seen.append(arguments[-1])
        workers.append(settings.get("workers"))
        return plan(source)

    monkeypatch.setattr(_commands, "plan", record)
    monkeypatch.setattr(_commands, "quantize", record)
    options = [text for arguments, _ in given.values() for text in arguments]
    assert qmoe("plan", source, *options).status == 0
    assert qmoe("quantize", source, tmp_path / "out", *options, "--workers", "3").status == 0
    assert qmoe("plan", source).status == 0
    assert qmoe("plan", source, "--budget", "3.5").status == 0
    assert workers == [None, 3, None, None]
    assert seen == [expected, expected, Recipe(), Recipe(budget=3.5)]


def test_exclude_and_override_reach_the_nodes(qmoe: Run, source: Path) -> None:
    def stored(*options: str) -> list[str]:
        rows = json.loads(qmoe("plan", source, "--json", *options).out)["nodes"]
        return [row["stored"] or row["status"] for row in rows]

    assert stored("--override", "layers.1.*:bits=8") == ["int4 row, raw", "int8 row, raw"]
    assert stored("--override", r"re:.*\.0\.moe:bits=8,block_size=32") == [
        "int8 block 32, raw",
        "int4 row, raw",
    ]
    assert stored("--exclude", "layers.0.moe", "--exclude", "nobody") == [
        "skipped",
        "int4 row, raw",
    ]


def test_workers_do_not_change_the_files(qmoe: Run, source: Path, tmp_path: Path) -> None:
    for workers in ("1", "5"):
        assert qmoe("quantize", source, tmp_path / workers, "--workers", workers).status == 0
    assert snapshot(tmp_path / "1") == snapshot(tmp_path / "5")


@pytest.mark.parametrize("command", ["plan", "quantize"])
def test_fail_if_skipped_exits_1_and_writes_nothing(
    qmoe: Run, source: Path, tmp_path: Path, command: str
) -> None:
    destination = [tmp_path / "out"] if command == "quantize" else []
    before = snapshot(tmp_path)
    arguments: list[str | Path] = [command, source, *destination, "--fail-if-skipped"]
    status, _, err = qmoe(*arguments, "--exclude", "layers.1.moe")
    assert status == 1
    assert err == "qmoe: 1 MoE node was not converted: excluded by the recipe (layers.1.moe)\n"
    assert snapshot(tmp_path) == before
    assert qmoe(*arguments).status == 0


def test_plan_still_prints_the_report_when_it_fails(qmoe: Run, source: Path) -> None:
    result = qmoe("plan", source, "--fail-if-skipped", "--exclude", "*", "--json")
    assert result.status == 1
    assert json.loads(result.out)["skipped"] == 2


@pytest.mark.parametrize("command", ["", "plan", "quantize", "inspect"])
def test_help(qmoe: Run, command: str) -> None:
    status, out, err = qmoe(*command.split(), "--help")
    assert (status, err) == (0, "")
    assert out.startswith(f"usage: qmoe {command}".strip())
    if command in ("plan", "quantize"):
        for option in ("--bits", "--block-size", "--exclude", "--override", "--fail-if-skipped"):
            assert option in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("explode", "argument COMMAND: invalid choice: 'explode' (choose from "),
        ("quantise m.onnx out", "did you mean quantize?"),
        ("plan", "the following arguments are required: MODEL"),
        ("quantize m.onnx", "the following arguments are required: OUT"),
        ("plan m.onnx --unheard-of", "unrecognized arguments: --unheard-of (see qmoe plan --help)"),
        ("plan m.onnx --blok-size 32", ": --blok-size 32; did you mean --block-size? (see qmoe "),
        ("plan m.onnx --blok-size=32", ": --blok-size=32; did you mean --block-size? (see qmoe "),
        ("quantize m.onnx out more", "unrecognized arguments: more (see qmoe quantize --help)"),
        ("plan m.onnx --bits four", "argument --bits: invalid int value: 'four'"),
        ("quantize m.onnx out --workers 0", "argument --workers: 0 is not a positive number"),
        ("quantize m.onnx out --workers many", "argument --workers: many is not a positive number"),
        ("calibrate m.onnx data out --window 0", "argument --window: 0 is not a positive number"),
        ("inspect m.onnx --bits 4", "unrecognized arguments: --bits 4 (see qmoe inspect --help)"),
        ("inspect m.onnx --target cude", "; did you mean cuda? (see qmoe inspect --help)"),
        ("calibrate m.onnx d c --dtype int8", "; did you mean uint8? (see qmoe calibrate --help)"),
    ],
    ids=str,
)
def test_usage_errors_exit_2_with_one_line(qmoe: Run, arguments: str, message: str) -> None:
    status, out, err = qmoe(*arguments.split())
    assert (status, out) == (2, "")
    assert err.startswith("qmoe: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "5"], "bits=5"),
        (["--block-size", "24"], "block_size=24"),
        (["--method", "magic"], "method='magic'"),
        (["--layout", "cutlass_sm80"], "target='cuda' takes this recipe"),
        (["--target", "tpu"], "target='tpu'"),
        (["--exclude", "re:("], "is no regular expression"),
        (["--override", "bits=8"], "'PATTERN:bits=8'"),
        (["--override", "a:colour=8"], "sets 'colour'"),
    ],
    ids=str,
)
def test_recipe_errors_exit_2_before_the_model_is_looked_at(
    qmoe: Run, tmp_path: Path, options: list[str], message: str
) -> None:
    for command in (["plan"], ["quantize", str(tmp_path / "out")]):
        status, out, err = qmoe(command[0], tmp_path / "absent.onnx", *command[1:], *options)
        assert (status, out) == (2, "")
        assert err.startswith("qmoe: ")
        assert message in err
        assert err.count("\n") == 1
    assert snapshot(tmp_path) == {}


# Bad sources and destinations: exit 2, one line, nothing written.


def _second_model(source: Path) -> None:
    shutil.copy(source, source.with_name("a.onnx"))
    source.rename(source.with_name("b.onnx"))


def _spoil_inf(source: Path) -> None:
    tensor = ir.load(source).graph.initializers["layers.1.moe.fc2"].const_value
    assert isinstance(tensor, ir.ExternalTensor)
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.seek(tensor.offset or 0)
        file.write(np.float32(np.inf).tobytes())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.unlink(), "holds 0 .onnx files"),
        (lambda s: shutil.rmtree(s.parent), "does not exist"),
        (_second_model, "holds 2 .onnx files"),
        (lambda s: s.write_text("a\nb\nc\n"), "ONNX model: "),
        (lambda s: s.write_bytes(b""), "ONNX model: "),
        (lambda s: s.with_name("model.onnx.data").unlink(), "No such file or directory"),
        (lambda s: s.with_name("model.onnx.data").write_bytes(b"short"), "truncated"),
        (_spoil_inf, "'layers.1.moe.fc2', expert 0: row 0 holds an infinity or a NaN"),
    ],
    ids=["no model", "no folder", "two models", "text", "empty", "no data", "short data", "inf"],
)
def test_bad_source_exits_2_with_one_line(
    qmoe: Run, source: Path, tmp_path: Path, spoil: Any, message: str
) -> None:
    spoil(source)
    before = snapshot(tmp_path)
    commands: list[list[str | Path]] = [["quantize", tmp_path / "new" / "out"]]
    if spoil is not _spoil_inf:  # only computing finds it
        commands += [["plan"], ["inspect"]]
    for command, *destination in commands:
        status, out, err = qmoe(command, source.parent, *destination)
        assert (status, out) == (2, "")
        assert err.startswith("qmoe: ")
        assert message in err
        assert err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_error_about_a_name_of_two_lines_is_one_line(qmoe: Run, tmp_path: Path) -> None:
    status, out, err = qmoe("plan", tmp_path / "two\nlines.onnx")
    assert (status, out) == (2, "")
    assert "lines.onnx does not exist" in err
    assert err.count("\n") == 1


def test_bad_destination_exits_2_with_one_line(qmoe: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    before = snapshot(tmp_path)
    for destination in ("file", "file/out", "file/out/model.onnx", "source", "source/model.onnx"):
        status, out, err = qmoe("quantize", source, tmp_path / destination)
        assert (status, out) == (2, ""), destination
        assert err.startswith("qmoe: "), destination
        assert err.count("\n") == 1, destination
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "place",
    [
        "source",
        "destination",
    ],
)
def test_name_that_is_too_long_exits_2(qmoe: Run, source: Path, tmp_path: Path, place: str) -> None:
    long = tmp_path / ("x" * 300 + ".onnx")
    arguments = (long, tmp_path / "out") if place == "source" else (source, long)
    status, _, err = qmoe("quantize", *arguments)
    assert status == 2
    assert err.count("\n") == 1


# Real faults, in a process of its own.

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
