"""Files that are no model, and data in places where they may not be."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
from onnx import ModelProto, TensorProto, helper

from tests.hostile._cases import OUTSIDE, case, place, proto_case, tensor_of

# Bytes.

for size in (0, 1, 2, 10, 100, 400):

    @case(r"not an ONNX model", f"cut to {size} bytes")
    def _cut(folder: Path, size: int = size) -> None:
        os.truncate(folder / "model.onnx", size)


@case("not an ONNX model")
def _zeros(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(bytes(1000))


@case("not an ONNX model")
def _ones(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\xff" * 1000)


@case("not an ONNX model")
def _a_length_of_2_to_the_63(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x3a" + b"\xff" * 8 + b"\x7f" + b"x" * 100)


@case("2 GB", "a sparse file of 3 GB")
def _large(folder: Path) -> None:
    os.truncate(folder / "model.onnx", 3 << 30)


@case("no regular file")
def _model_that_is_a_pipe(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


@case("no regular file")
def _model_that_is_a_device(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("/dev/zero")


@case("Text format|not an ONNX model", "deeply nested groups")
def _groups(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"\x3b" * 100_000)


# Places of external data.


@proto_case(OUTSIDE)
def _climbing(proto: ModelProto) -> None:
    place(proto, location="../outside/secret.data")


@proto_case(OUTSIDE)
def _climbing_from_a_folder_that_is_not_there(proto: ModelProto) -> None:
    place(proto, location="no/../../outside/secret.data")


@proto_case(OUTSIDE)
def _absolute(proto: ModelProto) -> None:
    place(proto, location="/etc/passwd", offset=0)


@proto_case(OUTSIDE)
def _the_process_itself(proto: ModelProto) -> None:
    place(proto, location="/proc/self/mem", offset=0)


@proto_case(OUTSIDE)
def _small_climbing_tensor(proto: ModelProto) -> None:
    """Of less than 256 bytes, which is read when the graph is written."""
    tensor = TensorProto(name="small", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    proto.graph.initializer.append(tensor)


@proto_case(OUTSIDE)
def _climbing_constant_node(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))


@proto_case(OUTSIDE)
def _climbing_constant_in_a_subgraph(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[64])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    body = helper.make_graph([node], "body", [], [helper.make_tensor_value_info("c", 1, None)])
    proto.graph.initializer.append(helper.make_tensor("yes", TensorProto.BOOL, [], [True]))
    proto.graph.node.append(
        helper.make_node("If", ["yes"], ["unused"], then_branch=body, else_branch=body)
    )


@proto_case(OUTSIDE)
def _climbing_constant_in_a_function(proto: ModelProto) -> None:
    tensor = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[64])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../outside/secret.data")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    opsets = [helper.make_opsetid("", 21)]
    proto.functions.append(helper.make_function("local", "F", [], ["c"], [node], opsets))
    proto.opset_import.append(helper.make_opsetid("local", 1))


@proto_case("Sparse tensors are not supported")
def _climbing_sparse_tensor(proto: ModelProto) -> None:
    values = TensorProto(name="value", data_type=TensorProto.FLOAT, dims=[4])
    values.data_location = TensorProto.EXTERNAL
    values.external_data.add(key="location", value="../outside/secret.data")
    indices = helper.make_tensor("indices", TensorProto.INT64, [4], range(4))
    sparse = helper.make_sparse_tensor(values, indices, [100])
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], sparse_value=sparse))


@case(OUTSIDE)
def _symlink(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("../outside/secret.data")


@case(OUTSIDE)
def _symlink_of_symlinks(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("second")
    (folder / "second").symlink_to(folder / "third")
    (folder / "third").symlink_to("../outside/secret.data")


@case(OUTSIDE)
def _symlinked_folder(folder: Path) -> None:
    (folder / "weights").symlink_to("../outside")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    place(proto, location="weights/secret.data")
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


@case("can be in no file")
def _loop_of_symlinks(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").symlink_to("second")
    (folder / "second").symlink_to("model.onnx.data")


@case("several hard links")
def _hard_link(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.link(folder.parent / "outside" / "secret.data", folder / "model.onnx.data")


@case("no regular file")
def _data_that_are_a_pipe(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    os.mkfifo(folder / "model.onnx.data")


@case("no regular file")
def _empty_tensor_in_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    proto = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = TensorProto(name="empty", data_type=TensorProto.FLOAT, dims=[0])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="pipe")
    proto.graph.initializer.append(tensor)
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=tensor))
    (folder / "model.onnx").write_bytes(proto.SerializeToString())


@case("no regular file")
def _data_that_are_a_folder(folder: Path) -> None:
    (folder / "model.onnx.data").unlink()
    (folder / "model.onnx.data").mkdir()


LOCATIONS = {
    "empty": ("", OUTSIDE),
    "dot": (".", OUTSIDE),
    "dots": ("..", OUTSIDE),
    "root": ("/", OUTSIDE),
    "nul": ("model.onnx.data\0", "can be in no file"),
    "very long": ("x" * 100_000, "its external data 'xxx"),
    "very deep": ("x/" * 2000, "cannot read its external data"),
    "escape": ("\x1b[2J\x1b]0;title\x07.data", "No such file"),
    "two lines": ("a\nqmoe: all is well\nb", "No such file"),
    "surrogate": ("\udcff", "not UTF-8"),
    "url": ("http://localhost/model.onnx.data", "No such file"),
}
for name, (location, message) in LOCATIONS.items():

    @case(message, f"location: {name}")
    def _located(folder: Path, location: str = location) -> None:
        proto = onnx.load(folder / "model.onnx", load_external_data=False)
        marker = "L0CATI0N"
        place(proto, location=marker * (len(location.encode("utf-8", "surrogatepass")) // 8 + 1))
        tensor = tensor_of(proto)
        data = location.encode("utf-8", "surrogateescape")
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = marker
        if len(data) == 1 and data == b"\xff":
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = "L"
            raw = proto.SerializeToString().replace(b"location\x12\x01L", b"location\x12\x01\xff")
            (folder / "model.onnx").write_bytes(raw)
            return
        place(proto, location=location)
        (folder / "model.onnx").write_bytes(proto.SerializeToString())
