"""`Slices` of every class: every range reads as numpy has it, and nothing else is read."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from qmoe_rules.errors import SourceError
from qmoe_rules.slices import (
    Combined,
    Joined,
    Lifted,
    Picked,
    Regrouped,
    SlicedTensor,
    Slices,
    TensorSlices,
    Unlifted,
)
from qmoe_rules.weights import resolve
from tests.chains import HOMES, Recorder, array_of, assert_reads, tensor_of
from tests.moe_models import Array, Graph

# --- The classes ---------------------------------------------------------------------------------

Made = tuple[Slices, Array]


def leaf(array: Array, home: str, folder: Path) -> TensorSlices:
    return TensorSlices(tensor_of(array, home, folder), "w")


def combined(home: str, folder: Path) -> Made:
    a, b = array_of(3, 2, 4), array_of(3, 5)
    sources = [leaf(a, home, folder), leaf(b, home, folder)]

    def function(x: Array, y: Array) -> Array:
        return np.concatenate([x.reshape(len(x), 8), y], axis=1)

    return Combined(sources, (3, 13), a.dtype, function), function(a, b)


def joined(home: str, folder: Path) -> Made:
    arrays = [array_of(2, 3), array_of(1, 3), array_of(3, 3)]
    sources: list[Slices] = [leaf(array, home, folder) for array in arrays]
    sources.insert(1, leaf(array_of(0, 3), "memory", folder))
    return Joined(sources), np.concatenate(arrays)


def picked(home: str, folder: Path) -> Made:
    return Picked(leaf(array_of(6, 3), home, folder), 2, 5), array_of(6, 3)[2:5]


def lifted(home: str, folder: Path) -> Made:
    return Lifted(leaf(array_of(4, 3), home, folder)), array_of(4, 3)[None]


def unlifted(home: str, folder: Path) -> Made:
    return Unlifted(leaf(array_of(1, 4, 3), home, folder)), array_of(4, 3)


def regrouped(home: str, folder: Path) -> Made:
    return Regrouped(leaf(array_of(6, 3), home, folder), 3), array_of(3, 2, 3)


def plain(home: str, folder: Path) -> Made:
    array = array_of(4, 3, 2, dtype=np.float16)
    return leaf(array, home, folder), array


CLASSES = [plain, combined, joined, picked, lifted, unlifted, regrouped]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("make", CLASSES)
def test_every_range_reads_as_numpy_has_it(
    make: Callable[[str, Path], Made], home: str, tmp_path: Path
) -> None:
    slices, array = make(home, tmp_path)
    assert_reads(slices, array)


@pytest.mark.parametrize("make", CLASSES)
def test_the_tensors_of_every_source_are_known(
    make: Callable[[str, Path], Made], tmp_path: Path
) -> None:
    slices, _ = make("memory", tmp_path)
    assert len(slices.tensors) == {"combined": 2, "joined": 4}.get(make.__name__, 1)
    assert all(isinstance(tensor, ir.Tensor) for tensor in slices.tensors)


def test_only_what_is_asked_for_is_read_and_released() -> None:
    first, second, third = (Recorder(array_of(2, 3)) for _ in range(3))
    slices = Regrouped(Picked(Joined([first, second, third]), 1, 5), 2)
    slices.read(0, 1)
    slices.release(0, 1)
    slices.read(1, 2)
    slices.release(1, 2)
    assert first.reads == first.releases == [(1, 2)]
    assert second.reads == second.releases == [(0, 1), (1, 2)]
    assert third.reads == third.releases == [(0, 1)]


def test_slices_of_one_source_may_share_its_memory() -> None:
    source = Recorder(array_of(1, 4, 3))
    Unlifted(source).release(0, 4)
    assert source.releases == []
    whole = Recorder(array_of(4, 3))
    lifted = Lifted(whole)
    lifted.release(0, 0)
    lifted.release(0, 1)
    assert whole.releases == [(0, 4)]


def test_a_tensor_that_is_made_may_read_others(tmp_path: Path) -> None:
    inner = SlicedTensor(leaf(array_of(2, 3), "file", tmp_path), "inner")
    outer = ir.LazyTensor(lambda: ir.Tensor(inner.numpy() * 2), inner.dtype, inner.shape)
    assert_reads(TensorSlices(outer, "outer"), array_of(2, 3) * 2)


def test_a_missing_file_is_named_through_a_chain(tmp_path: Path) -> None:
    graph = Graph()
    value = graph.weight("w", array_of(2, 3, 4))
    value.const_value = tensor_of(array_of(2, 3, 4), "file", tmp_path)
    slices = resolve(graph.op("Transpose", value, out="t", perm=[0, 2, 1]))
    assert isinstance(slices, Slices)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(SourceError, match="cannot read weight 'w'"):
        slices.read(0, 1)


# --- Tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8])
def test_a_sliced_tensor_is_the_array(dtype: npt.DTypeLike, tmp_path: Path) -> None:
    array = array_of(4, 3, 2, dtype=dtype)
    turned = array.transpose(0, 2, 1)
    source = leaf(array, "file", tmp_path)
    slices = Combined([source], turned.shape, array.dtype, lambda block: block.transpose(0, 2, 1))
    tensor = SlicedTensor(slices, "t")
    assert (tensor.name, tensor.shape, tensor.nbytes) == ("t", ir.Shape((4, 2, 3)), array.nbytes)
    assert tensor.dtype == ir.DataType.from_numpy(array.dtype)
    assert tensor.tobytes() == turned.tobytes()
    assert tensor.numpy().tobytes() == turned.tobytes()
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == turned.tobytes()
    assert repr(tensor) == f"SlicedTensor<{tensor.dtype},[4,2,3]>(Combined, name='t')"


def test_a_sliced_tensor_streams() -> None:
    source = Recorder(array_of(3, 2, 2))
    SlicedTensor(source, "t").tofile(io.BytesIO())
    assert source.reads == source.releases == [(0, 1), (1, 2), (2, 3)]


def test_a_sliced_tensor_is_never_kept() -> None:
    source = Recorder(array_of(3, 2))
    tensor = SlicedTensor(source, "t")
    tensor.numpy()
    tensor.numpy()
    assert source.reads == [(0, 3), (0, 3)]


def test_a_sliced_tensor_is_resolved_to_its_slices() -> None:
    source = Recorder(array_of(3, 2))
    value = ir.Value(name="v", const_value=SlicedTensor(source, "t"))
    assert resolve(value) is source
