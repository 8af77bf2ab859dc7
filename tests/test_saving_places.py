"""Where `save` writes: never onto the model's source, over an old model, beside foreign files."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qmoe_rules import SaveError, quantize, save, saving
from tests.saves import logits, planned, saved_by_onnx_ir, snapshot, tensors

# A model is never saved onto what it still reads.


def _symlinked_folder(source: Path) -> Path:
    link = source.parent.parent / "link"
    link.symlink_to(source.parent)
    return link / source.name


def _symlinked_file(source: Path) -> Path:
    link = source.parent.parent / "link.onnx"
    link.symlink_to(source)
    return link


@pytest.mark.parametrize(
    "spell",
    [
        lambda source: source,
        str,
        lambda source: source.parent / ".." / source.parent.name / source.name,
        lambda source: Path(os.path.relpath(source)),
        lambda source: source.with_name("model.onnx.data"),
        _symlinked_folder,
        _symlinked_file,
    ],
    ids=["path", "text", "dotdot", "relative", "data file", "symlinked folder", "symlinked file"],
)
def test_saving_onto_the_source_is_refused_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch, spell: Callable[[Path], Path]
) -> None:
    destination = spell(source)
    before = snapshot(source.parent.parent)
    monkeypatch.setattr(saving, "Staging", None)
    with pytest.raises(SaveError, match=r"model\.onnx\.data: the model still reads from it"):
        save(planned(source), destination)
    assert snapshot(source.parent.parent) == before


def test_model_loaded_by_its_bare_name_is_not_saved_onto_itself(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(source.parent)
    model = ir.load("model.onnx")
    with pytest.raises(SaveError, match="still reads from it"):
        save(model, source)


def test_source_that_only_planned_tensors_read_is_not_overwritten(source: Path) -> None:
    model = planned(source)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    before = snapshot(source.parent)
    with pytest.raises(SaveError, match="still reads from it"):
        save(model, source)
    assert snapshot(source.parent) == before


@pytest.mark.parametrize("name", ["other.onnx.data", "other.onnx.1.data"])
def test_data_file_that_bears_the_destinations_name_is_not_overwritten(
    source: Path, name: str
) -> None:
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    source.write_bytes(proto.SerializeToString())
    source.with_name("model.onnx.data").rename(source.with_name(name))
    before = snapshot(source.parent)
    with pytest.raises(SaveError, match="still reads from it"):
        save(planned(source), source.with_name("other.onnx"))
    assert snapshot(source.parent) == before


def test_file_that_only_looks_like_a_data_file_of_the_destination_stays(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.onnx.data").write_bytes(b"of another")
    for _ in range(3):
        save(planned(source), tmp_path / "out" / "model.onnx")
        written = snapshot(tmp_path / "out")
        assert written["model.onnx.data"] == b"of another"
        assert len(written) == 3
    save(planned(source), tmp_path / "expected" / "model.onnx")
    assert tensors(tmp_path / "out" / "model.onnx") == tensors(tmp_path / "expected" / "model.onnx")


def test_saving_beside_the_source_leaves_the_source_alone(source: Path) -> None:
    before = snapshot(source.parent)
    save(planned(source), source.with_name("int4.onnx"))
    after = snapshot(source.parent)
    assert set(after) - set(before) == {"int4.onnx", "int4.onnx.data"}
    assert {name: after[name] for name in before} == before


# Overwriting.


def test_old_model_is_replaced_with_its_data_and_foreign_files_stay(
    source: Path, tiny_fp16: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    save(planned(tiny_fp16, bits=8), out / "model.onnx")
    foreign: dict[str, bytes | None] = {
        "other.data": b"1",
        "model.onnx.old.data": b"2",
        "model.onnx.1x.data": b"3",
        "model.data": b"4",
        "readme.txt": b"5",
        "other.onnx": b"6",
    }
    for name, content in foreign.items():
        (out / name).write_bytes(content or b"")
    expected = saved_by_onnx_ir(planned(source), tmp_path / "expected" / "model.onnx")

    save(planned(source), out / "model.onnx")
    written = snapshot(out)
    assert {name: written.pop(name) for name in foreign} == foreign
    assert set(written) == {"model.onnx", "model.onnx.1.data"}
    assert tensors(out / "model.onnx") == tensors(expected)
    np.testing.assert_array_equal(logits(out / "model.onnx"), logits(expected))

    save(planned(source), out / "model.onnx")
    assert set(snapshot(out)) == {"model.onnx", "model.onnx.data", *foreign}
    assert (out / "model.onnx").read_bytes() == expected.read_bytes()


def test_data_file_that_another_model_reads_too_stays(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "model.onnx"
    save(planned(source, bits=8), path)
    variant = Path(shutil.copy(path, path.with_name("variant.onnx")))
    before = tensors(variant)
    save(planned(source), path)
    assert tensors(variant) == before
    variant.unlink()
    save(planned(source), path)
    assert "model.onnx.1.data" not in snapshot(path.parent)


def test_graph_is_the_last_file_to_be_put_in_place(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []

    def recording(move: Callable[..., None]) -> Callable[..., None]:
        def record(start: str, end: str) -> None:
            if Path(end).parent == tmp_path / "out":
                moved.append(Path(end).name)
            move(start, end)

        return record

    for name in ("tokenizer.json", "another.txt"):
        source.with_name(name).touch()
    (tmp_path / "out").mkdir()
    for name in ("link", "rename", "replace"):
        monkeypatch.setattr(os, name, recording(getattr(os, name)))
    quantize(source.parent, tmp_path / "out")
    assert sorted(moved) == ["another.txt", "model.onnx", "model.onnx.data", "tokenizer.json"]
    assert moved[-1] == "model.onnx"


def test_symlink_to_an_old_model_stays_a_symlink(source: Path, tmp_path: Path) -> None:
    save(planned(source), tmp_path / "real" / "model.onnx")
    (tmp_path / "link.onnx").symlink_to(tmp_path / "real" / "model.onnx")
    save(planned(source, bits=8), tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink()
    assert set(snapshot(tmp_path / "real")) == {"model.onnx", "model.onnx.1.data"}
    save(planned(source, bits=8), tmp_path / "expected" / "model.onnx")
    assert tensors(tmp_path / "real" / "model.onnx") == tensors(
        tmp_path / "expected" / "model.onnx"
    )


def test_new_folder_has_the_mode_of_any_other(source: Path, tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    save(planned(source), tmp_path / "out" / "model.onnx")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "ordinary")]
    assert modes[0] == modes[1]
