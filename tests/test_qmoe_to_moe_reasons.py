"""QMoE nodes that cannot become a float MoE, and why."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.report import SKIPPED, Report
from qmoe_rules.rules import apply_rules, qmoe_to_moe_rules
from tests.moe_models import Experts, Graph, inputs_of, the_node
from tests.qmoe_models import Codes, append, spec_of
from tests.qmoe_rewrites import back


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
