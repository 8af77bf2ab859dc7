"""`normalize_moe_rules`: gate and linear rows interleaved, without a copy and without a loss."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from onnxscript.rewriter import MatchingTracer, RewriteRuleSet, rewrite

from qmoe_rules import (
    QuantizeMoEPass,
    SaveError,
    moe_to_qmoe_rules,
    normalize_moe_rules,
    ops,
    reference,
    save,
)
from qmoe_rules.lazy import PlannedTensor
from qmoe_rules.loading import data_files
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules
from qmoe_rules.slices import SlicedTensor
from qmoe_rules.testing import moe_models
from tests.moe_models import (
    SLOTS,
    Array,
    Arrays,
    Experts,
    Graph,
    branches,
    inputs_of,
    nodes_of,
    quantized,
    relative_error,
    run,
    the_node,
)

EXACT = 1e-12
FP32 = 1e-6
INT4 = 0.2  # round-to-nearest, one scale per row, of normal weights

EXPERTS, HIDDEN, INTER = 3, 128, 192
SEPARATE = ("swiglu", "silu", "gelu", "geglu")
HALVES = ("swiglu", "geglu")
# The form of a node, the activation, and which of the fc1 and fc3 biases it has.
FORMS = [
    *itertools.product(["fc3"], SEPARATE, [(), ("fc1",), ("fc3",), ("fc1", "fc3")]),
    *itertools.product(["halves"], HALVES, [(), ("fc1",)]),
]
ALPHA: dict[str, Any] = {"activation_alpha": 1.702, "activation_beta": 1.0, "swiglu_limit": 0.8}


def arrays_of(form: str, biases: tuple[str, ...] = (), dtype: npt.DTypeLike = np.float32) -> Arrays:
    """Returns the weights of a node that is not normal."""
    rng = np.random.default_rng(7)
    rows = INTER if form == "fc3" else 2 * INTER
    arrays = {
        "fc1": rng.standard_normal((EXPERTS, rows, HIDDEN)) / HIDDEN**0.5,
        "fc2": rng.standard_normal((EXPERTS, HIDDEN, INTER)) / INTER**0.5,
        "fc2_bias": rng.standard_normal((EXPERTS, HIDDEN)),
    }
    if form == "fc3":
        arrays["fc3"] = rng.standard_normal((EXPERTS, INTER, HIDDEN)) / HIDDEN**0.5
    arrays |= {f"{name}_bias": rng.standard_normal((EXPERTS, rows)) for name in biases}
    return {name: array.astype(dtype) for name, array in arrays.items()}


def attributes_of(form: str, activation: str, **more: Any) -> dict[str, Any]:
    fusion = 0 if form == "fc3" else 2
    return {"activation_type": activation, "swiglu_fusion": fusion, "k": 2, **more}


def apart(
    form: str = "fc3",
    activation: str = "swiglu",
    biases: tuple[str, ...] = (),
    dtype: npt.DTypeLike = np.float32,
    homes: Mapping[str, str] | None = None,
    **more: Any,
) -> ir.Model:
    """Returns a model of one node, `moe`, that is not normal."""
    graph = Graph()
    x, router = inputs_of(graph, Experts(dtype=dtype))
    weights = graph.weights(arrays_of(form, biases, dtype), homes=homes)
    y = graph.moe(x, router, weights, **attributes_of(form, activation, **more))
    return graph.model(y)


def normalize(model: ir.Model, report: Report | None = None) -> ir.Model:
    return rewrite(model, normalize_moe_rules(report=report))


def interleaved(gate: Array, linear: Array) -> Array:
    out = np.empty((len(gate), 2 * gate.shape[1], *gate.shape[2:]), gate.dtype)
    out[:, 0::2], out[:, 1::2] = gate, linear
    return out


def normal(arrays: Arrays) -> Arrays:
    """Returns what the arrays of a node should become."""
    arrays = dict(arrays)
    if "fc3" not in arrays:
        for name in {"fc1", "fc1_bias"} & set(arrays):
            arrays[name] = interleaved(*np.split(arrays[name], 2, axis=1))
        return arrays
    arrays["fc1"] = interleaved(arrays["fc1"], arrays.pop("fc3"))
    biases = [arrays.pop(name, None) for name in ("fc1_bias", "fc3_bias")]
    present = next((bias for bias in biases if bias is not None), None)
    if present is not None:
        gate, linear = (np.zeros_like(present) if b is None else b for b in biases)
        arrays["fc1_bias"] = interleaved(gate, linear)
    return arrays


def constants(node: ir.Node) -> dict[str, Any]:
    """Returns the weights and biases of a MoE node, by their short names."""
    given = ops.inputs(node)
    tensors = {
        name: ir.convenience.get_const_tensor(value)
        for name, slot in SLOTS.items()
        if (value := given[slot]) is not None
    }
    return {name: tensor.numpy() for name, tensor in tensors.items() if tensor is not None}


def meaning(node: ir.Node, feeds: Arrays) -> Array:
    """Returns what a node computes, from its attributes and constants as they are in the graph."""
    values = {key: value for key, value in ops.attributes(node).items() if value is not None}
    if values["activation_type"] == "gelu":  # the reference knows gelu(gate) * linear as geglu
        values["activation_type"] = "geglu"
    return reference.moe(feeds["x"], feeds["router_probs"], **constants(node), **values)


# --- What it means -------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, ALPHA], ids=["plain", "alpha, beta, limit"])
@pytest.mark.parametrize(("form", "activation", "biases"), FORMS)
def test_a_normalized_node_means_what_it_meant(
    form: str, activation: str, biases: tuple[str, ...], more: dict[str, Any]
) -> None:
    feeds = Experts().feeds()
    model = apart(form, activation, biases, **more)
    before = meaning(the_node(model, "MoE"), feeds)
    normalize(model)
    node = the_node(model, "MoE")
    assert relative_error(meaning(node, feeds), before) <= EXACT
    expected = normal(arrays_of(form, biases))
    actual = constants(node)
    assert set(actual) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(actual[name], array)
    assert ops.attributes(node)["swiglu_fusion"] == 1
    assert len(node.inputs) == 6


@pytest.mark.parametrize("biases", [(), ("fc1", "fc3")])
@pytest.mark.parametrize("activation", ["swiglu", "silu"])
def test_the_float_model_runs(
    activation: str, biases: tuple[str, ...], record_property: Callable[[str, object], None]
) -> None:
    feeds = Experts().feeds()
    model = apart("fc3", activation, biases, **ALPHA)
    before = meaning(the_node(model, "MoE"), feeds)
    error = relative_error(run(normalize(model), feeds)[0], before)
    record_property("error", error)
    assert error <= FP32


def test_the_float_model_of_halves_runs() -> None:
    feeds = Experts().feeds()
    model = apart("halves", "swiglu", ("fc1",), **ALPHA)
    before = meaning(the_node(model, "MoE"), feeds)
    assert relative_error(run(normalize(model), feeds)[0], before) <= FP32


@given(
    moe_models(
        forms=["fc3", "halves"],
        hidden_sizes=range(1, 6),
        inter_sizes=range(1, 6),
        allow_functions=False,
        allow_nodes_before_weights=False,
    )
)
@settings(max_examples=50)
def test_every_shape_is_interleaved(model: ir.Model) -> None:
    wanted = [normal(constants(node)) for node in nodes_of(model, "MoE")]
    for node, arrays in zip(nodes_of(normalize(model), "MoE"), wanted, strict=True):
        found = constants(node)
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(found[name], array)


# --- What is written -----------------------------------------------------------------------------


def written(node: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in node.attributes.items()}


def test_every_attribute_is_explicit() -> None:
    more = {**ALPHA, "normalize_routing_weights": 1}
    assert written(the_node(normalize(apart("fc3", "swiglu", **more)), "MoE")) == {
        "activation_alpha": pytest.approx(1.702),
        "activation_beta": 1.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": pytest.approx(0.8),
        "use_sparse_mixer": 0,
    }


def test_silu_is_bare_swiglu() -> None:
    node = the_node(
        normalize(apart("fc3", "silu", **ALPHA, swiglu_limit_after_activation=1)), "MoE"
    )
    assert written(node) == {
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 0,
        "swiglu_fusion": 1,
        "use_sparse_mixer": 0,
    }


@pytest.mark.parametrize("activation", ["gelu", "geglu"])
def test_gelu_is_geglu(activation: str) -> None:
    values = written(the_node(normalize(apart("fc3", activation)), "MoE"))
    assert (values["activation_type"], values["swiglu_fusion"]) == ("geglu", 1)


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_a_limit_that_the_activation_never_read_goes(activation: str) -> None:
    node = the_node(normalize(apart("fc3", activation, swiglu_limit=0.8)), "MoE")
    assert "swiglu_limit" not in written(node)


def test_a_node_keeps_what_is_said_about_it() -> None:
    model = apart()
    node = the_node(model, "MoE")
    before = ops.inputs(node)
    kept = {name: before[name] for name in before if name[:3] not in ("fc1", "fc3")}
    node.doc_string, node.metadata_props["layer"] = "the experts", "7"
    output = node.outputs[0]
    output.doc_string, output.metadata_props["stage"] = "hidden", "9"
    normalize(model)
    node = the_node(model, "MoE")
    assert (node.name, node.doc_string, node.metadata_props["layer"]) == ("moe", "the experts", "7")
    (output,) = model.graph.outputs
    assert output is node.outputs[0]
    assert (output.name, output.doc_string, output.metadata_props) == (
        "y",
        "hidden",
        {"stage": "9"},
    )
    after = ops.inputs(node)
    assert {name: after[name] for name in kept} == kept


@pytest.mark.parametrize("home", ["initializer", "constant"])
def test_old_constants_are_gone(home: str) -> None:
    model = apart(
        biases=("fc1", "fc3"), homes=dict.fromkeys(("fc1", "fc3", "fc1_bias", "fc3_bias"), home)
    )
    assert apply_rules(model, normalize_moe_rules())  # without rewrite's own clean-up
    assert sorted(model.graph.initializers) == [
        "fc1_bias_interleaved",
        "fc1_interleaved",
        "fc2",
        "fc2_bias",
    ]
    assert [node.op_type for node in model.graph] == ["MoE"]


def test_a_constant_with_another_user_stays_for_it() -> None:
    graph = Graph()
    x, router = inputs_of(graph, Experts())
    weights = graph.weights(arrays_of("fc3"))
    y = graph.moe(x, router, weights, **attributes_of("fc3", "silu"))
    model = graph.model(y, graph.op("Neg", weights["fc3"], out="copy", like=weights["fc3"]))
    normalize(model)
    assert sorted(model.graph.initializers) == ["fc1_interleaved", "fc2", "fc2_bias", "fc3"]


@pytest.mark.parametrize(
    "model", [apart("halves", swiglu_fusion=1), apart("halves", activation_type="relu")]
)
def test_other_nodes_are_not_matched(model: ir.Model, caplog: pytest.LogCaptureFixture) -> None:
    report = Report()
    node = the_node(model, "MoE")
    assert not apply_rules(model, normalize_moe_rules(report=report))
    assert the_node(model, "MoE") is node
    assert (report.rows, caplog.records) == ([], [])


def test_a_second_sweep_finds_nothing() -> None:
    model = normalize(apart())
    assert not apply_rules(model, normalize_moe_rules())


# --- Quantized -----------------------------------------------------------------------------------


def both(report: Report | None = None, **fields: Any) -> RewriteRuleSet:
    return RewriteRuleSet(
        [*normalize_moe_rules(report=report), *moe_to_qmoe_rules(report=report, **fields)]
    )


def initializers(model: ir.Model) -> dict[str, bytes]:
    tensors = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {name: tensor.tobytes() for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("form", "activation"), [("fc3", "swiglu"), ("fc3", "silu"), ("halves", "swiglu")]
)
def test_a_node_is_quantized_in_the_same_sweep(
    form: str, activation: str, dtype: npt.DTypeLike
) -> None:
    biases = ("fc1", "fc3") if form == "fc3" else ("fc1",)
    more = {} if activation == "silu" else ALPHA
    model = apart(form, activation, biases, dtype, normalize_routing_weights=1, **more)
    feeds = Experts(dtype=dtype).feeds()
    real = meaning(the_node(model, "MoE"), feeds)
    report = Report()
    rewrite(model, both(report, bits=4, block_size=32))
    node = the_node(model)
    assert [(row.node, row.status) for row in report.rows] == [("moe", CONVERTED)]
    assert sorted(model.graph.initializers) == [
        "fc1_bias_interleaved",
        "fc1_interleaved_quantized",
        "fc1_interleaved_scales",
        "fc2_bias",
        "fc2_quantized",
        "fc2_scales",
    ]
    actual = run(model, feeds)[0]
    assert relative_error(actual, real) <= INT4
    spec = Recipe(bits=4, block_size=32).specs["fc1"]
    arrays: dict[str, Any] = normal(arrays_of(form, biases, dtype))
    arrays |= {name: quantized(arrays[name], spec) for name in ("fc1", "fc2")}
    values = ops.attributes(node)
    kept = {name: values[name] for name in ops.MOE_ATTRIBUTES if values[name] is not None}
    exact = reference.moe(feeds["x"], feeds["router_probs"], **arrays, **kept)
    assert relative_error(actual, exact) <= (1e-5 if dtype is np.float32 else 2e-3)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("form", "activation", "biases"), FORMS)
def test_the_bytes_are_those_of_the_interleaved_weights(
    form: str, activation: str, biases: tuple[str, ...], dtype: npt.DTypeLike
) -> None:
    target = "cpu" if dtype is np.float32 else "cuda"
    if target == "cpu" and activation in ("gelu", "geglu"):
        pytest.skip("no kernel for geglu in float32")
    model = rewrite(apart(form, activation, biases, dtype), both(bits=4, target=target))
    graph = Graph()
    x, router = inputs_of(graph, Experts(dtype=dtype))
    weights = graph.weights(normal(arrays_of(form, biases, dtype)))
    node = the_node(model)
    values = ops.attributes(node)
    attributes = {name: values[name] for name in ops.MOE_ATTRIBUTES if values[name] is not None}
    direct = graph.model(graph.moe(x, router, weights, **attributes))
    rewrite(direct, moe_to_qmoe_rules(bits=4, target=target))
    renamed = {name.replace("_interleaved", ""): b for name, b in initializers(model).items()}
    expected = initializers(direct)
    if biases == ("fc3",):
        renamed["fc1_bias"] = renamed.pop("fc3_bias")
    assert renamed == expected
    assert written(node) == written(the_node(direct))


def test_the_pass_normalizes_first() -> None:
    model = apart("fc3", "silu", ("fc1", "fc3"))
    quantize = QuantizeMoEPass(bits=8)
    quantize(model)
    assert [(row.node, row.status) for row in quantize.report.rows] == [("moe", CONVERTED)]
    assert the_node(model)


def test_a_node_as_the_genai_builder_makes_phimoe() -> None:
    """Three weights, no biases, the sparse mixer, empty names for what is missing."""
    graph = Graph()
    x, router = inputs_of(graph, Experts(dtype=np.float16))
    arrays = arrays_of("fc3", dtype=np.float16)
    w = graph.weights({name: arrays[name] for name in ("fc1", "fc2", "fc3")})
    empty = [ir.Value(name="") for _ in range(3)]
    slots = (x, router, w["fc1"], empty[0], w["fc2"], empty[1], w["fc3"], empty[2])
    y = graph.op(
        "MoE",
        *slots,
        out="y",
        like=x,
        name="/model/layers.0/moe/MoE",
        domain=ops.DOMAIN,
        **attributes_of("fc3", "silu", use_sparse_mixer=1, normalize_routing_weights=0),
    )
    report = Report()
    model = rewrite(graph.model(y), both(report, bits=4))
    node = the_node(model, "MoE")
    values = ops.attributes(node)
    assert node.name == "/model/layers.0/moe/MoE"
    assert (values["activation_type"], values["swiglu_fusion"]) == ("swiglu", 1)
    assert (values["use_sparse_mixer"], values["k"]) == (1, 2)
    assert len(node.inputs) == 5
    np.testing.assert_array_equal(constants(node)["fc1"], interleaved(arrays["fc1"], arrays["fc3"]))
    (row,) = report.rows  # of the new node: nothing about fc3 is left to say
    assert (row.node, row.status) == (node.name, SKIPPED)
    assert "use_sparse_mixer=1" in row.reason
    node.attributes.add(ir.AttrInt64("use_sparse_mixer", 0))
    assert the_node(rewrite(model, moe_to_qmoe_rules(bits=4)))


# --- Laziness ------------------------------------------------------------------------------------


class ReadError(Exception):
    """A weight was read."""


def unreadable(shape: tuple[int, ...]) -> ir.LazyTensor:
    def read() -> ir.TensorProtocol:
        raise ReadError

    return ir.LazyTensor(read, ir.DataType.FLOAT, ir.Shape(shape))


@pytest.mark.parametrize("form", ["fc3", "halves"])
@pytest.mark.parametrize("quantizing", [False, True])
def test_nothing_is_read_while_rewriting(form: str, quantizing: bool) -> None:
    biases = ("fc1", "fc3") if form == "fc3" else ("fc1",)
    model = apart(form, "swiglu", biases)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.const_value = unreadable(tuple(value.const_value.shape.numpy()))
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    node = the_node(model, "QMoE" if quantizing else "MoE")
    weight = ops.inputs(node)["fc1_experts_weights"]
    assert weight is not None
    assert weight.const_value is not None
    with pytest.raises(ReadError):
        weight.const_value.numpy()


def saved_by_onnx_ir(model: ir.Model, path: Path) -> None:
    ir.save(model, path, external_data=path.name + ".data")


@pytest.mark.parametrize("write", [save, saved_by_onnx_ir])
@pytest.mark.parametrize("form", ["fc3", "halves"])
def test_a_normalized_float_model_is_saved(
    form: str, write: Callable[[ir.Model, Path], None], tmp_path: Path
) -> None:
    feeds = Experts().feeds()
    biases = ("fc1", "fc3") if form == "fc3" else ("fc1",)
    saved_by_onnx_ir(apart(form, "swiglu", biases, **ALPHA), tmp_path / "a.onnx")
    model = ir.load(tmp_path / "a.onnx")
    before = meaning(the_node(model, "MoE"), feeds)
    normalize(model)
    assert data_files(model) == {(tmp_path / "a.onnx.data").resolve()}
    write(model, tmp_path / "b.onnx")
    loaded = ir.load(tmp_path / "b.onnx")
    for name, array in constants(the_node(loaded, "MoE")).items():
        np.testing.assert_array_equal(array, normal(arrays_of(form, biases))[name])
    proto = onnx.load(tmp_path / "b.onnx")
    assert relative_error(run(proto, feeds)[0], before) <= FP32


def test_saving_over_the_source_is_refused(tmp_path: Path) -> None:
    saved_by_onnx_ir(apart(), tmp_path / "a.onnx")
    model = normalize(ir.load(tmp_path / "a.onnx"))
    with pytest.raises(SaveError, match="the model still reads from it"):
        save(model, tmp_path / "a.onnx")


def test_a_dry_run_changes_nothing() -> None:
    model = apart(biases=("fc1", "fc3"))
    report = Report()
    rules = both(report, bits=4)
    before = dict(model.graph.initializers)
    rules.apply_to_model(model, tracer=MatchingTracer())
    assert dict(model.graph.initializers) == before
    assert the_node(model, "MoE")
    rewrite(model, rules)
    assert [(row.node, row.status) for row in report.rows] == [("moe", CONVERTED)]
    assert {
        type(v.const_value) for v in model.graph.initializers.values() if "bias" not in str(v.name)
    } == {PlannedTensor}


# --- Sharing, names and bodies -------------------------------------------------------------------


def sharing(graph: Graph, weights: list[Mapping[str, ir.Value]], form: str = "fc3") -> ir.Model:
    x, router = inputs_of(graph, Experts())
    for index, each in enumerate(weights):
        attributes = attributes_of(form, "swiglu")
        x = graph.moe(x, router, each, out=f"y{index}", name=f"moe{index}", **attributes)
    return graph.model(x)


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("form", ["fc3", "halves"])
def test_nodes_that_share_weights_share_the_result(form: str, quantizing: bool) -> None:
    graph = Graph()
    weights = graph.weights(arrays_of(form, ("fc1",)))
    model = sharing(graph, [weights, weights], form)
    feeds = Experts().feeds()
    middle = meaning(nodes_of(model, "MoE")[0], feeds)
    final = meaning(nodes_of(model, "MoE")[0], feeds | {"x": middle})
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    first, second = (ops.inputs(node) for node in nodes_of(model, "MoE", "QMoE"))
    for slot in ("fc1_experts_weights", "fc1_experts_bias", "fc2_experts_weights"):
        assert first[slot] is second[slot]
    assert len(model.graph.initializers) == (6 if quantizing else 4)
    limit = 2 * INT4 if quantizing else FP32
    assert relative_error(run(model, feeds)[0], final) <= limit


def test_one_gate_with_two_partners_is_two_weights() -> None:
    graph = Graph()
    weights = graph.weights(arrays_of("fc3"))
    other = graph.weight("other", -arrays_of("fc3")["fc3"])
    model = normalize(sharing(graph, [weights, {**weights, "fc3": other}]))
    assert sorted(model.graph.initializers) == [
        "fc1_interleaved",
        "fc1_interleaved_1",
        "fc2",
        "fc2_bias",
    ]
    first, second = (constants(node) for node in nodes_of(model, "MoE"))
    np.testing.assert_array_equal(first["fc1"][:, 0::2], second["fc1"][:, 0::2])
    np.testing.assert_array_equal(first["fc1"][:, 1::2], -second["fc1"][:, 1::2])


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("name", ["fc1_interleaved", "fc1_bias_interleaved", "val_0"])
def test_taken_names_keep_their_meaning(name: str, quantizing: bool) -> None:
    graph = Graph()
    x, router = inputs_of(graph, Experts())
    three = graph.weight(name, np.full(HIDDEN, 3, np.float32))
    total = graph.op("Add", x, three, out="sum", like=x)
    weights = graph.weights(arrays_of("fc3", ("fc1", "fc3")))
    model = graph.model(graph.moe(total, router, weights, **attributes_of("fc3", "swiglu")))
    feeds = Experts().feeds()
    real = meaning(the_node(model, "MoE"), feeds | {"x": feeds["x"] + 3})
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    np.testing.assert_array_equal(constants_by_name(model, name), np.full(HIDDEN, 3, np.float32))
    assert relative_error(run(model, feeds)[0], real) <= (INT4 if quantizing else FP32)


def constants_by_name(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("outer", [False, True], ids=["in the bodies", "in the outer graph"])
def test_nodes_in_both_bodies_of_an_if(outer: bool, quantizing: bool) -> None:
    graph = Graph()
    shared = graph.weights(arrays_of("fc3", ("fc1",))) if outer else {}

    def body_with(k: int) -> Callable[[Graph, ir.Value, ir.Value], ir.Value]:
        def fill(body: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
            weights = shared or body.weights(arrays_of("fc3", ("fc1",)))
            attributes = attributes_of("fc3", "silu", k=k, normalize_routing_weights=1)
            return body.moe(x, router, weights, out="inner", **attributes)

        return fill

    model = branches(body_with(1), body_with(2), graph)
    feeds = Experts().feeds()
    real = [meaning(node, feeds) for node in nodes_of(model, "MoE")]
    rewrite(model, both(bits=4) if quantizing else normalize_moe_rules())
    names = ["fc1_bias_interleaved", "fc1_interleaved", "fc2", "fc2_bias"]
    if quantizing:
        planned = ["fc1_interleaved_quantized", "fc1_interleaved_scales"]
        names = ["fc1_bias_interleaved", *planned, "fc2_bias", "fc2_quantized", "fc2_scales"]
    found = [sorted(graph.initializers) for graph in model.graphs()]
    assert found == ([names, [], []] if outer else [[], names, names])
    for flag, expected in zip((True, False), real, strict=True):
        actual = run(model, feeds | {"flag": np.array(flag)})[0]
        assert relative_error(actual, expected) <= (INT4 if quantizing else FP32)


def test_weights_of_two_graphs_meet() -> None:
    """fc1 is the outer graph's, fc3 the body's own."""
    graph = Graph()
    arrays = arrays_of("fc3")
    shared = graph.weights({name: array for name, array in arrays.items() if name != "fc3"})

    def fill(body: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        weights = {**shared, "fc3": body.weight("fc3", arrays["fc3"])}
        return body.moe(x, router, weights, out="inner", **attributes_of("fc3", "swiglu"))

    model = branches(fill, fill, graph)
    feeds = Experts().feeds()
    real = meaning(nodes_of(model, "MoE")[0], feeds)
    normalize(model)
    assert [list(graph.initializers) for graph in model.graphs()][1:] == [[], []]
    for flag in (True, False):
        actual = run(model, feeds | {"flag": np.array(flag)})[0]
        assert relative_error(actual, real) <= FP32


def test_a_clone_is_normalized_on_its_own() -> None:
    model = apart(biases=("fc1",))
    clone = model.clone()
    for each in (model, clone):
        normalize(each)
        for name, array in constants(the_node(each, "MoE")).items():
            np.testing.assert_array_equal(array, normal(arrays_of("fc3", ("fc1",)))[name])
    assert model.graph.initializers["fc1_interleaved"].graph is model.graph
    assert clone.graph.initializers["fc1_interleaved"].graph is clone.graph


def test_weights_behind_rearranging_nodes() -> None:
    """fc1 and fc3 are the halves of one packed weight that is stored transposed."""
    arrays: dict[str, Any] = arrays_of("fc3")
    packed = np.concatenate([arrays["fc1"], arrays["fc3"]], axis=1).transpose(0, 2, 1)
    graph = Graph()
    x, router = inputs_of(graph, Experts())
    stored = graph.weight("packed", np.ascontiguousarray(packed))
    turned = graph.op("Transpose", stored, out="turned", perm=[0, 2, 1])
    split = ir.node("Split", [turned], {"axis": 1, "num_outputs": 2}, num_outputs=2)
    graph.nodes.append(split)
    split.outputs[0].name, split.outputs[1].name = "gate", "up"
    weights = {**graph.weights({"fc2": arrays["fc2"]})}
    weights |= {"fc1": split.outputs[0], "fc3": split.outputs[1]}
    y = graph.moe(x, router, weights, **attributes_of("fc3", "silu"))
    model = graph.model(y)
    feeds = Experts().feeds()
    del arrays["fc2_bias"]
    real = reference.moe(feeds["x"], feeds["router_probs"], **arrays, k=2, activation_type="silu")
    rewrite(model, both(bits=8))
    assert [node.op_type for node in model.graph] == ["Softmax", "QMoE"]
    assert "packed" not in model.graph.initializers
    assert relative_error(run(model, feeds)[0], real) <= 0.02


# --- Reasons -------------------------------------------------------------------------------------


def with_input(slot: str, array: Array | None) -> Callable[[ir.Model], None]:
    """Returns what gives the node another constant, or takes one away."""

    def change(model: ir.Model) -> None:
        node = the_node(model, "MoE")
        value = None
        if array is not None:
            value = ir.Value(name=f"new_{slot}", const_value=ir.tensor(array))
            value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.tensor(array).dtype)
            model.graph.register_initializer(value)
        index = ops.MOE_INPUTS.index(slot)
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)

    return change


def with_attribute(name: str, value: Any) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        the_node(model, "MoE").attributes.add(ir.convenience.convert_attribute(name, value))

    return change


def zeros(*shape: int, dtype: npt.DTypeLike = np.float32) -> Array:
    return np.zeros(shape, dtype)


COMPUTED = {"fc1": "computed"}
REASONS: dict[str, tuple[ir.Model, Callable[[ir.Model], None] | None, str]] = {
    "relu": (apart("fc3", "relu"), None, "activation 'relu' has no meaning with fc3"),
    "identity": (apart("fc3", "identity"), None, "activation 'identity' has no meaning with fc3"),
    "fc3 bias alone": (
        apart("halves"),
        with_input("fc3_experts_bias", zeros(EXPERTS, INTER)),
        "fc3_experts_bias is present without fc3_experts_weights",
    ),
    "computed fc1": (
        apart(homes=COMPUTED),
        None,
        "fc1_experts_weights: fc1 is not a constant",
    ),
    "computed fc2": (
        apart(homes={"fc2": "computed"}),
        None,
        "fc2_experts_weights: fc2 is not a constant",
    ),
    "overridable fc3": (
        apart(homes={"fc3": "overridable"}),
        None,
        "fc3_experts_weights: fc3 is a graph input, so its default may be overridden at run time",
    ),
    "computed fc1 bias": (
        apart(biases=("fc1", "fc3"), homes={"fc1_bias": "computed"}),
        None,
        "fc1_experts_bias: fc1_bias is not a constant",
    ),
    "fc3 bias is an input": (
        apart(biases=("fc1", "fc3"), homes={"fc3_bias": "input"}),
        None,
        "fc3_experts_bias: fc3_bias is a graph input, so its default may be overridden at run time",
    ),
    "bias of another type": (
        apart(),
        with_input("fc3_experts_bias", zeros(EXPERTS, INTER, dtype=np.float16)),
        "fc3_experts_bias is float16 [3, 192]; the weights ask for float32 [3, 192]",
    ),
    "bias of another shape": (
        apart(),
        with_input("fc1_experts_bias", zeros(EXPERTS, 2 * INTER)),
        "fc1_experts_bias is [3, 384]; the weights ask for [3, 192]",
    ),
    "fc3 of another shape": (
        apart(),
        with_input("fc3_experts_weights", zeros(EXPERTS, INTER + 1, HIDDEN)),
        "fc3_experts_weights is [3, 193, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 192, 128]",
    ),
    "fc1 of halves of another shape": (
        apart("halves"),
        with_input("fc1_experts_weights", zeros(EXPERTS, INTER, HIDDEN)),
        "fc1_experts_weights is [3, 192, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'swiglu' asks for [3, 384, 128]",
    ),
    "fc3 of another type": (
        apart(),
        with_input("fc3_experts_weights", zeros(EXPERTS, INTER, HIDDEN, dtype=np.float16)),
        "fc1_experts_weights is float32, fc2_experts_weights is float32, "
        "fc3_experts_weights is float16",
    ),
    "fc2 is missing": (
        apart(),
        with_input("fc2_experts_weights", None),
        "fc2_experts_weights: it is missing",
    ),
    "fused twice": (
        apart(swiglu_fusion=1),
        None,
        "swiglu_fusion=1 with fc3, which is the gate's partner already",
    ),
    "unknown attribute": (
        apart(),
        with_attribute("fancy", 1),
        "MoE has no attribute 'fancy'",
    ),
    "unknown input": (
        apart(),
        lambda model: unknown_input(model),
        "it has more inputs than the 8 that are known",
    ),
}


def unknown_input(model: ir.Model) -> None:
    node = the_node(model, "MoE")
    node.resize_inputs(9)
    node.replace_input_with(8, model.graph.inputs[0])


@pytest.mark.parametrize("quantizing", [False, True])
@pytest.mark.parametrize("case", REASONS)
def test_what_stays_has_a_reason(
    case: str, quantizing: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model, change, reason = REASONS[case]
    model = model.clone()
    if change is not None:
        change(model)
    node = the_node(model, "MoE")
    before = (list(node.inputs), dict(node.attributes), list(model.graph.initializers))
    report = Report()
    rules = both(report, bits=4) if quantizing else normalize_moe_rules(report=report)
    with caplog.at_level(logging.WARNING):
        assert not apply_rules(model, rules)
    assert the_node(model, "MoE") is node
    assert (list(node.inputs), dict(node.attributes), list(model.graph.initializers)) == before
    assert [(row.node, row.status, row.reason) for row in report.rows] == [("moe", SKIPPED, reason)]
    assert report.rows[0].bytes_after == report.rows[0].bytes_before
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"moe stays as it is: {reason}"]


def test_a_node_in_a_function_stays() -> None:
    model = apart()
    node = the_node(model, "MoE")
    inner = [ir.Value(name=f"in{index}") for index in range(len(node.inputs))]
    copy = ir.node("MoE", inner, attributes=node.attributes, domain=ops.DOMAIN)
    function = ir.Function(
        "local", "experts", "", graph=ir.Graph(inner, copy.outputs, nodes=[copy]), attributes=[]
    )
    model.functions[function.identifier()] = function
    report = Report()
    normalize(model, report)
    assert [row.reason for row in report.rows] == [
        "it is inside a function, which holds no initializers; inline it (see prepare)"
    ]


def test_a_refused_node_may_still_be_quantized_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    """CUDA reads halves, and takes biases that are not constant."""
    model = apart("halves", "swiglu", ("fc1",), np.float16, homes={"fc1_bias": "input"})
    report = Report()
    rewrite(model, both(report, bits=4, target="cuda"))
    assert ops.attributes(the_node(model))["swiglu_fusion"] == 2
    assert [(row.node, row.status) for row in report.rows] == [("moe", CONVERTED)]
    assert [record.getMessage() for record in caplog.records] == [
        "moe stays as it is: fc1_experts_bias: fc1_bias is a graph input, so its default may be "
        "overridden at run time"
    ]


def test_what_is_normalized_is_a_lazy_view() -> None:
    model = normalize(apart())
    tensor = model.graph.initializers["fc1_interleaved"].const_value
    assert isinstance(tensor, SlicedTensor)
    sources = [source.name for source in tensor.slices.tensors]
    assert sources == ["fc1", "fc3"]
