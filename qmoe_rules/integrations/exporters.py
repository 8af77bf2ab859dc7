"""Quantizing what exporters hand over: models in memory, and folders for onnxruntime-genai."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, overload

import onnx_ir as ir

from qmoe_rules.errors import SourceError
from qmoe_rules.loading import locate
from qmoe_rules.passes import QuantizeMoEPass
from qmoe_rules.pipeline import quantize
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import Report

__all__ = ["HasModel", "quantize_exported", "quantize_genai_folder"]


class HasModel(Protocol):
    """What holds a model as its attribute `model`, such as a `torch.onnx.ONNXProgram`."""

    model: ir.Model


@overload
def quantize_exported(
    exported: ir.Model | HasModel, recipe: Recipe | None = None, **recipe_fields: Any
) -> Report: ...


@overload
def quantize_exported(
    exported: Mapping[str, ir.Model | HasModel], recipe: Recipe | None = None, **recipe_fields: Any
) -> dict[str, Report]: ...


def quantize_exported(
    exported: ir.Model | HasModel | Mapping[str, ir.Model | HasModel],
    recipe: Recipe | None = None,
    **recipe_fields: Any,
) -> Report | dict[str, Report]:
    """Plans, in place, the quantization of a model that an exporter holds in memory.

    The weights are computed when the model is saved; `qmoe_rules.save` streams them.

    Args:
        exported: A model; what holds one as its attribute `model`, such as the
            `torch.onnx.ONNXProgram` that `torch.onnx.export` returns; or several by name, such as
            the package that `mobius.build` returns.
        recipe: What to do; the default recipe where it is left out.
        **recipe_fields: Fields of `Recipe` that differ from `recipe`.

    Returns:
        The report; for several models, the report of each by its name.

    Raises:
        ConfigError: The recipe is wrong.
        TypeError: `exported` is, or holds, no model.

    Example:
        >>> # program = torch.onnx.export(module, arguments, dynamo=True)
        >>> # print(quantize_exported(program, bits=4, block_size=32))
        >>> # qmoe_rules.save(program.model, "model.onnx")
        >>> # package = mobius.build("Qwen/Qwen3-30B-A3B")
        >>> # reports = quantize_exported(package, bits=4, block_size=32)
        >>> # package.save("qwen3-int4")
    """
    recipe = Recipe.of(recipe, **recipe_fields)
    if isinstance(exported, Mapping):
        return {name: quantize_exported(model, recipe) for name, model in exported.items()}
    model = exported if isinstance(exported, ir.Model) else getattr(exported, "model", None)
    if not isinstance(model, ir.Model):
        raise TypeError(f"{type(exported).__name__} is no onnx_ir.Model and holds none as .model")
    quantize_moe = QuantizeMoEPass(recipe)
    quantize_moe(model)
    return quantize_moe.report


def quantize_genai_folder(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    recipe: Recipe | None = None,
    **options: Any,
) -> Report:
    """Quantizes a folder that onnxruntime-genai's model builder wrote.

    The new folder holds all that the old one does: genai_config.json, which fits the quantized
    model as it stands, the tokenizer, and whatever else is there.

    Args:
        source: The folder, with genai_config.json and the model that it names.
        destination: The folder to write.
        recipe: What to do; the default recipe where it is left out.
        **options: What `quantize` takes: fields of `Recipe`, `strict`, `workers`, `progress`.

    Returns:
        The report.

    Raises:
        ConfigError: The recipe is wrong.
        SourceError: The folder cannot be used, or its decoder is not the one model it holds.
        SaveError: The destination cannot be written; nothing has changed then.
        UnsupportedNodeError: `strict`, and some MoE node cannot be converted.

    Example:
        >>> # quantize_genai_folder("gpt-oss-fp16", "gpt-oss-int4", bits=4, block_size=32)
    """
    folder = Path(source)
    name = _decoder(folder / "genai_config.json")
    if Path(name).parent != Path():
        inner = folder / Path(name).parent
        raise SourceError(
            f"{folder} keeps its decoder in a folder of its own, {name!r}; quantize {inner} and "
            "put the result in its place in a copy of the package"
        )
    model = locate(folder).model
    if model.name != name:
        raise SourceError(f"genai_config.json names {name!r}, and {folder} holds {model.name!r}")
    return quantize(folder, Path(destination) / name, recipe, **options)


def _decoder(path: Path) -> str:
    """Returns the .onnx file that a genai_config.json names, relative to its folder."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise SourceError(f"{path} is not JSON: {error}") from error
    try:
        name = config["model"]["decoder"]["filename"]
    except (KeyError, TypeError):
        name = None
    if not isinstance(name, str) or not name.endswith(".onnx"):
        raise SourceError(f"{path} names no .onnx file as model.decoder.filename")
    return name
