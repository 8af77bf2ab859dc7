"""`save` writes the bytes of `onnx_ir.save`, whoever asks, and leaves the model object alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxscript import rewriter

from qmoe_rules import (
    ConfigError,
    QuantizeMoEPass,
    SaveError,
    moe_to_qmoe_rules,
    quantize,
    save,
    writing,
)
from qmoe_rules.cli import main
from qmoe_rules.lazy import PlannedTensor
from tests.saves import RECIPE, SLABS, logits, planned, saved_by_onnx_ir, snapshot, tensors


def in_memory(path: Path) -> ir.Model:
    """Loads a model with all its weights inside the ModelProto."""
    model: ir.Model = ir.from_proto(onnx.load(path))
    return QuantizeMoEPass(**RECIPE)(model).model


# The same bytes, whoever writes them.


@pytest.mark.parametrize("workers", [1, 2, 5, None])
def test_files_are_those_of_onnx_ir(tiny: Path, tmp_path: Path, workers: int | None) -> None:
    expected = saved_by_onnx_ir(planned(tiny), tmp_path / "expected" / "model.onnx")
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
    expected = saved_by_onnx_ir(planned(tiny), tmp_path / "expected" / "model.onnx")
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


@pytest.mark.parametrize("workers", [0, -1])
def test_number_of_workers_that_is_not_positive_is_a_config_error(
    source: Path, tmp_path: Path, workers: int
) -> None:
    with pytest.raises(ConfigError, match="workers"):
        save(planned(source), tmp_path / "out.onnx", workers=workers)
