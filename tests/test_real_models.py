"""Real models through `quantize`, each QMoE against the float64 reference in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort
import pytest

from qmoe_rules import Recipe, ops, plan, quantize, reference
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.quantized import QuantizedWeights
from tests.conftest import MODELS, SHARED

TINY = [MODELS / "bytelm-tiny8-fp32", MODELS / "bytelm-tiny8-fp16"]
RUN_ON_CPU = ["bytelm-swiglu16-fp32", "bytelm-swiglu16-fp16", "genai-gptoss-fp32-cpu"]
RUN_ON_CPU += ["genai-gptoss-fp16-cuda", "genai-qwen3_5_moe-fp16-cuda"]
NO_CPU_KERNEL = ["genai-gemma4-fp16-cuda", "genai-gptoss-bf16-cuda"]
SHARED_MODELS = [SHARED / "models" / name for name in RUN_ON_CPU]

# CUDA has no float32 kernel, so packed bytes, which only CUDA reads, come with 16-bit models only.
PACKED = [path for path in [*TINY, *SHARED_MODELS] if "fp32" not in path.name]
PACKED_ANYWHERE = [*PACKED, *(SHARED / "models" / name for name in NO_CPU_KERNEL)]

RECIPES = [(4, 0), (4, 32), (4, 64), (8, 0), (8, 32)]
# The CPU kernel rounds activations to int8 where int8 weights come in blocks.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3}
BLOCKWISE_INT8 = 5e-2


def quantized_nodes(path: Path) -> list[ir.Node]:
    return list(ops.nodes(ir.load(path), "QMoE"))


def stored_weights(node: ir.Node, name: str) -> QuantizedWeights:
    """Reads a projection back from the file alone: attributes, bytes and scales of the node."""
    given, values = ops.inputs(node), ops.attributes(node)
    stored, scales = (
        ir.convenience.get_const_tensor(value).numpy()  # type: ignore[union-attr, arg-type]
        for value in (given[f"{name}_experts_weights"], given[f"{name}_scales"])
    )
    bits = values["expert_weight_bits"]
    layout = LAYOUTS["cutlass_sm80" if values["weights_prepacked"] else "raw"]
    packed = np.stack([layout.load(expert, bits) for expert in stored])
    return QuantizedWeights(packed, scales, Spec(FORMATS[f"int{bits}"], values["block_size"] or 0))


def expected_output(node: ir.Node, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    given, values = ops.inputs(node), ops.attributes(node)
    options = {name: values[name] for name in ops.attributes(node) if name in REFERENCE_OPTIONS}
    for name in ("fc1", "fc2"):
        bias = given[f"{name}_experts_bias"]
        if bias is not None:
            options[f"{name}_bias"] = ir.convenience.get_const_tensor(bias).numpy()  # type: ignore[union-attr]
    return reference.qmoe(
        feeds["x"],
        feeds["router"],
        stored_weights(node, "fc1"),
        stored_weights(node, "fc2"),
        **options,
    )


REFERENCE_OPTIONS = {
    "k",
    "activation_type",
    "activation_alpha",
    "activation_beta",
    "swiglu_fusion",
    "swiglu_limit",
    "normalize_routing_weights",
}


def alone(node: ir.Node) -> ir.Model:
    """Returns a model of this node only, fed with `x` and `router`."""
    given = ops.inputs(node)
    constants = {
        name: ir.convenience.get_const_tensor(value)
        for name, value in given.items()
        if value is not None and name not in ("input", "router_probs")
    }
    dtype = dtype_of(node)
    x = ir.val("x", dtype, ["tokens", sizes(node)[1]])
    router = ir.val("router", dtype, ["tokens", sizes(node)[0]])
    initializers = [
        ir.val(name, const_value=ir.Tensor(tensor.numpy(), name=name))
        for name, tensor in constants.items()
        if tensor is not None
    ]
    by_name = {"input": x, "router_probs": router, **{value.name: value for value in initializers}}
    slots = [by_name.get(name) for name in ops.QMOE_INPUTS]
    copy = ir.Node(ops.DOMAIN, "QMoE", slots, list(node.attributes.values()), name="node")
    copy.outputs[0].name = "y"
    copy.outputs[0].type = ir.TensorType(dtype)
    graph = ir.Graph(
        [x, router],
        copy.outputs,
        nodes=[copy],
        initializers=initializers,
        opset_imports={"": 21, ops.DOMAIN: 1},
        name="alone",
    )
    return ir.Model(graph, ir_version=10)


def sizes(node: ir.Node) -> tuple[int, int]:
    """Returns (E, H) from the shape of fc2's scales, whatever the layout."""
    scales = ir.convenience.get_const_tensor(ops.inputs(node)["fc2_scales"])  # type: ignore[arg-type]
    assert scales is not None
    experts, hidden, *_ = scales.shape.numpy()
    return experts, hidden


def dtype_of(node: ir.Node) -> ir.DataType:
    scales = ops.inputs(node)["fc2_scales"]
    assert scales is not None
    assert scales.dtype is not None
    return scales.dtype


def run_alone(node: ir.Node, feeds: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    model = ir.to_proto(alone(node)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    output: npt.NDArray[Any] = session.run(None, feeds)[0]
    return output


def random_feeds(node: ir.Node, tokens: int = 48) -> dict[str, npt.NDArray[Any]]:
    """Returns hidden states and well separated router logits that reach every expert."""
    experts, hidden = sizes(node)
    dtype = dtype_of(node).numpy()
    rng = np.random.default_rng(7)
    router = rng.permuted(np.tile(np.linspace(-3, 3, experts), (tokens, 1)), axis=1)
    return {
        "x": rng.standard_normal((tokens, hidden)).astype(dtype),
        "router": router.astype(dtype),
    }


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def available(model: Path) -> Path:
    if not model.is_dir():
        pytest.skip("needs the shared models beside the project")
    return model


@pytest.mark.parametrize(("bits", "block_size"), RECIPES)
@pytest.mark.parametrize("model", [*TINY, *SHARED_MODELS], ids=lambda path: path.name)
def test_raw_models_compute_what_their_weights_say(
    model: Path, bits: int, block_size: int, tmp_path: Path
) -> None:
    report = quantize(available(model), tmp_path / "out", bits=bits, block_size=block_size)
    assert {row.status for row in report.rows} == {"converted"}
    for node in quantized_nodes(tmp_path / "out" / "model.onnx"):
        feeds = random_feeds(node)
        error = relative_error(run_alone(node, feeds), expected_output(node, feeds))
        blockwise_int8 = bits == 8 and block_size
        assert error <= (BLOCKWISE_INT8 if blockwise_int8 else TOLERANCE[feeds["x"].dtype.name])


@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("model", PACKED, ids=lambda path: path.name)
def test_packed_int4_runs_through_the_cpu_kernel_that_reads_packed_bytes(
    model: Path, block_size: int, tmp_path: Path
) -> None:
    quantize(
        available(model),
        tmp_path / "out",
        block_size=block_size,
        layout="cutlass_sm80",
        target="cuda",
    )
    for node in quantized_nodes(tmp_path / "out" / "model.onnx"):
        feeds = random_feeds(node)
        error = relative_error(run_alone(node, feeds), expected_output(node, feeds))
        assert error <= TOLERANCE[feeds["x"].dtype.name]


@pytest.mark.parametrize(("bits", "block_size"), RECIPES)
@pytest.mark.parametrize("model", PACKED_ANYWHERE, ids=lambda path: path.name)
def test_raw_and_packed_files_hold_the_same_weights(
    model: Path, bits: int, block_size: int, tmp_path: Path
) -> None:
    for layout in ("raw", "cutlass_sm80"):
        recipe = Recipe(bits=bits, block_size=block_size, layout=layout, target="cuda")
        report = quantize(available(model), tmp_path / layout, recipe)
        assert {row.status for row in report.rows} == {"converted"}
    raw, packed = (
        quantized_nodes(tmp_path / name / "model.onnx") for name in ("raw", "cutlass_sm80")
    )
    for a, b in zip(raw, packed, strict=True):
        assert (ops.attributes(a)["weights_prepacked"], ops.attributes(b)["weights_prepacked"]) == (
            0,
            1,
        )
        for name in ("fc1", "fc2"):
            np.testing.assert_array_equal(
                stored_weights(a, name).packed, stored_weights(b, name).packed
            )


@pytest.mark.parametrize("model", NO_CPU_KERNEL)
def test_portable_leaves_alone_what_the_cpu_cannot_run(
    model: str, shared: Path, tmp_path: Path
) -> None:
    report = quantize(shared / "models" / model, tmp_path / "out")
    assert {row.status for row in report.rows} == {"skipped"}
    assert all("target='cuda' takes it" in row.reason for row in report.rows)


def test_packed_float32_is_refused_because_the_cpu_would_read_it_as_raw(
    tiny_fp32: Path, tmp_path: Path
) -> None:
    report = quantize(tiny_fp32, tmp_path / "out", layout="cutlass_sm80", target="cuda")
    assert {row.reason for row in report.rows} == {
        "the CUDA provider has no float32 kernel (it has bfloat16, float16)"
    }


@pytest.mark.parametrize("model", ["genai-gptoss-int4-cpu", "genai-gptoss-int4-cuda"])
def test_quantized_models_pass_through(model: str, shared: Path, tmp_path: Path) -> None:
    report = quantize(shared / "models" / model, tmp_path / "out")
    assert [row.reason for row in report.rows] == ["it is QMoE already"] * 2
    before = ir.load(shared / "models" / model / "model.onnx").graph.initializers
    after = ir.load(tmp_path / "out" / "model.onnx").graph.initializers
    assert list(before) == list(after)
    for name, value in before.items():
        kept = after[name].const_value
        assert value.const_value is not None
        assert kept is not None
        assert kept.tobytes() == value.const_value.tobytes()


EXPORTED = ["mobius-deepseek_v3-fp32-cpu", "mobius-gemma4-fp32-cpu", "mobius-gptoss-fp32-cpu"]
EXPORTED += ["mobius-mixtral-fp32-cpu", "mobius-phimoe-fp32-cpu"]
EXPORTED += ["torch-deepseek_v3-batched_mm-fp32-none", "torch-mixtral-batched_mm-fp32-none"]


@pytest.mark.parametrize("model", EXPORTED)
def test_experts_spelled_out_by_exporters_are_found(model: str, shared: Path) -> None:
    report = plan(shared / "models" / model, block_size=32)
    layers = 1 if "deepseek" in model or "torch" in model else 2
    assert [row.status for row in report.rows] == ["converted"] * layers
    assert report.ratio is not None
    assert report.ratio > 1.7


@pytest.mark.parametrize(
    ("model", "statuses"),
    [("genai-phimoe-int4-cuda-raw", ["kept"] * 2), ("mobius-gptoss-fp16-cuda", ["skipped"] * 2)],
)
def test_broken_models_are_left_alone(
    model: str, statuses: list[str], shared: Path, tmp_path: Path
) -> None:
    report = quantize(shared / "models" / model, tmp_path / "out")
    assert [row.status for row in report.rows] == statuses
    assert all(row.reason for row in report.rows)
    before = ir.load(shared / "models" / model / "model.onnx")
    after = ir.load(tmp_path / "out" / "model.onnx")
    assert [node.op_type for node in after.graph] == [node.op_type for node in before.graph]
    assert list(after.graph.initializers) == list(before.graph.initializers)


def test_quantized_tiny_model_still_predicts_text(tiny_fp32: Path, tmp_path: Path) -> None:
    quantize(tiny_fp32, tmp_path / "model.onnx", block_size=32)
    text = b"And it came to pass in those days, that there went out a decree from the king. "
    ids = np.frombuffer(text, np.uint8).astype(np.int64)[None]
    before, after = (
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(
            None, {"input_ids": ids}
        )[0]
        for path in (tiny_fp32, tmp_path / "model.onnx")
    )
    divergence = kl_divergence(before, after)
    assert 0 < divergence < 0.05


def kl_divergence(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> float:
    p, q = (log_softmax(logits.astype(np.float64)) for logits in (before, after))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def log_softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs


@pytest.mark.parametrize(
    ("model", "warning"),
    [
        ("genai-gptoss-int4-cuda", "weights_prepacked is not stated"),
        ("genai-phimoe-int4-cuda-raw", "input is [?, ?, 128]; the weights ask for [?, ?, 192]"),
    ],
)
def test_what_is_wrong_with_kept_nodes_is_told(model: str, warning: str, shared: Path) -> None:
    for row in plan(shared / "models" / model).rows:
        assert row.status == "kept"
        assert [warning in text for text in row.warnings] == [True]


def test_a_kept_node_whose_layout_the_target_misreads_is_told(
    tiny_fp16: Path, tmp_path: Path
) -> None:
    quantize(tiny_fp16, tmp_path / "cuda", layout="cutlass_sm80", target="cuda")
    quantize(tiny_fp16, tmp_path / "raw")
    packed, raw = (plan(tmp_path / name).rows for name in ("cuda", "raw"))
    said = [text for row in packed for text in row.warnings]
    assert len(said) == 2
    assert all("the CPU provider takes the bytes for raw ones" in text for text in said)
    assert [row.warnings for row in raw] == [()] * 2
