"""Which nodes a pattern means, and which settings an override gives them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.recipe import Override, Recipe

NODE = "/model/layers.0/moe/MoE"


def settings_of(recipe: Recipe) -> tuple[int | None, int | None, str]:
    return recipe.bits, recipe.block_size, recipe.method


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
        assert overriding.resolve(name).bits == (8 if name in matches else None), name


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
    assert settings_of(recipe.resolve("/model/layers.7/moe")) == (None, 0, "rtn")
    assert recipe.resolve("other") == recipe
    resolved = recipe.resolve(NODE)
    assert (resolved.target, resolved.storage.name) == ("cpu", "raw")
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


@pytest.mark.parametrize("field", ["bit", "layout"])
def test_an_override_checks_its_fields_itself(field: str) -> None:
    with pytest.raises(ConfigError, match=f"override for 'a' sets '{field}'"):
        Override("a", ((field, "raw"),))


@pytest.mark.parametrize("override", ["a:bits=8,bits=4", "a:bits=", "a:", ("a", {})])
def test_an_override_says_each_thing_once(override: Any) -> None:
    with pytest.raises(ConfigError, match="override"):
        Recipe(overrides=[override])


@pytest.mark.parametrize(
    ("base", "override", "fc1", "fc2", "layout"),
    [
        # Whatever depends on the format is decided anew...
        (
            {"target": "cuda", "bits": 8, "block_size": 64, "symmetric": False, "layout": "raw"},
            "a:format=mxfp4",
            Spec(FORMATS["mxfp4"], 32),
            None,
            "n_packed",
        ),
        (
            {"target": "cuda", "block_size": 64, "layout": "cutlass_sm80"},
            "a:format=nvfp4",
            Spec(FORMATS["nvfp4"], 16),
            None,
            "n_packed",
        ),
        (
            {"target": "cpu", "format": "mxfp4", "layout": "k_packed"},
            "a:format=int",
            Spec(FORMATS["int4"]),
            None,
            "raw",
        ),
        # ... unless the override says it too.
        (
            {"target": "cuda", "format": "mxfp4"},
            "a:format=int,bits=2,fc2_bits=4,block_size=32,symmetric=false",
            Spec(FORMATS["int2"], 32, symmetric=False),
            Spec(FORMATS["int4"], 32, symmetric=False),
            "raw",
        ),
        # Without a format, the rest stays.
        (
            {"target": "cuda", "block_size": 64, "symmetric": False},
            "a:bits=8",
            Spec(FORMATS["int8"], 64, symmetric=False),
            None,
            "raw",
        ),
        (
            {"target": "cuda", "bits": 8, "fc2_bits": 4, "block_size": 32},
            "a:bits=4",
            Spec(FORMATS["int4"], 32),
            None,
            "raw",
        ),
    ],
)
def test_what_an_override_sets_decides_what_hangs_on_it(
    base: dict[str, Any], override: str, fc1: Spec, fc2: Spec | None, layout: str
) -> None:
    recipe = Recipe.of(**base, overrides=[override])
    resolved = recipe.resolve("a")
    assert resolved.specs == {"fc1": fc1, "fc2": fc2 or fc1}
    assert resolved.storage is LAYOUTS[layout]
    assert resolved.target == recipe.target
    assert recipe.resolve("b") == recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("false", False), ("False", False)],
)
def test_the_truth_in_an_overrides_text(text: str, value: bool) -> None:
    assert Override.parse(f"a:symmetric={text}").settings == (("symmetric", value),)
