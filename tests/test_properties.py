"""What holds of any model and any recipe: nothing is lost, and nothing is computed wrongly."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.kernels import RIGHT
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.passes import QuantizeMoEPass, prepare
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED
from qmoe_rules.rules import (
    apply_rules,
    normalize_moe_rules,
    qmoe_to_moe_rules,
    relayout_qmoe_rules,
)
from qmoe_rules.saving import save, saved_bytes
from qmoe_rules.testing import (
    assert_same_meaning,
    assert_untouched,
    assert_valid,
    moe_models,
    recipes,
)

SOME = settings(max_examples=40)


@SOME
@given(moe_models(), recipes(methods=["rtn", "search"]))
def test_any_model_means_what_it_meant_after_any_recipe(model: ir.Model, recipe: Recipe) -> None:
    after = model.clone()
    quantize = QuantizeMoEPass(recipe)
    quantize(after)
    assert_same_meaning(model, after)
    assert_untouched(model, after)
    assert_valid(after)
    found = list(ops.nodes(after, "QMoE"))
    assert quantize.report.count(CONVERTED) == len(found)
    assert all(audit(node, recipe.target).verdict == RIGHT for node in found)
    left = [row for row in quantize.report.rows if row.status == SKIPPED]
    assert len(left) == sum(1 for _ in ops.nodes(after, "MoE"))
    assert all(row.reason for row in left)


@SOME
@given(moe_models(), recipes())
def test_what_is_streamed_to_disk_is_what_is_computed_in_memory(
    model: ir.Model, recipe: Recipe
) -> None:
    QuantizeMoEPass(recipe)(model)
    with tempfile.TemporaryDirectory() as folder:
        save(model, Path(folder) / "model.onnx")
        written = sum(file.stat().st_size for file in Path(folder).iterdir())
        saved = ir.load(Path(folder) / "model.onnx")
        assert written == saved_bytes(model)
        for planned, found in zip(ops.graphs(model), ops.graphs(saved), strict=True):
            assert list(planned.initializers) == list(found.initializers)
            for name, value in planned.initializers.items():
                arrays = [value.const_value, found.initializers[name].const_value]
                first, second = (each.numpy() for each in arrays if each is not None)
                assert (first.dtype, first.shape) == (second.dtype, second.shape)
                assert first.tobytes() == second.tobytes()


@SOME
@given(moe_models(runs_on="cpu"), recipes(["cpu"], formats=["int"]))
def test_what_was_quantized_is_dequantized_to_what_it_means(
    model: ir.Model, recipe: Recipe
) -> None:
    QuantizeMoEPass(recipe)(model)
    after = model.clone()
    apply_rules(after, qmoe_to_moe_rules())
    assert_same_meaning(model, after)
    assert_untouched(model, after)


@SOME
@given(moe_models(hidden_sizes=[64, 128], inter_sizes=[64, 128]), st.sampled_from([4, 8]))
def test_another_layout_and_back_again_changes_no_byte(model: ir.Model, bits: int) -> None:
    QuantizeMoEPass(Recipe(bits=bits, target="cuda"))(model)
    before = ir.to_proto(model)
    for layout in ("cutlass_sm80", "raw"):
        apply_rules(model, relayout_qmoe_rules(layout))
        stated = {ops.attributes(node)["weights_prepacked"] for node in ops.nodes(model, "QMoE")}
        assert stated <= {LAYOUTS[layout].prepacked}
    after = ir.from_proto(ir.to_proto(model))
    assert_same_meaning(before, after)
    assert_untouched(before, after)


@SOME
@given(moe_models(forms=["halves", "fc3"]))
def test_interleaving_gates_keeps_the_meaning(model: ir.Model) -> None:
    after = prepare(model.clone())
    apply_rules(after, normalize_moe_rules())
    assert all(ops.attributes(node)["swiglu_fusion"] == 1 for node in ops.nodes(after, "MoE"))
    assert_same_meaning(model, after)
    assert_untouched(model, after)
    assert_valid(after)


@SOME
@given(moe_models())
def test_inlining_keeps_the_meaning(model: ir.Model) -> None:
    after = prepare(model.clone())
    assert not any(ops.in_function(after, node) for node in ops.nodes(after, "MoE"))
    assert_same_meaning(model, after)
    assert_untouched(model, after)
    assert_valid(after)
