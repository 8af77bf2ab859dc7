"""The strategies of `qmoe_rules.testing`: what they reach, how they shrink, what they refuse."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from qmoe_rules import ops
from qmoe_rules.audit import audit
from qmoe_rules.kernels import RIGHT
from qmoe_rules.overrides import matches
from qmoe_rules.passes import prepare
from qmoe_rules.providers import TARGETS
from qmoe_rules.recipe import Recipe
from qmoe_rules.testing import (
    Corner,
    LayerDesign,
    ModelDesign,
    WeightDesign,
    assert_valid,
    build_model,
    expert_shapes,
    expert_weights,
    feeds_for,
    model_designs,
    moe_models,
    moe_nodes,
    recipes,
    weight_designs,
)
from tests.moe_models import Array, run

FINDING = settings(
    max_examples=500,
    derandomize=True,
    phases=[Phase.generate, Phase.shrink],
)
SOME = settings(max_examples=60)


def found(strategy: SearchStrategy[Any], wanted: Callable[[Any], bool]) -> Any:
    return find(strategy, wanted, settings=FINDING)


def limits(weight: Array) -> Any:
    return ml_dtypes.finfo(weight.dtype)  # type: ignore[no-untyped-call]


# Weights.


def sizes(weight: Array) -> Array:
    """Magnitudes, in a type that holds every subnormal."""
    return np.abs(weight.astype(np.float64))


def has_subnormals(weight: Array) -> bool:
    size = sizes(weight)
    return bool(((size > 0) & (size < float(limits(weight).smallest_normal))).any())


def has_zeros_of_both_signs(weight: Array) -> bool:
    negative = np.signbit(weight.astype(np.float32))
    zero = weight == 0
    return bool((zero & negative).any() and (zero & ~negative).any())


def has_tie(weight: Array) -> bool:
    """A row whose largest number is there with both signs."""
    wide = weight.astype(np.float64)
    return bool(((wide.max(axis=2) == -wide.min(axis=2)) & (wide.max(axis=2) > 0)).any())


def has_constant_block(weight: Array) -> bool:
    if weight.shape[2] < 32:
        return False
    block = weight[:, :, :16].astype(np.float64)
    rest = weight[:, :, 16:].astype(np.float64)
    constant = (block == block[:, :, :1]).all(axis=2) & (block[:, :, 0] != 0)
    return bool((constant & (rest.std(axis=2) > 0)).any())


CORNERS: dict[str, Callable[[Array], bool]] = {
    "a zero row": lambda w: w.shape[1] > 1 and bool(((w == 0).all(axis=2) & (w != 0).any()).any()),
    "a zero expert": lambda w: len(w) > 1 and bool((w[0] == 0).all() and (w[1] != 0).any()),
    "an outlier": lambda w: bool((sizes(w) > 20 * np.median(sizes(w)) + 1).any()),
    "a constant block": has_constant_block,
    "a tie": has_tie,
    "zeros of both signs": has_zeros_of_both_signs,
    "subnormals": has_subnormals,
    "the largest number": lambda w: bool((sizes(w) == float(limits(w).max)).any()),
    "float16": lambda w: w.dtype == np.float16,
    "bfloat16": lambda w: w.dtype.name == "bfloat16",
}


@pytest.mark.parametrize("corner", CORNERS)
def test_weights_reach_every_corner(corner: str) -> None:
    weight = found(expert_weights(), CORNERS[corner])
    assert np.isfinite(weight.astype(np.float64)).all()
    assert weight.size <= 64  # nothing that the corner does not need


@pytest.mark.parametrize(
    ("switch", "wanted"),
    [("allow_infinity", np.isinf), ("allow_nan", np.isnan)],
)
def test_what_is_not_finite_is_asked_for(switch: str, wanted: Callable[[Any], Array]) -> None:
    switches: dict[str, Any] = {switch: True}
    weights = expert_weights(**switches)
    weight = found(weights, lambda w: bool(wanted(w.astype(np.float32)).any()))
    assert weight.shape == (1, 1, 1)


@SOME
@given(expert_weights(allow_extremes=False, allow_subnormal=False))
def test_weights_without_extremes_are_ordinary_numbers(weight: Array) -> None:
    assert sizes(weight).max() <= 16
    assert not has_subnormals(weight)


@SOME
@given(expert_weights(shapes=expert_shapes(max_columns=128, column_step=32)))
def test_weights_have_the_shapes_that_are_asked_for(weight: Array) -> None:
    experts, rows, columns = weight.shape
    assert experts <= 3
    assert rows <= 4
    assert columns in (32, 64, 96, 128)


def test_the_simplest_weight_tells_its_places_apart() -> None:
    design = found(weight_designs(), lambda design: True)
    assert design == WeightDesign()
    weight = design.array((3, 8, 16), np.float16)
    assert (weight * 16 == np.rint(weight * 16)).all()
    rows = weight.reshape(-1, 16)
    assert len(np.unique(rows, axis=0)) == len(rows)
    assert not np.array_equal(design.salted(1).array((3, 8, 16), np.float16), weight)


# Models.

IN_DESIGNS: dict[str, Callable[[ModelDesign], bool]] = {
    "shared weights": lambda d: d.layers[-1].shared,
    "a function": lambda d: d.layers[0].place == "function" and not d.layers[0].inside,
    "a function with its weights": lambda d: d.layers[0].place == "function" and d.layers[0].inside,
    "an If": lambda d: d.layers[0].place == "if",
    "a Loop with its weights": lambda d: d.layers[0].place == "loop" and d.layers[0].inside,
    "weights behind a Transpose": lambda d: d.layers[0].behind == "Transpose",
    "weights behind a Split": lambda d: d.layers[0].behind == "Split",
    "Constant nodes": lambda d: d.layers[0].home == "constant",
    "fc3 with biases": lambda d: d.layers[0].form == "fc3" and "fc3" in d.layers[0].biases,
    "halves": lambda d: d.layers[0].form == "halves",
    "geglu": lambda d: d.layers[0].activation == "geglu",
    "a limit": lambda d: d.layers[0].limit is not None,
    "a router of its own": lambda d: d.layers[0].router == "matmul",
    "three axes": lambda d: d.rank == 3,
    "opset 13": lambda d: d.opset == 13,
    "bfloat16": lambda d: d.dtype == "bfloat16",
    "no names": lambda d: not d.named,
    "sizes that no block divides": lambda d: d.hidden == 20,
    "a zero expert": lambda d: "zero_expert" in [c.kind for c in d.layers[0].weights.corners],
}


@pytest.mark.parametrize("corner", IN_DESIGNS)
def test_models_reach_every_corner_and_have_nothing_else(corner: str) -> None:
    design = found(model_designs(), IN_DESIGNS[corner])
    plain = ModelDesign()
    changed = [f.name for f in dataclasses.fields(design) if f.name != "layers"]
    changed = [name for name in changed if getattr(design, name) != getattr(plain, name)]
    layer = design.layers[-1]
    fields = [f.name for f in dataclasses.fields(layer)]
    changed += [name for name in fields if getattr(layer, name) != getattr(LayerDesign(), name)]
    assert len(design.layers) == (2 if layer.shared else 1)
    assert len(changed) <= 3, design


def test_the_simplest_model_is_the_default_design() -> None:
    assert found(model_designs(), lambda design: True) == ModelDesign()


@SOME
@given(model_designs())
def test_every_model_is_valid(design: ModelDesign) -> None:
    model = build_model(design)
    assert_valid(model)
    assert eval(repr(design)) == design
    again = ir.to_proto(build_model(design)).SerializeToString()
    assert ir.to_proto(model).SerializeToString() == again


@SOME
@given(st.data(), st.sampled_from(["cpu", "cuda", "portable", "webgpu"]))
def test_every_model_runs_right_where_it_is_said_to(data: st.DataObject, target: str) -> None:
    model = data.draw(moe_models(runs_on=target))
    for node in ops.nodes(prepare(model.clone()), "MoE"):
        assert audit(node, target).verdict == RIGHT
    if target in ("cpu", "portable"):
        assert_valid(model, runs_on="cpu")


@settings(SOME, max_examples=20)
@given(st.data())
def test_models_run_on_the_feeds_that_are_drawn_for_them(data: st.DataObject) -> None:
    model = data.draw(moe_models(runs_on="cpu"))
    feeds = data.draw(feeds_for(model, min_tokens=2, max_tokens=5))
    (y,) = run(model, feeds)
    assert y.shape == feeds["x"].shape
    assert 2 <= y.shape[-2] <= 5
    assert np.isfinite(y).all()


OFF: dict[str, tuple[dict[str, Any], Callable[[ModelDesign], bool]]] = {
    name: ({f"allow_{name}": False}, unwanted)
    for name, unwanted in {
        "biases": lambda d: any(each.biases for each in d.layers),
        "shared_weights": lambda d: any(each.shared for each in d.layers),
        "nodes_before_weights": lambda d: any(each.behind for each in d.layers),
        "constant_nodes": lambda d: any(
            each.home == "constant" or (each.place, each.inside) == ("function", True)
            for each in d.layers
        ),
        "functions": lambda d: any(each.place == "function" for each in d.layers),
        "subgraphs": lambda d: any(each.place in ("if", "loop") for each in d.layers),
        "computed_routers": lambda d: any(each.router != "input" for each in d.layers),
        "residuals": lambda d: d.residual,
        "annotations": lambda d: d.annotated,
        "unnamed_nodes": lambda d: not d.named,
    }.items()
}


@pytest.mark.parametrize("name", OFF)
def test_everything_can_be_switched_off(name: str) -> None:
    switch, unwanted = OFF[name]
    found(model_designs(), unwanted)

    @SOME
    @given(model_designs(**switch, max_layers=3))
    def check(design: ModelDesign) -> None:
        assert not unwanted(design)

    check()


@SOME
@given(
    model_designs(
        min_layers=3,
        max_experts=2,
        dtypes=["float16"],
        forms=["halves", "fc3"],
        activations=["geglu"],
        hidden_sizes=[7],
        inter_sizes=[3],
        opsets=[18],
        weights=st.just(WeightDesign(seed=9)),
    )
)
def test_everything_can_be_chosen(design: ModelDesign) -> None:
    assert len(design.layers) == 3
    assert (design.dtype, design.hidden, design.opset) == ("float16", 7, 18)
    for layer in design.layers:
        assert layer.experts <= 2
        assert layer.form in ("halves", "fc3")
        assert (layer.activation, layer.inter, layer.weights.seed) == ("geglu", 3, 9)


@SOME
@given(moe_nodes(runs_on="cpu"))
def test_nodes_stand_alone_in_a_graph(node: ir.Node) -> None:
    assert node.graph is not None
    assert [each.op_type for each in node.graph].count("MoE") == 1
    assert ops.is_op(node, "MoE")


def test_designs_print_as_short_python() -> None:
    design = ModelDesign(
        layers=(LayerDesign(weights=WeightDesign(corners=(Corner("outlier", row=2),))),)
    )
    assert repr(design) == (
        "ModelDesign(layers=(LayerDesign(weights=WeightDesign(corners=(Corner(kind='outlier', "
        "row=2),))),))"
    )


# Recipes.


def test_recipes_shrink_to_the_default_one() -> None:
    assert found(recipes(), lambda recipe: True) == Recipe()
    excluding = found(recipes(), lambda recipe: bool(recipe.nodes_to_exclude))
    assert excluding == Recipe(nodes_to_exclude=excluding.nodes_to_exclude)


@SOME
@given(st.data())
def test_recipes_are_for_the_targets_and_nodes_that_are_named(data: st.DataObject) -> None:
    target = data.draw(st.sampled_from(sorted(TARGETS)))
    names = ["/layers.0/moe", "a[b]*"]
    recipe = data.draw(recipes([target], nodes=names, methods=["search", "rtn"]))
    assert recipe.target == target
    patterns = recipe.patterns
    assert all(sum(matches(pattern, name) for name in names) == 1 for pattern in patterns)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda r: r.format == "nvfp4",
        lambda r: r.specs["fc1"].format.bits > r.specs["fc2"].format.bits,
        lambda r: not r.symmetric and r.target == "portable",
        lambda r: any(dict(each.settings).get("format") == "mxfp4" for each in r.overrides),
        lambda r: r.layout == "cutlass_sm80",
        lambda r: r.budget is not None,
    ],
)
def test_recipes_reach_every_corner(wanted: Callable[[Recipe], bool]) -> None:
    found(recipes(allow_budgets=True), wanted)


# Arguments.


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: model_designs(runs_on="gpu"), "runs_on='gpu'; it may be 'portable', 'cpu'"),
        (lambda: model_designs(runs_on="trt-rtx"), "runs_on='trt-rtx' runs no MoE"),
        (lambda: model_designs(runs_on="cpu", dtypes=["bfloat16"]), r"dtypes \['bfloat16'\]"),
        (lambda: model_designs(dtypes="float16"), "dtypes: 'float16'; it is a collection of"),
        (lambda: model_designs(forms=["odd"]), "forms: 'odd'; it is a collection of plain"),
        (lambda: model_designs(activations=["tanh"]), "activations: 'tanh'"),
        (lambda: model_designs(min_layers=3, max_layers=2), "min_layers=3, max_layers=2"),
        (lambda: model_designs(max_experts=0), "max_experts=0"),
        (lambda: model_designs(hidden_sizes=[]), r"hidden_sizes=\[\]"),
        (lambda: model_designs(opsets=[12]), r"opsets=\[12\]; it holds numbers from 13"),
        (lambda: expert_shapes(max_columns=8, column_step=16), "max_columns=8; it is at least 16"),
        (lambda: recipes(["gpu"]), r"targets=\('gpu',\)"),
        (lambda: recipes(formats="int"), "formats='int'"),
        (lambda: recipes(["trt-rtx"], formats=["fp8"]), "no target of trt-rtx takes fp8"),
        (lambda: recipes(methods=["best"]), r"methods=\['best'\]"),
        (lambda: feeds_for(build_model(ModelDesign()), min_tokens=0), "min_tokens=0"),
    ],
)
def test_wrong_arguments(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(InvalidArgument, match=reason):
        make()
