"""Hooks for exporters: models in memory, genai folders, and the examples of the documentation."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from qmoe_rules import ConfigError, SourceError, UnsupportedNodeError, ops, save
from qmoe_rules.integrations import quantize_exported, quantize_genai_folder
from qmoe_rules.integrations.exporters import HasModel
from tests.conftest import MODELS
from tests.moe_models import layers

RECIPE: dict[str, Any] = {"bits": 4, "block_size": 32}
DOCUMENT = Path(__file__).parents[1] / "docs" / "integrations.md"


def example(heading: str, language: str = "python") -> str:
    """Returns the code block below a heading of docs/integrations.md."""
    section = DOCUMENT.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found
    return found.group(1)


def count(model: ir.Model | Path, op_type: str = "QMoE") -> int:
    loaded = ir.load(model) if isinstance(model, Path) else model
    return sum(1 for _ in ops.nodes(loaded, op_type))


def load_session(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that holds tests/models, as a clone does."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "models").symlink_to(MODELS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def genai(tiny_fp32: Path, tmp_path: Path) -> Path:
    """A folder as the model builder writes it."""
    folder = tmp_path / "genai"
    shutil.copytree(tiny_fp32.parent, folder)
    (folder / "tokenizer.json").write_text("{}")
    name_decoder(folder, "model.onnx")
    return folder


def name_decoder(folder: Path, name: object) -> None:
    config = {"model": {"decoder": {"filename": name}}}
    (folder / "genai_config.json").write_text(json.dumps(config))


class Program:
    """What an exporter returns: something with a model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model


class TestExported:
    def test_a_model(self) -> None:
        model = layers(2)
        report = quantize_exported(model, **RECIPE)
        assert report.count("converted") == count(model) == 2

    def test_what_holds_a_model(self) -> None:
        program = Program(layers(1))
        assert quantize_exported(program, **RECIPE).count("converted") == 1
        assert count(program.model) == 1

    def test_several_models_by_name(self) -> None:
        package: dict[str, ir.Model | HasModel]
        package = {"decoder": layers(2), "other": Program(layers(1))}
        reports = quantize_exported(package, **RECIPE)
        assert {name: report.count("converted") for name, report in reports.items()} == {
            "decoder": 2,
            "other": 1,
        }

    def test_something_else_is_refused(self) -> None:
        with pytest.raises(TypeError, match=r"str is no onnx_ir\.Model"):
            quantize_exported("model.onnx")  # type: ignore[call-overload]

    def test_a_wrong_recipe_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="bits=5"):
            quantize_exported(layers(1), bits=5)

    def test_the_example(self, clone: Path) -> None:
        exec(example("A model in memory"), {})
        assert count(clone / "tiny-int4" / "model.onnx") == 2
        load_session(clone / "tiny-int4" / "model.onnx")


@pytest.mark.filterwarnings("ignore")
class TestTorch:
    def test_the_example(self, clone: Path) -> None:
        pytest.importorskip("torch")
        names: dict[str, Any] = {}
        exec(example("torch.onnx"), names)
        streamed = clone / "torch-int4" / "model.onnx"
        assert count(streamed) == 1
        names["program"].save(clone / "torch.onnx", external_data=True)
        feeds = {"x": np.ones((5, 64), np.float32)}
        (one,), (other,) = (
            load_session(path).run(None, feeds) for path in (streamed, clone / "torch.onnx")
        )
        assert np.abs(one).max() > 0
        np.testing.assert_array_equal(one, other)


def tiny_package() -> Any:
    """Returns a mobius package: a Gemma 4 of two small layers with random weights."""
    from mobius import Gemma4Config, build_from_module
    from mobius.models.gemma4 import Gemma4CausalLMModel

    config = Gemma4Config(
        model_type="gemma4",
        vocab_size=256,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
        head_dim=16,
        global_head_dim=32,
        hidden_act="gelu",
        enable_moe_block=True,
        num_local_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        layer_types=["sliding_attention", "full_attention"],
        attention_k_eq_v=True,
        num_global_key_value_heads=1,
    )
    package = build_from_module(Gemma4CausalLMModel(config), config)
    rng = np.random.default_rng(7)
    for value in package["model"].graph.initializers.values():
        if value.const_value is None:
            weights = 0.05 * rng.standard_normal(value.shape.numpy())
            value.const_value = ir.tensor(weights.astype(value.dtype.numpy()), name=value.name)
    return package


@pytest.mark.filterwarnings("ignore")
class TestMobius:
    def test_the_example(self, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        mobius = pytest.importorskip("mobius")
        monkeypatch.setattr(mobius, "build", lambda _name: tiny_package())
        exec(example("mobius"), {})
        assert count(clone / "gemma4-int4" / "model.onnx") == 2
        load_session(clone / "gemma4-int4" / "model.onnx")


class TestGenai:
    def test_the_folder_is_written_anew(self, genai: Path, tmp_path: Path) -> None:
        out = tmp_path / "out"
        assert quantize_genai_folder(genai, out, **RECIPE).count("converted") == 2
        assert count(out / "model.onnx") == 2
        for name in ("genai_config.json", "tokenizer.json"):
            assert (out / name).read_bytes() == (genai / name).read_bytes()

    def test_a_model_of_another_name_keeps_it(self, genai: Path, tmp_path: Path) -> None:
        save(ir.load(genai / "model.onnx"), tmp_path / "other" / "text.onnx")
        name_decoder(tmp_path / "other", "text.onnx")
        quantize_genai_folder(tmp_path / "other", tmp_path / "out", **RECIPE)
        assert count(tmp_path / "out" / "text.onnx") == 2

    def test_the_destination_is_always_a_folder(self, genai: Path, tmp_path: Path) -> None:
        quantize_genai_folder(genai, tmp_path / "out.onnx", **RECIPE)
        assert count(tmp_path / "out.onnx" / "model.onnx") == 2

    def test_strict_is_handed_on(self, genai: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedNodeError):
            quantize_genai_folder(genai, tmp_path / "out", nodes_to_exclude=["*"], strict=True)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", [None, 3, "model.bin"])
    def test_no_decoder_is_refused(self, genai: Path, tmp_path: Path, name: object) -> None:
        name_decoder(genai, name)
        with pytest.raises(SourceError, match=r"names no \.onnx file as model\.decoder\.filename"):
            quantize_genai_folder(genai, tmp_path / "out")

    @pytest.mark.parametrize("text", ["[]", "{}", '{"model": {"decoder": []}}'])
    def test_another_config_is_refused(self, genai: Path, tmp_path: Path, text: str) -> None:
        (genai / "genai_config.json").write_text(text)
        with pytest.raises(SourceError, match=r"names no \.onnx file"):
            quantize_genai_folder(genai, tmp_path / "out")

    def test_what_is_not_json_is_refused(self, genai: Path, tmp_path: Path) -> None:
        (genai / "genai_config.json").write_bytes(b"\xff{")
        with pytest.raises(SourceError, match="is not JSON"):
            quantize_genai_folder(genai, tmp_path / "out")

    def test_a_folder_without_config_is_refused(self, genai: Path, tmp_path: Path) -> None:
        (genai / "genai_config.json").unlink()
        with pytest.raises(SourceError, match=r"cannot read .*genai_config\.json"):
            quantize_genai_folder(genai, tmp_path / "out")

    def test_another_model_is_refused(self, genai: Path, tmp_path: Path) -> None:
        name_decoder(genai, "text.onnx")
        with pytest.raises(SourceError, match=r"names 'text\.onnx', and .* holds 'model\.onnx'"):
            quantize_genai_folder(genai, tmp_path / "out")

    def test_a_nested_decoder_is_named(self, genai: Path, tmp_path: Path) -> None:
        name_decoder(genai, "decoder/model.onnx")
        with pytest.raises(SourceError, match=r"'decoder/model\.onnx'; quantize .*genai.decoder"):
            quantize_genai_folder(genai, tmp_path / "out")

    def test_the_example(self, shared: Path, clone: Path) -> None:
        shutil.copytree(shared / "models" / "genai-gptoss-fp32-cpu", clone / "gpt-oss-fp32")
        exec(example("onnxruntime-genai"), {})
        out = clone / "gpt-oss-int4"
        assert count(out / "model.onnx") == 2
        assert {file.name for file in out.iterdir()} == {
            "genai_config.json",
            "model.onnx",
            "model.onnx.data",
        }
        load_session(out / "model.onnx")
