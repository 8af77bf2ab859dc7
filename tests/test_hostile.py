"""Whatever a model, a recipe or statistics hold: one clear line, and nothing else is touched."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from qmoe_rules import ConfigError, Recipe, SourceError, inspect
from qmoe_rules.fingerprints import fingerprints
from qmoe_rules.loading import load
from qmoe_rules.statistics import Calibration
from tests.hostile import CASES, Case, good_model
from tests.sandbox import MEMORY, Outcome, Sandbox, opened_in

# What a terminal obeys, or shows in another place: controls, separators of lines, directions.
_OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Those that ask ONNX Runtime to unfold far more than their bytes say. What it does about that is
# its own business: verify and calibrate are for models that somebody wants to run.
_FOR_THE_RUNTIME = ("diamonds",)

EACH = pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case,
            id=re.sub(r"\W+", "-", case.name),
            marks=[pytest.mark.fuzz] if case.rare else [],
        )
        for case in CASES
    ],
)


@pytest.fixture(scope="module")
def converted(sandbox: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The good model, quantized."""
    folder = tmp_path_factory.mktemp("good")
    assert sandbox("quantize", good_model(folder), folder / "out", folder=folder).status == 0
    return folder / "out"


def check(outcome: Outcome, model: Path, work: Path) -> None:
    """Asserts what holds whatever the run was given.

    Args:
        outcome: Of the run.
        model: The folder that it may read.
        work: The folder that it may write to.
    """
    assert outcome.status in (0, 1, 2), outcome
    assert not _OBEYED.search(outcome.printed)
    if outcome.status == 2:
        assert outcome.stderr.startswith("qmoe: ")
        assert outcome.stderr.count("\n") == 1
        assert outcome.stdout == ""
    assert outcome.memory < MEMORY
    assert outcome.strange == []
    case = str(model.parent)
    read = [path for path in outcome.read if path.startswith(case)]
    assert [path for path in read if not path.startswith((str(model), str(work)))] == []
    changed = [path for path in outcome.changed if "__pycache__" not in path and path != os.devnull]
    assert [path for path in changed if not path.startswith(f"{work}/")] == []


@EACH
def test_hostile_model_is_one_like_any_other_or_one_clear_error(
    sandbox: Sandbox, tmp_path: Path, case: Case
) -> None:
    model, work = good_model(tmp_path), tmp_path / "work"
    case.spoil(model)
    work.mkdir()
    with opened_in(tmp_path / "outside") as opened:
        outcome = sandbox("quantize", model, work / "out", folder=work)
    assert opened == []
    check(outcome, model, work)
    if case.message is None:
        assert outcome.status == 0, outcome.stderr
        assert load(work / "out" / "model.onnx").graph.outputs
    else:
        assert outcome.status == 2, outcome.stdout
        assert re.search(case.message, outcome.stderr), outcome.stderr
        assert [*work.iterdir()] == []


@pytest.mark.fuzz
@pytest.mark.parametrize("command", ["plan", "inspect", "verify", "calibrate"])
@EACH
def test_hostile_model_meets_every_other_command(
    sandbox: Sandbox, tmp_path: Path, converted: Path, case: Case, command: str
) -> None:
    runs = command in ("verify", "calibrate")
    if runs and case.name.startswith(_FOR_THE_RUNTIME):
        pytest.skip("ONNX Runtime unfolds it")
    model, work, data = good_model(tmp_path), tmp_path / "work", tmp_path / "model" / "data.npy"
    case.spoil(model)
    np.save(data, np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32))
    work.mkdir()
    options = {
        "plan": (),
        "inspect": ("--target", "cuda"),
        "verify": (converted,),
        "calibrate": (data, work / "out", "--input", "x"),
    }[command]
    with opened_in(tmp_path / "outside") as opened:
        outcome = sandbox(command, model, *options, folder=work)
    assert opened == []
    check(outcome, model, work)


# Folders.


def test_folder_without_a_model_is_not_searched_to_its_end(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    """As `/` would be, through links that lead back to it."""
    outcome = sandbox("plan", "/", folder=tmp_path)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "holds no .onnx file" in outcome.stderr


# Recipes.


@pytest.mark.parametrize(
    "pattern",
    ["re:(a+)+$", "re:(a|aa)+$", "re:(.*)*(.*)*(.*)*x", "re:(([a-z])+.)+[A-Z]([a-z])+$", "*a" * 60],
)
def test_evil_patterns_end(sandbox: Sandbox, tmp_path: Path, pattern: str) -> None:
    case = next(case for case in CASES if case.name == "node named: very long")
    model = good_model(tmp_path)
    case.spoil(model)
    outcome = sandbox("plan", model, "--exclude", pattern.replace("a", "n"), folder=tmp_path)
    check(outcome, model, tmp_path)
    assert outcome.status == 0


@pytest.mark.parametrize(
    "pattern",
    [
        "re:" + "(" * 10_000,
        "re:(((((a{1000}){1000}){1000}){1000}){1000})",
        "re:(?=a)b",
        "re:(?P<x>a)(?P=x)",
        "re:[",
        "re:*",
        r"re:\8",
        "re:\x1b[2J",
    ],
)
def test_pattern_that_is_none_is_one_clear_error(
    sandbox: Sandbox, tmp_path: Path, pattern: str
) -> None:
    model = good_model(tmp_path)
    for options in (("--exclude", pattern), ("--override", f"{pattern}:bits=8")):
        outcome = sandbox("plan", model, *options, folder=tmp_path)
        check(outcome, model, tmp_path)
        assert outcome.status == 2
        assert "is no regular expression" in outcome.stderr


DIGITS = "9" * 5000


@pytest.mark.parametrize(
    "options",
    [
        *(("--budget", text) for text in (DIGITS, f"{DIGITS}GB", "1e400", "nan", "-1", "0x10", "")),
        *(("--block-size", text) for text in (DIGITS, "-16", str(1 << 200), "1e3")),
        *(("--bits", text) for text in (DIGITS, "-4", "4.0", "")),
        *(("--override", text) for text in (f"*:bits={DIGITS}", "*:bits", ":", "=", "*:x=1", "")),
        ("--override", f"*:block_size={1 << 200}"),
        ("--override", "*:bits=8," * 5000),
        ("--override", "*:bits=8\0"),
        ("--calibration", "\0"),
        ("--calibration", "x" * 5000),
        ("--calibration", "."),
        ("--calibration", "/dev/zero"),
        ("--calibration", "/proc/self/mem"),
        ("--method", "\x1b[2J"),
    ],
    ids=lambda options: " ".join(options)[:40],
)
def test_recipe_that_is_none_is_one_clear_error(
    sandbox: Sandbox, tmp_path: Path, options: tuple[str, ...]
) -> None:
    model = good_model(tmp_path)
    outcome = sandbox("plan", model, *options, folder=tmp_path)
    assert outcome.status == 2, outcome
    assert "Traceback" not in outcome.stderr
    assert not _OBEYED.search(outcome.printed)


def test_long_expressions_name_one_node_exactly() -> None:
    name = "n[" * 100_000
    recipe = Recipe(nodes_to_exclude=[f"re:{re.escape(name)}"])
    assert recipe.excludes(name)
    assert not recipe.excludes(name + "n")


# Statistics.


def statistics_of(model: Path, path: Path, **changes: object) -> Path:
    """Writes statistics of the good model."""
    tensors: dict[str, np.ndarray] = {}
    for name in ("fc1", "fc2"):
        tensors[f"moe/{name}/tokens"] = np.array([100, 200])
        tensors[f"moe/{name}/mean_square"] = np.ones((2, 64), np.float32)
    prints = fingerprints(load(model / "model.onnx"))
    metadata = Calibration.metadata(prints, data="d", tokens=300, hessian=False)
    for key, value in changes.items():
        if isinstance(value, str):
            metadata[key] = value
        else:
            tensors[key.replace("__", "/")] = np.asarray(value)
    save_file(tensors, path, metadata)
    return path


def framed(header: bytes, data: bytes = b"", size: int | None = None) -> bytes:
    """Returns a safetensors file of this header, whatever size it claims to have."""
    return struct.pack("<Q", len(header) if size is None else size) + header + data


HUGE = np.full((2, 64), np.finfo(np.float32).max)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"moe__fc1__mean_square": HUGE, "moe__fc2__mean_square": HUGE}, None),
        ({"moe__fc1__tokens": [2**62, 2**62]}, None),
        ({"moe__fc1__tokens": [-1, 1]}, "negative"),
        ({"moe__fc1__tokens": [100]}, "broken"),
        ({"moe__fc1__tokens": [[100, 200]]}, "broken"),
        ({"moe__fc1__tokens": np.ones(2, np.float32)}, "F32, not I64"),
        (
            {"moe__fc1__tokens": [1], "moe__fc1__mean_square": np.ones((1, 64), np.float32)},
            "experts",
        ),
        ({"moe__fc1__mean_square": np.ones((2, 65), np.float32)}, "65 columns"),
        ({"moe__fc1__mean_square": np.ones((2, 0), np.float32)}, "broken"),
        ({"moe__fc1__mean_square": np.full((2, 64), np.nan, np.float32)}, "NaN"),
        ({"fingerprints": "[" * 100_000}, "broken"),
        ({"fingerprints": "[]"}, "broken"),
        ({"fingerprints": '"moe"'}, "broken"),
        ({"fingerprints": '{"moe": 1}'}, "broken"),
        ({"fingerprints": '{"\\u001b[2J": "x"}'}, "broken"),
        ({"fingerprints": "{}"}, "is of another model"),
        ({"tokens": DIGITS}, "broken"),
        ({"tokens": "\x1b[2J"}, "broken"),
        ({"version": "\x1b[2J"}, "version"),
    ],
)
def test_statistics_that_lie_are_one_clear_error(
    sandbox: Sandbox, tmp_path: Path, changes: dict[str, object], message: str | None
) -> None:
    model, work = good_model(tmp_path), tmp_path / "work"
    work.mkdir()
    path = statistics_of(model, model / "statistics", **changes)
    options = ("--method", "search", "--calibration", path)
    outcome = sandbox("quantize", model, work / "out", *options, folder=work)
    check(outcome, model, work)
    assert outcome.status == (0 if message is None else 2), outcome
    assert outcome.stderr == "" if message is None else re.search(message, outcome.stderr)


def test_statistics_that_are_no_safetensors_are_one_clear_error(
    sandbox: Sandbox, tmp_path: Path
) -> None:
    model = good_model(tmp_path)
    path = model / "statistics"
    entry = {"dtype": "I64", "shape": [1 << 62, 1 << 62], "data_offsets": [0, 8]}
    escape = b'{"\x1b[2J":' + json.dumps(entry).encode() + b"}"
    written = [
        b"",
        b"\xff" * 1000,
        framed(b"{}", size=1 << 62),
        framed(b'{"__metadata__":' + b"[" * 100_000),
        framed(json.dumps({"moe/fc1/tokens": entry}).encode(), bytes(8)),
        framed(escape, bytes(8)),
    ]
    for data in written:
        path.write_bytes(data)
        outcome = sandbox("plan", model, "--calibration", path, folder=tmp_path)
        check(outcome, model, tmp_path)
        assert outcome.status == 2, outcome


def _a_pipe(path: Path) -> None:
    os.mkfifo(path)


def _a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _itself(path: Path) -> None:
    path.symlink_to(path)


def _a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [_a_pipe, _a_device, _itself, _a_folder])
def test_statistics_that_are_no_file_are_one_clear_error(
    sandbox: Sandbox, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    model = good_model(tmp_path)
    make(model / "statistics")
    outcome = sandbox("plan", model, "--calibration", model / "statistics", folder=tmp_path)
    check(outcome, model, tmp_path)
    assert outcome.status == 2, outcome


# The harness itself.


def test_the_sandbox_sees_what_a_run_does(sandbox: Sandbox, tmp_path: Path) -> None:
    model = good_model(tmp_path)
    with opened_in(model) as opened:
        outcome = sandbox("quantize", model, tmp_path / "out", folder=tmp_path)
    assert outcome.status == 0
    assert "model.onnx" in opened
    assert str(model / "model.onnx") in outcome.read
    assert str(tmp_path / "out") in outcome.changed
    check(outcome, model, tmp_path)
    with pytest.raises(AssertionError):  # it has read what is not below this folder
        check(outcome, model / "elsewhere", tmp_path / "out")
    with pytest.raises(AssertionError):
        check(dataclasses.replace(outcome, stdout="\x1b[2J"), model, tmp_path)


def test_errors_are_of_the_library_too(tmp_path: Path) -> None:
    """What the command says in one line, Python gets as an exception."""
    model = good_model(tmp_path)
    next(case for case in CASES if case.name == "climbing").spoil(model)
    with pytest.raises(SourceError, match="outside the model's folder"):
        inspect(model)
    with pytest.raises(ConfigError, match="no regular expression"):
        Recipe(nodes_to_exclude=["re:("])
