"""The compiled engine orders bytes as numpy does, and touches none beside them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantizers import engine
from tests.engines import LAYOUT_CASES, Bytes, raw_bytes

pytestmark = pytest.mark.usefixtures("compiled_engine")


@pytest.mark.parametrize(("name", "bits", "rows", "columns"), LAYOUT_CASES)
def test_compiled_orders_are_those_of_numpy(name: str, bits: int, rows: int, columns: int) -> None:
    layout, raw = LAYOUTS[name], raw_bytes(rows, columns, bits)
    assert layout.compiled is not None
    assert layout.refuse_shape(rows, columns, bits) is None
    stored = layout.store(raw, bits)
    np.testing.assert_array_equal(stored, layout.permute(raw, bits))
    np.testing.assert_array_equal(layout.load(stored, bits), layout.restore(stored, bits))
    np.testing.assert_array_equal(layout.load(stored, bits), raw)


@pytest.mark.parametrize(
    ("name", "kernels"), [(n, x.compiled) for n, x in LAYOUTS.items() if x.compiled]
)
def test_the_kernels_do_the_work_and_nothing_beside(
    name: str, kernels: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layout, raw = LAYOUTS[name], raw_bytes(32, 128, 4)
    compiled, asked = engine.kernels(), []
    for kernel in set(kernels):
        run = getattr(compiled, kernel)

        def watched(source: Bytes, bits: int, target: Bytes, run: Any = run) -> None:
            asked.append(run)
            whole = np.full((len(target) + 2, target.shape[1]), 0xA5, np.uint8)
            run(source, bits, whole[1:-1])
            assert (whole[[0, -1]] == 0xA5).all()
            target[:] = whole[1:-1]

        monkeypatch.setattr(compiled, kernel, watched)
    stored = layout.store(raw, 4)
    np.testing.assert_array_equal(layout.load(stored, 4), raw)
    assert len(asked) == 2


@pytest.mark.parametrize("name", ["cutlass_sm80", "n_packed"])
def test_it_does_not_matter_how_bytes_lie_in_memory(name: str) -> None:
    layout, raw = LAYOUTS[name], raw_bytes(32, 128, 4)
    read_only = raw.copy()
    read_only.flags.writeable = False
    shifted = np.empty(raw.size + 1, np.uint8)[1:]
    shifted[:] = raw.ravel()
    for view in (
        read_only,
        shifted.reshape(raw.shape),
        np.asfortranarray(raw),
        raw.repeat(2, 0)[::2],
    ):
        stored = layout.store(view, 4)
        np.testing.assert_array_equal(stored, layout.store(raw, 4))
        np.testing.assert_array_equal(layout.load(np.asfortranarray(stored), 4), raw)


@pytest.mark.parametrize(("rows", "columns"), [(16, 96), (8, 64), (17, 64)])
def test_shapes_that_do_not_fit_never_reach_the_kernels(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They check no bounds; numpy does."""
    layout, raw = LAYOUTS["cutlass_sm80"], raw_bytes(rows, columns, 4)
    compiled: Any = engine.kernels()
    monkeypatch.setattr(compiled, "store_tiles", None)
    monkeypatch.setattr(compiled, "load_tiles", None)
    for convert, meaning in ((layout.store, layout.permute), (layout.load, layout.restore)):
        try:
            expected = meaning(raw, 4)
        except ValueError:
            with pytest.raises(ValueError, match="cannot reshape"):
                convert(raw, 4)
        else:
            np.testing.assert_array_equal(convert(raw, 4), expected)
