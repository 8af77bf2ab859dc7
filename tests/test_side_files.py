"""Files that come with a model: which are copied, which stay behind, which are never replaced."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from pathlib import Path

import onnx
import pytest

from qmoe_rules import SaveError, quantize
from tests.saves import MODEL, RECIPE, SIDE_FILES, edit, snapshot, tensors


@pytest.mark.parametrize("destination", ["out", "out/int4.onnx"])
def test_files_of_somebody_else_are_not_replaced(
    model_folder: Path, tmp_path: Path, destination: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("of mine")
    shutil.copy(model_folder / "tokenizer" / "merges" / "a.txt", tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match=r"^refusing to replace .*out/config.json by .*; name ano"):
        quantize(model_folder, tmp_path / destination, **RECIPE)
    assert snapshot(tmp_path) == before


def test_files_that_came_with_a_model_are_replaced_with_it(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantize(model_folder, tmp_path / "out", **RECIPE)
    (model_folder / "config.json").write_text("a newer one")
    assert caplog.messages == []
    quantize(model_folder, tmp_path / "out", **RECIPE)
    replaced = tmp_path / "out" / "config.json"
    assert replaced.read_text() == "a newer one"
    assert caplog.messages == [f"{replaced} is replaced by {model_folder / 'config.json'}"]


def test_a_link_to_a_folder_is_not_followed_and_told(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (model_folder / "alias").symlink_to(model_folder / "tokenizer")
    quantize(model_folder, tmp_path / "out", **RECIPE)
    assert not (tmp_path / "out" / "alias").exists()
    assert caplog.messages == [f"{model_folder / 'alias'} is not copied: it leads to a folder"]


def test_history_of_a_repository_stays_behind(model_folder: Path, tmp_path: Path) -> None:
    for name in (".git/HEAD", "tokenizer/.git/objects/a"):
        (model_folder / name).parent.mkdir(parents=True)
        (model_folder / name).write_text("theirs")
    (model_folder / ".gitattributes").write_text("kept")
    quantize(model_folder, tmp_path / "out", **RECIPE)
    assert set(snapshot(tmp_path / "out")) == MODEL | SIDE_FILES | {".gitattributes"}


def test_data_files_of_the_source_stay_behind_whatever_their_names(
    model_folder: Path, tmp_path: Path
) -> None:
    def scatter(proto: onnx.ModelProto) -> None:
        for index, tensor in enumerate(proto.graph.initializer):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"weights/{index % 2}.bin"

    (model_folder / "weights").mkdir()
    for name in ("0.bin", "1.bin"):
        shutil.copy(model_folder / "model.onnx.data", model_folder / "weights" / name)
    (model_folder / "model.onnx.data").unlink()
    (model_folder / "weights" / "readme.txt").write_text("not mine")
    edit(model_folder / "model.onnx", scatter)
    quantize(model_folder, tmp_path / "out", **RECIPE)
    written = set(snapshot(tmp_path / "out"))
    assert written == MODEL | SIDE_FILES | {"weights", "weights/readme.txt"}


def test_other_files_of_an_existing_folder_stay(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "tokenizer").mkdir(parents=True)
    foreign = {"mine.txt": b"1", "other.onnx.data": b"2", "tokenizer/mine.txt": b"3"}
    for name, content in foreign.items():
        (out / name).write_bytes(content)
    shutil.copy(model_folder / "config.json", out)
    quantize(model_folder, out, **RECIPE)
    written = snapshot(out)
    assert set(written) == MODEL | SIDE_FILES | set(foreign)
    assert {name: written[name] for name in foreign} == foreign


def test_symlinked_file_inside_the_folder_is_copied(model_folder: Path, tmp_path: Path) -> None:
    (model_folder / "alias.json").symlink_to("config.json")
    quantize(model_folder, tmp_path / "out", **RECIPE)
    copy = tmp_path / "out" / "alias.json"
    assert not copy.is_symlink()
    assert copy.read_text() == '{"model": "tiny"}'


@pytest.mark.parametrize(
    "target",
    [
        "secret.txt",
        "secrets",
        "nothing",
    ],
)
def test_symlink_that_leads_outside_is_left_out_with_a_warning(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a.txt").write_text("secret")
    (model_folder / "link").symlink_to(tmp_path / target)
    with caplog.at_level(logging.WARNING, "qmoe_rules"):
        quantize(model_folder, tmp_path / "out", **RECIPE)
    assert set(snapshot(tmp_path / "out")) == MODEL | SIDE_FILES
    assert [str(model_folder / "link") in record.getMessage() for record in caplog.records] == [
        True
    ]


def rename_data(folder: Path) -> None:
    """Calls the data of the model weights.bin, so that the name it has is free for others."""

    def move(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "weights.bin" if entry.key == "location" else entry.value

    (folder / "model.onnx.data").rename(folder / "weights.bin")
    edit(folder / "model.onnx", move)


def test_stray_file_of_the_data_files_name_is_a_side_file(
    model_folder: Path, tmp_path: Path
) -> None:
    rename_data(model_folder)
    (model_folder / "model.onnx.1.data").write_text("stray")
    quantize(model_folder, tmp_path / "out", **RECIPE)
    written = snapshot(tmp_path / "out")
    assert set(written) == MODEL | SIDE_FILES | {"model.onnx.1.data"}
    assert written["model.onnx.1.data"] == b"stray"


def test_stray_file_of_exactly_the_data_files_name_is_not_lost(
    model_folder: Path, tmp_path: Path
) -> None:
    rename_data(model_folder)
    (model_folder / "model.onnx.data").write_text("stray")
    quantize(model_folder, tmp_path / "out", **RECIPE)
    assert b"stray" in snapshot(tmp_path / "out").values()


@pytest.mark.parametrize("reader", ["model.onnx", "variant.onnx"])
def test_side_file_does_not_replace_the_data_of_a_model(
    model_folder: Path, tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The old model keeps its data until it is replaced; a model that stays keeps them."""
    out = tmp_path / "out"
    quantize(model_folder, out, bits=8)
    (out / "model.onnx").rename(out / reader)
    before = tensors(out / reader)
    rename_data(model_folder)
    (model_folder / "model.onnx.data").write_text("stray")
    with caplog.at_level(logging.WARNING, "qmoe_rules"):
        quantize(model_folder, out, **RECIPE)
    assert "model.onnx.data is not copied" in caplog.text
    assert (out / "model.onnx.data").exists() == (reader == "variant.onnx")
    if reader == "variant.onnx":
        assert tensors(out / reader) == before


def test_a_second_model_that_shares_the_data_is_not_copied(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its data file stays behind, and the quantized model's takes that file's name."""
    shutil.copy(model_folder / "model.onnx", model_folder / "other.onnx")
    quantize(model_folder, tmp_path / "out", **RECIPE)
    assert set(snapshot(tmp_path / "out")) == MODEL | SIDE_FILES
    assert [record.getMessage().partition("/other.onnx ")[2] for record in caplog.records] == [
        "is not copied: it shares data with the model"
    ]


def test_full_disk_while_side_files_are_copied_is_a_save_error(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy2", full)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match="No space left"):
        quantize(model_folder, tmp_path / "out", **RECIPE)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for a file"])
def test_side_file_that_cannot_be_put_in_place_changes_nothing(
    model_folder: Path, tmp_path: Path, obstacle: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    if obstacle == "a file for a folder":
        (out / "tokenizer").write_text("a file")
    else:
        (out / "tokenizer" / "merges" / "a.txt").mkdir(parents=True)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError):
        quantize(model_folder, out, **RECIPE)
    assert snapshot(tmp_path) == before
