"""Why a recipe refuses a node, and advice that, once followed, has it taken."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qmoe_rules.kernels import Facts
from qmoe_rules.providers import TARGETS
from qmoe_rules.recipe import Recipe
from qmoe_rules.testing import recipes
from tests.recipes import is_recipe


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
