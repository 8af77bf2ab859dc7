"""`quantize` from a path to a path: files, folders, and the source, which is never written to."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from qmoe_rules import SaveError, pipeline, quantize
from tests.saves import MODEL, RECIPE, SIDE_FILES, model_bytes, snapshot


@pytest.fixture
def expected(model_folder: Path, tmp_path: Path) -> dict[str, bytes | None]:
    """The quantized model.onnx and its data."""
    quantize(model_folder / "model.onnx", tmp_path / "expected" / "model.onnx", **RECIPE)
    return snapshot(tmp_path / "expected")


def test_file_to_file(
    model_folder: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    before = snapshot(model_folder)
    report = quantize(
        model_folder / "model.onnx", tmp_path / "new" / "out" / "model.onnx", **RECIPE
    )
    assert snapshot(tmp_path / "new" / "out") == expected
    assert set(expected) == MODEL
    assert [row.status for row in report.rows] == ["converted"] * 2
    assert [row.node for row in report.rows] == ["layers.0.moe", "layers.1.moe"]
    assert report.file_bytes_before == model_bytes(model_folder / "model.onnx")
    assert snapshot(model_folder) == before


@pytest.mark.parametrize("exists", [True, False])
def test_file_to_folder_takes_the_name_and_no_side_files(
    model_folder: Path, tmp_path: Path, expected: dict[str, bytes | None], exists: bool
) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    quantize(model_folder / "model.onnx", tmp_path / "out", **RECIPE)
    assert snapshot(tmp_path / "out") == expected


def test_existing_folder_with_the_ending_of_a_model_is_a_folder(
    model_folder: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    (tmp_path / "out.onnx").mkdir()
    quantize(model_folder / "model.onnx", tmp_path / "out.onnx", **RECIPE)
    assert snapshot(tmp_path / "out.onnx") == expected


def test_folder_to_folder_brings_the_side_files(
    model_folder: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    before = snapshot(model_folder)
    quantize(model_folder, tmp_path / "out", **RECIPE)
    written = snapshot(tmp_path / "out")
    assert set(written) == MODEL | SIDE_FILES
    assert {name: written[name] for name in MODEL} == expected
    assert {name: written[name] for name in SIDE_FILES} == {n: before[n] for n in SIDE_FILES}
    assert snapshot(model_folder) == before


def test_folder_to_file_brings_the_side_files_too(model_folder: Path, tmp_path: Path) -> None:
    quantize(model_folder, tmp_path / "out" / "int4.onnx", **RECIPE)
    names = {"int4.onnx", "int4.onnx.data"}
    assert set(snapshot(tmp_path / "out")) == names | SIDE_FILES


@pytest.mark.parametrize("place", ["int4", "deep/int4", "tokenizer", "deep/int4.onnx"])
def test_destination_inside_the_source_folder_is_refused(model_folder: Path, place: str) -> None:
    """Its files would be copied into a part of themselves, and by the next run once more."""
    before = snapshot(model_folder)
    with pytest.raises(SaveError) as error:
        quantize(model_folder, model_folder / place, **RECIPE)
    assert str(error.value).endswith(
        f"which is inside {model_folder}: its files would be copied into it; name a folder "
        f"elsewhere, or the model as {model_folder / 'model.onnx'}, which comes without other files"
    )
    assert snapshot(model_folder) == before


def test_a_file_has_nothing_that_could_mix(
    model_folder: Path, expected: dict[str, bytes | None]
) -> None:
    quantize(model_folder / "model.onnx", model_folder / "deep" / "int4", **RECIPE)
    assert snapshot(model_folder / "deep" / "int4") == expected


def test_destination_around_the_source_folder_keeps_its_files(
    model_folder: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    quantize(model_folder, tmp_path, **RECIPE)
    written = snapshot(tmp_path)
    assert {name: written[name] for name in MODEL} == expected
    assert set(written) >= SIDE_FILES
    inner = model_folder / model_folder.name
    inner.mkdir()
    (inner / "config.json").write_text("another")
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match=r"source/config\.json: it is inside the source$"):
        quantize(model_folder, tmp_path, **RECIPE)
    assert snapshot(tmp_path) == before


def test_file_beside_the_source_in_its_own_folder_needs_no_side_files(model_folder: Path) -> None:
    before, inode = snapshot(model_folder), (model_folder / "config.json").stat().st_ino
    quantize(model_folder, model_folder / "int4.onnx", **RECIPE)
    after = snapshot(model_folder)
    assert (model_folder / "config.json").stat().st_ino == inode
    assert set(after) - set(before) == {"int4.onnx", "int4.onnx.data"}
    assert {name: after[name] for name in before} == before


def test_destination_without_a_name_is_refused(
    tiny_fp32: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a shell makes of a variable that is not set: not the folder that one is in."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SaveError, match=r"^the destination is empty; name a folder, or a file"):
        quantize(tiny_fp32, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("spell", ["source", "source/model.onnx", "link", "link/../source"])
def test_destination_that_is_the_source_is_refused(
    model_folder: Path, tmp_path: Path, spell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model_folder)
    before = snapshot(model_folder)
    monkeypatch.setattr(pipeline, "stage_for", None)
    for given in (model_folder, model_folder / "model.onnx"):
        with pytest.raises(SaveError, match=r"refusing to overwrite .*model\.onnx"):
            quantize(given, tmp_path / spell, **RECIPE)
    assert snapshot(model_folder) == before


def test_source_with_all_weights_inside_is_not_overwritten_either(model_folder: Path) -> None:
    path = model_folder / "model.onnx"
    path.write_bytes(onnx.load(path).SerializeToString())
    (model_folder / "model.onnx.data").unlink()
    before = snapshot(model_folder)
    with pytest.raises(SaveError, match=r"refusing to overwrite .*model\.onnx:"):
        quantize(path, path, **RECIPE)
    assert snapshot(model_folder) == before
