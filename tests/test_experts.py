"""Experts that were found one by one become one MoE that computes the same, or are refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._experts import (
    Experts,
    Parts,
    assemble,
    derived,
    refuse_experts,
    rows_of,
    stack,
    transposed,
)
from qmoe_rules.rules._mlp import ALL, EVEN, FIRST_HALF, MLP, ODD, SECOND_HALF
from qmoe_rules.rules._routing import Routing
from qmoe_rules.slices import Slices, TensorSlices
from tests.moe_models import Array

# E, H, I and k.
EXPERTS, HIDDEN, INTER, CHOSEN = 4, 8, 6, 2


def slices(array: Array) -> Slices:
    return TensorSlices(ir.tensor(array), "array")


def read(found: Slices | str) -> Array:
    assert not isinstance(found, str)
    array = found.read(0, found.shape[0])
    assert (array.shape, array.dtype) == (found.shape, found.dtype)
    return array


def numbers(*shape: int, dtype: Any = np.float32) -> Array:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


# Slices


def constant(name: str, array: Array) -> ir.Value:
    return ir.val(name, const_value=ir.tensor(array, name=name))


@pytest.mark.parametrize("shape", [(3,), (3, 2)])
def test_constants_are_stacked(shape: Sequence[int]) -> None:
    arrays = [numbers(*shape) + 10 * expert for expert in range(3)]
    found = stack([constant(f"w{i}", array) for i, array in enumerate(arrays)])
    assert np.array_equal(read(found), np.stack(arrays))


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (numbers(3, 2), "w1 is float32 [3, 2], and w0 is float32 [2, 3]"),
        (numbers(2, 3, dtype=np.float16), "w1 is float16 [2, 3], and w0 is float32 [2, 3]"),
    ],
)
def test_constants_that_differ(array: Array, reason: str) -> None:
    first = constant("w0", numbers(2, 3))
    assert stack([first, constant("w1", array)]) == reason
    assert stack([first, first, constant("w1", array), first]) == reason
    assert stack([first, ir.val("w2")]) == "w2 is not a constant"


def test_what_is_made_of_slices() -> None:
    array = numbers(3, 4, 2)
    assert np.array_equal(read(transposed(slices(array))), array.transpose(0, 2, 1))
    doubled = derived(slices(array), (4, 2), lambda block: 2 * block)
    assert np.array_equal(read(doubled), 2 * array)


@pytest.mark.parametrize(
    ("columns", "rows"),
    [
        (ALL, slice(None)),
        (EVEN, slice(0, None, 2)),
        (ODD, slice(1, None, 2)),
        (FIRST_HALF, slice(0, 2)),
        (SECOND_HALF, slice(2, 4)),
    ],
)
def test_some_outputs_of_a_map(columns: str, rows: slice) -> None:
    whole = {"weights": numbers(2, 4, 6), "bias": numbers(2, 4), "scales": numbers(2, 4, 2)}
    found = rows_of({name: slices(array) for name, array in whole.items()}, columns)
    assert not isinstance(found, str)
    assert set(found) == set(whole)
    for name, part in found.items():
        assert np.array_equal(read(part), whole[name][:, rows])


@pytest.mark.parametrize("columns", [EVEN, ODD, FIRST_HALF, SECOND_HALF])
def test_an_odd_number_of_outputs_has_no_halves(columns: str) -> None:
    odd = {"weights": slices(numbers(2, 5, 4))}
    assert rows_of(odd, columns) == f"a map with 5 outputs has no {columns} ones"
    assert rows_of(odd, ALL) is odd


# Assembling

SOURCE = ir.val("x", ir.DataType.FLOAT, ["tokens", HIDDEN])
ROUTING = Routing(
    ir.val("indices", ir.DataType.INT64, ["tokens", CHOSEN]),
    ir.val("weights", ir.DataType.FLOAT, ["tokens", CHOSEN]),
    CHOSEN,
    EXPERTS,
)
HOME = ir.val("home")
WEIGHTS = {
    "g": numbers(2, INTER, HIDDEN),
    "u": 100 + numbers(2, INTER, HIDDEN),
    "d": 200 + numbers(2, HIDDEN, INTER),
}


def mlp(expert: int = 0, **fields: Any) -> MLP[str]:
    given: dict[str, Any] = {
        "source": SOURCE,
        "gate": (f"g{expert}", ALL),
        "up": (f"u{expert}", ALL),
        "down": f"d{expert}",
        "activation": "swiglu",
        "alpha": 1.5,
        "beta": 0.5,
        "limit": 7.0,
    }
    return MLP(**{**given, **fields})


def parts_of(names: Sequence[str]) -> Parts | str:
    """Returns one map of all experts by their names, such as g0 and g1."""
    if names[0].startswith("?"):
        return f"nothing is known of {names[0]}"
    kinds, experts = {name[0] for name in names}, [int(name[1:]) for name in names]
    return {"weights": slices(WEIGHTS["".join(kinds)][experts])}


def assembled(*mlps: MLP[str], storage: Mapping[str, Any] | None = None) -> Experts | str:
    return assemble(mlps, ROUTING, parts_of, home=HOME, storage=storage)


def test_experts_are_put_together_in_order() -> None:
    found = assembled(mlp(1), mlp(0), storage={"block_size": 32})
    assert isinstance(found, Experts)
    assert found.up is not None
    maps = {"g": found.gate, "u": found.up, "d": found.down}
    for name, parts in maps.items():
        assert np.array_equal(read(parts["weights"]), WEIGHTS[name][::-1])
    assert (found.source, found.routing, found.home) == (SOURCE, ROUTING, HOME)
    assert (found.activation, found.alpha, found.beta, found.limit) == ("swiglu", 1.5, 0.5, 7.0)
    assert found.key == tuple(((f"g{e}", ALL), (f"u{e}", ALL), f"d{e}") for e in (1, 0))
    assert found.storage == {"block_size": 32}


def test_experts_without_a_second_map() -> None:
    found = assembled(mlp(0, up=None), mlp(1, up=None))
    assert isinstance(found, Experts)
    assert found.up is None
    assert found.key == ((("g0", ALL), None, "d0"), (("g1", ALL), None, "d1"))
    assert found.storage == {}
    assert found.dtype == ir.DataType.FLOAT


def test_experts_of_some_columns() -> None:
    halves = [mlp(e, gate=(f"g{e}", SECOND_HALF), up=(f"g{e}", FIRST_HALF)) for e in range(2)]
    for count in (1, 2):
        found = assembled(*halves[:count])
        assert isinstance(found, Experts)
        assert found.up is not None
        assert np.array_equal(read(found.gate["weights"]), WEIGHTS["g"][:count, 3:])
        assert np.array_equal(read(found.up["weights"]), WEIGHTS["g"][:count, :3])
        assert np.array_equal(read(found.down["weights"]), WEIGHTS["d"][:count])


SHOWN = "swiglu(alpha=1.5, beta=0.5, limit=7.0)"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"source": ir.val("other")}, "expert 1 is applied to other, not to x"),
        ({"alpha": 2.0}, f"swiglu(alpha=2, beta=0.5, limit=7.0), and expert 0 {SHOWN}"),
        ({"beta": 0.0}, f"swiglu(alpha=1.5, beta=0, limit=7.0), and expert 0 {SHOWN}"),
        ({"limit": None}, f"swiglu(alpha=1.5, beta=0.5, limit=None), and expert 0 {SHOWN}"),
        ({"activation": "relu"}, f"relu(alpha=1.5, beta=0.5, limit=7.0), and expert 0 {SHOWN}"),
        ({"up": None}, f"a bare gate(alpha=1.5, beta=0.5, limit=7.0), and expert 0 {SHOWN}"),
        (
            {"up": None, "activation": "relu"},
            f"relu(alpha=1.5, beta=0.5, limit=7.0), and expert 0 {SHOWN}",
        ),
        ({"gate": ("g1", EVEN)}, f"{SHOWN} of the even columns, and expert 0 {SHOWN}"),
        ({"up": ("u1", ODD)}, f"{SHOWN}, and expert 0 {SHOWN}"),
    ],
)
def test_experts_that_differ(fields: dict[str, Any], reason: str) -> None:
    if "applied" not in reason:
        reason = f"expert 1 computes {reason}"
    assert assembled(mlp(0), mlp(1, **fields)) == reason


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"gate": ("?g", ALL)}, "nothing is known of ?g"),
        ({"up": ("?u", EVEN)}, "nothing is known of ?u"),
        ({"down": "?d"}, "nothing is known of ?d"),
    ],
)
def test_maps_that_cannot_be_stacked(fields: dict[str, Any], reason: str) -> None:
    assert assembled(mlp(**fields), mlp(**fields)) == reason


# Refusing


def made(dtype: Any = np.float32, **shapes: Sequence[int]) -> Any:
    """Returns the parts of a map, random ones of these shapes."""
    rng = np.random.default_rng(len(shapes) + sum(map(sum, shapes.values())))
    return {
        name: slices(rng.standard_normal(shape).astype(dtype)) for name, shape in shapes.items()
    }


def gate(dtype: Any = np.float32, experts: int = EXPERTS, **more: Sequence[int]) -> Any:
    return made(dtype, weights=(experts, INTER, HIDDEN), **more)


def down(dtype: Any = np.float32, experts: int = EXPERTS, **more: Sequence[int]) -> Any:
    return made(dtype, weights=(experts, HIDDEN, INTER), **more)


BIAS, BACK = (EXPERTS, INTER), (EXPERTS, HIDDEN)
QUANTIZED = {
    "gate": gate(np.uint8) | made(scales=(EXPERTS, INTER, 1)),
    "up": gate(np.uint8) | made(scales=(EXPERTS, INTER, 1)),
    # Of other sizes than those of the weights would ask for, which only the family can judge.
    "down": made(np.uint8, weights=(EXPERTS, HIDDEN, INTER // 2)) | made(scales=(4, HIDDEN, 1)),
    "storage": {"block_size": 32},
}


def experts(**fields: Any) -> Experts:
    given: dict[str, Any] = {
        "source": SOURCE,
        "routing": ROUTING,
        "gate": gate(),
        "up": gate(),
        "down": down(),
        "activation": "swiglu",
        "alpha": 1.0,
        "beta": 0.0,
        "limit": None,
        "home": HOME,
        "key": (),
    }
    return Experts(**{**given, **fields})


def rows(shape: Sequence[int | str] | None, dtype: ir.DataType | None = None) -> ir.Value:
    return ir.val("rows", dtype, shape)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"activation": "geglu"},
        {"activation": "relu", "up": None},
        {"limit": 0.0},
        {"limit": 7.0},
        {"gate": gate(bias=BIAS), "up": gate(bias=BIAS)},
        {"down": down(bias=BACK)},
        {"source": rows(["batch", "sequence", HIDDEN])},
        {"source": rows(["tokens", "size"], ir.DataType.FLOAT)},
        {
            "gate": gate(np.float16),
            "up": gate(np.float16),
            "down": down(np.float16),
            "source": rows(["t", 8]),
        },
        QUANTIZED,
    ],
)
def test_what_moe_computes(fields: dict[str, Any]) -> None:
    assert refuse_experts(experts(**fields), 16) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"activation": "relu"}, "MoE has no gated relu"),
        ({"up": None}, "MoE has no plain swiglu"),
        ({"limit": -1.0}, "the clamp -1 is negative"),
        ({"limit": float("nan")}, "the clamp nan is negative"),
        ({"down": down(np.float64)}, "the weights are DOUBLE"),
        ({"down": down(np.float16)}, "down and gate are stored differently"),
        ({"up": gate(np.float16)}, "up and gate are stored differently"),
        (
            {"up": gate(bias=BIAS)},
            "up and gate have different shapes, or only one of them a bias",
        ),
        (
            {"up": made(weights=(EXPERTS, INTER, HIDDEN + 1))},
            "up and gate have different shapes, or only one of them a bias",
        ),
        ({"down": down(bias=BIAS)}, "down has a bias float32 [4, 6]"),
        ({"down": down() | made(np.float16, bias=BACK)}, "down has a bias float16 [4, 8]"),
        (
            {"gate": gate(bias=(1, INTER)), "up": gate(bias=(1, INTER))},
            "gate has a bias float32 [1, 6]",
        ),
        (
            {"gate": gate(bias=BIAS), "up": gate() | made(np.float16, bias=BIAS)},
            "up has a bias float16 [4, 6]",
        ),
        ({"routing": replace(ROUTING, experts=5)}, "4 experts, 5 routed"),
        (
            {"down": down(experts=3)},
            "gate is [4, 6, 8], which asks for down [4, 8, 6], and it is [3, 8, 6]",
        ),
        (
            {"down": gate()},
            "gate is [4, 6, 8], which asks for down [4, 8, 6], and it is [4, 6, 8]",
        ),
        (
            {**QUANTIZED, "down": down(np.uint8) | made(scales=(4, 8, 1), zero_points=(4, 8, 1))},
            "down and gate are stored differently",
        ),
        ({**QUANTIZED, "up": gate(np.uint8)}, "up and gate are stored differently"),
        (
            {"source": rows(None)},
            "the experts' input rows is of unknown rank; MoE takes 2-D and 3-D",
        ),
        ({"source": rows([HIDDEN])}, "the experts' input rows is 1-D; MoE takes 2-D and 3-D"),
        (
            {"source": rows(["a", "b", "c", HIDDEN])},
            "the experts' input rows is 4-D; MoE takes 2-D and 3-D",
        ),
        (
            {"source": rows(["tokens", HIDDEN], ir.DataType.FLOAT16)},
            "rows is FLOAT16, and the experts are FLOAT",
        ),
    ],
)
def test_what_moe_does_not_compute(fields: dict[str, Any], reason: str) -> None:
    assert refuse_experts(experts(**fields), 16) == reason


def test_routing_that_the_opset_cannot_say() -> None:
    found = experts()
    assert refuse_experts(found, 15) == "its routing needs opset 16, and the model imports 15"
    logits = ir.val("logits", ir.DataType.FLOAT, ["tokens", EXPERTS])
    direct = replace(found, routing=replace(ROUTING, logits=logits))
    assert refuse_experts(direct, 15) is None
    logits.type = ir.TensorType(ir.DataType.FLOAT16)  # is encoded
    assert refuse_experts(direct, 15) == "its routing needs opset 16, and the model imports 15"
