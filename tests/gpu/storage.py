"""The cases of how weights are stored: formats, types, zero points, mixed widths, layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.contract import Cell
from tests.gpu.case import BY_CHANCE, GARBAGE, REFUSED, RIGHT, Case, forged, negated, sized

__all__ = ["GROUPS"]

STORED = (
    ("int2", 64),
    ("int4", 0),
    ("int4", 32),
    ("int4", 64),
    ("int4", 128),
    ("int8", 0),
    ("int8", 64),
    ("mxfp4", 32),
    ("nvfp4", 16),
)
INT2 = "INT2 or mixed-width CUDA QMoE"


def formats() -> Iterator[Case]:
    group = "formats"
    for format in ("int4", "int8"):
        yield Case(group, sized(format, 16), REFUSED)
        for block in (0, 32, 64, 128, 256):
            yield Case(group, sized(format, block))
    yield Case(group, sized("int2", 0), REFUSED, INT2)
    for block in (16, 32, 64, 128, 256):
        yield Case(group, sized("int2", block))
    for block in (0, 32):
        yield Case(group, sized("int3", block), REFUSED, "must be 2, 4, or 8")
    yield Case(group, sized("mxfp4", 32))
    yield Case(group, sized("nvfp4", 16))
    for format, block in (("int4", 0), ("int8", 0), ("int4", 64), ("int2", 64)):
        yield Case(
            group,
            sized(format, block),
            note="every second scale is negative",
            forge=lambda cell: cell.direct(weights=negated(cell)),
            answer=lambda cell: cell.expected(negated(cell)),
        )


def tokens() -> Iterator[Case]:
    for format, block in STORED:
        for tokens in (1, 64, 256):
            yield Case("tokens", sized(format, block, tokens=tokens))


def types() -> Iterator[Case]:
    group = "types"
    for format, block in STORED:
        yield Case(group, sized(format, block, dtype="bfloat16"))
    no_kernel = "fallback to CPU EP"
    for format, block in (("int4", 64), ("int8", 0), ("int2", 64), ("mxfp4", 32), ("nvfp4", 16)):
        yield Case(group, sized(format, block, dtype="float32"), REFUSED, no_kernel)
    allowed = "fallback to the CPU allowed"
    yield Case(
        group,
        sized("int4", 64, dtype="float32"),
        note=allowed,
        fallback=True,
        target="portable",
    )
    yield Case(
        group,
        sized("int4", 64, dtype="float32"),
        GARBAGE,
        note=f"cutlass_sm80, {allowed}",
        forge=forged("cutlass_sm80"),
        fallback=True,
    )


def zero_points() -> Iterator[Case]:
    group = "zero points"
    even = ((128, 192, 32), (128, 256, 64), (256, 256, 128))
    odd = ((192, 192, 64), (128, 192, 64), (192, 128, 64), (128, 128, 128))
    for format in ("int2", "int4", "int8"):
        for hidden, inter, block in (*even, *odd):
            cell = Cell(format, None, block, False, hidden=hidden, inter=inter)
            wrong = format == "int4" and (hidden, inter, block) in odd
            yield Case(group, cell, GARBAGE if wrong else RIGHT)
    yield Case(group, Cell("int4", None, 64, False, hidden=320, inter=320), GARBAGE)
    yield Case(group, Cell("int4", None, 256, False, hidden=256, inter=256), GARBAGE)
    for tokens in (1, 64):
        for format in ("int2", "int4", "int8"):
            yield Case(group, Cell(format, None, 64, False, hidden=128, inter=128, tokens=tokens))
        yield Case(
            group, Cell("int4", None, 64, False, hidden=192, inter=192, tokens=tokens), GARBAGE
        )
    for dtype, activation in (("bfloat16", "swiglu"), ("float16", "silu")):
        cell = Cell("int4", None, 64, False, dtype=dtype, activation=activation)
        yield Case(group, cell.but(hidden=128, inter=128))
    for format in ("int4", "int8"):
        yield Case(group, sized(format, 0, symmetric=False), REFUSED, "row-wise quantization")
    for format in ("int2", "int4", "int8"):
        yield Case(group, sized(format, 16, symmetric=False), REFUSED)


def mixed() -> Iterator[Case]:
    group = "mixed widths"
    pairs = (("int4", "int8"), ("int8", "int4"), ("int4", "int2"), ("int2", "int4"))
    for fc1, fc2 in (*pairs, ("int2", "int8"), ("int8", "int2")):
        yield Case(group, sized(fc1, 64, fc2_format=fc2))
        yield Case(group, sized(fc1, 64, fc2_format=fc2, tokens=64, inter=64))
    for fc1, fc2 in pairs:
        yield Case(group, sized(fc1, 32, fc2_format=fc2, tokens=1))
        yield Case(group, sized(fc1, 0, fc2_format=fc2), REFUSED, INT2)
        yield Case(
            group,
            sized(fc1, 64, fc2_format=fc2),
            REFUSED,
            "requires raw weights with weights_prepacked=0",
            "cutlass_sm80",
            forged("cutlass_sm80"),
        )
        for size in (128, 192):
            cell = Cell(fc1, fc2, 64, False, hidden=size, inter=size)
            yield Case(group, cell)
    yield Case(group, sized("int4", 16, fc2_format="int8"))
    for fc1, fc2 in pairs:
        yield Case(group, sized(fc1, 64, fc2_format=fc2, fusion=2), BY_CHANCE)
        for activation in ("relu", "gelu"):
            yield Case(group, sized(fc1, 64, fc2_format=fc2, activation=activation))
        cell = sized(fc1, 64, fc2_format=fc2, alpha=1.702, beta=1.0, limit=0.5, normalize=0)
        yield Case(group, cell)
    for block in (128, 256):
        yield Case(group, sized("int4", block, fc2_format="int8"))
    yield Case(group, sized("int4", 64, fc2_format="int8", dtype="bfloat16"))


def layouts() -> Iterator[Case]:
    group = "layouts"
    for format in ("int4", "int8"):
        for block in (0, 64):
            cell = sized(format, block)
            yield Case(group, cell.but(layout="cutlass_sm80"))
            yield Case(
                group,
                cell,
                note="cutlass_sm80, weights_prepacked=-1",
                forge=forged("cutlass_sm80", weights_prepacked=-1),
            )
            for layout, prepacked in (
                ("cutlass_sm80", 0),
                ("raw", 1),
                ("raw", -1),
                ("raw", None),
                ("cutlass_sm90", 1),
            ):
                said = "absent" if prepacked is None else str(prepacked)
                forge = forged(layout, weights_prepacked=prepacked)
                note = f"{layout}, weights_prepacked={said}"
                yield Case(group, cell, GARBAGE, note=note, forge=forge)
    for block in (32, 128, 256):
        yield Case(group, sized("int4", block, layout="cutlass_sm80"))
    for format, size in (("int4", 128), ("int8", 128), ("int8", 192), ("int4", 192)):
        cell = Cell(format, None, 64, False, "cutlass_sm80", hidden=size, inter=size)
        yield Case(group, cell, GARBAGE if (format, size) == ("int4", 192) else RIGHT)
    yield Case(group, sized("int4", 64, layout="cutlass_sm80", tokens=64))
    yield Case(group, sized("int8", 0, layout="cutlass_sm80", dtype="bfloat16"))
    for layout, prepacked in (("cutlass_sm80", 1), ("raw", -1), ("raw", 1)):
        yield Case(
            group,
            sized("int2", 64),
            REFUSED,
            "requires raw weights with weights_prepacked=0",
            f"{layout}, weights_prepacked={prepacked}",
            forged(layout, weights_prepacked=prepacked),
        )


GROUPS: tuple[Callable[[], Iterator[Case]], ...] = (
    formats,
    tokens,
    types,
    zero_points,
    mixed,
    layouts,
)
