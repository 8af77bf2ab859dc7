"""Several data files: those of `onnx_ir.save`, and replaced without touching anybody else's."""

from __future__ import annotations

import itertools
import os
import string
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qmoe_rules import ConfigError, SaveError, quantize, save
from qmoe_rules.cli import main
from qmoe_rules.extents import data_names, is_data_name, lay_out
from tests.saves import (
    OPTIONS,
    RECIPE,
    logits,
    planned,
    saved_by_onnx_ir,
    snapshot,
    tensors,
)

SIZE = 300_000
SHARDS = 6  # of the float32 model


def shard_names(count: int, stem: str = "model", suffixes: str = ".onnx.data") -> set[str]:
    return {f"{stem}-{number:05d}-of-{count:05d}{suffixes}" for number in range(1, count + 1)}


def sizes_of(model: ir.Model) -> list[int]:
    return [extent.tensor.nbytes for extent in lay_out(model)]


# The files of onnx_ir.


@pytest.mark.parametrize("size", [1, 257, 65_536, 131_072, 131_073, SIZE, 10**6, 10**10])
@pytest.mark.parametrize("workers", [1, 3])
def test_shards_are_those_of_onnx_ir(tiny: Path, tmp_path: Path, size: int, workers: int) -> None:
    expected = saved_by_onnx_ir(
        planned(tiny), tmp_path / "expected" / "model.onnx", max_shard_size_bytes=size
    )
    save(planned(tiny), tmp_path / "out" / "model.onnx", max_shard_size=size, workers=workers)
    assert snapshot(tmp_path / "out") == snapshot(expected.parent)


@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("count", [2, 5, None])
def test_shard_is_full_where_onnx_ir_says_so(
    tiny_fp16: Path, tmp_path: Path, count: int | None, off: int
) -> None:
    """At the exact size of some tensors, of all of them, and one byte beside."""
    size = sum(sizes_of(planned(tiny_fp16))[:count]) + off
    path = tmp_path / "expected" / "model.onnx"
    saved_by_onnx_ir(planned(tiny_fp16), path, max_shard_size_bytes=size)
    save(planned(tiny_fp16), tmp_path / "out" / "model.onnx", max_shard_size=size)
    assert snapshot(tmp_path / "out") == snapshot(path.parent)


def test_every_tensor_alone_has_a_file_of_its_own(tiny: Path, tmp_path: Path) -> None:
    model = planned(tiny)
    save(model, tmp_path / "out" / "model.onnx", max_shard_size=1)
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.data"))]
    assert sizes == sizes_of(model)


NAMES = [
    "model.onnx",
    "my.v2.onnx",
    "my.2.onnx",
    "model",
    "model.1",
    ".onnx",
    "two words.onnx",
    "größe.onnx",
    "model.größe.onnx",
    "model..onnx",
    "a.b-c.onnx",
    "model-00001-of-00002.onnx",
    "two\nlines.onnx",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_onnx_ir(tiny_fp16: Path, tmp_path: Path, name: str) -> None:
    path = saved_by_onnx_ir(planned(tiny_fp16), tmp_path / "ir" / name, max_shard_size_bytes=SIZE)
    expected = {file.name for file in path.parent.iterdir()}
    save(planned(tiny_fp16), tmp_path / "out" / name, max_shard_size=SIZE)
    assert {file.name for file in (tmp_path / "out").iterdir()} == expected
    assert len(expected) > 3


names = st.text(string.ascii_letters + string.digits + "._- ü", min_size=1, max_size=12).filter(
    lambda name: name.strip(".") != ""
)


@given(name=names, count=st.integers(1, 3), taken=st.integers(0, 4), data=st.data())
@example(name="a", count=100_001, taken=1, data=None)
def test_a_models_own_names_are_recognized(
    name: str, count: int, taken: int, data: st.DataObject | None
) -> None:
    """Whatever is taken, the names are of this model, and free."""
    refused: set[str] = set()
    for _ in range(taken):
        proposed = data_names(name, count, refused.__contains__)
        refused.add(proposed[0] if data is None else data.draw(st.sampled_from(proposed)))
    found = data_names(name, count, refused.__contains__)
    assert len(set(found)) == count
    assert not refused & set(found)
    assert all(is_data_name(each, name) for each in found)


@pytest.mark.parametrize(
    "stranger",
    [
        "model.onnx",
        "model.data",
        "other.onnx.data",
        "model.onnx.data.1",
        "model.onnx.old.data",
        "model.onnx.1x.data",
        "model.onnx.1.2.data",
        "model-1-of-2.onnx.data",
        "model-00001-of-00002.data",
        "model.onnx-00001-of-00002.data",
        "model-00001-of-00002.onnx.1.data",
        "xmodel-00001-of-00002.onnx.data",
        "model-00001-of-00002.onnx.datax",
        "modelxonnx.data",
    ],
)
def test_names_of_other_files_are_not_taken_for_the_models_own(stranger: str) -> None:
    assert not is_data_name(stranger, "model.onnx")


# What runs.


def test_sharded_model_runs_as_the_single_file_does(tiny: Path, tmp_path: Path) -> None:
    quantize(tiny, tmp_path / "single", **RECIPE)
    quantize(tiny, tmp_path / "shards", max_shard_size=SIZE, **RECIPE)
    assert len(list((tmp_path / "shards").glob("*.data"))) > 1
    shards, single = (tmp_path / name / "model.onnx" for name in ("shards", "single"))
    np.testing.assert_array_equal(logits(shards), logits(single))
    onnx.checker.check_model(shards)


def test_command_line_takes_a_size_with_a_unit(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in ("300kB", "0.3 MB", "300000"):
        command = ["quantize", str(tiny), str(tmp_path / size), *OPTIONS, "--max-shard-size", size]
        assert main(command) == 0
    quantize(tiny, tmp_path / "expected", max_shard_size=SIZE, **RECIPE)
    for size in ("300kB", "0.3 MB", "300000"):
        assert snapshot(tmp_path / size) == snapshot(tmp_path / "expected")
    for wrong in ("0", "-1", "2i", "much", "1e3", "5PB"):
        with pytest.raises(SystemExit) as stop:
            main(["quantize", str(tiny), str(tmp_path / "no"), f"--max-shard-size={wrong}"])
        assert stop.value.code == 2
        assert f"{wrong!r} is not a size such as 2GB" in capsys.readouterr().err


@pytest.mark.parametrize("size", [0, -1])
def test_size_that_is_not_positive_is_a_config_error(tiny: Path, tmp_path: Path, size: int) -> None:
    with pytest.raises(ConfigError, match=f"max_shard_size={size}"):
        save(planned(tiny), tmp_path / "model.onnx", max_shard_size=size)


# Replacing.

STRAYS = {
    "model-00001-of-00005.onnx.1.data": b"1",
    "model.onnx.3.data": b"2",
    "model-00001-of-00099.onnx.data": b"3",  # a name of ours, and yet nothing of the model's
    "other-00001-of-00005.onnx.data": b"4",
    "readme.txt": b"5",
}


@pytest.mark.parametrize(
    ("before", "after"), [p for p in itertools.product([None, SIZE, 1], repeat=2) if any(p)]
)
def test_replacing_a_model_removes_its_own_data_and_nothing_else(
    source: Path, tmp_path: Path, before: int | None, after: int | None
) -> None:
    out = tmp_path / "out"
    save(planned(source, bits=8), out / "model.onnx", max_shard_size=before)
    for name, content in STRAYS.items():
        (out / name).write_bytes(content)
    save(planned(source), out / "model.onnx", max_shard_size=after)
    save(planned(source), tmp_path / "expected" / "model.onnx", max_shard_size=after)
    written = snapshot(out)
    assert {name: written.pop(name) for name in STRAYS} == STRAYS
    assert len(written) == len(snapshot(tmp_path / "expected"))
    assert tensors(out / "model.onnx") == tensors(tmp_path / "expected" / "model.onnx")
    np.testing.assert_array_equal(
        logits(out / "model.onnx"), logits(tmp_path / "expected" / "model.onnx")
    )


def test_stray_file_of_a_shards_name_survives(source: Path, tmp_path: Path) -> None:
    """All shards take a numbered name where one of theirs is taken."""
    (tmp_path / "out").mkdir()
    stray = tmp_path / "out" / f"model-00002-of-{SHARDS:05d}.onnx.data"
    stray.write_bytes(b"precious")
    save(planned(source), tmp_path / "out" / "model.onnx", max_shard_size=SIZE)
    assert stray.read_bytes() == b"precious"
    names = set(snapshot(tmp_path / "out"))
    assert names == {"model.onnx", stray.name, *shard_names(SHARDS, "model.onnx.1", ".data")}
    save(planned(source), tmp_path / "expected.onnx")
    assert tensors(tmp_path / "out" / "model.onnx") == tensors(tmp_path / "expected.onnx")


def test_dangling_link_of_a_shards_name_survives(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    link = tmp_path / "out" / "model.onnx.data"
    link.symlink_to(tmp_path / "nowhere")
    save(planned(source), tmp_path / "out" / "model.onnx")
    assert os.readlink(link) == str(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert (tmp_path / "out" / "model.onnx.1.data").is_file()


def test_shards_that_a_model_reads_are_not_written_over(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.onnx"
    save(ir.load(source), path, max_shard_size=SIZE)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match=r"model-0000.*\.data: the model still reads from it"):
        save(planned(path), path)
    assert snapshot(tmp_path) == before
    path.rename(path.with_name("renamed.onnx"))
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match="still reads from it"):
        save(planned(path.with_name("renamed.onnx")), path, max_shard_size=1)
    assert snapshot(tmp_path) == before
