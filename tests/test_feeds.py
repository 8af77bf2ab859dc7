"""`feeds`: data from files, cut evenly, and completed for the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.feeds import (
    Input,
    complete,
    inputs_of,
    random_feeds,
    read_feeds,
    read_inputs,
)
from tests.moe_models import Array, Graph

INT, FLOAT = np.dtype(np.int64), np.dtype(np.float32)
IDS = {"input_ids": Input("input_ids", INT, (None, None))}
LLM = {
    **IDS,
    "attention_mask": Input("attention_mask", INT, (None, None)),
    "position_ids": Input("position_ids", INT, (3, None, None)),
    "past_key_values.0.key": Input("past_key_values.0.key", FLOAT, (None, 2, None, 16)),
    "past.0.conv": Input("past.0.conv", FLOAT, (None, 8, 3)),
}


def model(**inputs: tuple[Any, tuple[int | str, ...]]) -> ir.Model:
    graph = Graph()
    values = [graph.input(name, *given) for name, given in inputs.items()]
    return graph.model(graph.op("Identity", values[0], out="y", like=values[0]))


def test_inputs_are_those_without_a_default() -> None:
    graph = Graph()
    graph.input("ids", np.int64, ("batch", 7))
    graph.weight("default", np.ones(2), "overridable")
    x = graph.input("x", ml_dtypes.bfloat16, ())
    found = inputs_of(graph.model(graph.op("Identity", x, out="y", like=x)))
    assert found == {"ids": Input("ids", INT, (None, 7)), "x": Input("x", FLOAT, ())}


def test_an_input_of_strings_is_refused() -> None:
    text = model(x=(np.float32, (1,)))
    text.graph.inputs[0].type = ir.TensorType(ir.DataType.STRING)
    with pytest.raises(SourceError, match="input x is no tensor of numbers"):
        inputs_of(text)


@given(
    length=st.integers(1, 400),
    window=st.integers(1, 50),
    windows=st.integers(1, 12),
    dtype=st.sampled_from(["uint16", "int32", "int64"]),
)
def test_windows_are_evenly_spaced(
    length: int, window: int, windows: int, dtype: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("feeds") / "tokens"
    tokens = np.arange(length, dtype=np.dtype(dtype).newbyteorder("<"))
    path.write_bytes(tokens.tobytes())
    feeds = list(read_feeds(path, IDS, dtype=dtype, window=window, windows=windows))
    found = [feed["input_ids"] for feed in feeds]
    assert len(found) == max(min(windows, length // window), 1)
    starts = [int(array[0, 0]) for array in found]
    for start, array in zip(starts, found, strict=True):
        np.testing.assert_array_equal(array, tokens[None, start : start + window])
        assert array.shape == (1, min(window, length))
    gaps = np.diff(starts)
    assert starts[0] == 0
    assert (gaps >= window).all()
    assert gaps.max(initial=0) - gaps.min(initial=gaps.max(initial=0)) <= 1
    assert len(found) == 1 or starts[-1] + window == length


def test_a_raw_file_is_bytes_by_default(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(bytes([1, 255, 3]))
    (feed,) = read_feeds(tmp_path / "text", IDS)
    assert feed["input_ids"].tolist() == [[1, 255, 3]]


def test_arrays_of_samples(tmp_path: Path) -> None:
    arrays: dict[str, Array] = {"input_ids": np.arange(12).reshape(6, 2)}
    arrays["x"] = np.ones((6, 3, 4), np.float32)
    np.savez(tmp_path / "data.npz", **arrays)  # type: ignore[arg-type]
    save_file(arrays, tmp_path / "data.safetensors")
    np.save(tmp_path / "data.npy", arrays["input_ids"])
    for name in ("data.npz", "data.safetensors"):
        found = list(read_feeds(tmp_path / name, IDS))
        assert [feed["x"].shape for feed in found] == [(1, 3, 4)] * 6
        assert np.array_equal(
            np.concatenate([feed["input_ids"] for feed in found]), arrays["input_ids"]
        )
        chosen = [feed["input_ids"][0, 0] for feed in read_feeds(tmp_path / name, IDS, windows=3)]
        assert chosen == [0, 4, 10]  # samples 0, 2 and 5
    found = list(read_feeds(tmp_path / "data.npy", IDS))
    assert [feed["input_ids"].tolist() for feed in found][5] == [[10, 11]]


def test_one_axis_of_an_npy_is_tokens(tmp_path: Path) -> None:
    np.save(tmp_path / "tokens.npy", np.arange(10, dtype=np.uint32))
    found = list(read_feeds(tmp_path / "tokens.npy", IDS, window=5))
    assert [feed["input_ids"].tolist() for feed in found] == [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]]]


def test_which_input_data_without_names_are_for(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    path.write_bytes(b"abc")
    two = {name: Input(name, INT, (None, None)) for name in ("a", "b")}
    assert list(next(read_feeds(path, {"a": two["a"]}))) == ["a"]
    assert list(next(read_feeds(path, two, name="b"))) == ["b"]
    assert list(next(read_feeds(path, {**two, **IDS}))) == ["input_ids"]
    with pytest.raises(ConfigError, match=r"^which input are the data for\? It may be a, b$"):
        read_feeds(path, two)
    with pytest.raises(ConfigError, match="the model has no input 'c'; it has a, b"):
        read_feeds(path, two, name="c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window=0; it may be any number from 1"),
        ({"windows": -1}, "windows=-1; it may be any number from 1"),
        ({"dtype": "float32"}, "dtype='float32'; it may be uint8, uint16, int32, int64"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "tokens").write_bytes(b"abc")
    with pytest.raises(ConfigError) as error:
        read_feeds(tmp_path / "tokens", IDS, **options)
    assert str(error.value) == message


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for name in ("a.npy", "b.npz", "c.safetensors"):
        with pytest.raises(SourceError, match="does not exist"):
            read_feeds(tmp_path / name, IDS)
        (tmp_path / name).write_bytes(b"nonsense")
        kind = name.partition(".")[2]
        with pytest.raises(SourceError, match=f"{name}: it is no {kind} file of numbers$"):
            read_feeds(tmp_path / name, IDS)
    np.save(tmp_path / "objects.npy", np.array([{}], object))
    with pytest.raises(SourceError, match=r"it is no npy file of numbers$"):
        read_feeds(tmp_path / "objects.npy", IDS)
    with pytest.raises(SourceError, match=r"it is a folder; name a file of data$"):
        read_feeds(tmp_path, IDS)
    (tmp_path / "odd").write_bytes(b"abc")
    with pytest.raises(SourceError, match=r"3 bytes are no whole number of uint16$"):
        read_feeds(tmp_path / "odd", IDS, dtype="uint16")
    np.savez(tmp_path / "uneven.npz", a=np.ones((2, 3)), b=np.ones((3, 3)))
    np.savez(tmp_path / "single.npz", a=np.ones(()))
    for name in ("uneven.npz", "single.npz"):
        with pytest.raises(ConfigError, match="the arrays have no common first axis"):
            read_feeds(tmp_path / name, IDS)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "raw").touch()
    np.save(tmp_path / "a.npy", np.ones((0, 4)))
    np.savez(tmp_path / "b.npz")
    save_file({}, tmp_path / "c.safetensors")
    for name in ("raw", "a.npy", "b.npz", "c.safetensors"):
        with pytest.raises(SourceError, match=f"{name} holds no data$"):
            read_feeds(tmp_path / name, IDS)


def test_inputs_of_one_run(tmp_path: Path) -> None:
    """Arrays are taken whole; of tokens the first window is."""
    tokens = np.arange(12, dtype=np.uint16)
    (tmp_path / "raw").write_bytes(tokens.tobytes())
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "batch.npy", tokens.reshape(3, 4))
    arrays: dict[str, Array] = {
        "input_ids": tokens.reshape(2, 6),
        "past.0.key": np.ones((2, 0, 3), np.float32),
    }
    np.savez(tmp_path / "named.npz", **arrays)  # type: ignore[arg-type]
    save_file(arrays, tmp_path / "named.safetensors")
    for name in ("raw", "tokens.npy"):
        (found,) = read_inputs(tmp_path / name, IDS, dtype="uint16", window=5).values()
        assert found.tolist() == [[0, 1, 2, 3, 4]]
    (found,) = read_inputs(tmp_path / "batch.npy", IDS).values()
    assert np.array_equal(found, tokens.reshape(3, 4))
    for name in ("named.npz", "named.safetensors"):
        named = read_inputs(tmp_path / name, IDS)
        assert named.keys() == arrays.keys()
        assert all(np.array_equal(named[key], arrays[key]) for key in arrays)
    with pytest.raises(ConfigError, match="window=0; it may be any number from 1"):
        read_inputs(tmp_path / "raw", IDS, window=0)


def test_numbers_that_look_up_rows_that_are_not_there() -> None:
    graph = Graph()
    ids = graph.input("input_ids", np.int64, ("batch", "length"))
    table = graph.weight("table", np.ones((10, 4), np.float32))
    found = graph.op("Gather", table, ids, out="found")
    found.type = ir.TensorType(ir.DataType.FLOAT)
    needed = inputs_of(graph.model(found))
    assert needed["input_ids"].rows == 10
    fine = complete({"input_ids": np.array([[-10, 9]])}, needed, needed)
    assert fine["input_ids"].tolist() == [[-10, 9]]
    for wrong in (10, -11):
        message = f"input 'input_ids' holds {wrong}, and looks up a table of 10 rows; are the data "
        with pytest.raises(ConfigError, match=message):
            complete({"input_ids": np.array([[0, wrong]])}, needed, needed)


def test_tables_of_a_branch_that_may_not_be_taken() -> None:
    """As models with long contexts have them: a short table or a long one, by the length."""
    graph = Graph()
    ids = graph.input("ids", np.int64, ("batch", "length"))
    flag = graph.input("long", np.bool_, ())
    bodies: dict[str, Any] = {}
    for name, rows in (("then_branch", 90), ("else_branch", 10)):
        body = Graph()
        table = body.weight(f"table_{rows}", np.ones((rows, 4), np.float32))
        bodies[name] = body.done(body.op("Gather", table, ids, out=f"found_{rows}"))
    chosen = graph.op("If", flag, out="chosen", **bodies)
    always = graph.weight("table", np.ones((60, 4), np.float32))
    model = graph.model(chosen, graph.op("Gather", always, ids, out="found"))
    needed = inputs_of(model)
    far = {"ids": np.array([[59]]), "long": np.array(True)}
    assert complete(far, needed, needed)["ids"].tolist() == [[59]]
    with pytest.raises(ConfigError, match="holds 60, and looks up a table of 60 rows"):
        complete({**far, "ids": np.array([[60]])}, needed, needed)
    assert set(random_feeds(model, 200, seed=0)["ids"].ravel()) == set(range(10))


def test_what_follows_from_the_tokens() -> None:
    feed = {"input_ids": np.arange(10, dtype=np.int32).reshape(2, 5)}
    found = complete(feed, LLM, LLM)
    assert {name: (a.dtype, a.shape) for name, a in found.items()} == {
        "input_ids": (INT, (2, 5)),
        "attention_mask": (INT, (2, 5)),
        "position_ids": (INT, (3, 2, 5)),
        "past_key_values.0.key": (FLOAT, (2, 2, 0, 16)),
        "past.0.conv": (FLOAT, (2, 8, 3)),
    }
    assert (found["attention_mask"] == 1).all()
    assert (found["position_ids"] == np.arange(5)).all()
    assert not found["past.0.conv"].any()


def test_what_is_given_is_kept() -> None:
    mask: Array = np.array([[0, 1, 1]])
    given_ = {"input_ids": np.ones((1, 3), np.int64), "attention_mask": mask}
    assert np.array_equal(complete(given_, LLM, LLM)["attention_mask"], mask)


def test_only_what_is_needed_is_completed() -> None:
    feed = {"input_ids": np.ones((1, 3), np.int64), "past.0.conv": np.ones((9, 9))}
    assert list(complete(feed, IDS, LLM)) == ["input_ids"]


@pytest.mark.parametrize(
    ("feed", "needed", "message"),
    [
        ({"x": np.ones(3)}, IDS, "the model has no input 'x'; it has input_ids"),
        ({}, IDS, "input 'input_ids' is missing (given: none), and what it should be does not"),
        (
            {"input_ids": np.ones((1, 3), np.int64)},
            {**IDS, "pixels": Input("pixels", FLOAT, (None, 3))},
            "input 'pixels' is missing (given: input_ids)",
        ),
        (
            {"input_ids": np.ones((1, 3))},
            IDS,
            "input 'input_ids' is float64; the model wants int64",
        ),
        (
            {"input_ids": np.ones(3, np.int64)},
            IDS,
            "input 'input_ids' is [3]; the model wants [?, ?]",
        ),
        (
            {"past.0.conv": np.ones((1, 7, 3), np.float32)},
            {"past.0.conv": LLM["past.0.conv"]},
            "input 'past.0.conv' is [1, 7, 3]; the model wants [?, 8, 3]",
        ),
    ],
)
def test_feeds_that_do_not_fit(
    feed: dict[str, Array], needed: dict[str, Input], message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        complete(feed, needed, needed)
    assert str(error.value).startswith(message)


# Random feeds.


def test_random_feeds_fit_the_signature() -> None:
    graph = Graph()
    ids = graph.input("input_ids", np.int64, ("batch", "sequence"))
    graph.input("attention_mask", np.int64, ("batch", "total"))
    graph.input("hidden", ml_dtypes.bfloat16, ("batch", "sequence", 8))
    graph.input("flag", np.bool_, ())
    table = graph.weight("table", np.ones((5, 8), np.float32))
    y = graph.op("Gather", table, ids, out="y", like=table)
    model = graph.model(y)
    feeds = random_feeds(model, 40, seed=3)
    assert feeds["input_ids"].shape == (1, 40)
    assert set(feeds["input_ids"].ravel()) == set(range(5))
    np.testing.assert_array_equal(feeds["attention_mask"], np.ones((1, 40)))
    assert feeds["hidden"].shape == (1, 40, 8)
    assert feeds["hidden"].dtype == np.float32
    assert abs(feeds["hidden"].std() - 1) < 0.1
    assert feeds["flag"].shape == ()
    assert feeds["flag"].dtype == np.bool_
    flags = {bool(random_feeds(model, 1, seed)["flag"]) for seed in range(20)}
    assert flags == {True, False}


def test_what_does_not_follow_is_not_made_up() -> None:
    graph = Graph()
    number = graph.input("number", np.int64, ("batch",))
    y = graph.op("Neg", number, out="y", like=number)
    with pytest.raises(ConfigError, match="input 'number' is missing"):
        random_feeds(graph.model(y), 4, seed=0)
