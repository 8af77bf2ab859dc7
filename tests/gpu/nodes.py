"""The cases of what nodes compute: activations, routing, sizes, 4-bit floats, float MoE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from tests.contract import Cell
from tests.gpu.case import (
    BY_CHANCE,
    GARBAGE,
    REFUSED,
    RIGHT,
    Case,
    forged,
    redeclared,
    rescaled,
    sized,
    with_fc3,
    with_router_weights,
)

__all__ = ["GROUPS"]

_FUSED: tuple[dict[str, Any], ...] = (
    {},
    {"tokens": 1},
    {"tokens": 64},
    {"bias": False},
    {"dtype": "bfloat16"},
    {"alpha": 1.702, "beta": 1.0, "limit": 0.5},
)


def activations() -> Iterator[Case]:
    group = "activations"
    for format, block in (("int4", 64), ("int8", 0), ("int2", 64), ("mxfp4", 32), ("nvfp4", 16)):
        for activation in ("relu", "gelu", "silu", "identity"):
            yield Case(group, sized(format, block, activation=activation))
        # Where weights are dequantized for the float kernels, it depends on which one is picked.
        verdicts = BY_CHANCE if format in ("int2", "nvfp4") else RIGHT
        for fields in _FUSED:
            yield Case(group, sized(format, block, fusion=2, **fields), verdicts)
        yield Case(group, sized(format, block, alpha=1.702, beta=1.0, limit=0.5))
        yield Case(group, sized(format, block, bias=False))
    for format, block in (("int4", 0), ("int4", 32), ("int8", 64)):
        for tokens in (1, 64):
            yield Case(group, sized(format, block, fusion=2, tokens=tokens))
            yield Case(group, sized(format, block, activation="relu", tokens=tokens))
    for fusion in (1, 2):
        cell = sized("int4", 64, activation="geglu", fusion=fusion)
        yield Case(group, cell, REFUSED, "Unsupported MoE activation", differs=True)
    relu = sized("int4", 64, activation="relu")
    yield Case(
        group,
        relu,
        REFUSED,
        "Unsupported MoE activation",
        "relu2",
        forged(activation_type="relu2"),
    )
    yield Case(
        group,
        relu,
        REFUSED,
        "swiglu_fusion is only valid",
        "swiglu_fusion=1",
        forged(swiglu_fusion=1),
    )
    yield Case(group, sized("int4", 64), note="swiglu_fusion=0", forge=forged(swiglu_fusion=0))
    left_out = forged(activation_alpha=None, activation_beta=None)
    note = "without activation_alpha and activation_beta"
    yield Case(group, sized("int4", 64), note=note, forge=left_out)


def routing() -> Iterator[Case]:
    group = "routing"
    for k in (1, 2, 4):
        for normalize in (0, 1):
            yield Case(group, sized("int4", 64, k=k, normalize=normalize))
    for format, block in (("int8", 0), ("int2", 64), ("mxfp4", 32)):
        yield Case(group, sized(format, block, normalize=0))
    yield Case(
        group, sized("int4", 64, normalize=0), note="as made for portable", target="portable"
    )
    for experts, k in ((6, 3), (8, 2), (16, 4)):
        yield Case(group, sized("int4", 64, experts=experts, k=k))
    for format, block, tokens in (
        ("int4", 64, 1),
        ("int4", 64, 64),
        ("int8", 0, 1),
        ("mxfp4", 32, 1),
    ):
        for experts, k in ((60, 4), (128, 8)):
            sizes = {"hidden": 64, "inter": 64, "tokens": tokens}
            yield Case(group, sized(format, block, experts=experts, k=k, **sizes))
    for format, block in (("int4", 64), ("mxfp4", 32)):
        yield Case(
            group,
            sized(format, block, experts=8, k=3, ties=True),
            note="expected: the lower expert of equal ones",
            answer=lambda cell: cell.expected(lower=1e-6),
        )
    for experts in (4, 8, 16):
        cell = sized("int4", 64, experts=experts, sparse_mixer=1)
        yield Case(group, cell, note="expected: ordinary routing", differs=True)

    yield Case(
        group,
        sized("int4", 64),
        note="router_weights given; expected: as if they were not",
        forge=with_router_weights,
    )


def sizes() -> Iterator[Case]:
    group = "sizes"
    for hidden, inter in ((96, 128), (128, 96)):
        which = "hidden" if hidden == 96 else "inter"
        for format, block in (("int4", 0), ("int4", 32), ("int8", 0)):
            cell = Cell(format, None, block, hidden=hidden, inter=inter)
            yield Case(group, cell, REFUSED, f"requires {which}_size to be a multiple of")
    yield Case(group, Cell("int2", None, 32, hidden=96, inter=160))
    for format, block in (("mxfp4", 32), ("nvfp4", 16)):
        # The kernel of mxfp4 misreads what is no multiple of 64.
        verdicts = GARBAGE if format == "mxfp4" else RIGHT
        for hidden, inter in ((96, 128), (128, 96), (160, 96)):
            yield Case(group, Cell(format, None, block, hidden=hidden, inter=inter), verdicts)
        for tokens in (1, 64):
            cell = Cell(format, None, block, hidden=96, inter=96, tokens=tokens)
            yield Case(group, cell, verdicts)
        yield Case(group, Cell(format, None, block, hidden=320, inter=448))
    yield Case(group, Cell("nvfp4", None, 16, hidden=80, inter=112))
    yield Case(group, Cell("int2", None, 16, hidden=48, inter=80))
    yield Case(group, Cell("int4", "int8", 32, hidden=96, inter=160))
    for hidden, inter in ((64, 64), (448, 320)):
        yield Case(group, Cell("int4", None, 64, hidden=hidden, inter=inter))
    for format, block in (("int4", 0), ("int4", 64), ("int2", 64), ("mxfp4", 32), ("nvfp4", 16)):
        cell = Cell(format, None, block, hidden=2048, inter=768, experts=2)
        for tokens in (1, 8):
            yield Case(group, cell.but(tokens=tokens))
    cell = Cell("int4", None, 64, False, hidden=2048, inter=768, experts=2)
    for tokens in (1, 8):
        yield Case(group, cell.but(tokens=tokens))


def fp4() -> Iterator[Case]:
    group = "fp4"
    without = dict.fromkeys(("fc1_global_scale", "fc2_global_scale"))
    for format, block in (("mxfp4", 32), ("nvfp4", 16)):
        cell = sized(format, block)
        for prepacked in (None, -1, 1):
            said = "absent" if prepacked is None else str(prepacked)
            forge = forged("n_packed", weights_prepacked=prepacked)
            yield Case(group, cell, note=f"n_packed, weights_prepacked={said}", forge=forge)
        yield Case(
            group,
            cell,
            GARBAGE,
            note="k_packed bytes declared [E, K, N/2], weights_prepacked=1",
            forge=redeclared,
        )
        yield Case(
            group,
            cell,
            GARBAGE,
            note="k_packed bytes declared [E, N, K/2], weights_prepacked=1",
            forge=forged("k_packed"),
        )
        yield Case(
            group,
            cell,
            note="global scales 0.5, 1, 1.5, 2",
            forge=lambda cell: cell.direct("n_packed", rescaled(cell)),
            answer=lambda cell: cell.expected(rescaled(cell)),
        )
        yield Case(
            group,
            cell,
            REFUSED,
            "" if format == "mxfp4" else "fc1_global_scale, and fc2_global_scale",
            "no global scales",
            lambda cell: cell.direct("n_packed", extra=without),
        )
        forge = forged("n_packed", block_size=block)
        yield Case(group, cell, note="block_size written out", forge=forge)


def unsupported() -> Iterator[Case]:
    group = "refused by the wheel"
    for block in (128, 0):
        cell = Cell("fp8", None, block, hidden=256, inter=128)
        yield Case(group, cell, REFUSED, "requires USE_FP8_QMOE")
    fc3 = "does not support separate fc3_experts_weights"
    for format, block in (("int4", 64), ("int8", 0)):
        yield Case(group, sized(format, block), REFUSED, fc3, "fc3", with_fc3)


def float_moe() -> Iterator[Case]:
    """The float MoE that the speed of QMoE is compared with."""
    for dtype in ("float32", "float16", "bfloat16"):
        cell = Cell(dtype=dtype, inter=64)
        halves = RIGHT if dtype == "float32" else BY_CHANCE
        yield _float_case(cell)
        yield _float_case(cell.but(activation="gelu"))
        yield _float_case(cell.but(normalize=0))
        yield _float_case(cell.but(fusion=2), halves)
        yield _float_case(cell.but(fusion=2, bias=False), halves)
        yield _float_case(cell, GARBAGE, separate=True)
        yield _float_case(cell.but(bias=False), halves, separate=True)


def _float_case(cell: Cell, verdicts: tuple[str, ...] = RIGHT, separate: bool = False) -> Case:
    return Case(
        "float MoE",
        cell,
        verdicts,
        note="MoE with fc3" if separate else "MoE",
        forge=lambda cell: cell.float_model(separate),
        answer=Cell.expected_float,
        float=True,
    )


GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (
    activations,
    routing,
    sizes,
    fp4,
    unsupported,
    float_moe,
)
