"""Two at a time: processes that write the same model, threads that rewrite and save."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnxscript import rewriter

from qmoe_rules import Report, fuse_experts_rules, moe_to_qmoe_rules, normalize_moe_rules, save
from tests.sandbox import Sandbox
from tests.saves import OPTIONS, RECIPE, copied, planned, snapshot, tensors

OVERTAKEN = "another save has written it by now"


@pytest.fixture
def eager() -> Iterator[None]:
    """Lets threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """Calls all of them, each in a thread of its own, as nearly at once as threads can."""
    barrier = threading.Barrier(len(calls))

    def call(function: Callable[[], Any]) -> Any:
        barrier.wait()
        return function()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


# Processes.


def test_one_source_may_be_quantized_to_two_places_at_once(
    sandbox: Sandbox, tiny_fp16: Path, tmp_path: Path
) -> None:
    source = copied(tiny_fp16, tmp_path / "source").parent
    before = snapshot(source)
    runs = [("quantize", source, tmp_path / name, *OPTIONS) for name in ("one", "two")]
    for outcome in sandbox.together(runs, tmp_path):
        assert (outcome.status, outcome.stderr) == (0, "")
    save(planned(tiny_fp16), tmp_path / "expected" / "model.onnx")
    for name in ("one", "two"):
        assert snapshot(tmp_path / name) == snapshot(tmp_path / "expected")
    assert snapshot(source) == before


@pytest.mark.parametrize(
    ("exists", "count"),
    [
        (False, 2),
        (True, 2),
        *(pytest.param(exists, 4, marks=pytest.mark.slow) for exists in [False, True] * 20),
    ],
)
def test_one_destination_is_whole_whoever_comes_last(
    sandbox: Sandbox, tiny_fp16: Path, tmp_path: Path, exists: bool, count: int
) -> None:
    out = tmp_path / "out"
    if exists:
        save(planned(tiny_fp16, bits=8), out / "model.onnx")
    recipes = [
        {"bits": 4},
        {"bits": 8},
        {"bits": 4, "block_size": 32},
        {"bits": 8, "block_size": 64},
    ]
    runs = [("quantize", tiny_fp16.parent, out, *_options(recipe)) for recipe in recipes[:count]]
    outcomes = sandbox.together(runs, tmp_path)
    for outcome in outcomes:
        assert outcome.status in (0, 2)
        assert outcome.stderr == "" if outcome.status == 0 else OVERTAKEN in outcome.stderr
    assert 0 in [outcome.status for outcome in outcomes]
    found = tensors(out / "model.onnx")
    wanted = []
    for index, recipe in enumerate(recipes[:count]):
        save(planned(tiny_fp16, **recipe), tmp_path / f"{index}" / "model.onnx")
        wanted.append(tensors(tmp_path / f"{index}" / "model.onnx"))
    assert found in wanted
    assert len(snapshot(out)) == 2  # the model and its data: nothing of those that were replaced
    assert not list(tmp_path.rglob(".qmoe-*"))


def _options(recipe: dict[str, int]) -> list[object]:
    return [each for name, n in recipe.items() for each in (f"--{name.replace('_', '-')}", n)]


# Threads.


@pytest.mark.usefixtures("eager")
def test_every_call_of_a_factory_gives_rules_of_its_own(tiny_fp32: Path, tiny_fp16: Path) -> None:
    def rewrite(path: Path, bits: int) -> tuple[bytes, dict[str, Any]]:
        report = Report()
        rules = [
            *fuse_experts_rules(report=report),
            *normalize_moe_rules(report=report),
            *moe_to_qmoe_rules(bits=bits, block_size=32, report=report),
        ]
        model = rewriter.rewrite(ir.load(path), rules)
        proto: bytes = ir.serde.serialize_model(model).SerializeToString()
        return proto, report.to_dict()

    work = [(path, bits) for path in (tiny_fp32, tiny_fp16) for bits in (4, 8)]
    alone = [rewrite(*each) for each in work]
    assert together(*(lambda each=each: rewrite(*each) for each in work)) == alone


def test_rules_of_two_calls_share_nothing() -> None:
    first, second = ([*moe_to_qmoe_rules(bits=4)] for _ in range(2))
    assert not {id(rule) for rule in first} & {id(rule) for rule in second}


@pytest.mark.usefixtures("eager")
def test_a_planned_model_may_be_saved_by_several_threads_at_once(
    tiny_fp16: Path, tmp_path: Path
) -> None:
    model = planned(tiny_fp16)
    before = [value.const_value for value in model.graph.initializers.values()]
    save(planned(tiny_fp16), tmp_path / "expected" / "model.onnx")
    expected = snapshot(tmp_path / "expected")
    for turn in range(3):
        folders = [tmp_path / f"{turn}-{index}" for index in range(4)]
        together(*(lambda f=f: save(model, f / "model.onnx", workers=2) for f in folders))
        assert all(snapshot(folder) == expected for folder in folders)
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(a is b for a, b in zip(before, after, strict=True))


@pytest.mark.usefixtures("eager")
def test_threads_that_save_different_recipes_of_one_file(tiny_fp16: Path, tmp_path: Path) -> None:
    recipes = [RECIPE, {"bits": 8, "block_size": 64}, {"bits": 4}]
    models = [planned(tiny_fp16, **recipe) for recipe in recipes]
    together(
        *(
            lambda m=model, i=index: save(m, tmp_path / f"{i}" / "model.onnx")
            for index, model in enumerate(models)
        )
    )
    for index, recipe in enumerate(recipes):
        save(planned(tiny_fp16, **recipe), tmp_path / "expected" / f"{index}" / "model.onnx")
        assert snapshot(tmp_path / f"{index}") == snapshot(tmp_path / "expected" / f"{index}")
