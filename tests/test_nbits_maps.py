"""A map of MatMulNBits is read with every detail, and one that QMoE cannot store is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import Report, ops
from qmoe_rules.providers import TARGETS
from qmoe_rules.report import CONVERTED, Row
from qmoe_rules.rules._chain import Map
from qmoe_rules.rules._experts import Parts
from qmoe_rules.rules._fusing import Block
from qmoe_rules.rules._mlp import Linear
from qmoe_rules.rules.fuse_nbits_experts import FuseNBitsExperts
from tests import expert_graphs
from tests.expert_graphs import Builder, Layer

INT4 = Layer(bits=4, experts=2, k=1, hidden=64, inter=128)


def rule(target: str = "portable", report: Report | None = None) -> FuseNBitsExperts:
    return FuseNBitsExperts(report or Report(), TARGETS[target])


class Maps(Builder):
    """Writes maps of x, of which some are stored otherwise than the layer says."""

    def __init__(self, layer: Layer = INT4, **odd: Mapping[str, Any]) -> None:
        super().__init__(layer)
        self.x = expert_graphs.source(self.graph, layer)
        self.odd = odd

    def nbits(self, x: ir.Value, name: str, rows: int, columns: int, layer: Layer) -> ir.Value:
        own = dict(self.odd.get(name.rpartition(".")[2], {}))
        rows, columns = own.pop("rows", rows), own.pop("columns", columns)
        return super().nbits(x, name, rows, columns, replace(layer, **own))

    def map(self, name: str = "map", **fields: Any) -> ir.Value:
        """Appends a map [128, 64]; fields are those of a layer."""
        return self.nbits(self.x, name, 128, 64, replace(self.layer, **fields))

    def value(self, name: str = "b") -> ir.Value:
        return self.random(name, 128)


def node_of(value: ir.Value) -> ir.Node:
    return ops.producer(value)


def constants(found: Linear[Map]) -> list[str | None]:
    """Returns the names of what a map is made of, without the map's."""
    values = found.weight.constants
    return [None if value is None else str(value.name).rpartition(".")[2] for value in values]


# Reading


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda b: b.map(), ["codes", "scales", None, None, None]),
        (
            lambda b: b.map(zero_points=True),
            ["codes", "scales", "zero_points", None, None],
        ),
        (lambda b: b.map(bias=True), ["codes", "scales", None, None, "bias"]),
        (lambda b: b.op("Add", b.map(), b.value()), ["codes", "scales", None, None, "b"]),
        (
            lambda b: b.op("Add", b.map(zero_points=True), b.value()),
            ["codes", "scales", "zero_points", None, "b"],
        ),
    ],
)
def test_a_map_and_its_bias(
    write: Callable[[Maps], ir.Value], expected: list[str | None], swapped: bool
) -> None:
    b = Maps(replace(INT4, swapped=swapped))
    found = rule().linear(value := write(b))
    assert found is not None
    assert rule().claims(value)
    assert found.source is b.x
    assert constants(found) == expected
    assert list(found.weight.nodes) == b.graph.nodes
    (storage,) = found.weight.attributes
    assert storage == rule().linear(b.map("other")).weight.attributes[0]  # type: ignore[union-attr]


def test_inputs_of_no_name_are_left_out() -> None:
    b = Maps()
    value = b.map(bias=True)
    node_of(value).replace_input_with(3, ir.Value(name=""))
    found = rule().linear(value)
    assert found is not None
    assert constants(found) == ["codes", "scales", None, None, "bias"]


@pytest.mark.parametrize(
    "write",
    [
        lambda b: b.x,
        lambda b: b.op("Relu", b.map()),
        lambda b: b.op("Mul", b.map(), b.value()),
        lambda b: b.op("Add", b.x, b.value()),
        lambda b: b.op("Add", b.map(), b.value(), domain="other"),
        lambda b: b.op("Add", b.map(bias=True), b.value()),  # two biases
        lambda b: b.op("Add", b.map(), None),
        lambda b: b.op("MatMulNBits", b.x, b.value("codes"), b.value("scales")),
        lambda b: b.op("MatMulNBits", None, b.value("codes"), domain="com.microsoft"),
        lambda b: b.op("QMoE", b.x, b.value("codes"), domain="com.microsoft"),
    ],
)
def test_what_is_no_map(write: Callable[[Maps], ir.Value]) -> None:
    value = write(Maps())
    assert rule().linear(value) is None
    assert not rule().claims(value)


def test_of_two_summands_one_is_the_map() -> None:
    """A map with a bias of its own is added to another map, and is not its constant."""
    b = Maps()
    first, second = b.map("first", bias=True), b.map("second")
    found = rule().linear(b.op("Add", first, second))
    assert found is not None
    assert constants(found)[:2] == ["codes", "scales"]
    assert found.weight.constants[-1] is first


# Stacking


def parts(b: Maps, *names: str, **fields: Any) -> Parts | str:
    """Returns what maps are together."""
    return stacked(*(b.map(name, **fields) for name in names or ("map0", "map1")))


def stacked(*values: ir.Value) -> Parts | str:
    found = [rule().linear(value) for value in values]
    return rule().parts([each.weight for each in found if each is not None])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_stay_as_they_are(bits: int) -> None:
    b = Maps()
    found = parts(b, bits=bits, zero_points=True, bias=True)
    assert not isinstance(found, str)
    assert {name: (each.shape, each.dtype.name) for name, each in found.items()} == {
        "weights": ((2, 128, 8 * bits), "uint8"),
        "scales": ((2, 128, 2), "float32"),
        "zero_points": ((2, 128, bits // 4 or 1), "uint8"),
        "bias": ((2, 128), "float32"),
    }
    for index in range(2):
        for part, name in (
            ("weights", "codes"),
            ("scales",) * 2,
            ("zero_points",) * 2,
            ("bias",) * 2,
        ):
            (stored,) = (v for v in b.graph.initializers if v.name == f"l0.map{index}.{name}")
            assert stored.const_value is not None
            assert found[part].read(0, 2)[index].tobytes() == stored.const_value.tobytes()


def test_parts_that_a_map_does_not_have() -> None:
    found = parts(Maps())
    assert not isinstance(found, str)
    assert set(found) == {"weights", "scales"}


def changed(value: ir.Value, position: int | str, new: Any) -> ir.Value:
    """Gives a map another attribute, or other data at an input."""
    node = node_of(value)
    if isinstance(position, str):
        node.attributes[position] = ir.convenience.convert_attribute(position, new)
        return value
    if len(node.inputs) <= position:
        node.resize_inputs(position + 1)
    name = f"{value.name}.{position}"
    node.replace_input_with(position, ir.val(name, const_value=ir.tensor(new, name=name)))
    return value


CODES, SCALES, POINTS, ORDER, BIAS = 1, 2, 3, 4, 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"bits": 3}, "MatMulNBits with 3 bits"),
        ({"block_size": 0}, "64 columns are not whole blocks of 0"),
        ({"block_size": -32}, "64 columns are not whole blocks of -32"),
        (
            {"block_size": 1},
            "l0.map0.scales is [128, 2], and its attributes ask for [128, 64]",
        ),
        ({"block_size": 48}, "64 columns are not whole blocks of 48"),
        ({"accuracy_level": -1}, "MatMulNBits with accuracy_level=-1"),
        ({"accuracy_level": 5}, "MatMulNBits with accuracy_level=5"),
        (
            {"weight_prepacked": 1},
            "MatMulNBits with weight_prepacked=1, an order of its own",
        ),
        ({"rounding": 1}, "MatMulNBits has no attribute 'rounding'"),
        ({"bits": 4.0}, "MatMulNBits has no attribute 'bits' of this type"),
        (
            {"N": 64},
            "l0.map0.codes is [128, 2, 16], and its attributes ask for [64, 32]",
        ),
        (
            {SCALES: np.ones(128, np.float32)},
            "l0.MatMulNBits_1.2 is [128], and its attributes ask for [128, 2]",
        ),
        (
            {POINTS: np.zeros((128, 2), np.float32)},
            "l0.MatMulNBits_1.3 is [128, 2], and its attributes ask for [128, 1]",
        ),
        ({POINTS: np.zeros(128, np.float32)}, "l0.MatMulNBits_1.3 is float32, not uint8"),
        ({CODES: np.zeros((128, 32), np.int8)}, "l0.MatMulNBits_1.1 is int8, not uint8"),
        ({ORDER: np.arange(64)}, "MatMulNBits has g_idx, which reorders its columns"),
        (
            {BIAS: np.zeros(64, np.float32)},
            "l0.MatMulNBits_1.5 is [64], and its attributes ask for [128]",
        ),
    ],
)
def test_maps_that_qmoe_cannot_store(changes: dict[Any, Any], reason: str) -> None:
    b = Maps()
    maps = [b.map("map0"), b.map("map1")]
    for value in maps:
        for position, new in changes.items():
            changed(value, position, new)
    assert stacked(*maps) == reason


@pytest.mark.parametrize("level", [0, 1, 4])
def test_an_accuracy_level_is_a_permission(level: int) -> None:
    b = Maps()
    maps = [changed(b.map(name), "accuracy_level", level) for name in ("map0", "map1")]
    assert not isinstance(stacked(*maps), str)


@pytest.mark.parametrize("name", ["accuracy_level", "weight_prepacked"])
def test_a_default_may_be_written_out(name: str) -> None:
    b = Maps()
    assert not isinstance(stacked(changed(b.map("map0"), name, 0), b.map("map1")), str)


def test_maps_that_differ() -> None:
    b = Maps()
    plain, offset = b.map("plain"), b.map("offset", zero_points=True)
    assert stacked(plain, offset) == "expert 0 has no zero_points, and others have"
    assert stacked(offset, plain) == "expert 1 has no zero_points, and others have"
    wide = b.map("wide", bits=8)
    assert stacked(plain, plain, wide) == "the experts' MatMulNBits differ in their attributes"
    computed = b.map("computed")
    node_of(computed).replace_input_with(1, b.op("Abs", b.value("codes")))
    assert stacked(computed, computed) == f"{b.graph.nodes[-1].outputs[0].name} is not a constant"


@pytest.mark.parametrize("shape", [(128, 1), (1, 128), (1,)])
def test_what_is_added_is_a_bias_only_if_it_is_one_number_per_output(shape: Any) -> None:
    """Where there are as many tokens as outputs, [128, 1] adds a number to each token."""
    b = Maps()
    biased = b.op("Add", b.map(), b.random("b", *shape))
    assert stacked(biased) == f"l0.b is {list(shape)}, and its attributes ask for [128]"


def test_what_is_not_said_of_a_map() -> None:
    b = Maps()
    value = b.map("map", bits=4)
    node_of(value).attributes.clear()
    assert stacked(value) == "0 columns are not whole blocks of 0"
    for name, new in {"N": 128, "block_size": 32}.items():
        changed(value, name, new)
    reason = "l0.map.codes is [128, 2, 16], and its attributes ask for [128, 0]"
    assert stacked(value) == reason
    assert not isinstance(stacked(changed(value, "K", 64)), str)  # of 4 bits
    del node_of(value).attributes["N"]
    reason = "l0.map.codes is [128, 2, 16], and its attributes ask for [0, 32]"
    assert stacked(value) == reason


# Experts


def find(
    layer: Layer = INT4, target: str = "portable", **odd: Mapping[str, Any]
) -> Block | str | None:
    """Returns the experts of a layer, whose gate, up or down maps may be odd."""
    b = Maps(layer, **odd)
    model = expert_graphs.finished(b, b.x, b.experts(b.x))
    return rule(target).find([node for node in model.graph if node.op_type == "Add"][-1])


CUDA_SIZES = (
    "the CUDA provider needs hidden and inter sizes divisible by 64, and they are 64 and 96"
)


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        ({"up": {"bits": 8}}, "both int4 block 32 and int8 block 32 weights"),
        ({"down": {"block": 64}}, "both int4 block 32 and int4 block 64 weights"),
        (
            {"gate": {"zero_points": True}, "down": {"bits": 8}},
            "both int4 asymmetric block 32 and int8 asymmetric block 32 weights",
        ),
        ({"down": {"rows": 32}}, "gate is [128, 64], and down [32, 128]"),
        ({"down": {"columns": 64}}, "gate is [128, 64], and down [64, 64]"),
    ],
)
def test_maps_of_one_expert_that_do_not_fit(odd: Any, reason: str) -> None:
    assert find(**odd) == reason


@pytest.mark.parametrize(
    ("fields", "target", "reason"),
    [
        (
            {"block": 16},
            "portable",
            "the CUDA provider does not take block_size=16 with int4 (it takes 0, 32, 64, 128, "
            "256)",
        ),
        ({"inter": 96, "dtype": np.float16}, "portable", CUDA_SIZES),
        (
            {"activation": "geglu"},
            "cpu",
            "the CPU provider has no kernel for activation 'geglu' (it has gelu, identity, relu, "
            "silu, swiglu)",
        ),
        ({"zero_points": True}, "webgpu", "the WebGPU provider takes no zero points with int4"),
        (
            {"hidden": 128, "block": 128},
            "trt-rtx",
            "the TensorRT-RTX provider has no float32 kernel (it has bfloat16, float16)",
        ),
        (
            {"inter": 192, "block": 64, "zero_points": True, "dtype": np.float16},
            "portable",
            "the CUDA provider misreads the zero points of an odd number of blocks, and K=64 has "
            "1 of block_size=64",
        ),
    ],
)
def test_what_a_target_gets_wrong(fields: dict[str, Any], target: str, reason: str) -> None:
    assert find(replace(INT4, **fields), target) == reason


FALLS_BACK = ("the CUDA provider has no float32 kernel: ONNX Runtime runs such nodes on the CPU",)


@pytest.mark.parametrize("zero_points", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("activation", ["swiglu", "relu"])
def test_the_report_of_what_is_fused(activation: str, bits: int, zero_points: bool) -> None:
    layer = replace(INT4, activation=activation, bits=bits, zero_points=zero_points, bias=True)
    block = find(layer)
    assert isinstance(block, Block)
    assert block.experts.storage == {
        "expert_weight_bits": bits,
        "block_size": 32,
        "quant_type": "int",
        "weights_prepacked": 0,
    }
    report = Report()
    rule("portable", report).fused(block, ir.node("QMoE", [], name="layer"))
    maps = 3 if activation == "swiglu" else 2
    weights = maps * 2 * 128 * 64  # of 2 experts
    blocks = weights // 32
    points = 2 * 128 * (maps - 1) * -(-2 * bits // 8) + 2 * 64 * -(-4 * bits // 8)
    nbytes = weights * bits // 8 + 4 * blocks + (points if zero_points else 0)
    (row,) = report.rows
    assert replace(row, warnings=()) == Row(
        "layer",
        CONVERTED,
        experts=2,
        hidden=64,
        inter=128,
        stored=f"int{bits} {'asymmetric ' if zero_points else ''}block 32, raw, as they were",
        bytes_before=nbytes,
        bytes_after=nbytes,
    )
    approximate = ("the CPU provider rounds activations to int8 with blockwise int8, 1 to 2 % off",)
    assert row.warnings[:1] == (approximate if bits == 8 else FALLS_BACK)
    assert row.warnings[-1:] == FALLS_BACK
