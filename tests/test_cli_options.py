"""The options of the `qmoe` command, and one line for those that are wrong."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qmoe_rules import Recipe, plan
from qmoe_rules.cli import _commands
from tests.command import Run
from tests.saves import snapshot


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
