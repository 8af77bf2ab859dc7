"""`calibrate` on real models, from this repository and from other exporters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qmoe_rules import calibrate, ops, prepare
from qmoe_rules.cli import main
from qmoe_rules.feeds import inputs_of, read_feeds
from qmoe_rules.fingerprints import fingerprints
from qmoe_rules.rules import apply_rules, normalize_moe_rules
from tests.calibrations import assert_close, assert_seen, joined, seen
from tests.moe_models import Array, Arrays

OPTIONS = (
    "activation_alpha",
    "activation_beta",
    "activation_type",
    "k",
    "normalize_routing_weights",
    "swiglu_fusion",
    "swiglu_limit",
)


def captured(path: Path, feeds: Sequence[Arrays]) -> dict[str, tuple[ir.Node, Array, Array]]:
    """Runs a whole model in ONNX Runtime; returns every MoE with what it sees."""
    proto = onnx.load(path)
    nodes = [node for node in proto.graph.node if node.op_type == "MoE"]
    names = [name for node in nodes for name in node.input[:2]]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    runs = [dict(zip(names, session.run(names, feed), strict=True)) for feed in feeds]
    by_name = {ops.label(node): node for node in ops.nodes(ir.load(path), "MoE")}
    return {
        node.name: (by_name[node.name], joined(runs, node.input[0]), joined(runs, node.input[1]))
        for node in nodes
    }


def test_a_language_model(tiny_fp32: Path) -> None:
    """What the experts of a real model see in ONNX Runtime, where its own MoE kernel runs."""
    text = Path(__file__).read_bytes()
    feeds = [
        {"input_ids": np.frombuffer(text[i : i + 90], np.uint8)[None].astype(np.int64)}
        for i in (0, 500, 900)
    ]
    calibration = calibrate(tiny_fp32.parent, feeds, hessian=True)
    found = captured(tiny_fp32, feeds)
    assert calibration.nodes == tuple(found)
    for name, (node, x, logits) in found.items():
        given, values = ops.inputs(node), ops.attributes(node)
        arrays = {
            short: ir.convenience.get_const_tensor(value).numpy()  # type: ignore[union-attr]
            for short, slot in (("fc1", "fc1_experts_weights"), ("fc1_bias", "fc1_experts_bias"))
            if (value := given[slot]) is not None
        }
        expected = seen(arrays, x, logits, **{key: values[key] for key in OPTIONS})
        assert_seen(calibration, name, expected, 2e-5)


FLOAT_MODELS = [
    "bytelm-swiglu16-fp16",
    "genai-gemma4-fp16-cuda",
    "genai-gptoss-bf16-cuda",
    "genai-gptoss-fp16-cuda",
    "genai-gptoss-fp32-cpu",
    "genai-qwen3_5_moe-fp16-cuda",
    "mobius-deepseek_v3-fp32-cpu",
    "mobius-gemma4-fp32-cpu",
    "mobius-gptoss-fp32-cpu",
    "mobius-mixtral-fp32-cpu",
    "mobius-phimoe-fp32-cpu",
    "torch-deepseek_v3-batched_mm-fp32-none",
    "torch-mixtral-batched_mm-fp32-none",
]


@pytest.mark.parametrize("name", FLOAT_MODELS)
def test_models_of_exporters(name: str, shared: Path) -> None:
    """Models for every provider, with caches, masks and positions: the tokens are enough."""
    folder, rng = shared / "models" / name, np.random.default_rng(1)
    inputs = inputs_of(ir.load(folder / "model.onnx"))
    leading = next(key for key in ("input_ids", "inputs_embeds", "x") if key in inputs)
    shape = (1, 20) if leading == "input_ids" else (1, 20, 128)
    feeds: list[Arrays] = [
        {leading: rng.integers(0, 200, shape) if len(shape) == 2 else rng.standard_normal(shape)}
        for _ in range(2)
    ]
    calibration = calibrate(folder, feeds, hessian=True)
    assert calibration.tokens == 40
    for node in calibration.nodes:
        counts = calibration.counts(node, "fc1")
        assert counts.sum() % 40 == 0
        assert counts.sum() >= 40
        for projection in ("fc1", "fc2"):
            expert = int(counts.argmax())
            known = calibration.statistics(node, projection, expert)
            assert known.hessian is not None
            # The weights of the router are at most one, so H's diagonal is at most the mean of x^2.
            assert (np.diag(known.hessian) <= known.mean_square * (1 + 1e-5)).all()
            assert (np.linalg.eigvalsh(known.hessian) >= -1e-5 * known.mean_square.max()).all()


def test_precisions_of_one_model_agree(shared: Path) -> None:
    rng = np.random.default_rng(1)
    feeds = [{"input_ids": rng.integers(0, 200, (1, 30))} for _ in range(3)]
    exact, *others = (
        calibrate(shared / "models" / f"genai-gptoss-{kind}", feeds)
        for kind in ("fp32-cpu", "fp16-cuda", "bf16-cuda")
    )
    for other, tolerance in zip(others, (2e-2, 8e-2), strict=True):
        for node in exact.nodes:
            assert_close(other.pooled(node, "fc2"), exact.pooled(node, "fc2"), tolerance)


def test_the_nodes_are_those_that_quantization_finds(tiny_fp32: Path) -> None:
    feeds = read_feeds(__file__, inputs_of(ir.load(tiny_fp32)), window=64, windows=2)
    calibration = calibrate(tiny_fp32, feeds)
    model = prepare(ir.load(tiny_fp32))
    apply_rules(model, normalize_moe_rules())
    assert calibration.fingerprints == fingerprints(model)
    calibration.check(fingerprints(model))


@pytest.mark.parametrize(
    ("options", "data", "reason"),
    [
        (["--dtype", "uint16"], b"text", "input 'input_ids' holds 29816, and looks up a table of"),
        (["--window", "300"], b"t" * 300, "node 'posemb' looks up row 256 of a table of 256; is a"),
        ([], b"", "holds no data"),
        ([], None, "it is a folder; name a file of data"),
    ],
    ids=["dtype", "window", "empty", "folder"],
)
def test_data_that_do_not_fit_are_told_in_one_line(
    options: list[str],
    data: bytes | None,
    reason: str,
    tiny_fp32: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if data is not None:
        (tmp_path / "text").write_bytes(data)
    else:
        (tmp_path / "text").mkdir()
    where = (tmp_path / "text", tmp_path / "calibration")
    assert main(["calibrate", *map(str, (tiny_fp32, *where)), *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert reason in err
    assert list(tmp_path.iterdir()) == [tmp_path / "text"]
