"""Every combination of a recipe's fields: what is stored, or why no target takes it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from qmoe_rules.errors import ConfigError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.providers import TARGETS
from qmoe_rules.recipe import Recipe
from tests.recipes import is_recipe

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
