"""`ExpertWeights`: what counts as a constant weight, and reading it expert by expert."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import files
from qmoe_rules.errors import SourceError
from qmoe_rules.weights import ExpertWeights
from tests.moe_models import Array, Graph

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


def weight_of(dtype: Any, shape: tuple[int, ...] = (3, 4, 5)) -> Array:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def external(array: Array, path: Path, offset: int = 0) -> ir.ExternalTensor:
    """Writes an array behind `offset` bytes of something else, with more behind it."""
    path.write_bytes(b"\xa5" * offset + array.tobytes() + b"\xa5" * 100)
    return ir.ExternalTensor(
        path.name,
        offset,
        array.nbytes,
        ir.DataType.from_numpy(array.dtype),
        shape=ir.Shape(array.shape),
        name="fc1",
        base_dir=path.parent,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("home", ["initializer", "constant"])
def test_constants_are_read_one_expert_at_a_time(home: str, dtype: Any) -> None:
    array = weight_of(dtype)
    weights = ExpertWeights.of(Graph().weight("fc1", array, home))
    assert isinstance(weights, ExpertWeights)
    assert (weights.name, weights.shape, weights.dtype) == ("fc1", (3, 4, 5), np.dtype(dtype))
    assert weights.nbytes == array.nbytes
    for index in range(3):
        expert = weights.expert(index)
        assert expert.dtype == np.dtype(dtype)
        assert expert.tobytes() == array[index].tobytes()


@pytest.mark.parametrize(
    ("home", "array", "reason"),
    [
        ("computed", weight_of(np.float32), "fc1 is not a constant"),
        (
            "input",
            weight_of(np.float32),
            "fc1 is a graph input, so its default may be overridden at run time",
        ),
        (
            "overridable",
            weight_of(np.float32),
            "fc1 is a graph input, so its default may be overridden at run time",
        ),
        ("initializer", weight_of(np.float64), "fc1 is DOUBLE, not FLOAT, FLOAT16 or BFLOAT16"),
        ("initializer", weight_of(np.uint8), "fc1 is UINT8, not FLOAT, FLOAT16 or BFLOAT16"),
        ("constant", weight_of(np.float32, (6, 5)), "fc1 has shape [6, 5], not [E, N, K]"),
    ],
)
def test_everything_else_has_a_reason(home: str, array: Array, reason: str) -> None:
    graph = Graph()
    value = graph.weight("fc1", array, home)
    graph.done(value, opsets={"": 21})  # only a graph knows its inputs
    assert ExpertWeights.of(value) == reason


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 8, mmap.PAGESIZE, 3 * mmap.PAGESIZE + 16])
def test_released_experts_can_be_read_again(tmp_path: Path, dtype: Any, offset: int) -> None:
    """Experts of 1.5 pages or less, so that neighbours share pages."""
    array = np.random.default_rng(0).standard_normal((4, 32, 48)).astype(dtype)
    weights = ExpertWeights(external(array, tmp_path / "data", offset), "fc1")
    views = [weights.expert(index) for index in range(4)]
    for index in (0, 2, 1, 3):
        weights.release(index)
    for index, view in enumerate(views):
        assert view.tobytes() == array[index].tobytes()
        assert weights.expert(index).tobytes() == array[index].tobytes()


def test_pages_are_dropped_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page is dropped with the expert that is read last of those that share it."""
    page = mmap.PAGESIZE
    array = np.zeros((3, 3, page // 8), np.float32)  # 1.5 pages per expert
    weights = ExpertWeights(external(array, tmp_path / "data"), "fc1")
    dropped = []

    class Recorder:
        def madvise(self, advice: int, start: int, length: int) -> None:
            assert advice == mmap.MADV_DONTNEED
            dropped.append((start, start + length))

    monkeypatch.setattr(files, "_map", lambda tensor: Recorder())
    for index in range(3):
        weights.release(index)
    assert dropped == [(0, page), (page, 3 * page), (3 * page, 4 * page)]


def test_a_file_is_mapped_once_for_all_its_tensors(tmp_path: Path) -> None:
    """A descriptor for each tensor would run out on models of many experts."""
    array = weight_of(np.float32)
    weights = [ExpertWeights(external(array, tmp_path / "data"), "fc1") for _ in range(50)]
    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    views = [weight.expert(0) for weight in weights]
    after = len(list(descriptors.iterdir())) if descriptors.is_dir() else 0
    assert after - before <= 1
    assert all(view.tobytes() == array[0].tobytes() for view in views)


@pytest.fixture(params=["kept", "not kept"])
def kept_or_not(request: pytest.FixtureRequest) -> Iterator[None]:
    """Reads with and without `files.keeping`."""
    with files.keeping() if request.param == "kept" else nullcontext():
        yield


@pytest.mark.usefixtures("kept_or_not")
def test_a_file_of_the_same_name_is_read_anew(tmp_path: Path) -> None:
    array = weight_of(np.float32)
    old = ExpertWeights(external(array, tmp_path / "data"), "fc1").expert(1)
    (tmp_path / "data").rename(tmp_path / "gone")
    new = ExpertWeights(external(array * 2, tmp_path / "data"), "fc1").expert(1)
    assert old.tobytes() == array[1].tobytes()
    assert new.tobytes() == (array * 2)[1].tobytes()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no list of descriptors")
def test_files_are_kept_mapped_a_few_at_a_time_and_then_let_go(tmp_path: Path) -> None:
    array = weight_of(np.float32)
    weights = [ExpertWeights(external(array, tmp_path / str(i)), "fc1") for i in range(40)]

    def mapped() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    for weight in weights:
        weight.expert(0)
        assert mapped() == 0
    with files.keeping():
        for number, weight in enumerate(weights, 1):
            weight.expert(0)
            assert mapped() == min(number, 16)
        with files.keeping():
            weights[-1].release(0)
        assert mapped() == 16
    assert mapped() == 0


def test_tensors_in_memory_have_no_pages_to_drop() -> None:
    array = weight_of(np.float32)
    weights = ExpertWeights(ir.tensor(array), "fc1")
    weights.release(0)
    assert weights.expert(0).tobytes() == array[0].tobytes()


def test_an_unread_file_has_no_pages_to_drop(tmp_path: Path) -> None:
    array = weight_of(np.float32)
    weights = ExpertWeights(external(array, tmp_path / "data"), "fc1")
    weights.release(0)
    assert weights.expert(2).tobytes() == array[2].tobytes()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    tensor = external(weight_of(np.float32), tmp_path / "data")
    (tmp_path / "data").unlink()
    with pytest.raises(SourceError, match=r"cannot read weight 'layer.fc1': .*data"):
        ExpertWeights(tensor, "layer.fc1").expert(0)


@pytest.mark.usefixtures("kept_or_not")
def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    weights = ExpertWeights(external(weight_of(np.float32), tmp_path / "data"), "fc1")
    weights.expert(0)
    (tmp_path / "data").write_bytes(b"short")
    with pytest.raises(SourceError, match="cannot read weight 'fc1'"):
        weights.expert(0)


@pytest.mark.usefixtures("kept_or_not")
@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links")
def test_a_link_that_is_turned_outside_is_refused(tmp_path: Path) -> None:
    """What a name leads to is checked whenever it leads to another file."""
    folder = tmp_path / "model"
    folder.mkdir()
    weights = ExpertWeights(external(weight_of(np.float32), folder / "data"), "fc1")
    weights.expert(0)
    (tmp_path / "secret").write_bytes((folder / "data").read_bytes())
    (folder / "data").unlink()
    (folder / "data").symlink_to(tmp_path / "secret")
    with pytest.raises(SourceError, match="lie outside the model's folder"):
        weights.expert(0)


def test_an_array_that_is_made_on_demand_is_made_once_per_sweep() -> None:
    array, made = weight_of(np.float32), list[int]()

    def make() -> ir.TensorProtocol:
        made.append(len(made))
        return ir.Tensor(array)

    weights = ExpertWeights(ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(array.shape)), "fc1")
    for sweep in (1, 2):
        for index in range(3):
            assert weights.expert(index).tobytes() == array[index].tobytes()
            assert len(made) == sweep
            weights.release(index)
        files.forget()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_diamonds_of_concat_are_resolved_in_linear_time(axis: int) -> None:
    """Each level reads the one below twice: sixty levels are 2^60 ways to the constant."""
    graph = Graph()
    value = graph.weight("fc1", weight_of(np.float32))
    values = [value := graph.op("Concat", value, value, out=f"c{n}", axis=axis) for n in range(60)]
    small = ExpertWeights.of(values[2])
    assert isinstance(small, ExpertWeights)
    expected = weight_of(np.float32)
    for _ in range(3):
        expected = np.concatenate([expected, expected], axis)
    for index in range(len(expected)):
        np.testing.assert_array_equal(small.expert(index), expected[index])
    assert ExpertWeights.of(values[9]) == "c9 repeats its constants more than 64 times"
    assert ExpertWeights.of(values[-1]) == "c16 is put together from more than 65536 pieces"


def test_a_constant_that_is_computed_from_itself_is_none() -> None:
    graph = Graph()
    first = graph.op("Identity", graph.weight("fc1", weight_of(np.float32)), out="a")
    second = graph.op("Identity", first, out="b")
    producer = first.producer()
    assert producer is not None
    producer.replace_input_with(0, second)
    assert ExpertWeights.of(second) == "b is computed from itself"
