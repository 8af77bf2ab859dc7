"""QMoE back to a float MoE: the weights to the bit, what they compute, and what is refused."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import MatchingTracer, rewrite

from qmoe_rules import ops, reference
from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers.rtn import rtn_numpy
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED, Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules, qmoe_to_moe_rules
from qmoe_rules.saving import save
from qmoe_rules.slices import SlicedTensor
from tests.moe_models import (
    SLOTS,
    Experts,
    Graph,
    branches,
    inputs_of,
    nodes_of,
    relative_error,
    run,
    single,
    the_node,
)
from tests.qmoe_models import Codes, append, constants, meant, reference_options, spec_of

FLOAT = ("fc1_experts_weights", "fc2_experts_weights")


def back(model: ir.Model, source_layout: str | None = None, report: Report | None = None) -> Any:
    return rewrite(model, [*qmoe_to_moe_rules(source_layout=source_layout, report=report)])


# The numbers.


@pytest.mark.parametrize(
    ("dtype", "layout", "target"),
    [
        (np.float32, "raw", "cpu"),
        (np.float16, "raw", "cuda"),
        (np.float16, "cutlass_sm80", "cuda"),
        (ml_dtypes.bfloat16, "cutlass_sm80", "cuda"),
    ],
)
@pytest.mark.parametrize(("bits", "block_size"), [(4, 0), (4, 32), (8, 0), (8, 64)])
def test_there_and_back_gives_the_dequantized_weights(
    bits: int, block_size: int, dtype: Any, layout: str, target: str, tmp_path: Path
) -> None:
    experts = Experts(dtype=dtype)
    recipe = Recipe(bits=bits, block_size=block_size, layout=layout, target=target)
    model = back(rewrite(single(experts, k=2), [*moe_to_qmoe_rules(recipe)]))
    save(model, tmp_path / "model.onnx")
    for each in (model, ir.load(tmp_path / "model.onnx")):
        found = constants(the_node(each, "MoE"))
        for name, weight in experts.arrays().items():
            array = found[SLOTS[name]]
            assert array.dtype == np.dtype(dtype)
            if name in ("fc1", "fc2"):
                packed = [rtn_numpy(expert, recipe.specs["fc1"]) for expert in weight]
                weight = np.stack([expert.dequantize().astype(dtype) for expert in packed])
            np.testing.assert_array_equal(array, weight)


@pytest.mark.parametrize("zero_points", [False, True], ids=["symmetric", "zero-points"])
@pytest.mark.parametrize("block_size", [0, 32])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_moe_computes_what_qmoe_does(bits: int, block_size: int, zero_points: bool) -> None:
    codes = Codes(fc1=spec_of(bits, block_size), zero_points=zero_points)
    model = codes.model()
    feeds = codes.experts.feeds()
    node = the_node(model)
    weights = codes.weights()
    before = reference.qmoe(
        feeds["x"],
        feeds["router_probs"],
        weights["fc1"],
        weights["fc2"],
        **reference_options(node),
    )
    (ran_before,) = run(model, feeds)

    model = back(model)
    node = the_node(model, "MoE")
    float_weights = [constants(node)[slot] for slot in FLOAT]
    after = reference.moe(
        feeds["x"], feeds["router_probs"], *float_weights, **reference_options(node)
    )
    np.testing.assert_array_equal(after, before)
    (ran_after,) = run(model, feeds)
    assert relative_error(ran_after, before) <= 1e-5
    # The CPU kernel of QMoE rounds activations for int8 blocks, and looks int2 up.
    inexact = block_size and bits != 4
    assert relative_error(ran_after, ran_before) <= (5e-2 if inexact else 1e-5)


@pytest.mark.parametrize("fc3", [False, True], ids=["fused", "fc3"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize(
    ("format", "block_size", "layout"),
    [
        ("mxfp4", 32, "k_packed"),
        ("mxfp4", 32, "n_packed"),
        ("nvfp4", 16, "k_packed"),
        ("nvfp4", 16, "n_packed"),
        ("fp8", 128, "raw"),
    ],
)
def test_floating_point_codes_become_the_weights_that_they_mean(
    format: str, block_size: int, layout: str, dtype: Any, fc3: bool
) -> None:
    experts = Experts(dtype=dtype, activation="silu" if fc3 else "swiglu")
    codes = Codes(experts, Spec(FORMATS[format], block_size), layout=layout, fc3=fc3)
    model = codes.model()
    meant = codes.weights()
    if fc3:  # the operator has no slot for the global scale of an fc3
        meant["fc3"] = replace(meant["fc3"], global_scale=None)
    runs = layout == "k_packed" and not fc3
    ran = run(model, experts.feeds()) if runs else []
    found = constants(the_node(back(model), "MoE"))
    for name, weight in meant.items():
        assert found[SLOTS[name]].dtype == dtype
        np.testing.assert_array_equal(found[SLOTS[name]], weight.dequantize().astype(dtype))
    assert not [slot for slot in found if "scale" in slot]
    for output in ran:
        (after,) = run(model, experts.feeds())
        assert relative_error(after, output) <= 3e-3  # QMoE rounds what it multiplies with


@pytest.mark.parametrize("layout", ["raw", "cutlass_sm80"])
def test_float16_weights_are_rounded_once(layout: str) -> None:
    codes = Codes(Experts(dtype=np.float16), spec_of(8, 32), zero_points=True, layout=layout)
    found = constants(the_node(back(codes.model()), "MoE"))
    for name, weight in codes.weights().items():
        assert found[SLOTS[name]].dtype == np.float16
        np.testing.assert_array_equal(found[SLOTS[name]], meant(weight))


@pytest.mark.parametrize(
    ("fc1", "fc2", "attributes"),
    [
        (8, 4, {}),
        (4, 8, {}),
        (8, 4, {"expert_weight_bits": 4, "fc1_expert_weight_bits": 8}),
        (2, 8, {"expert_weight_bits": 4, "fc1_expert_weight_bits": 2}),
    ],
)
def test_projections_of_different_widths(fc1: int, fc2: int, attributes: dict[str, Any]) -> None:
    codes = Codes(fc1=spec_of(fc1, 32), fc2=spec_of(fc2, 32), zero_points=True)
    found = constants(the_node(back(codes.model(**attributes)), "MoE"))
    for name, weight in codes.weights().items():
        np.testing.assert_array_equal(found[SLOTS[name]], meant(weight))


@pytest.mark.parametrize("activation", ["silu", "swiglu"])
def test_fc3_stays_an_fc3(activation: str) -> None:
    codes = Codes(Experts(activation=activation), spec_of(4, 32), fc3=True)
    node = the_node(back(codes.model()), "MoE")
    found, weights = constants(node), codes.weights()
    assert set(weights) == {"fc1", "fc2", "fc3"}
    for name, weight in weights.items():
        np.testing.assert_array_equal(found[SLOTS[name]], meant(weight))
    x, router = codes.experts.feeds().values()
    real = [found[SLOTS[name]] for name in ("fc1", "fc2", "fc3")]
    options = reference_options(node)
    np.testing.assert_array_equal(
        reference.moe(x, router, *real[:2], fc3=real[2], **options),
        reference.qmoe(x, router, weights["fc1"], weights["fc2"], fc3=weights["fc3"], **options),
    )


# The node.


def test_every_attribute_is_explicit_and_the_moes_own() -> None:
    model = Codes(fc1=spec_of(4, 32)).model(accuracy_level=4, swiglu_limit=7.0)
    node = the_node(back(model), "MoE")
    assert {name: attribute.value for name, attribute in node.attributes.items()} == {
        "activation_alpha": 1.0,
        "activation_beta": 0.0,
        "activation_type": "swiglu",
        "k": 2,
        "normalize_routing_weights": 1,
        "swiglu_fusion": 1,
        "swiglu_limit": 7.0,
        "use_sparse_mixer": 0,
    }


@pytest.mark.parametrize("bias", [False, True])
def test_inputs_take_the_slots_of_a_moe(bias: bool) -> None:
    model = back(Codes(Experts(bias=bias), zero_points=True).model())
    node = the_node(model, "MoE")
    names = {slot: value.name for slot, value in ops.inputs(node).items() if value is not None}
    biases = {f"{name}_experts_bias": f"{name}_experts_bias" for name in ("fc1", "fc2") if bias}
    assert names == {
        "input": "x",
        "router_probs": "router_probs",
        "fc1_experts_weights": "fc1_experts_weights_dequantized",
        "fc2_experts_weights": "fc2_experts_weights_dequantized",
        **biases,
    }
    assert set(model.graph.initializers) == {*names.values()} - {"x", "router_probs"}
    assert isinstance(model.graph.initializers[names[FLOAT[0]]].const_value, SlicedTensor)


def test_the_node_keeps_its_name_documentation_and_metadata() -> None:
    model = Codes().model()
    node = the_node(model)
    node.doc_string, node.metadata_props["from"] = "experts", "layer 3"
    node.outputs[0].doc_string, node.outputs[0].metadata_props["to"] = "mixed", "layer 4"
    new = the_node(back(model), "MoE")
    assert (new.name, new.doc_string, new.metadata_props["from"]) == ("qmoe", "experts", "layer 3")
    (output,) = new.outputs
    assert (output.name, output.doc_string, output.metadata_props) == (
        "y",
        "mixed",
        {"to": "layer 4"},
    )


def test_the_report_tells_what_was_done() -> None:
    report = Report()
    codes = Codes(Experts(dtype=np.float16), spec_of(4, 32), zero_points=True)
    back(codes.model(), report=report)
    (row,) = report.rows
    assert (row.node, row.status, row.reason, row.stored) == ("qmoe", CONVERTED, "", "float16")
    assert (row.experts, row.hidden, row.inter) == (3, 128, 192)
    weights = 3 * (384 * 128 + 128 * 192)
    constants = codes.arrays()
    stored = [constants[slot].nbytes for slot in constants if not slot.endswith("bias")]
    assert (row.bytes_before, row.bytes_after) == (sum(stored), 2 * weights)
    assert row.warnings == ()


# Routing.


def with_router_weights(
    make: Callable[[Graph, ir.Value], ir.Value], normalize: int = 0
) -> ir.Model:
    """Returns a QMoE whose input 14 is what `make` makes of router_probs."""
    codes = Codes()
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values = {slot: graph.weight(slot, array) for slot, array in codes.arrays().items()}
    values["router_weights"] = make(graph, router)
    attributes = codes.attributes(normalize_routing_weights=normalize)
    return graph.model(append(graph, x, router, values, **attributes))


def softmax(graph: Graph, router: ir.Value, **attributes: Any) -> ir.Value:
    return graph.op("Softmax", router, out="weights", like=router, **attributes)


@pytest.mark.parametrize("attributes", [{}, {"axis": -1}, {"axis": 1}])
def test_a_softmax_of_the_router_is_what_moe_computes_itself(attributes: dict[str, Any]) -> None:
    model = with_router_weights(lambda graph, router: softmax(graph, router, **attributes))
    feeds = Codes().experts.feeds()
    (before,) = run(model, feeds)
    assert apply_rules(model, qmoe_to_moe_rules())
    assert [node.op_type for node in model.graph] == ["MoE"]
    (after,) = run(model, feeds)
    assert relative_error(after, before) <= 1e-5


def test_what_moe_to_qmoe_adds_for_the_cpu_goes_again() -> None:
    model = single(k=2, normalize_routing_weights=0)
    there = rewrite(model, [*moe_to_qmoe_rules()])
    assert [node.op_type for node in there.graph] == ["Softmax", "QMoE"]
    assert [node.op_type for node in back(there).graph] == ["MoE"]


NOT_A_SOFTMAX = "router_weights is not Softmax(router_probs), which is all that MoE mixes with"


@pytest.mark.parametrize(
    ("make", "normalize", "reason"),
    [
        (softmax, 1, "router_weights is present with normalize_routing_weights=1"),
        (lambda graph, router: router, 0, NOT_A_SOFTMAX),
        (lambda graph, router: softmax(graph, router, axis=0), 0, NOT_A_SOFTMAX),
        (
            lambda graph, router: graph.op("Sigmoid", router, out="weights", like=router),
            0,
            NOT_A_SOFTMAX,
        ),
        (
            lambda graph, router: softmax(graph, graph.op("Neg", router, out="other", like=router)),
            0,
            NOT_A_SOFTMAX,
        ),
    ],
    ids=["normalized", "an input", "another axis", "a sigmoid", "another router"],
)
def test_other_routing_weights_are_a_reason(
    make: Callable[[Graph, ir.Value], ir.Value], normalize: int, reason: str
) -> None:
    report = Report()
    model = back(with_router_weights(make, normalize), report=report)
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]
    assert ops.inputs(the_node(model))["router_weights"] is not None


def test_a_kernel_that_renormalizes_all_the_same_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    report = Report()
    back(Codes().model(normalize_routing_weights=0), report=report)
    (warning,) = report.rows[0].warnings
    assert warning == (
        "normalize_routing_weights=0 without router_weights: the CPU kernel of QMoE renormalizes "
        "all the same, and that of MoE does not"
    )
    assert caplog.messages == [f"qmoe: {warning}"]


# Refusals.


@dataclass(frozen=True)
class Refusal:
    """A node that stays, and why.

    Attributes:
        reason: The exact reason.
        codes: What the node holds.
        attributes: Attributes that differ.
        arrays: Constants that differ, by slot; None leaves one out.
        homes: Constants that live elsewhere (see `Graph.weight`).
    """

    reason: str
    codes: Codes = field(default_factory=Codes)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Any] = field(default_factory=dict)
    homes: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> ir.Model:
        graph = Graph()
        x, router = inputs_of(graph, self.codes.experts)
        values = {
            slot: graph.weight(slot, array, self.homes.get(slot, "initializer"))
            for slot, array in {**self.codes.arrays(), **self.arrays}.items()
            if array is not None
        }
        attributes = self.codes.attributes(**self.attributes)
        return graph.model(append(graph, x, router, values, **attributes))


BLOCKS = Codes(fc1=spec_of(4, 32), zero_points=True)
ROWS = Codes(zero_points=True)
FC3 = Codes(Experts(activation="silu"), fc3=True)
MXFP4 = Codes(fc1=Spec(FORMATS["mxfp4"], 32), layout="k_packed")


def some(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


REFUSALS = {
    "a width that is not known": Refusal(
        "fc1 has 5-bit codes of quant_type='int'; known are int2, int3, int4, int8, mxfp4, nvfp4, "
        "fp8",
        attributes={"expert_weight_bits": 5},
    ),
    "a width of one projection that is not known": Refusal(
        "fc2 has 16-bit codes of quant_type='int'; known are int2, int3, int4, int8, mxfp4, "
        "nvfp4, fp8",
        attributes={"fc2_expert_weight_bits": 16},
    ),
    "a type of codes that is not known": Refusal(
        "fc1 has 4-bit codes of quant_type='wfp4afp8'; known are int2, int3, int4, int8, mxfp4, "
        "nvfp4, fp8",
        attributes={"quant_type": "wfp4afp8"},
    ),
    "integers said to be nvfp4": Refusal(
        "fc1_scales is [3, 384]; weights [N=128, K=384] stored as nvfp4 block 16 in layout "
        "n_packed ask for [3, 128, 24]",
        attributes={"quant_type": "nvfp4"},
    ),
    "fp4 with zero points": Refusal(
        "mxfp4 has floating-point codes, which have no zero points",
        codes=MXFP4,
        arrays={"fc1_zero_points": some(3, 384, 2, dtype=np.uint8)},
    ),
    "floating-point codes without scales": Refusal(
        "fc2_scales: it is missing", codes=MXFP4, arrays={"fc2_scales": None}
    ),
    "one scale per expert that is missing": Refusal(
        "fc1_global_scale: it is missing",
        codes=Codes(fc1=Spec(FORMATS["fp8"])),
        arrays={"fc1_global_scale": None},
    ),
    "scales beside one scale per expert": Refusal(
        "fc2_scales is present, and fp8 expert has none",
        codes=Codes(fc1=Spec(FORMATS["fp8"])),
        arrays={"fc2_scales": some(3)},
    ),
    "activations that are quantized too": Refusal(
        "fc1_act_scale is present, and MoE has no such input",
        codes=MXFP4,
        arrays={"fc1_act_scale": some(1)},
    ),
    "no layout": Refusal(
        "weights_prepacked is not stated, so the layout of its bytes is unknown; "
        "source_layout='raw' says that a CPU build wrote them, 'cutlass_sm80' a CUDA build",
        attributes={"weights_prepacked": -1},
    ),
    "an unknown attribute": Refusal("QMoE has no attribute 'zeal'", attributes={"zeal": 1}),
    "an input of other formats": Refusal(
        "fc1_global_scale is present, and int4 row has none",
        arrays={"fc1_global_scale": some(3)},
    ),
    "weights that are computed": Refusal(
        "fc2_experts_weights: fc2_experts_weights is not a constant",
        homes={"fc2_experts_weights": "computed"},
    ),
    "weights that come at run time": Refusal(
        "fc1_experts_weights: fc1_experts_weights is a graph input, so its default may be "
        "overridden at run time",
        homes={"fc1_experts_weights": "input"},
    ),
    "scales that come at run time": Refusal(
        "fc1_scales: fc1_scales is a graph input, so its default may be overridden at run time",
        homes={"fc1_scales": "overridable"},
    ),
    "zero points that are computed": Refusal(
        "fc1_zero_points: fc1_zero_points is not a constant",
        codes=ROWS,
        homes={"fc1_zero_points": "computed"},
    ),
    "3-bit codes in the packed layout": Refusal(
        "fc1_experts_weights: layout cutlass_sm80 holds 2-bit, 4-bit and 8-bit codes, not 3-bit "
        "ones",
        attributes={"weights_prepacked": 1, "expert_weight_bits": 3},
        arrays={"fc1_experts_weights": some(3, 128, 144, dtype=np.uint8)},
    ),
    "columns that the packed layout cannot hold": Refusal(
        "fc1_experts_weights: layout cutlass_sm80 needs K divisible by 64, and K=96",
        attributes={"weights_prepacked": 1},
        arrays={"fc1_experts_weights": some(3, 96, 192, dtype=np.uint8)},
    ),
    "no scales": Refusal("fc2_scales: it is missing", arrays={"fc2_scales": None}),
    "a bias of an fc3 that is missing": Refusal(
        "fc3_experts_weights: it is missing", arrays={"fc3_experts_bias": some(3, 192)}
    ),
    "codes of another type": Refusal(
        "fc1_experts_weights is int8 (it may be uint8)",
        arrays={"fc1_experts_weights": some(3, 384, 64, dtype=np.int8)},
    ),
    "scales of another type": Refusal(
        "fc1_scales is float64 (it may be bfloat16, float16, float32)",
        arrays={"fc1_scales": some(3, 384, dtype=np.float64)},
    ),
    "scales of two types": Refusal(
        "fc1_scales is float32, fc2_scales is float16",
        arrays={"fc2_scales": some(3, 128, dtype=np.float16)},
    ),
    "scales that are not of the activation's type": Refusal(
        "fc1_scales is float16, input is float32",
        arrays={
            "fc1_scales": some(3, 384, dtype=np.float16),
            "fc2_scales": some(3, 128, dtype=np.float16),
        },
    ),
    "too few axes": Refusal(
        "fc1_experts_weights is [384, 64]; it has three axes",
        arrays={"fc1_experts_weights": some(384, 64, dtype=np.uint8)},
    ),
    "more rows than scales": Refusal(
        "fc2_scales is [3, 128]; weights [N=130, K=192] stored as int4 row in layout raw ask for "
        "[3, 130]",
        arrays={"fc2_experts_weights": some(3, 130, 96, dtype=np.uint8)},
    ),
    "more experts than scales": Refusal(
        "fc2_scales is [2, 128]; weights [N=128, K=192] stored as int4 row in layout raw ask for "
        "[3, 128]",
        arrays={"fc2_scales": some(2, 128)},
    ),
    "scales of blocks without a block size": Refusal(
        "fc1_scales is [3, 384, 4]; weights [N=384, K=128] stored as int4 row in layout raw ask "
        "for [3, 384]",
        arrays={"fc1_scales": some(3, 384, 4)},
    ),
    "scales of other blocks": Refusal(
        "fc1_scales is [3, 384, 4]; weights [N=384, K=128] stored as int4 asymmetric block 64 in "
        "layout raw ask for [3, 384, 2]",
        codes=BLOCKS,
        attributes={"block_size": 64},
    ),
    "blocks that do not divide": Refusal(
        "fc1_experts_weights: K=128 is not divisible by block_size=48",
        codes=BLOCKS,
        attributes={"block_size": 48},
    ),
    "zero points of rows": Refusal(
        "fc2_zero_points is [3, 128]; weights [N=128, K=192] stored as int4 asymmetric row in "
        "layout raw ask for [3, 64]",
        codes=ROWS,
        arrays={"fc2_zero_points": some(3, 128, dtype=np.uint8)},
    ),
    "zero points of blocks": Refusal(
        "fc2_zero_points is [3, 128, 6]; weights [N=128, K=192] stored as int4 asymmetric block "
        "32 in layout raw ask for [3, 128, 3]",
        codes=BLOCKS,
        arrays={"fc2_zero_points": some(3, 128, 6, dtype=np.uint8)},
    ),
    "projections that disagree": Refusal(
        "fc1_experts_weights is [3, 384, 128]; fc2_experts_weights [3, 128, 128] with activation "
        "'swiglu' asks for [3, 256, 128]",
        arrays={"fc2_experts_weights": some(3, 128, 64, dtype=np.uint8)},
    ),
    "an fc3 that disagrees": Refusal(
        "fc3_experts_weights is [3, 200, 128]; fc2_experts_weights [3, 128, 192] with activation "
        "'silu' asks for [3, 192, 128]",
        codes=FC3,
        arrays={
            "fc3_experts_weights": some(3, 200, 64, dtype=np.uint8),
            "fc3_scales": some(3, 200),
        },
    ),
    "an fc3 and a fused fc1": Refusal(
        "swiglu_fusion=1 with fc3, which is the gate's partner already",
        codes=Codes(fc3=True),
        attributes={"swiglu_fusion": 1},
    ),
    "a bias that disagrees": Refusal(
        "fc1_experts_bias is [3, 380]; the weights ask for [3, 384]",
        arrays={"fc1_experts_bias": some(3, 380)},
    ),
}


@pytest.mark.parametrize("case", REFUSALS.values(), ids=REFUSALS.keys())
def test_a_refused_node_stays_as_it_was(case: Refusal, caplog: pytest.LogCaptureFixture) -> None:
    model = case.model()
    node = the_node(model)
    before = (list(node.inputs), dict(node.attributes), list(model.graph.initializers))
    report = Report()
    model = back(model, report=report)
    assert [(row.node, row.status, row.reason) for row in report.rows] == [
        ("qmoe", SKIPPED, case.reason)
    ]
    assert caplog.record_tuples == [
        ("qmoe_rules.rules._stored", logging.WARNING, f"qmoe stays as it is: {case.reason}")
    ]
    assert the_node(model) is node
    assert (list(node.inputs), dict(node.attributes), list(model.graph.initializers)) == before


def test_scales_without_the_type_of_the_activations_ask_for_that_of_the_input() -> None:
    codes = Codes(Experts(bias=False), Spec(FORMATS["mxfp4"], 32), layout="n_packed")
    model = codes.model()
    node = the_node(model)
    untyped = ir.node("Relu", [node.inputs[0]])
    model.graph.insert_before(node, untyped)
    node.replace_input_with(0, untyped.outputs[0])
    report = Report()
    apply_rules(model, qmoe_to_moe_rules(report=report))
    reason = "the type of its input is not known"
    assert [(row.status, row.reason) for row in report.rows] == [(SKIPPED, reason)]
    assert the_node(model) is node


def test_an_input_that_the_schema_does_not_know_is_a_reason() -> None:
    model = Codes().model()
    node = the_node(model)
    node.resize_inputs(len(ops.QMOE_INPUTS) + 1)
    node.replace_input_with(len(ops.QMOE_INPUTS), node.inputs[0])
    report = Report()
    back(model, report=report)
    assert [row.reason for row in report.rows] == ["it has more inputs than the 21 that are known"]


def test_a_node_inside_a_function_stays() -> None:
    model = Codes().model()
    body = the_node(model)
    inputs = [value for value in body.inputs if value is not None]
    formal = {value: ir.val(str(value.name), value.dtype, value.shape) for value in inputs}
    slots = [formal[value] if value is not None else None for value in body.inputs]
    inner = ir.Node(ops.DOMAIN, "QMoE", slots, list(body.attributes.values()), name="qmoe")
    inner.outputs[0].name = "inner"
    graph = ir.Graph(
        list(formal.values()), inner.outputs, nodes=[inner], opset_imports={"": 21, ops.DOMAIN: 1}
    )
    function = ir.Function("local", "Experts", graph=graph, attributes=())
    outer = Graph()
    x, router = inputs_of(outer, Codes().experts)
    arrays = Codes().arrays()
    given = [x, router, *(outer.weight(str(v.name), arrays[str(v.name)]) for v in inputs[2:])]
    y = outer.op("Experts", *given, out="y", like=x, domain="local")
    opsets = {"": 21, ops.DOMAIN: 1, "local": 1}
    report = Report()
    model = outer.model(y, opsets=opsets, functions=[function])
    back(model, report=report)
    assert {(row.status, row.reason) for row in report.rows} == {
        (
            SKIPPED,
            "it is inside a function, which holds no initializers; inline it (see prepare)",
        )
    }


@pytest.mark.parametrize("layout", ["cutlass_sm90", "RAW", ""])
def test_layouts_that_no_node_has_are_refused_at_once(layout: str) -> None:
    with pytest.raises(ConfigError) as caught:
        qmoe_to_moe_rules(source_layout=layout)
    assert str(caught.value) == f"source_layout={layout!r}; it may be 'raw' or 'cutlass_sm80'"


# The graph.


def bodies(shared: bool) -> ir.Model:
    """Returns an If whose bodies hold a QMoE each, of the same constants or of their own."""
    codes = Codes(fc1=spec_of(4, 32))
    outer = Graph()
    common: dict[str, ir.Value] = {}

    def fill(graph: Graph, x: ir.Value, router: ir.Value) -> ir.Value:
        values = common if shared else {}
        if not values:
            home = outer if shared else graph
            values |= {slot: home.weight(slot, array) for slot, array in codes.arrays().items()}
        return append(graph, x, router, values, out="z", **codes.attributes())

    return branches(fill, fill, outer)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_nodes_in_both_bodies_of_an_if(shared: bool) -> None:
    model = bodies(shared)
    feeds = {"flag": np.array(True), **Codes().experts.feeds()}
    (before,) = run(model, feeds)
    model = back(model)
    assert not nodes_of(model, "QMoE")
    nodes = nodes_of(model, "MoE")
    assert len(nodes) == 2
    (after,) = run(model, feeds)
    assert relative_error(after, before) <= 1e-5
    wanted = {f"{slot}_dequantized" for slot in FLOAT} | {f"fc{i}_experts_bias" for i in (1, 2)}
    homes = [model.graph] if shared else [node.graph for node in nodes]
    for home in homes:
        assert isinstance(home, ir.Graph)
        assert set(home.initializers) == wanted
    assert (nodes[0].inputs[2] is nodes[1].inputs[2]) is shared


def test_shared_codes_with_other_scales_are_not_shared_weights() -> None:
    codes = Codes(Experts(activation="relu", hidden=192))
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values: dict[str, ir.Value | None] = {
        slot: graph.weight(slot, array) for slot, array in codes.arrays().items()
    }
    first = append(graph, x, router, values, out="first", name="first", **codes.attributes())
    doubled = graph.weight("doubled", 2 * codes.arrays()["fc1_scales"])
    other = {**values, "fc1_scales": doubled}
    y = append(graph, first, router, other, out="y", name="second", **codes.attributes())
    one, two = nodes_of(back(graph.model(y)), "MoE")
    assert one.inputs[4] is two.inputs[4]
    np.testing.assert_array_equal(
        2 * constants(one)["fc1_experts_weights"], constants(two)["fc1_experts_weights"]
    )
    names = ["fc1_experts_weights_dequantized", "fc1_experts_weights_dequantized_1"]
    assert [node.inputs[2].name for node in (one, two)] == names  # type: ignore[union-attr]


def test_codes_stay_for_a_node_that_was_refused() -> None:
    codes = Codes(Experts(activation="relu", hidden=192))
    graph = Graph()
    x, router = inputs_of(graph, codes.experts)
    values = {slot: graph.weight(slot, array) for slot, array in codes.arrays().items()}
    first = append(graph, x, router, values, out="first", name="first", **codes.attributes())
    odd = codes.attributes(weights_prepacked=-1)
    y = append(graph, first, router, values, out="y", name="second", **odd)
    report = Report()
    model = back(graph.model(y), report=report)
    assert [row.status for row in report.rows] == [CONVERTED, SKIPPED]
    assert set(codes.arrays()) <= set(model.graph.initializers)
    assert all(value is not None and value.graph is model.graph for value in values.values())


def test_weights_can_be_quantized_anew_in_the_same_sweep() -> None:
    codes = Codes(fc1=spec_of(4, 32))
    reports = Report(), Report()
    model = rewrite(
        codes.model(),
        [*qmoe_to_moe_rules(report=reports[0]), *moe_to_qmoe_rules(bits=8, report=reports[1])],
    )
    node = the_node(model)
    assert ops.attributes(node)["expert_weight_bits"] == 8
    assert [[row.status for row in report.rows] for report in reports] == [[CONVERTED]] * 2
    found = constants(node)
    spec = Recipe(bits=8).specs["fc1"]
    for name, weight in codes.weights().items():
        again = [rtn_numpy(expert, spec) for expert in meant(weight)]
        np.testing.assert_array_equal(
            found[f"{name}_experts_weights"], np.stack([expert.packed for expert in again])
        )
    used = {str(value.name) for value in node.inputs if value is not None}
    assert set(model.graph.initializers) == used - {"x", "router_probs"}


def test_nothing_is_read_before_somebody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: QuantizedWeights) -> None:
        raise AssertionError("an expert was dequantized")

    with monkeypatch.context() as patch:
        patch.setattr(QuantizedWeights, "dequantize", refuse)
        model = back(Codes().model())
    assert constants(the_node(model, "MoE"))["fc1_experts_weights"].any()


def test_a_dry_run_leaves_nothing_behind() -> None:
    model = Codes().model()
    before = list(model.graph.initializers)
    rules = qmoe_to_moe_rules()
    rules.apply_to_model(model, tracer=MatchingTracer())
    assert list(model.graph.initializers) == before
    assert the_node(model).op_type == "QMoE"


def test_rule_objects_may_be_used_again() -> None:
    rules = [*qmoe_to_moe_rules()]
    for _ in range(2):
        assert nodes_of(rewrite(Codes().model(), rules), "MoE")


# Real models.


@pytest.mark.parametrize(
    ("name", "source_layout"),
    [("genai-gptoss-int4-cpu", "raw"), ("genai-gptoss-int4-cuda", "cutlass_sm80")],
)
def test_a_model_of_the_genai_builder(
    name: str, source_layout: str, shared: Path, tmp_path: Path
) -> None:
    path = shared / "models" / name / "model.onnx"
    report = Report()
    back(ir.load(path), report=report)
    assert [row.status for row in report.rows] == [SKIPPED] * 2
    assert all(row.reason.startswith("weights_prepacked is not stated") for row in report.rows)

    report = Report()
    model = back(ir.load(path), source_layout, report)
    assert [row.status for row in report.rows] == [CONVERTED] * 2
    save(model, tmp_path / "model.onnx")
    real = ir.load(shared / "models" / "genai-gptoss-fp32-cpu" / "model.onnx")
    for node, original in zip(
        nodes_of(ir.load(tmp_path / "model.onnx"), "MoE"), nodes_of(real, "MoE"), strict=True
    ):
        for slot in FLOAT:
            weights, wanted = constants(node)[slot], constants(original)[slot]
            assert relative_error(weights, wanted) < 0.15


def test_a_model_whose_shapes_disagree(shared: Path) -> None:
    path = shared / "models" / "genai-phimoe-int4-cuda-raw" / "model.onnx"
    report = Report()
    model = back(ir.load(path), report=report)
    assert {(row.status, row.reason) for row in report.rows} == {
        (SKIPPED, "input is [?, ?, 128]; the weights ask for [?, ?, 192]")
    }
    assert len(nodes_of(model, "QMoE")) == 2
