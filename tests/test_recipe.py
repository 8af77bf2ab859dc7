"""Recipes: what is refused when one is made, and which settings a node gets."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.providers import TARGETS
from qmoe_rules.recipe import Override, Recipe

NODE = "/model/layers.0/moe/MoE"


def settings_of(recipe: Recipe) -> tuple[int, int, str]:
    return recipe.bits, recipe.block_size, recipe.method


def test_the_default_is_portable_int4_with_a_scale_per_row() -> None:
    recipe = Recipe()
    assert recipe == Recipe(
        bits=4,
        block_size=0,
        method="rtn",
        layout="raw",
        target="portable",
        nodes_to_exclude=(),
        overrides=(),
    )
    assert recipe.specs["fc1"] == Spec(FORMATS["int4"], 0)
    assert recipe.provider_target is TARGETS["portable"]
    assert not recipe.excludes(NODE)
    assert recipe.resolve(NODE) == recipe


def test_the_spec_follows_bits_and_block_size() -> None:
    assert Recipe(bits=8, block_size=64).specs["fc1"] == Spec(FORMATS["int8"], 64)


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
NO_SM90 = (
    "layout cutlass_sm90 is never read by QMoE: every GPU, Hopper and later too, reads "
    "cutlass_sm80 (measured with onnxruntime-gpu 1.31.1 on an H200)"
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, "bits=5; it may be 4, 8"),
        ({"bits": "4"}, "bits='4'; it may be 4, 8"),
        ({"bits": True}, "bits=True; it may be 4, 8"),
        ({"block_size": 48}, f"block_size=48; {BLOCKS}"),
        ({"block_size": 8}, f"block_size=8; {BLOCKS}"),
        ({"block_size": -16}, f"block_size=-16; {BLOCKS}"),
        ({"block_size": True}, f"block_size=True; {BLOCKS}"),
        ({"block_size": False}, f"block_size=False; {BLOCKS}"),
        ({"block_size": 32.0}, f"block_size=32.0; {BLOCKS}"),
        ({"block_size": None}, f"block_size=None; {BLOCKS}"),
        ({"method": "rnt"}, "method='rnt'; it may be 'rtn'"),
        ({"target": "gpu"}, "target='gpu'; it may be 'portable', 'cpu', 'cuda'"),
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
            "pattern 're:(' is no regular expression: "
            "missing ), unterminated subpattern at position 0",
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
            "override for 'a' sets 'layout'; it may set bits, block_size, method",
        ),
        (
            {"overrides": [("a", {"bit": 8})]},
            "override for 'a' sets 'bit'; it may set bits, block_size, method",
        ),
        (
            {"overrides": [("re:[", {"bits": 8})]},
            "pattern 're:[' is no regular expression: unterminated character set at position 0",
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
        ("a:bits=5", "bits=5; it may be 4, 8"),
        ("a:bits=four", "bits='four'; it may be 4, 8"),
        ("a:block_size=48", f"block_size=48; {BLOCKS}"),
        ("a:method=gptq", "method='gptq'; it may be 'rtn'"),
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
            "known: bits, block_size, method, layout, target, nodes_to_exclude, overrides",
        ),
    ],
)
def test_an_unknown_field_is_refused_with_the_closest_known_one(field: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe.of(**{field: 8})
    assert str(error.value) == f"recipe has no field {field!r}; {hint}"


def test_a_config_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="bits=3"):
        Recipe(bits=3)


# Which node a pattern means.


@pytest.mark.parametrize(
    ("pattern", "matches", "differs"),
    [
        (NODE, [NODE], ["/model/layers.1/moe/MoE", NODE + "_1", "x" + NODE]),
        ("*layers.0/*", [NODE], ["/model/layers.10/moe/MoE"]),
        ("layer?", ["layer1"], ["layer10", "layer", "LAYER1"]),
        ("moe[0]", ["moe[0]", "moe0"], ["moe1"]),  # a name, and a pattern with a set
        (r"re:.*layers\.[0-3]/.*", [NODE], ["/model/layers.4/moe/MoE", "/model/layersx0/moe"]),
        ("re:moe", ["moe"], ["moe_1", "a_moe", "re:moe"]),  # the whole name, nothing else
        ("re:", [""], ["a"]),
        ("", [""], ["a"]),
    ],
)
def test_a_pattern_is_a_name_an_fnmatch_pattern_or_a_regex(
    pattern: str, matches: list[str], differs: list[str]
) -> None:
    excluding = Recipe.of(nodes_to_exclude=[pattern])
    overriding = Recipe.of(overrides=[(pattern, {"bits": 8})])
    for name in [*matches, *differs]:
        assert excluding.excludes(name) == (name in matches), name
        assert overriding.resolve(name).bits == (8 if name in matches else 4), name


@given(st.text())
def test_a_name_without_a_prefix_always_means_itself(name: str) -> None:
    if not name.startswith("re:"):
        assert Recipe(nodes_to_exclude=("unlike this", name)).excludes(name)


def test_any_of_several_patterns_excludes() -> None:
    recipe = Recipe(nodes_to_exclude=("a", "b*", "re:c+"))
    assert [recipe.excludes(name) for name in ("a", "bb", "cc", "d")] == [True, True, True, False]


def test_the_first_override_that_matches_wins_and_the_rest_stays() -> None:
    recipe = Recipe.of(
        block_size=32,
        target="cpu",
        nodes_to_exclude=["z"],
        overrides=["*layers.0/*:bits=8", ("*layers.*", {"block_size": 0}), f"{NODE}:block_size=64"],
    )
    assert settings_of(recipe.resolve(NODE)) == (8, 32, "rtn")  # nothing of the later ones
    assert settings_of(recipe.resolve("/model/layers.7/moe")) == (4, 0, "rtn")
    assert recipe.resolve("other") == recipe
    resolved = recipe.resolve(NODE)
    assert (resolved.target, resolved.layout) == ("cpu", "raw")
    assert resolved.excludes("z")
    assert resolved.resolve("/model/layers.7/moe") == resolved  # a node's recipe is final


@pytest.mark.parametrize(
    ("given_as", "pattern", "fields"),
    [
        ("a:bits=8", "a", {"bits": 8}),
        ("a:bits=8,block_size=32,method=rtn", "a", {"bits": 8, "block_size": 32, "method": "rtn"}),
        (r"re:.*\.0/.*:bits=8", r"re:.*\.0/.*", {"bits": 8}),
        ("a:b:block_size=0", "a:b", {"block_size": 0}),
        (("a", {"bits": 8}), "a", {"bits": 8}),
        (("a:bits=4", {"bits": 8}), "a:bits=4", {"bits": 8}),
        (Override("a", (("bits", 8),)), "a", {"bits": 8}),
    ],
)
def test_an_override_is_read_from_text_a_pair_or_itself(
    given_as: Any, pattern: str, fields: dict[str, Any]
) -> None:
    override = Override.parse(given_as)
    assert (override.pattern, dict(override.settings)) == (pattern, fields)
    recipe = Recipe.of(overrides=[given_as])
    assert recipe.overrides == (override,)


# A recipe as a value.


def test_of_changes_the_given_fields_of_a_recipe_and_leaves_it_alone() -> None:
    base = Recipe.of(bits=8, block_size=32, overrides=[("a", {"bits": 4})])
    changed = Recipe.of(base, block_size=64)
    assert settings_of(changed) == (8, 64, "rtn")
    assert changed.overrides == base.overrides
    assert base.block_size == 32
    assert Recipe.of(base) == base
    assert Recipe.of() == Recipe()
    with pytest.raises(ConfigError, match="bits=3"):
        Recipe.of(base, bits=3)


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


@pytest.mark.parametrize("field", ["bit", "layout"])
def test_an_override_checks_its_fields_itself(field: str) -> None:
    with pytest.raises(ConfigError, match=f"override for 'a' sets '{field}'"):
        Override("a", ((field, "raw"),))


@pytest.mark.parametrize("override", ["a:bits=8,bits=4", "a:bits=", "a:", ("a", {})])
def test_an_override_says_each_thing_once(override: Any) -> None:
    with pytest.raises(ConfigError, match="override"):
        Recipe(overrides=[override])
