"""Every code block of the documents runs, and what they say of commands and names is there."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qmoe_rules
from qmoe_rules.cli import parser
from qmoe_rules.quantizers import METHODS
from tests.documents import DOCUMENTS, ROOT, Block, blocks, code_spans

BLOCKS = {path: list(blocks(path)) for path in DOCUMENTS}
RUN = ("python", "sh")
NOT_RUN = 24
"""How many blocks may be marked so at most."""

# What the documents call the files of their readers.
PLACES = {
    "MODEL": "tests/models/bytelm-tiny8-fp16",
    "OUT": "out",
    "DATA": "text.bin",
    "FILE": "calibration.safetensors",
}
PLACE = re.compile(rf"(?<![\w./-])({'|'.join(PLACES)})(?![\w.-])")
INSTALLING = re.compile(r"python3 -m venv \.venv && |\.venv/bin/pip install [^&\n]*&& ")
NUMBER = re.compile(r"\d+(\.\d+)?(e[+-]\d+)?")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with what the documents take for granted: models, text, the command."""
    for name in ("tests", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for file in (ROOT / PLACES["MODEL"]).iterdir():
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "text.bin").write_bytes((ROOT / "README.md").read_bytes())
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("qmoe", "-m qmoe_rules.cli"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    known = dict(METHODS)
    yield tmp_path
    METHODS.clear()
    METHODS.update(known)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if BLOCKS[path]], ids=lambda p: p.stem)
def test_every_block_runs(path: Path, desk: Path) -> None:
    names: dict[str, Any] = {"__name__": "document"}
    output: str | None = None
    for block in BLOCKS[path]:
        if block.not_run is None and block.language in RUN:
            output = run(block, names)
        else:
            if block.language == "text" and block.not_run is None:
                assert output is not None, f"{block}: output of nothing that is run"
                assert_shown(block, output)
            check(block)
            output = None


def test_no_block_is_overlooked() -> None:
    every = [block for found in BLOCKS.values() for block in found]
    strange = [
        str(block)
        for block in every
        if block.not_run is None and block.language not in (*RUN, "text", "json")
    ]
    assert not strange, f"neither run nor marked: {', '.join(strange)}"
    marked = [block for block in every if block.not_run is not None]
    assert all(block.not_run for block in marked), "marked without a reason"
    assert len(marked) <= NOT_RUN
    assert sum(block.not_run is None and block.language in RUN for block in every) >= 25


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_every_option_that_is_named_exists(path: Path) -> None:
    known = options() | {"--cpu"}  # of a benchmark
    spans = [span for span in code_spans(path) if re.match(r"(--\w|qmoe \w)", span)]
    named = {option for span in spans for option in re.findall(r"(?<!\S)--[a-z][\w-]*", span)}
    assert named <= known


def test_every_recipe_option_is_in_the_readme() -> None:
    spans = {word for span in code_spans(ROOT / "README.md") for word in span.split()}
    assert recipe_options() <= spans


def test_every_public_name_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\.\. auto\w+:: (\w+)$", text, re.MULTILINE))
    assert documented == set(qmoe_rules.__all__)


def test_the_commands_of_the_readme_are_found_by_those_who_run_them() -> None:
    """`.ci` looks for them by a few words."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if "qmoe quantize" in line)
    assert re.fullmatch(r"python3 -m venv .* install -q \. && \.venv/bin/qmoe quantize .*", first)
    tests = next(line for line in lines if "-m pytest" in line)
    assert tests.endswith(".venv/bin/python -m pytest -q")


@pytest.mark.parametrize(
    ("text", "output", "figures_vary", "agree"),
    [
        ("a  1.5 kB", "before\na 1.5 kB\n", False, True),
        ("a 1.5 kB", "a 1.6 kB", False, False),
        ("a 1.5 kB", "a 1.6e-07 kB", True, True),
        ("a 1.5 kB", "b 1.5 kB", True, False),
        ("... a (b)", "now: a (b)", False, True),
        ("first\nsecond", "second\nfirst", False, False),
    ],
)
def test_shown_output_is_compared(text: str, output: str, figures_vary: bool, agree: bool) -> None:
    block = Block(ROOT / "README.md", 1, "text", text, figures_vary=figures_vary)
    with contextlib.nullcontext() if agree else pytest.raises(AssertionError):
        assert_shown(block, output)


def run(block: Block, names: dict[str, Any]) -> str:
    """Runs a block and returns what it prints."""
    if block.before:
        exec(compile(textwrap.dedent(block.before), f"{block}, before", "exec"), names)
    if block.language == "sh":
        code = PLACE.sub(lambda found: PLACES[found[0]], INSTALLING.sub("", block.code))
        return shell(block, ["bash", "-euo", "pipefail", "-c", code.replace(".venv/bin/", "")])
    if "__main__" in block.code:
        Path("block.py").write_text(block.code, encoding="utf-8")
        return shell(block, ["python", "block.py"])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, str(block), "exec"), names)
    promised = re.findall(r"^print\(.*\)  # (.*)$", block.code, re.MULTILINE)
    assert_shown(Block(block.path, block.line, "text", "\n".join(promised)), printed.getvalue())
    return printed.getvalue()


def shell(block: Block, command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{block} exits with {done.returncode}:\n{done.stderr}"
    return done.stdout


def check(block: Block) -> None:
    """Checks that a block is code of its language."""
    if block.language == "python":
        compile(block.code, str(block), "exec")
    elif block.language == "sh":
        shell(block, ["bash", "-n", "-c", block.code])
    elif block.language == "json":
        json.loads(block.code)


def assert_shown(block: Block, output: str) -> None:
    """Asserts that the lines of a block are in the output, in this order."""
    left = iter(output.splitlines())
    for line in block.code.splitlines():
        wanted = pattern(line, block.figures_vary)
        found = any(re.fullmatch(wanted, words(each, block.figures_vary)) for each in left)
        assert found, f"{block}: {line!r} is not in, or not in this place of:\n{output}"


def pattern(line: str, figures_vary: bool) -> str:
    return ".*".join(re.escape(part) for part in words(line, figures_vary).split("..."))


def words(line: str, figures_vary: bool) -> str:
    text = " ".join(line.split())
    return NUMBER.sub("#", text) if figures_vary else text


def options() -> set[str]:
    """Returns every option of the command and of its commands."""
    parsers = [parser()]
    found: set[str] = set()
    while parsers:
        for action in parsers.pop()._actions:
            found.update(action.option_strings)
            if isinstance(action.choices, dict):
                parsers.extend(action.choices.values())
    return found


def recipe_options() -> set[str]:
    (commands,) = (a.choices for a in parser()._actions if isinstance(a.choices, dict))
    (group,) = (g for g in commands["plan"]._action_groups if g.title == "recipe")
    return {action.option_strings[0] for action in group._group_actions}
