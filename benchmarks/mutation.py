"""The mutation lane: does a test fail when the code says something else?

`python -m benchmarks.mutation [MODULE...]` runs mutmut over the modules that pyproject.toml names
in `[tool.mutmut.modules]`, each with its own tests and in its own copy of the project, which lies
under build/mutation. It prints a row for each module, and what has survived. What a run found
stands: the next one tries what has changed since, and what has survived. See docs/mutation.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["main"]

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "mutation"
COPIED = ("docs", "qmoe_rules", "tests", "README.md")

# What mutmut writes down of a mutant: the exit status of its tests, or a number of its own.
STATUSES = {
    None: "not tried", 0: "survived", 33: "no test", 36: "timeout", -24: "timeout", 37: "types"
}  # fmt: skip
COLUMNS = ("killed", "types", "timeout", "no test", "survived", "not tried")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the lane and prints a row per module, and the survivors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation", description=__doc__)
    parser.add_argument("modules", nargs="*", help="such as layouts or rules/_mlp; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--report", action="store_true", help="only print what was found before")
    given = parser.parse_args(arguments)
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    rooms: dict[str, list[str]] = tomllib.loads(config)["tool"]["mutmut"]["modules"]
    if unknown := set(given.modules) - set(rooms):
        parser.error(f"pyproject.toml names no tests for {', '.join(sorted(unknown))}")
    modules = given.modules or list(rooms)
    if not given.report:
        for module in modules:
            _run(module, rooms[module], config, given.jobs)
    results = {module: _results(module) for module in modules}
    print(_table(results))
    for found in results.values():
        for name, status in found.items():
            if status in ("no test", "survived"):
                print(f"{status}: {name}")
    return 0


def _run(module: str, tests: Sequence[str], config: str, jobs: int) -> None:
    """Runs mutmut over one module, in its own copy of the project."""
    folder = _folder(module)
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, copy = ROOT / name, folder / name
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)  # with what is no longer there
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, copy)
    found = (sorted(ROOT.glob(f"tests/test_{name}.py")) for name in tests)
    paths = [str(path.relative_to(ROOT)) for each in found for path in each]
    chosen = (
        f'only_mutate = ["qmoe_rules/{module}.py"]\n'
        f"pytest_add_cli_args_test_selection = {json.dumps(paths)}\n"
    )
    own = config.replace("[tool.mutmut]\n", f"[tool.mutmut]\n{chosen}")
    (folder / "pyproject.toml").write_text(own, encoding="utf-8")
    scripts = Path(sys.executable).parent
    command = [str(scripts / "mutmut"), "run", "--max-children", str(jobs)]
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)  # which would hide the copy
    _forget(module)
    subprocess.run(command, cwd=folder, env=environment, check=True)


def _forget(module: str) -> None:
    """Has mutmut try again what survived, and look anew which tests come by which function."""
    path = _meta(module)
    if path.exists():
        data = json.loads(path.read_text(encoding="utf-8"))
        for name, status in _results(module).items():
            if status not in ("killed", "types"):
                data["exit_code_by_key"][name] = None
        path.write_text(json.dumps(data), encoding="utf-8")
    (_folder(module) / "mutants" / "mutmut-stats.json").unlink(missing_ok=True)


def _folder(module: str) -> Path:
    return BUILD / module.replace("/", ".")


def _meta(module: str) -> Path:
    return _folder(module) / "mutants" / "qmoe_rules" / f"{module}.py.meta"


def _results(module: str) -> dict[str, str]:
    """Returns what became of every mutant of a module, by mutmut's name for it."""
    path = _meta(module)
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]
    return {name: STATUSES.get(status, "killed") for name, status in found.items()}


def _table(results: Mapping[str, Mapping[str, str]]) -> str:
    """Returns the rows of docs/mutation.md, as far as they can be counted."""
    lines = [" | ".join(("module", "mutants", *COLUMNS))]
    total: Counter[str] = Counter()
    for module, found in results.items():
        counts = Counter(found.values())
        total += counts
        lines.append(_line(module, counts))
    return "\n".join((*lines, _line("all", total)))


def _line(name: str, counts: Counter[str]) -> str:
    return " | ".join(map(str, (name, counts.total(), *(counts[column] for column in COLUMNS))))


if __name__ == "__main__":
    sys.exit(main())
