"""Recipes: what their fields come to, and what is refused when one is made."""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import WIDTHS, Override, Recipe

NODE = "/model/layers.0/moe/MoE"


def test_the_default_is_portable_int4_with_a_scale_per_row() -> None:
    recipe = Recipe()
    assert recipe == Recipe(
        format="int",
        bits=None,
        fc2_bits=None,
        block_size=None,
        symmetric=True,
        method="rtn",
        layout=None,
        target="portable",
        nodes_to_exclude=(),
        overrides=(),
    )
    assert recipe.specs == {"fc1": Spec(FORMATS["int4"]), "fc2": Spec(FORMATS["int4"])}
    assert recipe.storage is LAYOUTS["raw"]
    assert recipe.describe() == "int4 row, raw"
    assert recipe.provider_target is TARGETS["portable"]
    assert not recipe.excludes(NODE)
    assert recipe.resolve(NODE) == recipe


@pytest.mark.parametrize(
    ("fields", "fc1", "fc2", "layout", "words"),
    [
        (
            {"bits": 8, "block_size": 64},
            Spec(FORMATS["int8"], 64),
            None,
            "raw",
            "int8 block 64, raw",
        ),
        (
            {"symmetric": False, "block_size": 32},
            Spec(FORMATS["int4"], 32, symmetric=False),
            None,
            "raw",
            "int4 asymmetric block 32, raw",
        ),
        (
            {"bits": 2, "fc2_bits": 4, "block_size": 64, "target": "cuda"},
            Spec(FORMATS["int2"], 64),
            Spec(FORMATS["int4"], 64),
            "raw",
            "int2 block 64 and int4 block 64, raw",
        ),
        (
            {"fc2_bits": 8, "block_size": 32, "target": "cuda"},
            Spec(FORMATS["int4"], 32),
            Spec(FORMATS["int8"], 32),
            "raw",
            "int4 block 32 and int8 block 32, raw",
        ),
        # The CPU kernel of int3, and TensorRT-RTX, take no negative scales.
        (
            {"bits": 3, "block_size": 64, "target": "cpu"},
            Spec(FORMATS["int3"], 64, signed=False),
            None,
            "raw",
            "int3 block 64, raw",
        ),
        (
            {"block_size": 128, "target": "trt-rtx"},
            Spec(FORMATS["int4"], 128, signed=False),
            None,
            "raw",
            "int4 block 128, raw",
        ),
        # Not every kernel takes one scale per row.
        (
            {"target": "trt-rtx"},
            Spec(FORMATS["int4"], 128, signed=False),
            None,
            "raw",
            "int4 block 128, raw",
        ),
        (
            {"bits": 3, "target": "cpu"},
            Spec(FORMATS["int3"], 32, signed=False),
            None,
            "raw",
            "int3 block 32, raw",
        ),
        ({"bits": 2}, Spec(FORMATS["int2"], 32), None, "raw", "int2 block 32, raw"),
        ({"bits": 2, "target": "cpu"}, Spec(FORMATS["int2"]), None, "raw", "int2 row, raw"),
        (
            {"symmetric": False},
            Spec(FORMATS["int4"], 32, symmetric=False),
            None,
            "raw",
            "int4 asymmetric block 32, raw",
        ),
        (
            {"fc2_bits": 8, "target": "cuda"},
            Spec(FORMATS["int4"], 32),
            Spec(FORMATS["int8"], 32),
            "raw",
            "int4 block 32 and int8 block 32, raw",
        ),
        (
            {"format": "mxfp4", "target": "cpu"},
            Spec(FORMATS["mxfp4"], 32),
            None,
            "k_packed",
            "mxfp4 block 32, k_packed",
        ),
        (
            {"format": "nvfp4", "target": "cuda", "bits": 4, "block_size": 16},
            Spec(FORMATS["nvfp4"], 16),
            None,
            "n_packed",
            "nvfp4 block 16, n_packed",
        ),
        (
            {"format": "fp8", "target": "webgpu"},
            Spec(FORMATS["fp8"], 128),
            None,
            "raw",
            "fp8 block 128, raw",
        ),
    ],
)
def test_what_a_recipe_leaves_open_the_format_and_the_target_decide(
    fields: dict[str, Any], fc1: Spec, fc2: Spec | None, layout: str, words: str
) -> None:
    recipe = Recipe(**fields)
    assert recipe.specs == {"fc1": fc1, "fc2": fc2 or fc1}
    assert recipe.storage is LAYOUTS[layout]
    assert recipe.describe() == words


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("target", "layout", "blocks"),
    [
        ("portable", "raw", [0, 32, 64, 128, 256]),
        ("cpu", "raw", [0, 16, 32, 64, 128, 256]),
        ("cuda", "raw", [0, 32, 64, 128, 256]),
        ("cuda", "cutlass_sm80", [0, 32, 64, 128, 256]),
    ],
)
def test_what_a_target_takes_is_a_recipe(
    bits: int, target: str, layout: str, blocks: list[int]
) -> None:
    for block in blocks:
        recipe = Recipe(bits=bits, block_size=block, target=target, layout=layout)
        assert (recipe.bits, recipe.block_size, recipe.target) == (bits, block, target)


def test_the_default_block_size_is_what_the_help_says() -> None:
    """0 where the target takes it, else 32, or 128 for trt-rtx."""
    seen = set()
    for target, bits, symmetric in itertools.product(TARGETS, WIDTHS, (True, False)):
        fields: dict[str, Any] = {"target": target, "bits": bits, "symmetric": symmetric}
        try:
            size = Recipe(**fields).specs["fc1"].block_size
        except ConfigError:  # whatever the size
            continue
        try:
            Recipe(**fields, block_size=0)
        except ConfigError:
            assert size == (128 if target == "trt-rtx" else 32)
        else:
            assert size == 0
        seen.add((target, size))
    assert {("portable", 0), ("portable", 32), ("cpu", 32), ("trt-rtx", 128)} <= seen


# What is wrong, and what would be right.

BLOCKS = "it may be 0 (one scale per row) or a power of two from 16"
EXCLUDES = "it is a sequence of names or patterns"
FORM = "is neither 'PATTERN:bits=8' nor ('PATTERN', {'bits': 8})"
NO_BLOCK_16 = (
    "the CUDA provider does not take block_size=16 with int4 (it takes 0, 32, 64, 128, 256); "
    "target='cpu' takes this recipe"
)
MISREADS = (
    "the CPU provider misreads layout 'cutlass_sm80' (it reads raw); "
    "target='cuda' takes this recipe"
)
METHOD_CHOICES = ", ".join(map(repr, METHODS))
OVERRIDABLE = "format, bits, fc2_bits, block_size, symmetric, method"
NO_SM90 = (
    "layout cutlass_sm90 is never read by QMoE: every GPU, Hopper and later too, reads "
    "cutlass_sm80 (measured with onnxruntime-gpu 1.31.1 on an H200)"
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": "int4"}, "format='int4'; it may be 'int', 'mxfp4', 'nvfp4', 'fp8'"),
        ({"format": None}, "format=None; it may be 'int', 'mxfp4', 'nvfp4', 'fp8'"),
        ({"bits": 5}, "bits=5; it may be 2, 3, 4, 8"),
        ({"bits": "4"}, "bits='4'; it may be 2, 3, 4, 8"),
        ({"bits": True}, "bits=True; it may be 2, 3, 4, 8"),
        ({"fc2_bits": 16}, "fc2_bits=16; it may be 2, 3, 4, 8"),
        ({"fc2_bits": True}, "fc2_bits=True; it may be 2, 3, 4, 8"),
        ({"symmetric": 1}, "symmetric=1; it may be True, False"),
        ({"symmetric": None}, "symmetric=None; it may be True, False"),
        ({"block_size": 48}, f"block_size=48; {BLOCKS}"),
        ({"block_size": 8}, f"block_size=8; {BLOCKS}"),
        ({"block_size": -16}, f"block_size=-16; {BLOCKS}"),
        ({"block_size": True}, f"block_size=True; {BLOCKS}"),
        ({"block_size": False}, f"block_size=False; {BLOCKS}"),
        ({"block_size": 32.0}, f"block_size=32.0; {BLOCKS}"),
        ({"method": "rnt"}, f"method='rnt'; it may be {METHOD_CHOICES}"),
        ({"method": None}, f"method=None; it may be {METHOD_CHOICES}"),
        (
            {"target": "gpu"},
            "target='gpu'; it may be 'portable', 'cpu', 'cuda', 'webgpu', 'trt-rtx'",
        ),
        ({"layout": "cutlass_sm90"}, NO_SM90),
        ({"layout": "cutlass_sm90", "target": "cuda"}, NO_SM90),
        ({"layout": "cutlass_sm80"}, f"target 'portable': {MISREADS}"),
        ({"layout": "cutlass_sm80", "target": "cpu"}, f"target 'cpu': {MISREADS}"),
        ({"block_size": 16}, f"target 'portable': {NO_BLOCK_16}"),
        ({"block_size": 16, "target": "cuda"}, f"target 'cuda': {NO_BLOCK_16}"),
        (  # no target reads this layout and takes this block: none is suggested
            {"block_size": 16, "layout": "cutlass_sm80", "target": "cuda"},
            "target 'cuda': the CUDA provider does not take block_size=16 with int4 "
            "(it takes 0, 32, 64, 128, 256)",
        ),
        ({"nodes_to_exclude": "/moe"}, f"nodes_to_exclude='/moe'; {EXCLUDES}"),
        ({"nodes_to_exclude": None}, f"nodes_to_exclude=None; {EXCLUDES}"),
        (
            {"nodes_to_exclude": ["re:("]},
            "pattern 're:(' is no regular expression of RE2: missing ): (",
        ),
        ({"overrides": "a:bits=8"}, "overrides='a:bits=8'; it is a sequence of overrides"),
        (
            {"overrides": Override("a", (("bits", 8),))},
            "overrides=Override(pattern='a', settings=(('bits', 8),)); "
            "it is a sequence of overrides",
        ),
        ({"overrides": ["a"]}, f"overrides: 'a' {FORM}"),
        ({"overrides": ["a:bits"]}, f"overrides: 'a:bits' {FORM}"),
        ({"overrides": ["a:bits=8,"]}, f"overrides: 'a:bits=8,' {FORM}"),
        ({"overrides": [":bits=8"]}, f"overrides: ':bits=8' {FORM}"),
        ({"overrides": ("a", {"bits": 8})}, f"overrides: 'a' {FORM}"),
        (
            {"overrides": ["a:layout=raw"]},
            f"override for 'a' sets 'layout'; it may set {OVERRIDABLE}",
        ),
        (
            {"overrides": [("a", {"bit": 8})]},
            f"override for 'a' sets 'bit'; it may set {OVERRIDABLE}",
        ),
        (
            {"overrides": [("re:[", {"bits": 8})]},
            "pattern 're:[' is no regular expression of RE2: missing ]: [",
        ),
    ],
)
def test_a_wrong_field_is_refused_with_what_would_be_right(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(**fields)
    assert str(error.value) == message
    with pytest.raises(ConfigError) as error:
        Recipe.of(**fields)
    assert str(error.value) == message


def test_an_unknown_layout_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"^layout='cutlass'; it may be 'raw', 'cutlass_sm80'"):
        Recipe(layout="cutlass")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("a:bits=5", "bits=5; it may be 2, 3, 4, 8"),
        ("a:bits=four", "bits='four'; it may be 2, 3, 4, 8"),
        ("a:symmetric=maybe", "symmetric='maybe'; it may be True, False"),
        ("a:fc2_bits=8", "the CPU provider does not take int4 in fc1 and int8 in fc2"),
        ("a:format=mxfp4", "target 'portable': no layout of mxfp4 is read by both"),
        ("a:format=fp4", "format='fp4'; it may be 'int', 'mxfp4', 'nvfp4', 'fp8'"),
        ("a:block_size=48", f"block_size=48; {BLOCKS}"),
        ("a:method=best", f"method='best'; it may be {METHOD_CHOICES}"),
        ("a:block_size=16", NO_BLOCK_16),  # right for some target, wrong for the recipe's
        (("a", {"block_size": True}), f"block_size=True; {BLOCKS}"),
    ],
)
def test_a_wrong_value_in_an_override_is_refused_when_the_recipe_is_made(
    override: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        Recipe.of(overrides=[override])


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4.0},
        {"overrides": None},
        {"overrides": 8},
        {"overrides": [8]},
        {"overrides": [("a",)]},
        {"overrides": [("a", 8)]},
        {"overrides": [("a", "bits=8")]},
        {"overrides": [(1, {"bits": 8})]},
    ],
    ids=str,
)
def test_values_of_another_kind_are_config_errors_too(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields)).removesuffix("s")):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("field", "hint"),
    [
        ("bit", "did you mean 'bits'?"),
        ("blocksize", "did you mean 'block_size'?"),
        ("node_to_exclude", "did you mean 'nodes_to_exclude'?"),
        (
            "xyz",
            f"known: {', '.join(field.name for field in dataclasses.fields(Recipe))}",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_the_closest_known_one(field: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.of(**{field: 8})
    assert str(error.value) == f"recipe has no field {field!r}; {hint}"


def test_a_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="bits=5"):
        Recipe(bits=5)


# A recipe as a value.


def test_of_changes_the_given_fields_of_a_recipe_and_leaves_it_alone() -> None:
    base = Recipe.of(bits=8, block_size=32, overrides=[("a", {"bits": 4})])
    changed = Recipe.of(base, block_size=64)
    assert (changed.bits, changed.block_size, changed.method) == (8, 64, "rtn")
    assert changed.overrides == base.overrides
    assert base.block_size == 32
    assert Recipe.of(base) == base
    assert Recipe.of() == Recipe()
    with pytest.raises(ConfigError, match="bits=5"):
        Recipe.of(base, bits=5)


def test_a_recipe_cannot_be_changed_and_shares_no_list_with_its_maker() -> None:
    excluded = ["a"]
    recipe = Recipe.of(nodes_to_exclude=excluded)
    excluded.append("b")
    assert recipe.nodes_to_exclude == ("a",)
    with pytest.raises(FrozenInstanceError):
        recipe.bits = 8  # type: ignore[misc]


def test_equal_recipes_hash_alike() -> None:
    one, other = (Recipe.of(overrides=["a:bits=8"], nodes_to_exclude=["b"]) for _ in range(2))
    assert len({one, other, Recipe()}) == 2
