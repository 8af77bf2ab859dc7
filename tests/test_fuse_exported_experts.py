"""What exporters really write, where they are installed: exported here, fused, and compared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.report import Report
from qmoe_rules.rules import apply_rules, moe_to_qmoe_rules
from qmoe_rules.rules.fuse_experts import fuse_experts_rules
from tests.moe_models import Array, Arrays, nodes_of, relative_error, run

pytestmark = pytest.mark.filterwarnings("ignore")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
}
LATENT = {
    "first_k_dense_replace": 0,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
# Names of configurations in transformers, and what is special about them.
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "DeepseekV2": {**LATENT, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": None},
    "DeepseekV3": {
        **LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 2,
        "topk_group": 1,
    },
    "GptOss": {"num_local_experts": 8, "num_experts_per_tok": 4},
    "GraniteMoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Lfm2Moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_dense_layers": 0,
        "layer_types": ["full_attention"],
    },
    "Mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "Phimoe": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 8, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 32},
    "Qwen3Moe": {"num_experts": 8, "num_experts_per_tok": 1, "norm_topk_prob": True},
}


def _block(model: Any) -> Any:
    """Returns the innermost module that holds experts and calls them."""
    inner = [each for _, each in model.named_modules() if hasattr(each, "experts")]
    return inner[-1]


def _exported(name: str, dtype: str, path: Path) -> ir.Model:
    """Exports one MoE block x [batch, sequence, 64] -> y with random weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers", minversion="5")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **TRANSFORMERS[name]})
    config._experts_implementation = "batched_mm"
    model = transformers.AutoModelForCausalLM.from_config(
        config, experts_implementation="batched_mm", attn_implementation="eager"
    )
    buffers = [each for key, each in model.named_buffers() if "correction_bias" in key]
    for tensor in (*model.parameters(), *buffers):
        torch.nn.init.normal_(tensor, std=0.2)
    block = _block(model.to(getattr(torch, dtype)))

    class First(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Any) -> Any:
            y = self.block(x)
            return y[0] if isinstance(y, tuple) else y

    torch.onnx.export(
        First().eval(),
        (torch.randn(2, 5, 64, dtype=getattr(torch, dtype)),),
        path,
        dynamo=True,
        opset_version=20,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes={"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}},
        external_data=False,
    )
    return ir.load(path)


def _x(dtype: str, shape: tuple[int, int]) -> Arrays:
    x: Array = np.random.default_rng(1).standard_normal((*shape, 64)).astype(dtype)
    return {"x": x}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_batched_experts(name: str, dtype: str, tmp_path: Path) -> None:
    before = _exported(name, dtype, tmp_path / "model.onnx")
    after = ir.load(tmp_path / "model.onnx")
    report = Report()
    apply_rules(after, fuse_experts_rules(report=report))
    assert report.rows == []
    assert len(nodes_of(after, "MoE")) == 1
    assert "GatherND" not in {node.op_type for node in after.graph}
    for shape in [(1, 1), (1, 7), (4, 1), (4, 7)]:
        feeds = _x(dtype, shape)
        error = relative_error(run(after, feeds)[0], run(before, feeds)[0])
        assert error < (1e-5 if dtype == "float32" else 2e-3)
    assert apply_rules(after, moe_to_qmoe_rules(bits=4, block_size=32, target="cpu"))


def _gemma(dtype: str) -> ir.Model:
    """Builds a language model whose experts mobius spells out."""
    mobius = pytest.importorskip("mobius")
    mobius.register_ep(
        mobius.EpCapabilities(
            name="unrolled",
            gqa_dtypes=frozenset(),
            qkv_pack_dtypes=frozenset(),
            supports_fused_moe=False,
        ),
        overwrite=True,
    )
    sizes: Mapping[str, Any] = {key: SIZES[key] for key in SIZES if key != "pad_token_id"}
    config = mobius.Gemma4Config(
        **{**sizes, "num_hidden_layers": 2},
        model_type="gemma4",
        global_head_dim=16,
        hidden_act="gelu",
        enable_moe_block=True,
        num_local_experts=8,
        num_experts_per_tok=2,
        layer_types=["sliding_attention", "full_attention"],
        num_global_key_value_heads=2,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
        dtype=ir.DataType.from_numpy(np.dtype(dtype)),
    )
    module = mobius.models.Gemma4CausalLMModel(config)
    package = mobius.build_from_module(module, config, execution_provider="unrolled")
    model: ir.Model = package["model"]
    rng = np.random.default_rng(0)
    for name, value in model.graph.initializers.items():
        if value.const_value is None and value.shape is not None and value.dtype is not None:
            array = rng.standard_normal(value.shape.numpy())
            array = 1 + 0.3 * array if array.ndim < 2 else array / array.shape[-1] ** 0.5
            value.const_value = ir.tensor(array.astype(value.dtype.numpy()), name=name)
    return model


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_mobius_unrolled_experts(dtype: str) -> None:
    before, after = _gemma(dtype), _gemma(dtype)
    report = Report()
    apply_rules(after, fuse_experts_rules(report=report))
    assert report.rows == []
    assert len(nodes_of(after, "MoE")) == 2
    assert len(list(after.graph)) < len(list(before.graph)) / 2
    for batch, sequence in [(1, 1), (1, 7), (4, 1), (4, 7)]:
        positions = np.tile(np.arange(sequence), (batch, 1))
        feeds = {
            "input_ids": np.random.default_rng(1).integers(0, 128, (batch, sequence)),
            "attention_mask": np.ones_like(positions),
            "position_ids": positions,
        }
        for value in after.graph.inputs[3:]:
            feeds[str(value.name)] = np.zeros((batch, 2, 0, 16), dtype)
        error = relative_error(run(after, feeds)[0], run(before, feeds)[0])
        assert error < (1e-5 if dtype == "float32" else 2e-3)
