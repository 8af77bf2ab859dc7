"""The arrows between modules: imports only point upwards, and heavy ones come late."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import qmoe_rules

PACKAGE = Path(qmoe_rules.__file__).parent
MAX_LINES = 400

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def _rooms() -> tuple[str, ...]:
    """Returns the rooms from top to bottom, as docs/design.md lists them."""
    listed = DESIGN.read_text(encoding="utf-8").partition("\nqmoe_rules/\n")[2]
    return tuple(re.findall(r"^  (\w+)(?:\.py|/) ", listed.partition("```")[0], re.MULTILINE))


# A module may import what stands above it, not its own row.
ORDER = _rooms()
NUMBERS = ORDER[: ORDER.index("ops")]

LATE = ("numba", "onnxruntime", "hypothesis", "jinja2", "onnx", "rich", "safetensors")


@dataclass(frozen=True)
class Module:
    """A source file of the package."""

    path: Path

    @property
    def name(self) -> str:
        """The dotted name, without the package's own; `__init__` for the package itself."""
        parts = self.path.relative_to(PACKAGE).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)

    @property
    def room(self) -> str:
        """The first part of the name: a module, or a folder of modules."""
        return self.name.split(".")[0]

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.path.read_text(encoding="utf-8"))

    def imports(self, *, top_level: bool = False) -> Iterator[str]:
        """Yields the modules that are imported, anywhere or when this one is."""
        for node in _executed(self.tree) if top_level else ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{self.name} has a relative import"
                # `from package import module` names a module too.
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def imported_packages(self, *, top_level: bool = False) -> set[str]:
        return {name.split(".")[0] for name in self.imports(top_level=top_level)}

    def imported_rooms(self) -> set[str]:
        names = [name.split(".") for name in self.imports()]
        return {parts[1] for parts in names if parts[0] == "qmoe_rules"}


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when the module is imported: all but function bodies."""
    for node in ast.iter_child_nodes(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield node
            yield from _executed(node)


MODULES = [Module(path) for path in sorted(PACKAGE.rglob("*.py"))]
each_module = pytest.mark.parametrize("module", MODULES, ids=lambda module: module.name)


@each_module
def test_every_module_has_a_room(module: Module) -> None:
    assert module.room in ORDER


def test_every_room_exists() -> None:
    assert set(ORDER) <= {module.room for module in MODULES}
    assert len(set(ORDER)) == len(ORDER)


@each_module
def test_imports_only_point_upwards(module: Module) -> None:
    if module.room == "__init__":
        return
    above = set(ORDER[: ORDER.index(module.room)]) | {module.room}
    assert module.imported_rooms() <= above


@each_module
def test_only_rules_import_onnxscript(module: Module) -> None:
    assert "onnxscript" not in module.imported_packages() or module.room == "rules"


@each_module
def test_numbers_know_no_graph(module: Module) -> None:
    if module.room in (*NUMBERS, "reference"):
        assert module.imported_packages().isdisjoint({"onnx", "onnx_ir", "onnxruntime"})


@each_module
def test_the_runtime_is_imported_late(module: Module) -> None:
    assert "onnxruntime" not in module.imported_packages(top_level=True)


@each_module
def test_only_testing_imports_hypothesis(module: Module) -> None:
    assert "hypothesis" not in module.imported_packages() or module.room == "testing"


@each_module
def test_nothing_but_tests_needs_testing(module: Module) -> None:
    assert "testing" not in module.imported_rooms() or module.room == "testing"


def test_testing_says_what_it_needs() -> None:
    """In a process without hypothesis."""
    code = "import sys; sys.modules['hypothesis'] = None; import qmoe_rules.testing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ImportError: qmoe_rules.testing needs hypothesis; pip install 'qmoe-rules[testing]'"
    )


@each_module
def test_numba_has_a_room_of_its_own(module: Module) -> None:
    room = "quantizers._kernels"
    assert "numba" not in module.imported_packages() or module.name.startswith(room)


@each_module
def test_files_stay_short(module: Module) -> None:
    assert len(module.path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES


@each_module
def test_public_names_exist(module: Module) -> None:
    if module.name.split(".")[-1].startswith("_") and module.name != "__init__":
        return
    dotted = "qmoe_rules" if module.name == "__init__" else f"qmoe_rules.{module.name}"
    if module.name == "integrations.olive":
        pytest.importorskip("olive")
    imported = importlib.import_module(dotted)
    names = imported.__all__
    assert len(set(names)) == len(names)
    missing = [name for name in names if not hasattr(imported, name)]
    assert not missing
    assert all(not name.startswith("_") for name in names)


def _imported(code: str, *arguments: str) -> set[str]:
    """Returns what a fresh process has imported in the end; whatever it printed before is lost."""
    code = f"import sys\n{code}\nprint('\\n', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_is_light() -> None:
    """A worker that computes slabs needs no graphs, and loads none."""
    assert _imported("import qmoe_rules").isdisjoint({*LATE, "numpy", "onnx_ir", "onnxscript"})
    slabs = _imported("from qmoe_rules.slabs import write_slab")
    assert slabs.isdisjoint({*LATE, "onnx_ir", "onnxscript"})
    everything = _imported("from qmoe_rules import *")
    assert everything.isdisjoint({*LATE} - {"onnx"})  # which onnxscript imports


def test_the_public_names_are_where_they_are_said_to_be() -> None:
    for name in qmoe_rules.__all__:
        found = getattr(qmoe_rules, name)
        assert found.__name__ == name
        assert found.__module__.startswith("qmoe_rules.")
    assert set(qmoe_rules.__all__) <= set(dir(qmoe_rules))
    with pytest.raises(AttributeError, match="module 'qmoe_rules' has no attribute 'quantise'"):
        qmoe_rules.quantise  # type: ignore[attr-defined]  # noqa: B018


def test_a_plan_loads_nothing_that_it_does_not_need(tiny_fp16: Path) -> None:
    """`sympy` and its like are known, but nothing of them is loaded."""
    code = "from qmoe_rules.cli import main\nassert not main(['plan', *sys.argv[1:]])"
    imported = _imported(code, str(tiny_fp16))
    assert {"onnx_ir", "onnxscript.rewriter", "qmoe_rules.rules"} <= imported
    heavy = {"sympy.core", "mpmath", "onnx.reference.ops._op", "rich.progress"}
    rooms = {"qmoe_rules.calibration", "qmoe_rules.verification", "qmoe_rules.reference"}
    late = {*LATE} - {"onnx", "onnxruntime", "rich"}  # the runtime is asked what it knows
    assert imported.isdisjoint(heavy | rooms | late)


def test_what_waits_is_loaded_when_it_is_asked_for() -> None:
    """Sizes that are expressions and constants that are folded work in the command too."""
    code = """
from qmoe_rules.cli._later import import_later
import_later()
import onnx_ir as ir, onnxscript.optimizer
assert "sympy.core" not in sys.modules
size = ir.SymbolicDim("batch") * 2 + 1
import pickle, sympy
assert size == "2*batch + 1" and isinstance(size._expr, sympy.Expr), size
assert pickle.loads(pickle.dumps(size._expr)) == size._expr
assert "onnx.reference.ops._op" not in sys.modules
model = ir.from_onnx_text(
    '''<ir_version: 10, opset_import: ["" : 20]>
    agraph (float[batch] x) => (float[batch] y) {
        a = Constant <value = float[1] {2}> ()
        b = Constant <value = float[1] {3}> ()
        c = Add (a, b)
        y = Mul (x, c)
    }'''
)
onnxscript.optimizer.fold_constants(model)
assert not any(node.op_type == "Add" for node in model.graph)
"""
    assert {"sympy.core", "onnx.reference.ops._op"} <= _imported(code)


def test_the_checks_see_what_they_look_for(tmp_path: Path) -> None:
    """Guards the tests above against a walk that finds nothing."""
    lazy = {module.name: module for module in MODULES}["lazy"]
    assert {"formats", "layouts", "slabs", "weights"} <= lazy.imported_rooms()
    assert {"numpy", "onnx_ir"} <= lazy.imported_packages(top_level=True)
    path = tmp_path / "sample.py"
    path.write_text("import a\nif True:\n    import b.c\ndef f():\n    import onnxruntime\n")
    assert Module(path).imported_packages(top_level=True) == {"a", "b"}
    assert Module(path).imported_packages() == {"a", "b", "onnxruntime"}
