"""What the installed ONNX Runtime knows, and what is said of what it does not."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest

from qmoe_rules import inspection, ops, pipeline
from qmoe_rules.cli import main
from qmoe_rules.inspection import inspect
from qmoe_rules.installed import Installed, installed
from qmoe_rules.pipeline import plan, quantize
from qmoe_rules.providers import TARGETS
from tests.contract import Cell

# The attributes of QMoE's schema in onnxruntime 1.31.1, and what is left of them in an old one.
OF_1_31 = [
    "accuracy_level",
    "activation_alpha",
    "activation_beta",
    "activation_type",
    "block_size",
    "expert_weight_bits",
    "fc1_expert_weight_bits",
    "fc2_expert_weight_bits",
    "fc3_expert_weight_bits",
    "k",
    "normalize_routing_weights",
    "quant_type",
    "swiglu_fusion",
    "swiglu_limit",
    "use_sparse_mixer",
    "weights_prepacked",
]
OF_OLD = [
    name
    for name in OF_1_31
    if name not in ("accuracy_level", "quant_type", "weights_prepacked")
    and not name.startswith(("fc1_", "fc2_", "fc3_"))
]
MOE = [name for name in OF_1_31 if name in ops.MOE_ATTRIBUTES]


Pretend = Callable[[Installed | None], None]
"""Puts a runtime, or none, into the place of the installed one."""


@dataclass
class Schema:
    """As `get_all_operator_schema()` returns it."""

    name: str
    attributes: dict[str, object]
    inputs: list[object]
    domain: str = "com.microsoft"


def schemas(attributes: list[str], inputs: int = 21) -> list[Schema]:
    return [
        Schema("QMoE", {}, [], domain="ai.onnx"),  # of another domain
        Schema("QMoE", dict.fromkeys(attributes), [None] * inputs),
        Schema("MoE", dict.fromkeys(MOE), [None] * 8),
        Schema("Gelu", {}, [None]),
    ]


CURRENT = Installed.of("1.31.1", schemas(OF_1_31))
OLD = Installed.of("1.20.0", schemas(OF_OLD, inputs=14))


def said(runtime: Installed, model: ir.Model, target: str = "cpu") -> list[str]:
    found = runtime.remarks(ops.nodes(model, "MoE", "QMoE"), TARGETS[target])
    start = f"onnxruntime {runtime.version}, which is installed here, "
    assert all(remark.startswith(start) for remark in found)
    return [remark.removeprefix(start) for remark in found]


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Puts another runtime into the place of the installed one."""

    def pretend(given: Installed | None) -> None:
        monkeypatch.setattr(pipeline, "installed", lambda: given)
        monkeypatch.setattr(inspection, "installed", lambda: given)

    return pretend


def test_the_schemas_of_the_runtime_are_read() -> None:
    found = installed()
    assert found is not None
    assert found.version == onnxruntime.__version__
    assert found.inputs == {"MoE": len(ops.MOE_INPUTS), "QMoE": len(ops.QMOE_INPUTS)}
    assert {"k", "weights_prepacked"} <= found.attributes["QMoE"]
    assert found.attributes["MoE"] >= set(MOE)
    assert installed() is found  # it is asked once


def test_the_tables_of_the_library_are_those_of_the_installed_runtime() -> None:
    """`ops` knows the schemas of 1.32; a newer runtime would tell here what it has more."""
    found = installed()
    assert found is not None
    if found.older_than("1.32"):
        pytest.skip("needs onnxruntime 1.32")
    typed: dict[str, object] = {"activation_type": "relu", "quant_type": "int"}
    typed |= dict.fromkeys(("activation_alpha", "activation_beta", "swiglu_limit"), 1.0)
    for name, known in found.attributes.items():
        values: dict[str, Any] = {attribute: typed.get(attribute, 1) for attribute in known}
        node = ir.node(name, [], values, domain=ops.DOMAIN)
        assert ops.refuse_unknown(node) is None
        assert set(ops.attributes(node)) == set(known)


def test_without_a_runtime_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert installed.__wrapped__() is None


def test_a_runtime_that_does_not_load_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert installed.__wrapped__() is None


@pytest.mark.parametrize(
    ("version", "other", "older"),
    [
        ("1.31.1", "1.32", True),
        ("1.32.0", "1.32", False),
        ("1.32.0.dev20261001", "1.32", False),
        ("1.9.0", "1.32", True),
        ("2.0.0", "1.32", False),
    ],
)
def test_versions_are_numbers(version: str, other: str, older: bool) -> None:
    assert Installed(version, {}, {}).older_than(other) is older


@pytest.mark.parametrize(
    ("runtime", "model", "target", "expected"),
    [
        (CURRENT, Cell(block_size=32).direct(), "cpu", []),
        (CURRENT, Cell().float_model(), "portable", []),
        (
            CURRENT,
            Cell(limit=7.0).direct(swiglu_limit_after_activation=1),
            "cuda",
            [
                "does not know QMoE's attribute swiglu_limit_after_activation",
                "is older than 1.32, the first version with swiglu_limit_after_activation=1",
            ],
        ),
        (
            CURRENT,
            Cell("int3", block_size=32).direct(),
            "cpu",
            ["is older than 1.32, the first version with int3 on the CPU provider"],
        ),
        (
            CURRENT,
            Cell("mxfp4", block_size=32).direct("k_packed"),
            "cpu",
            ["is older than 1.32, the first version with mxfp4 on the CPU provider"],
        ),
        (CURRENT, Cell("mxfp4", block_size=32).direct("n_packed"), "cuda", []),
        (
            CURRENT,
            Cell(activation="geglu").float_model(),
            "cuda",
            ["is older than 1.32, the first version with geglu"],
        ),
        (
            OLD,
            Cell().float_model(),
            "webgpu",
            ["is older than 1.31, the first version with MoE on the WebGPU provider"],
        ),
        (
            OLD,
            Cell("int4", "int8", 32).direct(),
            "cuda",
            [
                "does not know QMoE's attribute fc2_expert_weight_bits",
                "does not know QMoE's attribute quant_type",
                "does not know QMoE's attribute weights_prepacked",
            ],
        ),
        (
            OLD,
            Cell(normalize=0).convert("portable"),
            "portable",
            [
                "does not know QMoE's attribute quant_type",
                "does not know QMoE's attribute weights_prepacked",
                "does not know QMoE's input router_weights",
            ],
        ),
        (Installed("1.10.0", {}, {}), Cell().float_model(), "cpu", ["has no operator MoE"]),
    ],
)
def test_what_a_runtime_does_not_know(
    runtime: Installed, model: ir.Model, target: str, expected: list[str]
) -> None:
    assert sorted(said(runtime, model, target)) == sorted(expected)


def test_each_thing_is_said_once(runtime: Pretend, tiny_fp16: Path) -> None:
    """The model has two nodes."""
    runtime(OLD)
    for summary in inspect(tiny_fp16, "cpu"):
        assert summary.notes == ()  # they are float
    nodes = [Cell().direct(), Cell().direct()]
    found = OLD.remarks([n for model in nodes for n in ops.nodes(model, "QMoE")], TARGETS["cpu"])
    assert len(found) == len(set(found)) == 2


def test_plan_and_quantize_say_it(
    runtime: Pretend,
    tiny_fp16: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lines = [
        "onnxruntime 1.20.0, which is installed here, does not know QMoE's attribute quant_type",
        "onnxruntime 1.20.0, which is installed here, does not know QMoE's attribute "
        "weights_prepacked",
    ]
    runtime(OLD)
    with caplog.at_level(logging.WARNING, "qmoe_rules.pipeline"):
        plan(tiny_fp16)
        assert sorted(caplog.messages) == lines
        caplog.clear()
        quantize(tiny_fp16, tmp_path / "out.onnx")
        assert sorted(caplog.messages) == lines
    runtime(CURRENT)
    caplog.clear()
    plan(tiny_fp16)
    assert caplog.messages == []
    runtime(None)
    plan(tiny_fp16)
    assert caplog.messages == []


def test_the_command_prints_it(
    runtime: Pretend,
    tiny_fp16: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runtime(OLD)
    line = "onnxruntime 1.20.0, which is installed here, does not know QMoE's attribute quant_type"
    assert main(["quantize", str(tiny_fp16), str(tmp_path / "out.onnx")]) == 0
    assert f"qmoe: {line}\n" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "out.onnx"), "--target", "cpu"]) == 0
    assert capsys.readouterr().out.count(f"note: {line}\n") == 1
