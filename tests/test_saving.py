"""`save`: the bytes of `onnx_ir.save`, whole or not at all, never onto the model's source."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxscript import rewriter

from qmoe_rules import (
    ConfigError,
    QuantizeMoEPass,
    SaveError,
    SourceError,
    moe_to_qmoe_rules,
    quantize,
    quantizers,
    save,
    saving,
    slabs,
    writing,
)
from qmoe_rules.cli import main
from qmoe_rules.lazy import PlannedTensor

RECIPE: dict[str, Any] = {"bits": 4, "block_size": 32}
SLABS = 2 * 2 * 8  # layers, projections, experts of the tiny models


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Returns every file below a folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def planned(path: Path, **recipe: Any) -> ir.Model:
    return QuantizeMoEPass(**(recipe or RECIPE))(ir.load(path)).model


def in_memory(path: Path) -> ir.Model:
    """Loads a model with all its weights inside the ModelProto."""
    model: ir.Model = ir.from_proto(onnx.load(path))
    return QuantizeMoEPass(**RECIPE)(model).model


def reference(model: ir.Model, folder: Path) -> Path:
    """Saves the model with `onnx_ir.save` under the names that `save` uses."""
    folder.mkdir()
    ir.save(model, folder / "model.onnx", external_data="model.onnx.data")
    return folder / "model.onnx"


def run(path: Path, **feeds: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


def logits(path: Path) -> np.ndarray[Any, Any]:
    return run(path, input_ids=np.arange(40, dtype=np.int64).reshape(2, 20))[0]


def tensors(path: Path) -> dict[str, tuple[ir.DataType, tuple[int, ...], bytes]]:
    """Returns type, shape and bytes of every initializer of every graph."""
    found = {}
    for graph in ir.load(path.absolute()).graphs():
        for name, value in graph.initializers.items():
            tensor = value.const_value
            assert tensor is not None
            found[name] = (tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())
    return found


def write_graph(path: Path, graph: onnx.GraphProto) -> Path:
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    )
    return path


def sum_graph(**constants: np.ndarray[Any, Any]) -> onnx.GraphProto:
    """Returns y = x + the constants, with each of them as an initializer."""
    names = ["x", *constants]
    nodes = [
        helper.make_node("Add", [before, name], [f"x+{name}"])
        for before, name in zip(["x", *(f"x+{n}" for n in names[1:])], names[1:], strict=False)
    ]
    y = nodes[-1].output[0]
    return helper.make_graph(
        nodes,
        "sum",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    """A copy of the float32 model that a test may alter."""
    shutil.copytree(tiny_fp32.parent, tmp_path / "source")
    return tmp_path / "source" / "model.onnx"


@pytest.fixture(params=["fp32", "fp16"])
def tiny(request: pytest.FixtureRequest) -> Path:
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


# The same bytes, whoever writes them.


@pytest.mark.parametrize("workers", [1, 2, 5, None])
def test_files_are_those_of_onnx_ir(tiny: Path, tmp_path: Path, workers: int | None) -> None:
    expected = reference(planned(tiny), tmp_path / "expected")
    save(planned(tiny), tmp_path / "saved" / "model.onnx", workers=workers)
    assert snapshot(tmp_path / "saved") == snapshot(expected.parent)


@pytest.mark.parametrize("workers", [1, 5])
def test_model_in_memory_gives_the_bytes_of_the_streamed_one(
    tiny: Path, tmp_path: Path, workers: int
) -> None:
    save(planned(tiny), tmp_path / "streamed" / "model.onnx")
    save(in_memory(tiny), tmp_path / "memory" / "model.onnx", workers=workers)
    assert snapshot(tmp_path / "memory") == snapshot(tmp_path / "streamed")


def test_order_of_the_work_does_not_matter(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(planned(source), tmp_path / "forward" / "model.onnx", workers=1)
    tasks = writing._tasks
    monkeypatch.setattr(writing, "_tasks", lambda *given: [*tasks(*given)][::-1])
    save(planned(source), tmp_path / "backward" / "model.onnx", workers=1)
    assert snapshot(tmp_path / "backward") == snapshot(tmp_path / "forward")


def test_every_route_writes_the_same_bytes(tiny: Path, tmp_path: Path) -> None:
    save(planned(tiny), tmp_path / "pass" / "model.onnx")
    rewritten = rewriter.rewrite(ir.load(tiny), [*moe_to_qmoe_rules(**RECIPE)])
    save(rewritten, tmp_path / "rewrite" / "model.onnx")
    quantize(tiny, tmp_path / "quantize" / "model.onnx", **RECIPE)
    command = ["quantize", str(tiny), str(tmp_path / "cli"), "--bits", "4", "--block-size", "32"]
    assert main(command) == 0
    expected = snapshot(tmp_path / "pass")
    assert snapshot(tmp_path / "quantize") == expected
    assert snapshot(tmp_path / "cli") == expected
    # rewrite() cleans the graph up, so only the data are comparable.
    assert (tmp_path / "rewrite" / "model.onnx.data").read_bytes() == expected["model.onnx.data"]
    np.testing.assert_array_equal(
        logits(tmp_path / "rewrite" / "model.onnx"), logits(tmp_path / "cli" / "model.onnx")
    )


def test_result_computes_what_the_planned_model_means(tiny: Path, tmp_path: Path) -> None:
    expected = reference(planned(tiny), tmp_path / "expected")
    save(planned(tiny), tmp_path / "model.onnx", workers=2)
    got = logits(tmp_path / "model.onnx")
    np.testing.assert_array_equal(got, logits(expected))
    assert not np.array_equal(got, logits(tiny))


def test_everything_outside_the_experts_keeps_its_bytes(tiny: Path, tmp_path: Path) -> None:
    save(planned(tiny), tmp_path / "model.onnx")
    before, after = tensors(tiny), tensors(tmp_path / "model.onnx")
    experts = {name for name in before if ".moe.fc" in name}
    assert len(experts) == 4
    assert {name: before[name] for name in before if name not in experts} == {
        name: after[name] for name in after if not name.startswith(tuple(experts))
    }
    assert len(after) == len(before) - 4 + 8


# The model object.


def test_model_object_is_unchanged_and_saves_again_to_the_same_bytes(
    source: Path, tmp_path: Path
) -> None:
    model = planned(source)
    before = {name: value.const_value for name, value in model.graph.initializers.items()}
    proto = ir.to_proto(planned(source)).SerializeToString()
    save(model, tmp_path / "first" / "model.onnx")
    after = {name: value.const_value for name, value in model.graph.initializers.items()}
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert sum(isinstance(tensor, PlannedTensor) for tensor in after.values()) == 8
    save(model, tmp_path / "second" / "model.onnx")
    assert snapshot(tmp_path / "first") == snapshot(tmp_path / "second")
    assert ir.to_proto(model).SerializeToString() == proto


def test_model_object_survives_a_save_that_fails(source: Path, tmp_path: Path) -> None:
    model = planned(source)
    before = [value.const_value for value in model.graph.initializers.values()]
    (tmp_path / "file").touch()
    with pytest.raises(SaveError):
        save(model, tmp_path / "file" / "model.onnx")
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(x is y for x, y in zip(before, after, strict=True))


def test_graph_that_cannot_be_serialized_is_a_save_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large(_model: ir.Model) -> onnx.ModelProto:
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB")

    model = planned(source)
    before = [value.const_value for value in model.graph.initializers.values()]
    monkeypatch.setattr(ir.serde, "serialize_model", too_large)
    files = snapshot(tmp_path)
    with pytest.raises(SaveError, match="maximum protobuf size"):
        save(model, tmp_path / "out" / "model.onnx")
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert snapshot(tmp_path) == files


@pytest.mark.parametrize("workers", [1, 4])
def test_progress_ends_at_the_size_of_the_data_file(
    source: Path, tmp_path: Path, workers: int
) -> None:
    calls: list[tuple[int, int]] = []
    save(
        planned(source),
        tmp_path / "out" / "model.onnx",
        workers=workers,
        progress=lambda done, total: calls.append((done, total)),
    )
    size = (tmp_path / "out" / "model.onnx.data").stat().st_size
    done = [count for count, _ in calls]
    assert done == sorted(set(done))
    assert len(done) > SLABS
    assert {total for _, total in calls} == {size}
    assert done[-1] == size


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
    expected = reference(planned(source), tmp_path / "expected")

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


# A save that fails.

Failure = Callable[[pytest.MonkeyPatch, Path], type[BaseException]]
"""Arranges that a save of the source fails midway, and returns with which error."""


def _nth_slab_fails(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    countdown = iter(range(SLABS - 5, -1, -1))
    rtn = quantizers.METHODS["rtn"]

    def broken(weight: np.ndarray[Any, Any], spec: Any, statistics: Any) -> Any:
        if next(countdown, 0) == 0:
            raise RuntimeError("broken quantizer")
        return rtn(weight, spec, statistics)

    monkeypatch.setitem(quantizers.METHODS, "rtn", broken)
    return RuntimeError


def _last_expert_has_a_nan(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    weight = ir.load(source).graph.initializers["layers.1.moe.fc2"].const_value
    assert isinstance(weight, ir.ExternalTensor)
    with source.with_name("model.onnx.data").open("r+b") as file:
        file.seek((weight.offset or 0) + weight.nbytes - 4)
        file.write(np.float32(np.nan).tobytes())
    return SourceError


def _disk_is_full(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    countdown = iter(range(SLABS // 2, -1, -1))
    write = slabs.write_slab

    def full(*arguments: Any) -> int:
        if next(countdown, 0) == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(writing, "write_slab", full)
    return SaveError


def _interrupted(monkeypatch: pytest.MonkeyPatch, source: Path) -> type[BaseException]:
    return KeyboardInterrupt


def _interrupt_late(done: int, total: int) -> None:
    if done > 0.8 * total:
        raise KeyboardInterrupt


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("overwrites", [True, False])
@pytest.mark.parametrize(
    "arrange", [_nth_slab_fails, _last_expert_has_a_nan, _disk_is_full, _interrupted]
)
def test_failed_save_changes_nothing(
    source: Path,
    tiny_fp16: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Failure,
    overwrites: bool,
    workers: int,
) -> None:
    destination = tmp_path / "new" / "folders" / "model.onnx"
    if overwrites:
        save(planned(tiny_fp16), destination)
    error = arrange(monkeypatch, source)
    before = snapshot(tmp_path)
    with pytest.raises(error):
        save(
            planned(source),
            destination,
            workers=workers,
            progress=_interrupt_late if error is KeyboardInterrupt else None,
        )
    assert snapshot(tmp_path) == before


def test_nan_is_reported_with_the_weight_and_the_expert(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _last_expert_has_a_nan(monkeypatch, source)
    with pytest.raises(SourceError, match=r"'layers\.1\.moe\.fc2', expert 7: .*NaN"):
        save(planned(source), tmp_path / "out.onnx")


def test_weight_that_disappears_after_planning_is_a_source_error(
    source: Path, tmp_path: Path
) -> None:
    model = planned(source)
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    source.with_name("model.onnx.data").unlink()
    with pytest.raises(SourceError, match=r"cannot read weight 'layers\..\.moe\.fc"):
        save(model, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_full_disk_is_noticed_before_anything_is_computed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        total: int
        used: int
        free: int

    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(2000, 1000, 1000))
    monkeypatch.delitem(quantizers.METHODS, "rtn")
    before = snapshot(tmp_path)
    model = ir.load(source)
    with pytest.raises(SaveError, match=r"4\.09 MB needed, 1 kB free"):
        save(model, tmp_path / "new" / "out" / "model.onnx")
    assert snapshot(tmp_path) == before


def test_destination_below_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    before = snapshot(tmp_path)
    for destination in ("file/model.onnx", "file/deep/model.onnx"):
        with pytest.raises(SaveError, match=r"cannot write to .*/file(/deep)?: "):
            save(planned(source), tmp_path / destination)
    assert snapshot(tmp_path) == before


def test_destination_that_is_a_folder_is_refused_without_a_trace(
    source: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "model.onnx").mkdir(parents=True)
    before = snapshot(tmp_path)
    with pytest.raises(SaveError):
        save(planned(source), tmp_path / "out" / "model.onnx")
    assert snapshot(tmp_path) == before


def test_longest_possible_folder_name_is_a_destination(source: Path, tmp_path: Path) -> None:
    save(planned(source), tmp_path / "new" / ("x" * 255) / "model.onnx")
    assert set(snapshot(tmp_path / "new" / ("x" * 255))) == {"model.onnx", "model.onnx.data"}


def test_file_name_that_is_too_long_is_a_save_error(source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match="File name too long"):
        save(planned(source), tmp_path / "out" / f"{'x' * 250}.onnx")
    assert snapshot(tmp_path) == before


def test_parents_go_again_when_the_folder_cannot_be_made(source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    with pytest.raises(SaveError):
        save(planned(source), tmp_path / "new" / ("x" * 256) / "model.onnx")
    assert snapshot(tmp_path) == before


def test_loop_of_symlinks_is_a_save_error(source: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(SaveError):
        save(planned(source), tmp_path / "loop" / "model.onnx")


# Models of other shapes.


def test_model_without_large_tensors_has_no_data_file(tmp_path: Path) -> None:
    graph = sum_graph(c=np.arange(4, dtype=np.float32))
    path = write_graph(tmp_path / "source" / "model.onnx", graph)
    save(ir.load(path), tmp_path / "out" / "model.onnx")
    assert set(snapshot(tmp_path / "out")) == {"model.onnx"}
    x = np.ones(4, np.float32)
    np.testing.assert_array_equal(run(tmp_path / "out" / "model.onnx", x=x)[0], [1, 2, 3, 4])


def test_data_file_goes_when_the_new_model_needs_none(source: Path, tmp_path: Path) -> None:
    save(planned(source), tmp_path / "out" / "model.onnx")
    graph = sum_graph(c=np.arange(4, dtype=np.float32))
    save(
        ir.load(write_graph(tmp_path / "small" / "model.onnx", graph)),
        tmp_path / "out" / "model.onnx",
    )
    assert set(snapshot(tmp_path / "out")) == {"model.onnx"}


def test_threshold_is_that_of_onnx_ir(tmp_path: Path) -> None:
    sizes = {f"c{count}": np.full((count, 1), 0.5, np.float32) for count in (63, 64, 65)}
    path = write_graph(tmp_path / "source" / "model.onnx", sum_graph(**sizes))
    expected = reference(ir.load(path), tmp_path / "expected")
    save(ir.load(path), tmp_path / "out" / "model.onnx")
    assert snapshot(tmp_path / "out") == snapshot(expected.parent)
    assert (tmp_path / "out" / "model.onnx.data").stat().st_size == 4 * 65


def test_small_external_tensors_move_into_the_model(tmp_path: Path) -> None:
    constants = {"a": np.arange(8, dtype=np.float32), "b": np.ones((100, 8), np.float32)}
    path = tmp_path / "source" / "model.onnx"
    write_graph(path, sum_graph(**constants))
    onnx.save_model(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
    )
    assert all(
        tensor.external_data
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    )
    model = ir.load(path)
    before = [value.const_value for value in model.graph.initializers.values()]
    expected = reference(ir.load(path), tmp_path / "expected")
    save(model, tmp_path / "out" / "model.onnx")
    after = [value.const_value for value in model.graph.initializers.values()]
    assert all(x is y for x, y in zip(before, after, strict=True))
    assert snapshot(tmp_path / "out") == snapshot(expected.parent)
    shutil.rmtree(path.parent)
    y = run(tmp_path / "out" / "model.onnx", x=np.zeros((100, 8), np.float32))[0]
    np.testing.assert_array_equal(y, constants["a"] + constants["b"])


def test_element_types_and_storage_forms_keep_their_bytes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    floats = rng.standard_normal(300).astype(np.float32)
    initializers = [
        helper.make_tensor("float_data", TensorProto.FLOAT, [300], floats),
        helper.make_tensor("half", TensorProto.FLOAT16, [300], floats),
        helper.make_tensor("brain", TensorProto.BFLOAT16, [300], floats),
        helper.make_tensor("int64_data", TensorProto.INT64, [300], range(300)),
        helper.make_tensor("int4", TensorProto.INT4, [601], rng.integers(-8, 8, 601)),
        helper.make_tensor("bool", TensorProto.BOOL, [300], rng.integers(0, 2, 300)),
        helper.make_tensor("fp8", TensorProto.FLOAT8E4M3FN, [300], floats),
        helper.make_tensor("empty", TensorProto.FLOAT, [0, 300], []),
        numpy_helper.from_array(np.array(3.5), "scalar"),
        numpy_helper.from_array(np.full(100, 1j, np.complex64), "complex"),
    ]
    graph = sum_graph(c=floats)
    graph.initializer.extend(initializers)
    path = write_graph(tmp_path / "source" / "model.onnx", graph)
    expected = reference(ir.load(path), tmp_path / "expected")
    save(ir.load(path), tmp_path / "out" / "model.onnx", workers=3)
    assert snapshot(tmp_path / "out") == snapshot(expected.parent)
    assert tensors(tmp_path / "out" / "model.onnx") == tensors(path)
    # And once more, from external data.
    save(ir.load(expected), tmp_path / "again" / "model.onnx", workers=3)
    assert snapshot(tmp_path / "again") == snapshot(expected.parent)


def test_string_initializers_stay_in_the_model(source: Path, tmp_path: Path) -> None:
    words = [b"abc" * 50, b"", "größe".encode()] * 10
    strings = onnx.TensorProto(name="words", data_type=TensorProto.STRING, dims=[30])
    strings.string_data.extend(words)
    proto = onnx.load(source, load_external_data=False)
    proto.graph.initializer.append(strings)
    source.write_bytes(proto.SerializeToString())
    save(planned(source), tmp_path / "out" / "model.onnx")
    saved = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    found = {tensor.name: tensor for tensor in saved.graph.initializer}
    assert list(found["words"].string_data) == words
    assert logits(tmp_path / "out" / "model.onnx").shape == (2, 20, 256)


def moe_into_branch(proto: onnx.ModelProto) -> None:
    """Moves the first MoE with its weights into the then-branch of an If; the else-branch is 0."""
    graph = proto.graph
    moe = next(node for node in graph.node if node.op_type == "MoE")
    place = list(graph.node).index(moe)
    (result,) = moe.output
    graph.node.remove(moe)
    weights = [tensor for tensor in graph.initializer if tensor.name in moe.input]
    assert len(weights) == 2
    moe.output[0] = "then_out"
    inside = helper.make_tensor_value_info("then_out", TensorProto.FLOAT, None)
    then_branch = helper.make_graph([moe], "then", [], [inside])
    for tensor in weights:
        then_branch.initializer.add().CopyFrom(tensor)
        graph.initializer.remove(tensor)
    zeros = numpy_helper.from_array(np.zeros((1, 128), np.float32), "zeros")
    identity = helper.make_node("Identity", ["zeros"], ["else_out"])
    outside = helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)
    else_branch = helper.make_graph([identity], "else", [], [outside], [zeros])
    graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    branches = {"then_branch": then_branch, "else_branch": else_branch}
    graph.node.insert(place, helper.make_node("If", ["yes"], [result], name="if", **branches))


def test_initializers_of_subgraphs_are_saved_and_quantized_where_they_are(
    source: Path, tmp_path: Path
) -> None:
    save(planned(source), tmp_path / "flat" / "model.onnx")
    proto = onnx.load(source, load_external_data=False)
    moe_into_branch(proto)
    source.write_bytes(proto.SerializeToString())
    expected = reference(planned(source), tmp_path / "expected")
    save(planned(source), tmp_path / "out" / "model.onnx", workers=3)
    assert snapshot(tmp_path / "out") == snapshot(expected.parent)
    model = ir.load(tmp_path / "out" / "model.onnx")
    branches = [graph for graph in model.graphs() if graph is not model.graph]
    assert sorted(name for graph in branches for name in graph.initializers) == [
        "layers.0.moe.fc1_quantized",
        "layers.0.moe.fc1_scales",
        "layers.0.moe.fc2_quantized",
        "layers.0.moe.fc2_scales",
        "zeros",
    ]
    got, flat = (logits(tmp_path / name / "model.onnx") for name in ("out", "flat"))
    np.testing.assert_array_equal(got, flat)


def head_into_constant(source: Path, location: str) -> None:
    """Makes the output projection a Constant node whose data lie in a file of its own."""
    proto = onnx.load(source, load_external_data=False)
    (head,) = [tensor for tensor in proto.graph.initializer if tensor.name == "head.weight"]
    proto.graph.initializer.remove(head)
    entries = {entry.key: entry.value for entry in head.external_data}
    offset, length = int(entries["offset"]), int(entries["length"])
    content = source.with_name("model.onnx.data").read_bytes()[offset : offset + length]
    source.with_name(location).write_bytes(content)
    del head.external_data[:]
    head.external_data.add(key="location", value=location)
    node = helper.make_node("Constant", [], ["head.weight"], name="head", value=head)
    proto.graph.node.insert(0, node)
    source.write_bytes(proto.SerializeToString())


def test_external_data_of_a_constant_node_come_along(source: Path, tmp_path: Path) -> None:
    save(planned(source), tmp_path / "expected" / "model.onnx")
    head_into_constant(source, "head.bin")
    save(planned(source), tmp_path / "out" / "model.onnx")
    got, expected = (logits(tmp_path / name / "model.onnx") for name in ("out", "expected"))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("data", "destination"), [("other.onnx.data", "other.onnx"), ("head.bin", "head.bin")]
)
def test_data_file_of_a_constant_node_is_not_overwritten(
    source: Path, data: str, destination: str
) -> None:
    head_into_constant(source, data)
    before = snapshot(source.parent)
    with pytest.raises(SaveError, match=f"{data}: the model still reads from it"):
        save(planned(source), source.with_name(destination))
    assert snapshot(source.parent) == before


def test_old_data_file_goes_even_if_only_subgraphs_used_it(source: Path, tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = numpy_helper.from_array(np.ones((20, 20), np.float32), "weight")
    body = [helper.make_node("Identity", ["weight"], ["y"])]
    branch = helper.make_graph(body, "branch", [], [value], [weight])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)
    yes = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    path = write_graph(tmp_path / "given.onnx", helper.make_graph([node], "if", [], [value], [yes]))
    save(ir.load(path), tmp_path / "out" / "model.onnx")
    assert set(snapshot(tmp_path / "out")) == {"model.onnx", "model.onnx.data"}
    save(planned(source), tmp_path / "out" / "model.onnx")
    assert set(snapshot(tmp_path / "out")) == {"model.onnx", "model.onnx.1.data"}


@pytest.fixture
def overlong(source: Path) -> Path:
    """The model with two tensors whose external data are longer than they need: legal."""
    proto = onnx.load(source, load_external_data=False)
    for name in ("layers.0.router.weight", "head.weight"):
        (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
        for entry in tensor.external_data:
            if entry.key == "length":
                entry.value = str(int(entry.value) + 4096)
    source.write_bytes(proto.SerializeToString())
    with source.with_name("model.onnx.data").open("ab") as file:
        file.write(bytes(4096))
    return source


def test_external_data_longer_than_their_tensor_do_not_spill(
    overlong: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(planned(overlong), tmp_path / "forward.onnx", workers=1)
    tasks = writing._tasks
    monkeypatch.setattr(writing, "_tasks", lambda *given: [*tasks(*given)][::-1])
    save(planned(overlong), tmp_path / "backward.onnx", workers=1)
    assert tensors(tmp_path / "backward.onnx") == tensors(tmp_path / "forward.onnx")


def test_data_file_ends_with_the_last_tensor(overlong: Path, tmp_path: Path) -> None:
    model = ir.load(overlong)
    save(model, tmp_path / "out" / "model.onnx")
    assert sum(file.stat().st_size for file in (tmp_path / "out").iterdir()) == saving.saved_bytes(
        model
    )


@pytest.mark.parametrize("name", ["head.weight", "layers.1.moe.fc2"])
def test_inline_tensor_shorter_than_its_shape_is_a_source_error(
    source: Path, tmp_path: Path, name: str
) -> None:
    proto = onnx.load(source)
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    tensor.raw_data = tensor.raw_data[:-100]
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(SourceError, match=name):
        save(planned(source), tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


def test_sparse_initializers_are_kept_or_refused(source: Path, tmp_path: Path) -> None:
    proto = onnx.load(source, load_external_data=False)
    sparse = proto.graph.sparse_initializer.add(dims=[10])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "sparse"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.full(1, 3, np.int64), "indices"))
    source.write_bytes(proto.SerializeToString())
    try:
        quantize(source, tmp_path / "out.onnx", **RECIPE)
    except SourceError:
        return
    saved = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert len(saved.graph.sparse_initializer) == 1


@pytest.mark.parametrize("workers", [0, -1])
def test_number_of_workers_that_is_not_positive_is_a_config_error(
    source: Path, tmp_path: Path, workers: int
) -> None:
    with pytest.raises(ConfigError, match="workers"):
        save(planned(source), tmp_path / "out.onnx", workers=workers)
