"""Recipes: what is refused when one is made, and which settings a node gets."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.kernels import Facts
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import TARGETS
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import WIDTHS, Override, Recipe
from qmoe_rules.testing import recipes

NODE = "/model/layers.0/moe/MoE"


def settings_of(recipe: Recipe) -> tuple[int | None, int | None, str]:
    return recipe.bits, recipe.block_size, recipe.method


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


# A recipe as a value.


def test_of_changes_the_given_fields_of_a_recipe_and_leaves_it_alone() -> None:
    base = Recipe.of(bits=8, block_size=32, overrides=[("a", {"bits": 4})])
    changed = Recipe.of(base, block_size=64)
    assert settings_of(changed) == (8, 64, "rtn")
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


# Every combination of fields.

SIZES = [0, 32, 64, 128, 16, 256]
FORMAT_BITS = {"mxfp4": 4, "nvfp4": 4, "fp8": 8}
FORMAT_BLOCKS = {"mxfp4": 32, "nvfp4": 16, "fp8": 128}
COMBINATIONS: list[dict[str, Any]] = [
    dict(zip(("format", "bits", "fc2_bits", "block_size", "symmetric"), values, strict=True))
    for values in itertools.product(
        ("int", *FORMAT_BLOCKS),
        (None, 2, 3, 4, 8),
        (None, 2, 3, 4, 8),
        (None, 16, 32, 128),
        (True, False),
    )
]


def contradiction(fields: dict[str, Any]) -> str | None:
    """Why no target could take these fields, in the words of the recipe."""
    format = fields["format"]
    for name in ("bits", "fc2_bits"):
        if format in FORMAT_BITS and fields[name] not in (None, FORMAT_BITS[format]):
            return (
                f"{name}={fields[name]} with format={format!r}, whose codes have "
                f"{FORMAT_BITS[format]} bits"
            )
    size = fields["block_size"]
    if format in ("mxfp4", "nvfp4") and size not in (None, FORMAT_BLOCKS[format]):
        return f"{format} has blocks of {FORMAT_BLOCKS[format]} columns, not block_size={size}"
    if format in FORMAT_BITS and not fields["symmetric"]:
        return f"{format} has floating-point codes, which have no zero points"
    return None


def wanted_specs(fields: dict[str, Any], target: str) -> list[dict[str, Spec]]:
    """The ways to store that the fields leave open, the one that is meant first."""
    sizes = [fields["block_size"]]
    if sizes == [None]:
        sizes = [FORMAT_BLOCKS[fields["format"]]] if fields["format"] in FORMAT_BLOCKS else SIZES
    ways = [specs_with(fields, target, size) for size in sizes]
    return sorted(ways, key=lambda specs: objects(target, specs))


def objects(target: str, specs: dict[str, Spec]) -> bool:
    return any(provider.refuse_specs(specs) for provider in TARGETS[target].providers)


def specs_with(fields: dict[str, Any], target: str, size: int) -> dict[str, Spec]:
    specs = {}
    bits = fields["bits"] or 4
    for name, width in (("fc1", bits), ("fc2", fields["fc2_bits"] or bits)):
        format = fields["format"] if fields["format"] in FORMAT_BITS else f"int{width}"
        positive = (format, target) in (("int3", "portable"), ("int3", "cpu"), ("int4", "trt-rtx"))
        specs[name] = Spec(FORMATS[format], size, fields["symmetric"], signed=not positive)
    return specs


@pytest.mark.parametrize("target", TARGETS)
def test_every_combination_is_specs_or_an_error_that_says_why(target: str) -> None:
    taken = 0
    for fields in COMBINATIONS:
        wanted = contradiction(fields)
        ways = [] if wanted else wanted_specs(fields, target)
        refusals = [TARGETS[target].refuse_storage(specs, None) for specs in ways]
        wanted_ones = {wanted, *(f"target {target!r}: {reason}" for reason in refusals if reason)}
        try:
            recipe = Recipe(**fields, target=target)
        except ConfigError as error:
            message, _, hint = str(error).partition("; target=")
            assert message in wanted_ones, fields
            assert all(refusals), fields
            takers = [name for name in TARGETS if ways and is_recipe(**fields, target=name)]
            assert not hint or hint.split("'")[1] in takers, fields
            assert hint or not takers, fields
        else:
            assert wanted is None, fields
            assert recipe.specs == ways[0], fields
            assert not misfit(recipe.storage.name, ways[0]), fields
            assert not TARGETS[target].refuse_storage(ways[0], recipe.storage.name), fields
            taken += 1
    assert taken >= 4


def misfit(layout: str, specs: dict[str, Spec]) -> str | None:
    return LAYOUTS[layout].refuse_format(specs["fc1"].format)


def is_recipe(**fields: Any) -> bool:
    try:
        Recipe(**fields)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"format": "mxfp4", "bits": 8},
            "bits=8 with format='mxfp4', whose codes have 4 bits",
        ),
        (
            {"format": "fp8", "fc2_bits": 4},
            "fc2_bits=4 with format='fp8', whose codes have 8 bits",
        ),
        (
            {"format": "mxfp4", "block_size": 16},
            "mxfp4 has blocks of 32 columns, not block_size=16",
        ),
        (
            {"format": "nvfp4", "symmetric": False},
            "nvfp4 has floating-point codes, which have no zero points",
        ),
        (
            {"format": "mxfp4"},
            "target 'portable': no layout of mxfp4 is read by both the CPU provider (k_packed) and "
            "the CUDA provider (n_packed); target='cpu' takes this recipe",
        ),
        (
            {"format": "mxfp4", "layout": "raw"},
            "layout raw is not one of mxfp4's (n_packed, k_packed)",
        ),
        (
            {"layout": "n_packed"},
            "layout n_packed is not one of int4's (raw, cutlass_sm80, cutlass_sm90)",
        ),
        (
            {"format": "nvfp4", "layout": "n_packed", "target": "cpu"},
            "target 'cpu': the CPU provider misreads layout 'n_packed' (it reads k_packed); "
            "target='cuda' takes this recipe",
        ),
        (
            {"format": "fp8"},
            "target 'portable': the CPU provider has no kernel for fp8; "
            "target='webgpu' takes this recipe",
        ),
        (
            {"format": "fp8", "block_size": 0, "target": "webgpu"},
            "target 'webgpu': the WebGPU provider does not take block_size=0 with fp8 "
            "(it takes 128)",
        ),
        (
            {"symmetric": False, "block_size": 0},
            "target 'portable': the CUDA provider takes no zero points with int4 and block_size=0 "
            "(it does with 32, 64, 128, 256); target='cpu' takes this recipe",
        ),
        (
            {"bits": 3, "block_size": 0},
            "target 'portable': the CPU provider does not take block_size=0 with int3 "
            "(it takes 32, 64, 128)",
        ),
        (
            {"bits": 3},
            "target 'portable': the CUDA provider has no kernel for int3; "
            "target='cpu' takes this recipe",
        ),
        (
            {"bits": 3, "block_size": 32},
            "target 'portable': the CUDA provider has no kernel for int3; "
            "target='cpu' takes this recipe",
        ),
        (
            {"bits": 3, "block_size": 32, "symmetric": False, "target": "cpu"},
            "target 'cpu': the CPU provider takes no zero points with int3",
        ),
        (
            {"bits": 2, "block_size": 0},
            "target 'portable': the CUDA provider does not take block_size=0 with int2 "
            "(it takes 16, 32, 64, 128, 256); target='cpu' takes this recipe",
        ),
        (
            {"fc2_bits": 8, "block_size": 32},
            "target 'portable': the CPU provider does not take int4 in fc1 and int8 in fc2; "
            "target='cuda' takes this recipe",
        ),
        (
            {"fc2_bits": 8, "block_size": 32, "target": "cuda", "layout": "cutlass_sm80"},
            "target 'cuda': the CUDA provider misreads layout 'cutlass_sm80' (it reads raw)",
        ),
        (
            {"bits": 2, "block_size": 32, "target": "cuda", "layout": "cutlass_sm80"},
            "target 'cuda': the CUDA provider misreads layout 'cutlass_sm80' (it reads raw)",
        ),
        (
            {"bits": 2, "block_size": 32, "target": "webgpu"},
            "target 'webgpu': the WebGPU provider has no kernel for int2; "
            "target='portable' takes this recipe",
        ),
        (
            {"block_size": 32, "symmetric": False, "target": "webgpu"},
            "target 'webgpu': the WebGPU provider takes no zero points with int4; "
            "target='portable' takes this recipe",
        ),
        (
            {"target": "trt-rtx", "block_size": 0},
            "target 'trt-rtx': the TensorRT-RTX provider does not take block_size=0 with int4 "
            "(it takes 128); target='portable' takes this recipe",
        ),
        (
            {"symmetric": False, "target": "trt-rtx"},
            "target 'trt-rtx': the TensorRT-RTX provider takes no zero points with int4; "
            "target='portable' takes this recipe",
        ),
        (
            {"bits": 8, "block_size": 128, "target": "trt-rtx"},
            "target 'trt-rtx': the TensorRT-RTX provider has no kernel for int8; "
            "target='portable' takes this recipe",
        ),
    ],
    ids=str,
)
def test_what_no_target_or_not_this_one_takes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        Recipe(**fields)
    assert str(error.value) == message


def test_no_recipe_for_webgpu_or_trt_rtx_has_zero_points() -> None:
    for target, fields in itertools.product(("webgpu", "trt-rtx"), COMBINATIONS):
        assert fields["symmetric"] or not is_recipe(**fields, target=target), fields


# What a node that is refused would need.


@st.composite
def node_facts(draw: st.DrawFn) -> Facts:
    """What nodes are like, of sizes that some formats and kernels do not take."""
    sizes = st.sampled_from([1, 8, 16, 32, 48, 64, 96, 100, 128, 160, 192, 256, 320, 512])
    return Facts(
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        activation=draw(st.sampled_from(["swiglu", "silu", "geglu", "relu2"])),
        fusion=draw(st.sampled_from([1, 1, 0, 2])),
        hidden=draw(sizes),
        inter=draw(sizes),
        sparse_mixer=draw(st.sampled_from([False, False, False, True])),
        limit_after_activation=draw(st.sampled_from([False, False, False, True])),
    )


def advised(advice: str) -> dict[str, Any]:
    """The fields that a piece of advice names."""
    text = re.fullmatch(r"(.*) would do|(target='[a-z-]+') takes it", advice)
    assert text is not None, advice
    fields: dict[str, Any] = eval(f"dict({text[1] or text[2]})")
    return fields


def neighbours(recipe: Recipe, count: int) -> Iterator[Recipe]:
    """The recipes for the same target with exactly `count` fields changed, those that are any."""
    choices: dict[str, tuple[Any, ...]] = {
        "block_size": (0, 16, 32, 64, 128, 256),
        "symmetric": (True, False),
        "fc2_bits": (None,),
    }
    for names in itertools.combinations(choices, count):
        for values in itertools.product(*(choices[name] for name in names)):
            fields = dict(zip(names, values, strict=True))
            if is_recipe(**{**vars(recipe), **fields}):
                yield dataclasses.replace(recipe, **fields)


@settings(max_examples=200)
@given(recipes(allow_excludes=False, allow_overrides=False), node_facts())
def test_advice_that_is_followed_removes_the_refusal(recipe: Recipe, facts: Facts) -> None:
    if recipe.refuse(facts) is None:
        return
    advice = recipe.advise(facts)
    takers = [
        name
        for name in TARGETS
        if is_recipe(**{**vars(recipe), "target": name})
        and not dataclasses.replace(recipe, target=name).refuse(facts)
    ]
    near = [count for count in (1, 2, 3) if any_takes(neighbours(recipe, count), facts)]
    if advice is None:
        assert not takers
        assert not near or recipe.format != "int"
        return
    fields = advised(advice)
    assert all(getattr(recipe, name) != value for name, value in fields.items())
    assert dataclasses.replace(recipe, **fields).refuse(facts) is None
    if "target" in fields:
        assert fields["target"] in takers
        assert not near or recipe.format != "int"
    else:
        assert len(fields) == near[0]  # no recipe is nearer


def any_takes(candidates: Iterator[Recipe], facts: Facts) -> bool:
    return any(candidate.refuse(facts) is None for candidate in candidates)


ODD = Facts(dtype="float16", activation="swiglu", fusion=1, hidden=192, inter=128)


@pytest.mark.parametrize(
    ("fields", "facts", "reason", "advice"),
    [
        (
            {"block_size": 64, "symmetric": False},
            ODD,
            "the CUDA provider misreads the zero points of an odd number of blocks, and K=192 has "
            "3 of block_size=64",
            "symmetric=True would do",
        ),
        (
            {"block_size": 32, "symmetric": False},
            dataclasses.replace(ODD, hidden=96, inter=96),
            "the CUDA provider needs hidden and inter sizes divisible by 64, and they are 96 and "
            "96",
            "target='cpu' takes it",
        ),
        (
            {"block_size": 128},
            ODD,
            "fc1_experts_weights: K=192 is not divisible by block_size=128",
            "block_size=32 would do",
        ),
        (
            {"block_size": 256, "symmetric": False},
            dataclasses.replace(ODD, hidden=320, inter=320),
            "fc1_experts_weights: K=320 is not divisible by block_size=256",
            "block_size=32 would do",
        ),
        (
            {"block_size": 32, "symmetric": False, "target": "cuda"},
            dataclasses.replace(ODD, hidden=64, inter=64),
            None,
            None,
        ),
        (
            {"block_size": 64, "symmetric": False, "target": "cuda"},
            dataclasses.replace(ODD, hidden=64, inter=64),
            "the CUDA provider misreads the zero points of an odd number of blocks, and K=64 has "
            "1 of block_size=64",
            "symmetric=True would do",
        ),
        (
            {"bits": 2, "block_size": 32, "target": "cuda"},
            dataclasses.replace(ODD, activation="relu2", fusion=0),
            "the CUDA provider has no kernel for activation 'relu2' "
            "(it has geglu, gelu, identity, relu, silu, swiglu)",
            None,
        ),
        (
            {"format": "mxfp4", "target": "cuda"},
            dataclasses.replace(ODD, hidden=100),
            "the CUDA provider needs hidden and inter sizes divisible by 64, and they are 100 and "
            "128",
            None,
        ),
        (
            {"format": "mxfp4", "target": "cpu"},
            dataclasses.replace(ODD, dtype="bfloat16", fusion=2),
            "the CPU provider does not take swiglu_fusion=2 (it takes 1)",
            "target='cuda' takes it",
        ),
    ],
)
def test_reasons_and_advice_for_a_node(
    fields: dict[str, Any], facts: Facts, reason: str | None, advice: str | None
) -> None:
    recipe = Recipe(**fields)
    assert recipe.refuse(facts) == reason
    if reason:
        assert recipe.advise(facts) == advice


@settings(max_examples=200)
@given(
    st.sampled_from(["cuda", "portable"]),
    st.sampled_from([32, 64, 128, 256]),
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from(["float16", "bfloat16", "float32"]),
)
def test_int4_zero_points_never_leave_for_cuda_with_an_odd_number_of_blocks(
    target: str, block: int, hidden: int, inter: int, dtype: str
) -> None:
    facts = Facts(dtype, "swiglu", 1, hidden * 64, inter * 64)
    recipe = Recipe(block_size=block, symmetric=False, target=target)
    refused = recipe.refuse(facts)
    whole = facts.hidden % block == 0 and facts.inter % block == 0
    even = facts.hidden // block % 2 == 0 and facts.inter // block % 2 == 0
    wide = Recipe(bits=8, block_size=block, symmetric=False, target=target)
    if target == "portable" and dtype == "float32":  # runs on the CPU, in a session for CUDA too
        assert (refused is None) == whole
    elif dtype == "float16" or (target == "cuda" and dtype == "bfloat16"):
        assert (refused is None) == (whole and even)
        assert (wide.refuse(facts) is None) == whole  # int8 is right with any number of blocks
    else:
        assert refused is not None  # no kernel of this type


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
