"""A chain of weighted experts is one block that a MoE takes the place of, or says why it is not."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from qmoe_rules.providers import TARGETS
from qmoe_rules.report import Report
from qmoe_rules.rules import apply_rules
from qmoe_rules.rules._fusing import Block
from qmoe_rules.rules.fuse_dense_experts import FuseDenseExperts
from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from qmoe_rules.rules.fuse_nbits_experts import FuseNBitsExperts
from tests import expert_graphs
from tests.expert_graphs import Layer
from tests.moe_models import nodes_of, relative_error, run

SMALL: dict[str, Any] = {"experts": 3, "hidden": 8, "inter": 6}
NBITS: dict[str, Any] = {"experts": 3, "hidden": 32, "inter": 64, "bits": 4}


def found(model: ir.Model, rule: Any = None) -> Block | str | None:
    """Returns what the last Add of a model ends."""
    node = [node for node in model.graph if node.op_type == "Add"][-1]
    block: Block | str | None = (rule or FuseDenseExperts(Report())).find(node)
    return block


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"bias": True},
        {"activation": "silu"},
        {"keepdims": 0, "numbers": [2, 0, 1]},
        {"shared": "before"},
        {"shared": "before", "experts": 1, "k": 1},
    ],
    ids=str,
)
def test_a_block_is_all_nodes_of_the_experts(fields: dict[str, Any]) -> None:
    model = expert_graphs.model(**{**SMALL, **fields})
    block = found(model)
    assert isinstance(block, Block)
    nodes = [node for node in model.graph if node.op_type not in ("Constant", "Identity")]
    outputs = [str(node.outputs[0].name) for node in nodes]
    before = "l0.shared.down.MatMul" if "shared" in fields else None
    assert (None if block.rest is None else block.rest.name) == before
    end = before or next(name for name in outputs if "Div" in name)  # of the router
    assert set(block.nodes) == set(nodes[outputs.index(end) + 1 :])
    assert block.name.removesuffix(".0") == "l0.experts"


def test_experts_are_what_the_graph_says() -> None:
    model = expert_graphs.model(**SMALL, numbers=[2, 0, 1])
    block = found(model)
    assert isinstance(block, Block)
    experts = block.experts
    assert experts.source is model.graph.inputs[0]
    assert experts.storage == {}
    assert experts.gate["weights"].shape == (3, 6, 8)
    assert (experts.routing.k, experts.routing.experts) == (2, 3)
    assert experts.home.name == "l0.experts.1.gate.weight_t"  # the second one is expert 0


def nbits_rule() -> FuseNBitsExperts:
    return FuseNBitsExperts(Report(), TARGETS["cpu"])


def test_quantized_experts_say_how_they_are_stored() -> None:
    block = found(expert_graphs.model(**NBITS), nbits_rule())
    assert isinstance(block, Block)
    assert block.experts.storage["expert_weight_bits"] == 4
    assert block.name.removesuffix(".0") == "l0.experts"


def test_every_family_leaves_the_others_alone() -> None:
    assert found(expert_graphs.model(**NBITS)) is None
    assert found(expert_graphs.model(**SMALL), nbits_rule()) is None


def test_a_layer_is_fused_and_computes_the_same() -> None:
    layer = Layer(**SMALL)
    model, feeds = expert_graphs.model(layer), expert_graphs.feeds(layer)
    before = run(model, feeds)[0]
    apply_rules(model, fuse_experts_rules())
    assert len(nodes_of(model, "MoE")) == 1
    assert relative_error(run(model, feeds)[0], before) < 1e-6


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"numbers": [0, 2]}, "expert 1 is missing"),
        ({"numbers": [1, 2]}, "expert 0 is missing"),
        ({"numbers": [0, 1, 1, 2]}, "expert 1 is added twice"),
        ({"numbers": [0, 0, 1, 2]}, "expert 0 is added twice"),
        ({"numbers": [-1, 0, 1, 2]}, "there is no expert -1"),
        ({"numbers": [0, 1]}, "the router ranks 3 experts, and there are 2"),
        (
            {"odd": {1: {"activation": "relu"}}},
            "expert 1 computes relu(alpha=1, beta=0, limit=None), and expert 0 "
            "swiglu(alpha=1, beta=0, limit=None)",
        ),
    ],
    ids=str,
)
def test_what_is_no_moe(fields: dict[str, Any], reason: str) -> None:
    assert found(expert_graphs.model(**SMALL, **fields)) == reason


def test_an_expert_that_computes_something_else() -> None:
    model = expert_graphs.model(**SMALL)
    sigmoid = [node for node in model.graph if node.op_type == "Sigmoid"][1]
    sigmoid.op_type = "Tanh"
    down = next(n for n in model.graph if n.outputs[0].name == "l0.experts.1.down.MatMul")
    assert down.inputs[0] is not None
    reason = f"expert 1: what {down.inputs[0].name} computes is no activation of MoE"
    assert found(model) == reason


def test_a_wrong_mask_of_any_expert() -> None:
    model = expert_graphs.model(**SMALL)
    cast = [node for node in model.graph if node.op_type == "Cast"][1]
    cast.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    weights = next(node for node in model.graph if node.op_type == "Div").outputs[0]
    weights.dtype = ir.DataType.FLOAT
    assert found(model) == "expert 1 has FLOAT weights and a FLOAT16 mask"


def test_a_router_of_other_tokens() -> None:
    model = expert_graphs.model(**SMALL)
    router = next(node for node in model.graph if node.op_type == "MatMul")
    router.replace_input_with(0, ir.val("pooled", ir.DataType.FLOAT, ["batch", 1, 8]))
    top = next(node for node in model.graph if node.op_type == "TopK")
    reason = f"{top.outputs[1].name} is not known to have one row per token of x"
    assert found(model) == reason


def test_what_the_family_objects_to() -> None:
    layer = Layer(**{**NBITS, "odd": {}})
    model = expert_graphs.model(layer)
    for node in nodes_of(model, "MatMulNBits"):
        if ".down." in str(node.inputs[1].name):  # type: ignore[union-attr]
            node.attributes["block_size"] = ir.AttrInt64("block_size", 64)
    reason = found(model, nbits_rule())
    assert isinstance(reason, str)
    assert reason.startswith("l0.experts.0.down.scales is ")
