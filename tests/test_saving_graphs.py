"""`save` and models of other shapes: no data, small data, every type, subgraphs, constant nodes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qmoe_rules import SaveError, SourceError, quantize, save, saving, writing
from tests.saves import RECIPE, logits, planned, saved_by_onnx_ir, snapshot, tensors


def run(path: Path, **feeds: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs: list[np.ndarray[Any, Any]] = session.run(None, feeds)
    return outputs


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
    expected = saved_by_onnx_ir(ir.load(path), tmp_path / "expected" / "model.onnx")
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
    expected = saved_by_onnx_ir(ir.load(path), tmp_path / "expected" / "model.onnx")
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
    expected = saved_by_onnx_ir(ir.load(path), tmp_path / "expected" / "model.onnx")
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
    expected = saved_by_onnx_ir(planned(source), tmp_path / "expected" / "model.onnx")
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
