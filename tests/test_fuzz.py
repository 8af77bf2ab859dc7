"""Models that are harmed at random, in their bytes and in their meaning.

`docs/fuzzing.md` says how to run this for longer, and what to do with what it finds.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto

from qmoe_rules import QuantizeMoEPass, save
from tests import expert_graphs
from tests.hostile import EXPERTS, NAMES
from tests.moe_models import single
from tests.sandbox import Outcome, Sandbox
from tests.test_hostile import check

EXAMPLES = int(os.environ.get("QMOE_FUZZ_EXAMPLES", "2000"))

NUMBERS = [0, 1, -1, 2, 3, 64, 127, 1 << 16, 1 << 31, 1 << 40, (1 << 63) - 1, -(1 << 63)]
TEXTS = ["", "x", "y", "fc1", "fc2", "com.microsoft", "MoE", "QMoE", "Concat", "Identity", "If"]
TEXTS += ["model.onnx.data", "../outside/secret.data", *sorted(set(NAMES) - {"very long"})]
INTEGERS = {
    FieldDescriptor.CPPTYPE_INT32,
    FieldDescriptor.CPPTYPE_INT64,
    FieldDescriptor.CPPTYPE_ENUM,
    FieldDescriptor.CPPTYPE_UINT64,
}


def _models() -> dict[str, ir.Model]:
    """Returns one model of every kind that the library reads differently."""
    quantized = QuantizeMoEPass(bits=4, block_size=32)(single(EXPERTS)).model
    graph = expert_graphs.model(hidden=32, inter=32, experts=2, k=1)
    return {"moe": single(EXPERTS), "qmoe": quantized, "experts": graph}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in _models().items():
        save(model, folder / name / "model.onnx")
    return {name: folder / name for name in sorted(os.listdir(folder))}


def _places(message: Message) -> Iterator[tuple[Message, FieldDescriptor]]:
    """Yields every field of a message, and of the messages inside it, whether it is set or not."""
    for field in message.DESCRIPTOR.fields:
        yield message, field
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from _places(inner)


def _harm(proto: ModelProto, draw: Any) -> None:
    """Changes one field somewhere in a model."""
    places = [*_places(proto)]
    message, field = draw(st.sampled_from(places))
    name = field.name
    if field.is_repeated and len(getattr(message, name)):
        _harm_list(getattr(message, name), field, draw)
    elif field.is_repeated or draw(st.integers(0, 7)) == 0:
        message.ClearField(name)
    elif field.type != FieldDescriptor.TYPE_MESSAGE:
        setattr(message, name, _value(field, draw))
    else:
        others = [each for each, _ in places if each.DESCRIPTOR is field.message_type]
        if others:
            copy = type(others[0])()
            copy.CopyFrom(draw(st.sampled_from(others)))
            getattr(message, name).CopyFrom(copy)


def _harm_list(values: Any, field: FieldDescriptor, draw: Any) -> None:
    """Removes, repeats, moves or changes an element."""
    index, other = (draw(st.integers(0, len(values) - 1)) for _ in range(2))
    how = draw(st.sampled_from(["remove", "repeat", "swap", "change"]))
    if how == "remove":
        del values[index]
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        copy = type(values[index])()
        copy.CopyFrom(values[index])
        if how == "repeat":
            values.append(copy)
        else:
            values[index].CopyFrom(values[other])
            values[other].CopyFrom(copy)
    elif how == "swap":
        values[index], values[other] = values[other], values[index]
    else:
        values[index] = _value(field, draw)


def _value(field: FieldDescriptor, draw: Any) -> Any:
    if field.cpp_type in INTEGERS:
        small = field.cpp_type in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_ENUM)
        number = draw(st.sampled_from(NUMBERS) | st.integers(0, 30))
        if field.cpp_type == FieldDescriptor.CPPTYPE_ENUM:
            return draw(st.sampled_from([each.number for each in field.enum_type.values]))
        if field.cpp_type == FieldDescriptor.CPPTYPE_UINT64:
            return abs(number)
        return max(min(number, (1 << 31) - 1), -(1 << 31)) if small else number
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw(st.sampled_from(TEXTS))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.binary(max_size=64))
    return draw(st.sampled_from([0.0, 1.5, -1.0, float("inf"), float("nan")]))


def _harm_bytes(data: bytes, draw: Any) -> bytes:
    """Flips, removes, repeats or inserts bytes."""
    start = draw(st.integers(0, len(data)))
    stop = start + draw(st.integers(0, 64))
    between = {
        "flip": bytes(byte ^ draw(st.integers(1, 255)) for byte in data[start : start + 1]),
        "remove": b"",
        "repeat": data[start:stop] * 2,
        "insert": data[start:stop] + draw(st.binary(max_size=16)),
    }
    how = draw(st.sampled_from([*between, "cut"]))
    if how == "cut":
        return data[:start]
    rest: bytes = data[start + 1 if how == "flip" else stop :]
    changed: bytes = data[:start] + between[how] + rest
    return changed


@st.composite
def harmed(draw: Any, data: bytes) -> bytes:
    """Draws a serialized model with some harm done to it."""
    if draw(st.integers(0, 3)) == 0:
        for _ in range(draw(st.integers(1, 3))):
            data = _harm_bytes(data, draw)
        return data
    proto = ModelProto()
    proto.ParseFromString(data)
    for _ in range(draw(st.integers(1, 4))):
        _harm(proto, draw)
    try:
        changed: bytes = proto.SerializeToString()
    except (DecodeError, ValueError):
        return data
    return changed


def _run(
    sandbox: Sandbox, models: dict[str, Path], data: st.DataObject, commands: list[str]
) -> list[Outcome]:
    base = models[data.draw(st.sampled_from(sorted(models)), label="model")]
    folder = Path(tempfile.mkdtemp(prefix="qmoe-fuzz-"))
    try:
        model, work = folder / "model", folder / "work"
        shutil.copytree(base, model)
        (folder / "outside").mkdir()
        (folder / "outside" / "secret.data").write_bytes(bytes(70_000))
        work.mkdir()
        path = model / "model.onnx"
        path.write_bytes(data.draw(harmed(path.read_bytes())))
        more: dict[str, list[object]] = {
            "quantize": [work / "out", "--block-size", 32],
            "inspect": ["--target", "portable"],
            "verify": [models["qmoe"]],
        }
        outcomes = []
        for command in commands:
            outcomes.append(sandbox(command, model, *more.get(command, []), folder=work))
            check(outcomes[-1], model, work)
        if (work / "out").exists():
            onnx.load(work / "out" / "model.onnx")
        return outcomes
    finally:
        shutil.rmtree(folder)


BOUNDED = settings(suppress_health_check=[*HealthCheck])


@given(data=st.data())
@settings(BOUNDED, max_examples=40)
def test_harmed_models(sandbox: Sandbox, models: dict[str, Path], data: st.DataObject) -> None:
    _run(sandbox, models, data, ["quantize"])


@pytest.mark.fuzz
@given(data=st.data())
@settings(BOUNDED, max_examples=EXAMPLES, derandomize=False)
def test_many_harmed_models(sandbox: Sandbox, models: dict[str, Path], data: st.DataObject) -> None:
    _run(sandbox, models, data, ["quantize", "inspect", "plan", "verify"])


@pytest.mark.parametrize("name", ["moe", "qmoe", "experts"])
def test_models_are_good_before_they_are_harmed(
    sandbox: Sandbox, models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Guards the tests above against models that were refused anyway."""
    outcome = sandbox("plan", models[name], folder=tmp_path)
    assert outcome.status == 0
    assert re.search("1 (converted|kept)", outcome.stdout)
