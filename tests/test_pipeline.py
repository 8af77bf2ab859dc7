"""`plan` and `quantize`: from a path to a path, with the report that says what happened."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qmoe_rules import (
    ConfigError,
    Recipe,
    SaveError,
    SourceError,
    UnsupportedNodeError,
    pipeline,
    plan,
    quantize,
    quantizers,
    writing,
)
from tests.saves import tensors

RECIPE: dict[str, Any] = {"bits": 4, "block_size": 32}


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Returns every file below a folder with its bytes, and every folder with None."""
    return {
        str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
    }


def model_bytes(path: Path) -> int:
    """Returns the size of a saved model: the .onnx file and the data files of its name."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def graph_without_locations(path: Path) -> bytes:
    """Returns the model as onnx_ir spells it, without a word about where its tensors lie."""
    proto = ir.to_proto(ir.from_proto(onnx.load(path)))
    for tensor in proto.graph.initializer:
        del tensor.external_data[:]
        tensor.ClearField("data_location")
    found: bytes = proto.SerializeToString(deterministic=True)
    return found


def edit(path: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    proto = onnx.load(path, load_external_data=False)
    change(proto)
    path.write_bytes(proto.SerializeToString())


def moe_nodes(proto: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in proto.graph.node if node.op_type == "MoE"]


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the float32 model and the files that come with a model."""
    folder = tmp_path / "source"
    shutil.copytree(tiny_fp32.parent, folder)
    (folder / "config.json").write_text('{"model": "tiny"}')
    (folder / "tokenizer" / "merges").mkdir(parents=True)
    (folder / "tokenizer" / "merges" / "a.txt").write_text("a b")
    return folder


SIDE_FILES = {"config.json", "tokenizer", "tokenizer/merges", "tokenizer/merges/a.txt"}
MODEL = {"model.onnx", "model.onnx.data"}


@pytest.fixture
def expected(source: Path, tmp_path: Path) -> dict[str, bytes | None]:
    """The quantized model.onnx and its data."""
    quantize(source / "model.onnx", tmp_path / "expected" / "model.onnx", **RECIPE)
    return snapshot(tmp_path / "expected")


# From where to where.


def test_file_to_file(source: Path, tmp_path: Path, expected: dict[str, bytes | None]) -> None:
    before = snapshot(source)
    report = quantize(source / "model.onnx", tmp_path / "new" / "out" / "model.onnx", **RECIPE)
    assert snapshot(tmp_path / "new" / "out") == expected
    assert set(expected) == MODEL
    assert [row.status for row in report.rows] == ["converted"] * 2
    assert [row.node for row in report.rows] == ["layers.0.moe", "layers.1.moe"]
    assert report.file_bytes_before == model_bytes(source / "model.onnx")
    assert snapshot(source) == before


@pytest.mark.parametrize("exists", [True, False])
def test_file_to_folder_takes_the_name_and_no_side_files(
    source: Path, tmp_path: Path, expected: dict[str, bytes | None], exists: bool
) -> None:
    if exists:
        (tmp_path / "out").mkdir()
    quantize(source / "model.onnx", tmp_path / "out", **RECIPE)
    assert snapshot(tmp_path / "out") == expected


def test_existing_folder_with_the_ending_of_a_model_is_a_folder(
    source: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    (tmp_path / "out.onnx").mkdir()
    quantize(source / "model.onnx", tmp_path / "out.onnx", **RECIPE)
    assert snapshot(tmp_path / "out.onnx") == expected


def test_folder_to_folder_brings_the_side_files(
    source: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    before = snapshot(source)
    quantize(source, tmp_path / "out", **RECIPE)
    written = snapshot(tmp_path / "out")
    assert set(written) == MODEL | SIDE_FILES
    assert {name: written[name] for name in MODEL} == expected
    assert {name: written[name] for name in SIDE_FILES} == {n: before[n] for n in SIDE_FILES}
    assert snapshot(source) == before


def test_folder_to_file_brings_the_side_files_too(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out" / "int4.onnx", **RECIPE)
    names = {"int4.onnx", "int4.onnx.data"}
    assert set(snapshot(tmp_path / "out")) == names | SIDE_FILES


@pytest.mark.parametrize("destination", ["out", "out/int4.onnx"])
def test_files_of_somebody_else_are_not_replaced(
    source: Path, tmp_path: Path, destination: str
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("of mine")
    shutil.copy(source / "tokenizer" / "merges" / "a.txt", tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match=r"^refusing to replace .*out/config.json by .*; name ano"):
        quantize(source, tmp_path / destination, **RECIPE)
    assert snapshot(tmp_path) == before


def test_files_that_came_with_a_model_are_replaced_with_it(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", **RECIPE)
    (source / "config.json").write_text("a newer one")
    quantize(source, tmp_path / "out", **RECIPE)
    assert (tmp_path / "out" / "config.json").read_text() == "a newer one"


def test_history_of_a_repository_stays_behind(source: Path, tmp_path: Path) -> None:
    for name in (".git/HEAD", "tokenizer/.git/objects/a"):
        (source / name).parent.mkdir(parents=True)
        (source / name).write_text("theirs")
    (source / ".gitattributes").write_text("kept")
    quantize(source, tmp_path / "out", **RECIPE)
    assert set(snapshot(tmp_path / "out")) == MODEL | SIDE_FILES | {".gitattributes"}


def test_data_files_of_the_source_stay_behind_whatever_their_names(
    source: Path, tmp_path: Path
) -> None:
    def scatter(proto: onnx.ModelProto) -> None:
        for index, tensor in enumerate(proto.graph.initializer):
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"weights/{index % 2}.bin"

    (source / "weights").mkdir()
    for name in ("0.bin", "1.bin"):
        shutil.copy(source / "model.onnx.data", source / "weights" / name)
    (source / "model.onnx.data").unlink()
    (source / "weights" / "readme.txt").write_text("not mine")
    edit(source / "model.onnx", scatter)
    quantize(source, tmp_path / "out", **RECIPE)
    written = set(snapshot(tmp_path / "out"))
    assert written == MODEL | SIDE_FILES | {"weights", "weights/readme.txt"}


@pytest.mark.parametrize("place", ["int4", "deep/int4", "tokenizer", "deep/int4.onnx"])
def test_destination_inside_the_source_folder_is_refused(source: Path, place: str) -> None:
    """Its files would be copied into a part of themselves, and by the next run once more."""
    before = snapshot(source)
    with pytest.raises(SaveError) as error:
        quantize(source, source / place, **RECIPE)
    assert str(error.value).endswith(
        f"which is inside {source}: its files would be copied into it; name a folder elsewhere, or "
        f"the model as {source / 'model.onnx'}, which comes without other files"
    )
    assert snapshot(source) == before


def test_a_file_has_nothing_that_could_mix(source: Path, expected: dict[str, bytes | None]) -> None:
    quantize(source / "model.onnx", source / "deep" / "int4", **RECIPE)
    assert snapshot(source / "deep" / "int4") == expected


def test_destination_around_the_source_folder_keeps_its_files(
    source: Path, tmp_path: Path, expected: dict[str, bytes | None]
) -> None:
    quantize(source, tmp_path, **RECIPE)
    written = snapshot(tmp_path)
    assert {name: written[name] for name in MODEL} == expected
    assert set(written) >= SIDE_FILES
    inner = source / source.name
    inner.mkdir()
    (inner / "config.json").write_text("another")
    before = snapshot(tmp_path)
    with pytest.raises(SaveError, match=r"source/config\.json: it is inside the source$"):
        quantize(source, tmp_path, **RECIPE)
    assert snapshot(tmp_path) == before


def test_file_beside_the_source_in_its_own_folder_needs_no_side_files(source: Path) -> None:
    before, inode = snapshot(source), (source / "config.json").stat().st_ino
    quantize(source, source / "int4.onnx", **RECIPE)
    after = snapshot(source)
    assert (source / "config.json").stat().st_ino == inode
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
    source: Path, tmp_path: Path, spell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(source)
    before = snapshot(source)
    monkeypatch.setattr(pipeline, "stage_for", None)
    for given in (source, source / "model.onnx"):
        with pytest.raises(SaveError, match=r"refusing to overwrite .*model\.onnx"):
            quantize(given, tmp_path / spell, **RECIPE)
    assert snapshot(source) == before


def test_source_with_all_weights_inside_is_not_overwritten_either(source: Path) -> None:
    path = source / "model.onnx"
    path.write_bytes(onnx.load(path).SerializeToString())
    (source / "model.onnx.data").unlink()
    before = snapshot(source)
    with pytest.raises(SaveError, match=r"refusing to overwrite .*model\.onnx:"):
        quantize(path, path, **RECIPE)
    assert snapshot(source) == before


def test_other_files_of_an_existing_folder_stay(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "tokenizer").mkdir(parents=True)
    foreign = {"mine.txt": b"1", "other.onnx.data": b"2", "tokenizer/mine.txt": b"3"}
    for name, content in foreign.items():
        (out / name).write_bytes(content)
    shutil.copy(source / "config.json", out)
    quantize(source, out, **RECIPE)
    written = snapshot(out)
    assert set(written) == MODEL | SIDE_FILES | set(foreign)
    assert {name: written[name] for name in foreign} == foreign


def test_symlinked_file_inside_the_folder_is_copied(source: Path, tmp_path: Path) -> None:
    (source / "alias.json").symlink_to("config.json")
    quantize(source, tmp_path / "out", **RECIPE)
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
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, target: str
) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "a.txt").write_text("secret")
    (source / "link").symlink_to(tmp_path / target)
    with caplog.at_level(logging.WARNING, "qmoe_rules"):
        quantize(source, tmp_path / "out", **RECIPE)
    assert set(snapshot(tmp_path / "out")) == MODEL | SIDE_FILES
    assert [str(source / "link") in record.getMessage() for record in caplog.records] == [True]


def test_stray_file_of_the_data_files_name_is_a_side_file(source: Path, tmp_path: Path) -> None:
    def move(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "weights.bin" if entry.key == "location" else entry.value

    (source / "model.onnx.data").rename(source / "weights.bin")
    edit(source / "model.onnx", move)
    (source / "model.onnx.1.data").write_text("stray")
    quantize(source, tmp_path / "out", **RECIPE)
    written = snapshot(tmp_path / "out")
    assert set(written) == MODEL | SIDE_FILES | {"model.onnx.1.data"}
    assert written["model.onnx.1.data"] == b"stray"


def test_stray_file_of_exactly_the_data_files_name_is_not_lost(
    source: Path, tmp_path: Path
) -> None:
    def move(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "weights.bin" if entry.key == "location" else entry.value

    (source / "model.onnx.data").rename(source / "weights.bin")
    edit(source / "model.onnx", move)
    (source / "model.onnx.data").write_text("stray")
    quantize(source, tmp_path / "out", **RECIPE)
    assert b"stray" in snapshot(tmp_path / "out").values()


@pytest.mark.parametrize("reader", ["model.onnx", "variant.onnx"])
def test_side_file_does_not_replace_the_data_of_a_model(
    source: Path, tmp_path: Path, reader: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The old model keeps its data until it is replaced; a model that stays keeps them."""
    out = tmp_path / "out"
    quantize(source, out, bits=8)
    (out / "model.onnx").rename(out / reader)
    before = tensors(out / reader)
    data = (source / "model.onnx.data").rename(source / "weights.bin")

    def move(proto: onnx.ModelProto) -> None:
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                entry.value = data.name if entry.key == "location" else entry.value

    edit(source / "model.onnx", move)
    (source / "model.onnx.data").write_text("stray")
    with caplog.at_level(logging.WARNING, "qmoe_rules"):
        quantize(source, out, **RECIPE)
    assert "model.onnx.data is not copied" in caplog.text
    assert (out / "model.onnx.data").exists() == (reader == "variant.onnx")
    if reader == "variant.onnx":
        assert tensors(out / reader) == before


# Failures.


def test_recipe_errors_come_before_anything_is_read_or_written(tmp_path: Path) -> None:
    for fields in ({"bits": 5}, {"bitz": 4}, {"block_size": 24}):
        with pytest.raises(ConfigError):
            plan(tmp_path / "absent.onnx", **fields)  # type: ignore[arg-type]
        with pytest.raises(ConfigError):
            quantize(tmp_path / "absent.onnx", tmp_path / "out", **fields)  # type: ignore[arg-type]
    assert snapshot(tmp_path) == {}


def test_source_errors_come_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist"):
        quantize(tmp_path / "absent.onnx", tmp_path / "out")
    assert snapshot(tmp_path) == {}


def test_strict_raises_before_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "stage_for", None)
    before = snapshot(tmp_path)
    with pytest.raises(UnsupportedNodeError, match=r"1 MoE .*excluded by the rec.*layers\.1\.moe"):
        quantize(source, tmp_path / "out", strict=True, nodes_to_exclude=["layers.1.*"])
    assert snapshot(tmp_path) == before


def test_strict_writes_when_every_node_is_converted(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", strict=True, **RECIPE)
    assert report.count("converted") == 2
    assert (tmp_path / "out" / "model.onnx").exists()


@pytest.mark.parametrize("exists", [True, False])
def test_failed_quantization_leaves_no_side_file_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exists: bool
) -> None:
    if exists:
        (tmp_path / "new" / "out").mkdir(parents=True)
        (tmp_path / "new" / "out" / "mine.txt").write_text("old")

    def broken(*_: object) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setitem(quantizers.METHODS, "rtn", broken)
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError, match="broken"):
        quantize(source, tmp_path / "new" / "out", **RECIPE)
    assert snapshot(tmp_path) == before


def test_full_disk_while_side_files_are_copied_is_a_save_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copy2", full)
    before = snapshot(tmp_path)
    try:
        quantize(source, tmp_path / "out", **RECIPE)
    except SaveError as error:
        assert "No space left" in str(error)  # noqa: PT017
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("obstacle", ["a file for a folder", "a folder for a file"])
def test_side_file_that_cannot_be_put_in_place_changes_nothing(
    source: Path, tmp_path: Path, obstacle: str
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
        quantize(source, out, **RECIPE)
    assert snapshot(tmp_path) == before


# The dry run.


@pytest.mark.parametrize(
    "fields",
    [
        {"bits": 4},
        {"bits": 4, "block_size": 32},
        {"bits": 8, "block_size": 128},
        {"nodes_to_exclude": ["layers.0.*"]},
        {"overrides": ["layers.1.*:bits=8"]},
        {"nodes_to_exclude": ["*"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("tiny", ["fp32", "fp16"])
def test_plan_predicts_the_report_and_the_bytes(
    tmp_path: Path, request: pytest.FixtureRequest, tiny: str, fields: dict[str, Any]
) -> None:
    path: Path = request.getfixturevalue(f"tiny_{tiny}")
    expected = plan(path, Recipe(**fields))
    report = quantize(path, tmp_path / "out", **fields)
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    assert expected.to_dict() == report.to_dict()
    assert expected.file_bytes_after == written
    assert expected.file_bytes_before == model_bytes(path)


@pytest.mark.parametrize("destination", ["new/q.onnx", "again"])
def test_report_knows_the_bytes_whatever_the_names(
    source: Path, tmp_path: Path, destination: str
) -> None:
    quantize(source / "model.onnx", tmp_path / "again", **RECIPE)
    report = quantize(source / "model.onnx", tmp_path / destination, **RECIPE)
    folder = tmp_path / destination.split("/", maxsplit=1)[0]
    written = sum(file.stat().st_size for file in folder.iterdir())
    assert report.file_bytes_after == written


@pytest.fixture
def no_quantizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every computation fail."""

    def computed(*_: object) -> Any:
        raise RuntimeError("a weight was quantized")

    monkeypatch.setitem(quantizers.METHODS, "rtn", computed)


@pytest.mark.usefixtures("no_quantizer")
def test_plan_computes_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    assert plan(source, **RECIPE).count("converted") == 2
    assert snapshot(tmp_path) == before
    with pytest.raises(RuntimeError, match="was quantized"):
        quantize(source, tmp_path / "out", **RECIPE)


@pytest.mark.usefixtures("no_quantizer")
def test_plan_does_not_compute_small_scales_either(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in (("fc1", (2, 16, 16)), ("fc2", (2, 16, 16)))
    ]
    node = helper.make_node(
        "MoE", ["x", "router", "fc1", "", "fc2"], ["y"], "moe", domain="com.microsoft", k=1
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["tokens", 16]),
        helper.make_tensor_value_info("router", TensorProto.FLOAT, ["tokens", 2]),
    ]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 16])
    graph = helper.make_graph([node], "small", inputs, [output], weights)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    assert plan(tmp_path / "model.onnx", target="cpu").count("converted") == 1


# Models with nothing to do, and models with more than one kind of node.


def test_quantized_model_passes_through(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "first", **RECIPE)
    report = quantize(tmp_path / "first", tmp_path / "second", bits=8, strict=True)
    assert [(row.status, row.reason) for row in report.rows] == [("kept", "it is QMoE already")] * 2
    assert snapshot(tmp_path / "second") == snapshot(tmp_path / "first")
    assert report.file_bytes_after == report.file_bytes_before


def test_model_without_moe_passes_through(source: Path, tmp_path: Path) -> None:
    def hide(proto: onnx.ModelProto) -> None:
        for node in moe_nodes(proto):
            node.domain = "somewhere.else"
        proto.opset_import.append(helper.make_opsetid("somewhere.else", 1))

    edit(source / "model.onnx", hide)
    report = quantize(source, tmp_path / "out")
    assert report.rows == []
    assert "nothing to quantize" in report.summary()
    got, given = (graph_without_locations(f / "model.onnx") for f in (tmp_path / "out", source))
    assert got == given


def test_model_whose_nodes_are_all_excluded_passes_through(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", nodes_to_exclude=["*"])
    assert report.count("skipped") == 2
    got, given = (graph_without_locations(f / "model.onnx") for f in (tmp_path / "out", source))
    assert got == given


def test_half_converted_model_runs_and_says_which_half(source: Path, tmp_path: Path) -> None:
    report = quantize(source, tmp_path / "out", nodes_to_exclude=["layers.1.*"], **RECIPE)
    assert [(row.node, row.status) for row in report.rows] == [
        ("layers.0.moe", "converted"),
        ("layers.1.moe", "skipped"),
    ]
    model = ir.load(tmp_path / "out" / "model.onnx")
    assert [n.op_type for n in model.graph if n.domain == "com.microsoft"] == ["QMoE", "MoE"]
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"]
    )
    (logits,) = session.run(None, {"input_ids": np.arange(20).reshape(1, 20)})
    assert np.isfinite(logits).all()
    # The rest of the way, from what was written.
    report = quantize(tmp_path / "out", tmp_path / "rest", **RECIPE)
    assert [(row.node, row.status) for row in report.rows] == [
        ("layers.0.moe", "kept"),
        ("layers.1.moe", "converted"),
    ]


def test_branches_that_use_the_same_names_are_all_converted(source: Path, tmp_path: Path) -> None:
    def branch(proto: onnx.ModelProto) -> None:
        graph = proto.graph
        moe = moe_nodes(proto)[0]
        place = list(graph.node).index(moe)
        (result,) = moe.output
        inside = helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)
        moe.output[0] = "inside"
        branches = {
            f"{name}_branch": helper.make_graph([moe], name, [], [inside])
            for name in ("then", "else")
        }
        graph.node.remove(moe)
        graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
        graph.node.insert(place, helper.make_node("If", ["yes"], [result], **branches))

    edit(source / "model.onnx", branch)
    onnxruntime.InferenceSession(source / "model.onnx", providers=["CPUExecutionProvider"])
    report = quantize(source, tmp_path / "out", **RECIPE)
    assert report.count("converted") == 3


def test_progress_and_workers_are_passed_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []

    def counting(workers: int) -> Any:
        counts.append(workers)
        return ThreadPoolExecutor(workers)

    monkeypatch.setattr(writing, "ThreadPoolExecutor", counting)
    calls: list[tuple[int, int]] = []
    quantize(source, tmp_path / "out", workers=3, progress=lambda *call: calls.append(call))
    assert counts == [3]
    assert calls[-1] == ((tmp_path / "out" / "model.onnx.data").stat().st_size,) * 2


def test_a_second_model_that_shares_the_data_is_not_copied(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its data file stays behind, and the quantized model's takes that file's name."""
    shutil.copy(source / "model.onnx", source / "other.onnx")
    quantize(source, tmp_path / "out", **RECIPE)
    assert set(snapshot(tmp_path / "out")) == MODEL | SIDE_FILES
    assert [record.getMessage().partition("/other.onnx ")[2] for record in caplog.records] == [
        "is not copied: it shares data with the model"
    ]


@pytest.mark.parametrize(
    "fields",
    [{"nodes_to_exclude": ["Layers.0.moe"]}, {"overrides": [("re:nothing", {"bits": 8})]}],
    ids=str,
)
def test_a_pattern_that_matches_no_node_is_told(
    tiny_fp32: Path, caplog: pytest.LogCaptureFixture, fields: dict[str, Any]
) -> None:
    plan(tiny_fp32, **fields)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("matches no node; they are layers.0.moe, layers.1.moe")


def test_external_data_of_a_function_come_along(source: Path, tmp_path: Path) -> None:
    """A Constant inside a function is no initializer; its bytes move into the .onnx file."""
    model = onnx.load(source / "model.onnx", load_external_data=False)
    (source / "fn.bin").write_bytes(np.full(128, 0.5, np.float32).tobytes())
    tensor = onnx.TensorProto(name="c", data_type=onnx.TensorProto.FLOAT, dims=[128])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="fn.bin")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor),
        helper.make_node("Mul", ["a", "c"], ["b"]),
    ]
    opsets = [helper.make_opsetid("", 21)]
    model.functions.append(helper.make_function("local", "Halve", ["a"], ["b"], nodes, opsets))
    moe = moe_nodes(model)[0]
    model.graph.node.insert(
        list(model.graph.node).index(moe),
        helper.make_node("Halve", [moe.input[0]], ["halved"], domain="local"),
    )
    moe.input[0] = "halved"
    model.opset_import.append(helper.make_opsetid("local", 1))
    (source / "model.onnx").write_bytes(model.SerializeToString())
    quantize(source, tmp_path / "out", **RECIPE)
    saved = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    (constant, _) = saved.functions[0].node
    assert np.frombuffer(constant.attribute[0].t.raw_data, np.float32).tolist() == [0.5] * 128
