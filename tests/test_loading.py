"""`locate` and `load`: the right model, unread, or one clear word about what is wrong with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qmoe_rules import QMoEError, QuantizeMoEPass, SourceError, plan, quantize
from qmoe_rules.loading import Source, data_files, load, locate


def point(source: Path, name: str, **entries: str | int | None) -> None:
    """Changes where the external data of one initializer are said to lie; None removes an entry."""
    proto = onnx.load(source, load_external_data=False)
    (tensor,) = [tensor for tensor in proto.graph.initializer if tensor.name == name]
    merged = {entry.key: entry.value for entry in tensor.external_data} | entries
    del tensor.external_data[:]
    for key, value in merged.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    source.write_bytes(proto.SerializeToString())


# Which file a path means.


def test_file_is_taken_as_it_is(tiny_fp32: Path) -> None:
    assert locate(tiny_fp32) == Source(tiny_fp32)
    assert locate(str(tiny_fp32)) == Source(tiny_fp32)


def test_folder_means_its_model_onnx_even_among_others(source: Path) -> None:
    shutil.copy(source, source.with_name("another.onnx"))
    assert locate(source.parent) == Source(source, source.parent)


def test_folder_means_its_only_onnx_file(source: Path) -> None:
    decoder = source.rename(source.with_name("decoder.onnx"))
    assert locate(source.parent) == Source(decoder, source.parent)


def test_folder_with_two_models_names_them(source: Path) -> None:
    shutil.copy(source, source.with_name("b.onnx"))
    source.rename(source.with_name("a.onnx"))
    with pytest.raises(SourceError, match=r"holds 2 \.onnx files.*name one of a\.onnx, b\.onnx"):
        locate(source.parent)


def test_folder_whose_model_is_further_down_names_it(source: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no .*name one of source/model\.onnx"):
        locate(source.parent.parent)


def test_folder_without_a_model_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no \.onnx file itself; name a folder that"):
        locate(tmp_path)


def test_path_to_nothing_says_so(tmp_path: Path) -> None:
    (tmp_path / "dangling.onnx").symlink_to(tmp_path / "nothing")
    for name in ("absent.onnx", "absent", "dangling.onnx"):
        with pytest.raises(SourceError, match=rf"{name} does not exist"):
            locate(tmp_path / name)


def test_path_that_cannot_exist_is_a_source_error() -> None:
    with pytest.raises(SourceError):
        locate("x" * 300)


# Loading.


def test_loading_reads_no_weight(tiny_fp32: Path) -> None:
    model = load(tiny_fp32)
    tensors = [value.const_value for value in model.graph.initializers.values()]
    external = [tensor for tensor in tensors if isinstance(tensor, ir.ExternalTensor)]
    assert len(external) == 13
    assert all(tensor.raw is None for tensor in external)


def test_threads_that_load_leave_the_warnings_as_they_were(
    tiny_fp32: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = [0]
    deserialize = ir.serde.deserialize_model

    def counted(proto: onnx.ModelProto) -> ir.Model:
        inside.append(inside[-1] + 1)
        model = deserialize(proto)
        inside.append(inside[-1] - 1)
        return model

    monkeypatch.setattr(ir.serde, "deserialize_model", counted)
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(load, [tiny_fp32] * 16))
    finally:
        sys.setswitchinterval(interval)
    assert max(inside) == 1
    assert warnings.filters == before


def test_bare_file_name_finds_its_data(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source.parent)
    model = load("model.onnx")
    assert data_files(model) == {source.with_name("model.onnx.data").resolve()}


def test_data_in_a_subfolder_are_found(source: Path) -> None:
    (source.parent / "weights").mkdir()
    source.with_name("model.onnx.data").rename(source.parent / "weights" / "head")
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "weights/head" if entry.key == "location" else entry.value
    source.write_bytes(proto.SerializeToString())
    assert data_files(load(source)) == {(source.parent / "weights" / "head").resolve()}
    assert plan(source).count("converted") == 2


def test_data_files_are_those_of_planned_tensors_too(source: Path) -> None:
    shutil.copy(source.with_name("model.onnx.data"), source.with_name("experts.bin"))
    point(source, "layers.0.moe.fc1", location="experts.bin")
    model = QuantizeMoEPass()(load(source)).model
    names = {path.name for path in data_files(model)}
    assert names == {"model.onnx.data", "experts.bin"}


Spoil = Callable[[Path], object]


def _truncate(source: Path) -> None:
    os.truncate(source.with_name("model.onnx.data"), 4071423)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_truncate, r"truncated: it ends at byte 4071423, and the tensor at byte 4071424"),
        (lambda s: s.with_name("model.onnx.data").unlink(), r"cannot read its .*No such file"),
        (lambda s: point(s, "head.weight", location="gone.data"), r"gone\.data: No such file"),
        (lambda s: point(s, "head.weight", location=None), r"'head\.weight'"),
        (lambda s: point(s, "head.weight", location="."), r"'head\.weight'"),
        (lambda s: point(s, "head.weight", offset=-1), r"ONNX model: ."),
        (lambda s: point(s, "head.weight", offset=1 << 40), r"truncated"),
        (lambda s: point(s, "head.weight", offset="first"), r"ONNX model: ."),
        (lambda s: point(s, "head.weight", length=131071), r"131071 bytes .* hold 131072 bytes"),
        (lambda s: point(s, "head.weight", length=1 << 40), r"truncated"),
        (lambda s: point(s, "layers.1.moe.fc2", length=4), r"4 bytes .* cannot hold 524288"),
        (lambda s: s.write_text("hello, this is a text\n" * 9), r"ONNX model: ."),
        (lambda s: s.write_bytes(b""), r"ONNX model: its graph has no outputs"),
        (lambda s: s.write_bytes(s.read_bytes()[:-500]), r"ONNX model: ."),
        (lambda s: s.write_bytes(s.read_bytes()[::-1]), r"ONNX model: ."),
    ],
    ids=[
        "truncated data",
        "missing data",
        "missing data of one tensor",
        "no location",
        "location is a folder",
        "negative offset",
        "offset past the end",
        "offset is no number",
        "length too short",
        "length past the end",
        "expert too short",
        "text",
        "empty",
        "truncated model",
        "backwards",
    ],
)
def test_spoiled_model_is_a_source_error_on_one_line(
    source: Path, tmp_path: Path, spoil: Spoil, message: str
) -> None:
    spoil(source)
    with pytest.raises(SourceError, match=message) as caught:
        load(source)
    assert "\n" not in str(caught.value)
    with pytest.raises(SourceError, match=message):
        plan(source.parent)
    with pytest.raises(SourceError, match=message):
        quantize(source, tmp_path / "out" / "model.onnx")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("offset", [-1, "first"])
def test_error_of_the_parser_is_told_with_its_cause(source: Path, offset: str | int) -> None:
    point(source, "head.weight", offset=offset)
    with pytest.raises(SourceError, match=r"offset|negative|invalid literal"):
        load(source)


def _climb(source: Path) -> str:
    source.with_name("model.onnx.data").rename(source.parent.parent / "outside.data")
    return "../outside.data"


def _absolute(source: Path) -> str:
    _climb(source)
    return str(source.parent.parent / "outside.data")


def _link(source: Path) -> str:
    source.with_name("link.data").symlink_to(source.parent / _climb(source))
    return "link.data"


@pytest.mark.parametrize(
    "move", [_climb, _absolute, _link], ids=["climbing", "absolute", "symlink"]
)
@pytest.mark.parametrize("name", ["head.weight", "layers.0.moe.fc1"])
def test_data_outside_the_models_folder_are_refused(
    source: Path, move: Callable[[Path], str], name: str
) -> None:
    shutil.copy(source.with_name("model.onnx.data"), source.with_name("kept.data"))
    proto = onnx.load(source, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "kept.data" if entry.key == "location" else entry.value
    source.write_bytes(proto.SerializeToString())
    point(source, name, location=move(source))
    with pytest.raises(SourceError, match=name):
        load(source)


def test_hard_linked_data_are_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    os.link(source.with_name("model.onnx.data"), tmp_path / "second name")
    with pytest.raises(SourceError, match="have several hard links"):
        quantize(source, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_model_whose_files_are_all_symlinks_is_read_or_refused_in_our_own_words(
    source: Path, tmp_path: Path
) -> None:
    # As in the cache of a model hub: snapshots/1/model.onnx -> ../../blobs/a.
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots" / "1").mkdir(parents=True)
    for name, blob in (("model.onnx", "a"), ("model.onnx.data", "b")):
        source.with_name(name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshots" / "1" / name).symlink_to(f"../../blobs/{blob}")
    with contextlib.suppress(QMoEError):
        quantize(tmp_path / "snapshots" / "1", tmp_path / "out.onnx")


def test_symlink_inside_the_folder_is_followed(source: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "expected" / "model.onnx")
    data = source.with_name("model.onnx.data")
    data.rename(source.with_name("blob"))
    data.symlink_to("blob")
    quantize(source, tmp_path / "out" / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        got, expected = tmp_path / "out" / name, tmp_path / "expected" / name
        assert got.read_bytes() == expected.read_bytes()


# Constant nodes with external data.


def test_reference_to_a_functions_attribute_needs_no_type(tmp_path: Path) -> None:
    softmax = helper.make_node("Softmax", ["a"], ["b"])
    softmax.attribute.add(name="axis", ref_attr_name="axis")
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("own", 1)]
    function = helper.make_function("own", "Soft", ["a"], ["b"], [softmax], imports, ["axis"])
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    call = helper.make_node("Soft", ["x"], ["y"], domain="own", axis=1)
    graph = helper.make_graph([call], "g", [x], [y])
    onnx.save(
        helper.make_model(graph, opset_imports=imports, functions=[function]), tmp_path / "m.onnx"
    )
    assert len(load(tmp_path / "m.onnx").functions) == 1


def constant_of(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    """Takes an initializer out of a graph and returns a Constant node in its place."""
    (tensor,) = [tensor for tensor in graph.initializer if tensor.name == name]
    node = helper.make_node("Constant", [], [name], name=name, value=tensor)
    graph.initializer.remove(tensor)
    return node


def logits(path: Path) -> np.ndarray[Any, Any]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, {"input_ids": np.arange(20).reshape(1, 20)})[0]
    return found


@pytest.mark.parametrize("name", ["head.weight", "layers.1.moe.fc1"])
def test_constant_node_with_external_data_is_saved_with_them(
    source: Path, tmp_path: Path, name: str
) -> None:
    quantize(source, tmp_path / "expected" / "model.onnx")
    proto = onnx.load(source, load_external_data=False)
    proto.graph.node.insert(0, constant_of(proto.graph, name))
    source.write_bytes(proto.SerializeToString())
    assert source.with_name("model.onnx.data").resolve() in data_files(load(source))
    report = quantize(source, tmp_path / "out" / "model.onnx")
    assert report.count("converted") == 2
    shutil.rmtree(source.parent)
    got, expected = (logits(tmp_path / folder / "model.onnx") for folder in ("out", "expected"))
    np.testing.assert_array_equal(got, expected)


def test_constant_node_in_a_subgraph_is_saved_with_its_external_data(
    source: Path, tmp_path: Path
) -> None:
    quantize(source, tmp_path / "expected" / "model.onnx")
    proto = onnx.load(source, load_external_data=False)
    last = proto.graph.node[-1]
    assert last.name == "logits"
    nodes = [constant_of(proto.graph, "head.weight"), last]
    (result,) = last.output
    inside = helper.make_tensor_value_info("branch_out", TensorProto.FLOAT, None)
    last.output[0] = "branch_out"
    then_branch = helper.make_graph(nodes, "then", [], [inside])
    identity = helper.make_node("Identity", ["normf"], ["else_out"])
    outside = helper.make_tensor_value_info("else_out", TensorProto.FLOAT, None)
    identity.input[0] = last.input[0]
    else_branch = helper.make_graph([identity], "else", [], [outside])
    del proto.graph.node[-1]
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    branches = {"then_branch": then_branch, "else_branch": else_branch}
    proto.graph.node.append(helper.make_node("If", ["yes"], [result], name="if", **branches))
    source.write_bytes(proto.SerializeToString())
    quantize(source, tmp_path / "out" / "model.onnx")
    shutil.rmtree(source.parent)
    got, expected = (logits(tmp_path / folder / "model.onnx") for folder in ("out", "expected"))
    np.testing.assert_array_equal(got, expected)


def test_constant_node_whose_data_are_missing_is_a_source_error(source: Path) -> None:
    point(source, "head.weight", location="gone.data")
    proto = onnx.load(source, load_external_data=False)
    proto.graph.node.insert(0, constant_of(proto.graph, "head.weight"))
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(SourceError, match=r"gone\.data"):
        load(source)


def test_model_without_external_constants_keeps_its_constant_nodes(source: Path) -> None:
    proto = onnx.load(source, load_external_data=False)
    proto.graph.node.insert(0, constant_of(proto.graph, "layers.0.qs"))
    source.write_bytes(proto.SerializeToString())
    model = load(source)
    assert model.graph[0].op_type == "Constant"
    assert "layers.0.qs" not in model.graph.initializers


def test_tensors_of_subgraphs_are_checked_and_counted_too(source: Path, tmp_path: Path) -> None:
    point(source, "head.weight", location="head.bin", offset=0)
    proto = onnx.load(source, load_external_data=False)
    (head,) = [tensor for tensor in proto.graph.initializer if tensor.name == "head.weight"]
    proto.graph.initializer.remove(head)
    last = proto.graph.node.pop()
    value = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    branch = helper.make_graph([last], "branch", [], [value], [head])
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    node = helper.make_node("If", ["yes"], ["logits"], then_branch=branch, else_branch=branch)
    proto.graph.node.append(node)
    source.write_bytes(proto.SerializeToString())
    with pytest.raises(SourceError, match=r"head\.bin: No such file"):
        load(source)
    source.with_name("head.bin").write_bytes(bytes(131072))
    assert source.with_name("head.bin").resolve() in data_files(load(source))
    quantize(source.parent, tmp_path / "out")
    assert not (tmp_path / "out" / "head.bin").exists()
