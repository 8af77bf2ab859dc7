"""The CUDA cases, as far as they can be checked without a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.gpu.case import BY_CHANCE, GARBAGE, REFUSED, RIGHT, Case
from tests.gpu.cases import cases, write
from tests.gpu.run_case import read_cases, run, run_all, run_apart, verdict

CPU = "CPUExecutionProvider"
CASES = cases()


def named(name: str) -> Case:
    (found,) = (case for case in CASES if case.name == name)
    return found


@pytest.mark.parametrize("group", dict.fromkeys(case.group for case in CASES))
def test_the_library_converts_what_the_device_computes_right_and_nothing_else(group: str) -> None:
    for case in CASES:
        if case.group != group or case.forge:
            continue
        made = not isinstance(case.cell.convert(case.target), str)
        assert made == ((case.verdicts == RIGHT) != case.differs), case.title
        assert not (made and "garbage" in case.verdicts), case.title


def test_every_case_has_one_verdict_and_a_message_only_where_it_is_refused() -> None:
    for case in CASES:
        assert case.verdicts in (RIGHT, REFUSED, GARBAGE, BY_CHANCE), case.title
        assert not case.message or case.verdicts == REFUSED, case.title


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few cases, which the CPU provider computes, refuses and gets wrong."""
    some = [
        named("formats-int4-row"),
        named("layouts-int4-row-layout=cutlass-sm80"),
        named("activations-int4-block-64-fusion=2"),
        named("routing-int4-block-64-router-weights-given-expected-as-if-they-were-not"),
    ]
    write(tmp_path, some)
    return tmp_path


def test_the_runner_tells_what_became_of_each_case(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listed = read_cases(folder)
    results = list(run_all(folder, listed, jobs=2, provider=CPU))
    assert [result["name"] for result in results] == [case["name"] for case in listed]
    row, sm80, fused, weights = results
    assert (row["verdict"], row["status"]) == ("right", "ran")
    assert row["error"] < 1e-3
    assert "requires block_size 32, 64, or 128" in sm80["message"]
    assert (fused["verdict"], fused["stage"]) == ("refused", "load")
    assert "only supports interleaved SwiGLU" in fused["message"]
    assert weights["verdict"] == "garbage"
    assert weights["error"] > 0.1


def test_a_process_that_dies_is_a_crash(folder: Path) -> None:
    (case, *_) = read_cases(folder)
    (folder / f"{case['name']}.npz").unlink()
    assert run_apart(folder, case, CPU)["status"] == "refused"
    (folder / "cases.json").write_text("not json")
    result = run_apart(folder, case, CPU)
    assert result["status"] == "crash"
    assert "JSONDecodeError" in result["message"]
    assert verdict(case, result) == "crash"


def test_a_provider_that_is_not_there_is_no_device(folder: Path) -> None:
    (case, *_) = read_cases(folder)
    result = run(folder, case, "NoSuchExecutionProvider")
    assert result["status"] == verdict(case, result) == "no device"


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        ({"status": "ran", "error": 1e-3}, "right"),
        ({"status": "ran", "error": 3e-3}, "garbage"),
        ({"status": "ran", "error": None}, "garbage"),
        ({"status": "refused", "message": "CUDA failure 700: an illegal memory access"}, "crash"),
        ({"status": "refused", "message": "requires SM75+ CUDA hardware"}, "refused"),
    ],
)
def test_the_verdict_is_by_the_tolerance_and_the_message(
    result: dict[str, Any], expected: str
) -> None:
    assert verdict({"tolerance": 2e-3}, result) == expected
