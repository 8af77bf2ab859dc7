"""`Staging`: all files appear, the last one last, or none does; and two saves at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qmoe_rules import SaveError, quantize, save
from qmoe_rules.staging import Staging
from tests.saves import RECIPE, planned, snapshot, tensors


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A destination with an old model."""
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("model", "data", "tokenizer"):
        (folder / name).write_text(f"old {name}")
    return folder


def fill(stage: Staging, *names: str) -> None:
    """Stages a model, a side file and, under these names, data."""
    for name in ("model", "tokenizer"):
        (stage.path / name).write_text(f"new {name}")
    for name in names:
        file = stage.unfinished() / name
        file.write_text(f"new {name}")
        stage.exclusive[name] = file
    stage.obsolete = lambda: [stage.destination / "data"]


def test_commit_replaces_the_old_files(out: Path) -> None:
    with Staging(out) as stage:
        fill(stage, "data.1", "data.2")
        stage.commit("model")
    assert snapshot(out) == {
        name: f"new {name}".encode() for name in ("model", "tokenizer", "data.1", "data.2")
    }


def test_file_that_is_put_in_place_is_not_obsolete(out: Path) -> None:
    with Staging(out) as stage:
        fill(stage)
        (stage.path / "data").write_text("new data")
        stage.commit("model")
    assert (out / "data").read_text() == "new data"


def test_commit_makes_the_folder_in_one_step(tmp_path: Path) -> None:
    with Staging(tmp_path / "new" / "out") as stage:
        fill(stage, "data.1")
        assert not (tmp_path / "new" / "out").exists()
        stage.commit("model")
    assert set(snapshot(tmp_path)) == {
        "new",
        "new/out",
        *(f"new/out/{name}" for name in ("model", "tokenizer", "data.1")),
    }


def test_name_that_somebody_has_taken_undoes_everything(out: Path) -> None:
    with Staging(out) as stage:
        fill(stage, "data.1", "data.2", "data.3")
        (out / "data.2").write_text("of another")
        before = snapshot(out)
        with pytest.raises(SaveError, match=r"data\.2: another save has written it by now"):
            stage.commit("model")
        assert snapshot(out) == before
        assert snapshot(stage.unfinished()) == {
            name: f"new {name}".encode() for name in ("data.1", "data.2", "data.3")
        }


def _side_file(source: Path, _target: Path) -> bool:
    return source.name == "tokenizer"


def _last_file(source: Path, _target: Path) -> bool:
    return source.name == "model"


@pytest.mark.parametrize("fails", [_side_file, _last_file])
def test_file_that_cannot_be_moved_leaves_the_old_model(
    out: Path, monkeypatch: pytest.MonkeyPatch, fails: Callable[[Path, Path], bool]
) -> None:
    replace = Path.replace

    def refusing(self: Path, target: Path) -> Path:
        if fails(self, target):
            raise PermissionError(13, "Permission denied")
        return replace(self, target)

    with Staging(out) as stage:
        fill(stage, "data.1")
        monkeypatch.setattr(Path, "replace", refusing)
        with pytest.raises(SaveError, match=r"cannot write to .*/out: Permission denied"):
            stage.commit("model")
    written = snapshot(out)
    assert written.pop("tokenizer") in (b"old tokenizer", b"new tokenizer")
    assert written == {"model": b"old model", "data": b"old data"}


def test_interrupt_behind_the_last_file_keeps_the_new_model(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever strikes when the new model is in place must not take its data away."""
    replace = Path.replace

    def striking(self: Path, target: Path) -> Path:
        done = replace(self, target)
        if self.name == "model":
            raise KeyboardInterrupt
        return done

    with Staging(out) as stage:
        fill(stage, "data.1")
        monkeypatch.setattr(Path, "replace", striking)
        with pytest.raises(KeyboardInterrupt):
            stage.commit("model")
    assert (out / "model").read_text() == "new model"
    assert (out / "data.1").read_text() == "new data.1"


def interrupted(out: Path, work: Callable[[Staging], object]) -> None:
    stage = Staging(out, "model").__enter__()
    work(stage)
    stage.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)


def test_unfinished_work_of_another_kind_goes(out: Path) -> None:
    interrupted(out, lambda stage: (stage.unfinished("one") / "file").touch())
    with Staging(out, "model") as stage:
        assert [file.name for file in stage.unfinished("one").iterdir()] == ["file"]
        assert not list(stage.unfinished("two").iterdir())
        assert not list(stage.unfinished("one").iterdir())


def test_nothing_is_kept_where_nothing_was_begun(out: Path) -> None:
    before = snapshot(out)
    interrupted(out, lambda stage: (stage.path / "file").touch())
    assert snapshot(out) == before


def test_lock_is_held_by_one_save_at_a_time(out: Path) -> None:
    with Staging(out, "model"):
        with pytest.raises(SaveError, match=r"another process is saving .*/out/model"):
            Staging(out, "model").__enter__()
        with Staging(out, "other"), Staging(out):
            pass
        with pytest.raises(SaveError):
            Staging(out, "model").__enter__()
    with Staging(out, "model"):
        pass
    assert set(snapshot(out)) == {"data", "model", "tokenizer"}


# Two saves at a time.


@pytest.mark.parametrize("exists", [True, False])
def test_save_that_is_overtaken_fails_and_leaves_the_other(
    source: Path, tmp_path: Path, exists: bool
) -> None:
    path = tmp_path / "out" / "model.onnx"
    if exists:
        save(planned(source, bits=8), path)

    def overtake(done: int, total: int) -> None:
        if done == total:
            save(planned(source), path)

    with pytest.raises(SaveError, match="another save has written it by now"):
        save(planned(source, bits=8, block_size=32), path, progress=overtake)
    save(planned(source), tmp_path / "expected.onnx")
    assert tensors(path) == tensors(tmp_path / "expected.onnx")
    assert len(snapshot(path.parent)) == 2
    assert not list(tmp_path.rglob(".qmoe-*"))


def test_leftovers_of_killed_saves_do_not_disturb(source: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "out", source.parent):
        for name in (".qmoe-abc/files/model.onnx.data", ".qmoe-resume-1/unfinished/new/shard-0"):
            (folder / name).parent.mkdir(parents=True)
            (folder / name).write_bytes(b"stale")
    quantize(source.parent, tmp_path / "out", **RECIPE)
    quantize(source.parent, tmp_path / "fresh", **RECIPE)
    own = {"model.onnx", "model.onnx.data"}
    written = snapshot(tmp_path / "out")
    assert {name for name in written if not name.startswith(".qmoe-")} == own
    assert set(snapshot(tmp_path / "fresh")) == own
