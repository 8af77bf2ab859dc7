"""`Calibration`: files of statistics, read expert by expert, and refused where they are broken."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.statistics import Calibration, ProjectionStatistics, Statistics

E, H, INTER = 4, 40, 24
COUNTS = [200, 80, 7, 0]  # enough for a Hessian, for the mean, for neither, none
NODES = {"/model/layers.0/moe/MoE": "aa", "moe/1": "bb"}
FIRST = next(iter(NODES))

Tensors = dict[str, npt.NDArray[Any]]


def tensors(hessian: bool = True) -> Tensors:
    rng, found = np.random.default_rng(2), Tensors()
    for node in NODES:
        for projection, columns in (("fc1", H), ("fc2", INTER)):
            head = f"{node}/{projection}"
            found[f"{head}/tokens"] = np.array(COUNTS)
            squares = rng.random((E, columns), np.float32)
            squares[3] = 0
            found[f"{head}/mean_square"] = squares
            for expert in range(3) if hessian else ():
                rows = rng.standard_normal((columns, columns)).astype(np.float32)
                found[f"{head}/hessian/{expert}"] = rows.T @ rows
            if hessian and projection == "fc1":
                found[f"{head}/hessian"] = np.eye(H, dtype=np.float32) * 7
    return found


def write(path: Path, given: Tensors, **changes: str) -> Path:
    hessian = any("hessian" in name for name in given)
    metadata = Calibration.metadata(NODES, data="d", tokens=144, hessian=hessian)
    save_file(given, path, metadata={**metadata, **changes})
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "calibration", tensors())


def test_what_is_written_is_read(path: Path) -> None:
    calibration, stored = Calibration.load(path), tensors()
    assert calibration.nodes == tuple(NODES)
    assert calibration.fingerprints == NODES
    assert (calibration.tokens, calibration.hessian, calibration.data) == (144, True, "d")
    for node in NODES:
        for projection, columns in (("fc1", H), ("fc2", INTER)):
            head = f"{node}/{projection}"
            assert calibration.columns(node, projection) == columns
            np.testing.assert_array_equal(calibration.counts(node, projection), COUNTS)
            for expert in range(E):
                known = calibration.statistics(node, projection, expert)
                assert known.tokens == COUNTS[expert]
                np.testing.assert_array_equal(
                    known.mean_square, stored[f"{head}/mean_square"][expert]
                )
                if expert < 3:
                    np.testing.assert_array_equal(known.hessian, stored[f"{head}/hessian/{expert}"])
                else:
                    assert known.hessian is None


def test_the_pool_weighs_experts_by_their_tokens(path: Path) -> None:
    squares = tensors()[f"{FIRST}/fc1/mean_square"].astype(np.float64)
    expected = sum(n * row for n, row in zip(COUNTS, squares, strict=True)) / sum(COUNTS)
    pooled = Calibration.load(path).pooled(FIRST, "fc1")
    assert pooled.dtype == np.float32
    np.testing.assert_allclose(pooled, expected, rtol=1e-6)


def kind(known: Statistics | None, calibration: Calibration, expert: int) -> str:
    """Returns whose statistics these are."""
    assert known is not None
    assert known.tokens == COUNTS[expert]
    own = calibration.statistics(FIRST, "fc1", expert)
    if np.array_equal(known.mean_square, calibration.pooled(FIRST, "fc1")):
        assert known.hessian is None
        return "pooled"
    np.testing.assert_array_equal(known.mean_square, own.mean_square)
    if known.hessian is None:
        return "mean"
    assert own.hessian is not None
    weights = [COUNTS[expert], 2 * H]  # the pool takes part for 2 K tokens
    expected = np.average([own.hessian, calibration.pooled_hessian(FIRST)], 0, weights)
    np.testing.assert_allclose(known.hessian, expected, rtol=1e-5, atol=1e-5)
    return "Hessian"


def test_what_fc2_sees_is_the_experts_own(path: Path) -> None:
    calibration = Calibration.load(path)
    known = calibration.for_expert(FIRST, "fc2", 1)
    assert known is not None
    own = calibration.statistics(FIRST, "fc2", 1).hessian
    np.testing.assert_array_equal(known.hessian, own)


@pytest.mark.parametrize(
    ("hessian", "kinds", "fallbacks"),
    [
        (True, ["Hessian", "Hessian", "pooled", "pooled"], [2, 3]),
        (False, ["mean", "mean", "pooled", "pooled"], [2, 3]),
    ],
)
def test_experts_that_saw_little_fall_back(
    path: Path, hessian: bool, kinds: list[str], fallbacks: list[int]
) -> None:
    calibration = Calibration.load(path)
    found = [calibration.for_expert(FIRST, "fc1", e, hessian=hessian) for e in range(E)]
    assert [kind(known, calibration, e) for e, known in enumerate(found)] == kinds
    assert calibration.fallbacks(FIRST, "fc1", hessian=hessian) == fallbacks


def test_a_hessian_of_fewer_than_2k_tokens_is_not_used(tmp_path: Path) -> None:
    stored = tensors()
    stored[f"{FIRST}/fc1/tokens"] = np.array([2 * H, 2 * H - 1, 64, 63])
    stored[f"{FIRST}/fc1/hessian/3"] = np.eye(H, dtype=np.float32)
    calibration = Calibration.load(write(tmp_path / "calibration", stored))
    found = [calibration.for_expert(FIRST, "fc1", expert) for expert in range(E)]
    assert [known is not None and known.hessian is not None for known in found] == [True] + 3 * [
        False
    ]
    assert calibration.fallbacks(FIRST, "fc1", hessian=True) == [1, 2, 3]
    assert calibration.fallbacks(FIRST, "fc1", hessian=False) == [3]
    # fc2 has so few columns that the mean wants more tokens than they do.
    assert calibration.enough(FIRST, "fc2", True) == 64


def test_a_node_that_saw_nothing_knows_nothing(tmp_path: Path) -> None:
    stored = {name: np.zeros_like(array) for name, array in tensors(hessian=False).items()}
    calibration = Calibration.load(write(tmp_path / "calibration", stored))
    assert calibration.for_expert(FIRST, "fc1", 0) is None
    assert not calibration.pooled(FIRST, "fc1").any()


def test_a_node_that_is_not_there(path: Path) -> None:
    calibration = Calibration.load(path)
    for node in ("moe", f"{FIRST}/fc1"):
        message = f"has no {node}/fc1; it has fc1 and fc2 of {FIRST}, "
        for ask in (calibration.counts, calibration.columns, calibration.pooled):
            with pytest.raises(ConfigError, match=message):
                ask(node, "fc1")
        with pytest.raises(ConfigError, match=message):
            calibration.statistics(node, "fc1", 0)
    with pytest.raises(ConfigError, match=f"has no {FIRST}/fc3; it has fc1 and fc2 of "):
        calibration.counts(FIRST, "fc3")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (NODES, None),
        ({FIRST: "aa", "another": "cc"}, None),
        ({}, None),
        ({FIRST: "ab"}, "the weights or attributes of node /model/layers.0/moe/MoE are not those"),
        ({"other": "aa"}, "is of another model: it has no node other"),
    ],
)
def test_a_file_of_another_model_is_refused(
    path: Path, given: dict[str, str], message: str | None
) -> None:
    calibration = Calibration.load(path)
    if message is None:
        calibration.check(given)
        return
    with pytest.raises(ConfigError) as error:
        calibration.check(given)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_equal_files_are_equal_calibrations(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copy(path, copy)
    other = write(tmp_path / "other", tensors(), data="e")
    first, second, third = map(Calibration.load, (path, copy, other))
    assert first == second == pickle.loads(pickle.dumps(first))
    assert hash(first) == hash(second)
    assert repr(first) == repr(second)
    assert first != third
    assert repr(first) != repr(third)
    views = [ProjectionStatistics(each, FIRST, "fc1", True) for each in (first, second, third)]
    assert views[0] == views[1] != views[2]
    assert views[0] != ProjectionStatistics(first, FIRST, "fc2", True)
    assert views[0] != ProjectionStatistics(first, FIRST, "fc1", False)


# Broken files.


def replaced(name: str, change: Callable[[npt.NDArray[Any]], Any]) -> Callable[[Tensors], None]:
    def spoil(stored: Tensors) -> None:
        stored[name] = np.asarray(change(stored[name]))

    return spoil


def poke(array: npt.NDArray[Any], value: float) -> npt.NDArray[Any]:
    array = array.copy()
    array.reshape(-1)[1] = value
    return array


SQUARES, TOKENS, HESSIAN = (
    f"{FIRST}/fc1/{part}" for part in ("mean_square", "tokens", "hessian/1")
)
POOLED = f"{FIRST}/fc1/hessian"
BROKEN: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "no counts": (lambda t: t.pop(TOKENS), f"it has no {TOKENS}"),
    "no means": (lambda t: t.pop(SQUARES), f"it has no {SQUARES}"),
    "no Hessian": (lambda t: t.pop(HESSIAN), f"it has no {HESSIAN}"),
    "no pooled Hessian": (lambda t: t.pop(POOLED), f"it has no {POOLED}"),
    "NaN": (
        replaced(SQUARES, lambda a: poke(a, np.nan)),
        f"{SQUARES} holds an infinity or a NaN",
    ),
    "negative": (
        replaced(SQUARES, lambda a: poke(a, -1)),
        f"{FIRST}/fc1 has negative counts or squares",
    ),
    "negative count": (
        replaced(TOKENS, lambda a: poke(a, -1)),
        f"{FIRST}/fc1 has negative counts or squares",
    ),
    "float64": (replaced(SQUARES, lambda a: a.astype(np.float64)), f"{SQUARES} is F64, not F32"),
    "int32": (replaced(TOKENS, lambda a: a.astype(np.int32)), f"{TOKENS} is I32, not I64"),
    "float16 Hessian": (
        replaced(HESSIAN, lambda a: a.astype(np.float16)),
        f"{HESSIAN} is F16, not F32",
    ),
    "experts": (
        replaced(SQUARES, lambda a: a[:-1].copy()),
        f"{FIRST}/fc1 has tokens [4] and mean_square [3, 40]",
    ),
    "axes": (
        replaced(SQUARES, lambda a: a.reshape(-1)),
        f"{FIRST}/fc1 has tokens [4] and mean_square [160]",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    spoil, reason = BROKEN[name]
    stored = tensors()
    spoil(stored)
    path = write(tmp_path / "calibration", stored)
    with pytest.raises(SourceError) as error:
        Calibration.load(path)
    assert str(error.value) == f"{path} is broken: {reason}"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda a: poke(a, np.inf), "holds an infinity or a NaN"),
        (lambda a: a[:, :-1].copy(), "is [40, 39]"),
    ],
)
def test_a_broken_hessian_is_an_error_when_it_is_read(
    change: Callable[[npt.NDArray[Any]], Any], reason: str, tmp_path: Path
) -> None:
    stored = tensors()
    replaced(HESSIAN, change)(stored)
    path = write(tmp_path / "calibration", stored)
    calibration = Calibration.load(path)
    calibration.statistics(FIRST, "fc1", 0)
    with pytest.raises(SourceError) as error:
        calibration.statistics(FIRST, "fc1", 1)
    assert str(error.value) == f"{path} is broken: {HESSIAN} {reason}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "other"}, "is not a calibration file"),
        ({"version": "1"}, "has version 1 of the calibration format, and 2 is known"),
        ({"tokens": "many"}, "is broken: its metadata"),
        ({"fingerprints": "{"}, "is broken: its metadata"),
    ],
)
def test_other_metadata(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "calibration", tensors(), **changes)
    with pytest.raises(SourceError) as error:
        Calibration.load(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_none(tmp_path: Path, tiny_fp32: Path) -> None:
    save_file({"a": np.ones(3)}, tmp_path / "plain")
    (tmp_path / "empty").touch()
    for path, message in {
        tmp_path / "nothing": "does not exist",
        tmp_path: "cannot read",
        tmp_path / "empty": "is not a calibration file",
        tmp_path / "plain": "is not a calibration file",
        tiny_fp32: "is not a calibration file",
    }.items():
        with pytest.raises(SourceError, match=message) as error:
            Calibration.load(path)
        assert str(path) in str(error.value)


def test_offsets_are_checked(path: Path) -> None:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    for offsets in ([-4, 0], [0, 1 << 40], [8, 4]):
        header[TOKENS]["data_offsets"] = offsets
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
        with pytest.raises(SourceError, match="is not a calibration file"):
            Calibration.load(path)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(end=st.integers(0, 60_000))
def test_a_truncated_file_is_refused(end: int, tmp_path: Path) -> None:
    data = write(tmp_path / "whole", tensors()).read_bytes()
    path = tmp_path / "cut"
    path.write_bytes(data[: min(end, len(data) - 1)])
    with pytest.raises(SourceError, match="is not a calibration file"):
        Calibration.load(path)


def test_only_what_is_asked_for_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One Hessian at a time: the file is never read as a whole."""
    calibration, read = Calibration.load(path), list[str]()
    original = Calibration._slice

    def spy(self: Calibration, node: str, projection: str, part: str) -> Any:
        read.append(f"{node}/{projection}/{part}")
        return original(self, node, projection, part)

    monkeypatch.setattr(Calibration, "_slice", spy)
    calibration.for_expert(FIRST, "fc1", 1)
    assert [name for name in read if "hessian" in name] == [HESSIAN, POOLED]
    read.clear()
    calibration.for_expert(FIRST, "fc1", 1, hessian=False)
    assert not [name for name in read if "hessian" in name]


def test_the_file_holds_what_its_description_says(path: Path) -> None:
    assert load_file(path).keys() == tensors().keys()
