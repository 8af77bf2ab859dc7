"""The suite of docs/testing.md, as it stands there: it finds planted bugs, and shrinks them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from hypothesis import Phase, find, given, settings
from onnxscript.rewriter import rewrite

from qmoe_rules import Recipe, moe_to_qmoe_rules, ops
from qmoe_rules.testing import (
    LayerDesign,
    ModelDesign,
    assert_same_meaning,
    build_model,
    model_designs,
)
from tests.moe_models import Array

DOCUMENT = Path(__file__).parents[1] / "docs" / "testing.md"
SHRINKING = settings(
    max_examples=50,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)
SIMPLEST = ModelDesign(layers=(LayerDesign(activation="swiglu", form="fc3"),))


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    """What the document's Python defines."""
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL):
        exec(compile(block, str(DOCUMENT), "exec"), namespace)
    return namespace


def test_the_right_rule_passes(example: dict[str, Any]) -> None:
    example["test_interleaving_keeps_the_meaning"]()


def test_quantization_passes(example: dict[str, Any]) -> None:
    example["test_quantized_models_mean_what_their_weights_mean"]()


def swapped(rule: type) -> type:
    """The rule of the document with a bug: linear rows come before gate rows."""

    class Swapped(rule):  # type: ignore[misc]
        def interleave(self, gate: Array, up: Array) -> Array:
            wrong: Array = super().interleave(up, gate)
            return wrong

    return Swapped


def test_a_swapped_gate_is_found_and_shrinks_to_the_simplest_layer(example: dict[str, Any]) -> None:
    """What is printed is Python that builds the model again."""
    bug = swapped(example["InterleaveGate"])

    @SHRINKING
    @given(example["exported"])
    def suite(model: ir.Model) -> None:
        example["check"](model, bug)

    with pytest.raises(AssertionError) as failure:
        suite()
    printed = re.search(r"model=(build_model\(.*\)),", "".join(failure.value.__notes__), re.DOTALL)
    assert printed is not None
    names: dict[str, Any] = {each.__name__: each for each in (ModelDesign, LayerDesign)}
    assert eval(printed[1], {**names, "build_model": lambda design: design}) == SIMPLEST
    message = (
        r"^output y is 0\.\d+ off what it was.* at \[\d+, \d+\].*\n/layers.0/moe: constant l0_fc1"
    )
    with pytest.raises(AssertionError, match=message):
        example["check"](build_model(SIMPLEST), bug)


def without_zero_points(model: ir.Model) -> ir.Model:
    """Somebody's tool that writes the inputs of QMoE anew, and forgets the last ones."""
    for node in ops.nodes(model, "QMoE"):
        kept = ops.QMOE_INPUTS.index("fc1_zero_points")
        for index in range(kept, len(node.inputs)):
            node.replace_input_with(index, None)
    return model


def test_forgotten_zero_points_are_found(example: dict[str, Any]) -> None:
    recipe = Recipe(target="cpu", symmetric=False)

    def rewritten(design: ModelDesign) -> tuple[ir.Model, ir.Model]:
        model = build_model(design)
        return model, rewrite(model.clone(), [*moe_to_qmoe_rules(recipe)])

    def loses(design: ModelDesign) -> bool:
        model, after = rewritten(design)
        try:
            assert_same_meaning(model, without_zero_points(after))
        except AssertionError as failure:
            return "weights: " in str(failure)
        return False

    designs = model_designs(runs_on="cpu", max_layers=1, allow_functions=False)
    found = find(designs, loses, settings=SHRINKING)
    assert found == ModelDesign(layers=(LayerDesign(weights=found.layers[0].weights),))
    assert_same_meaning(*rewritten(found))
