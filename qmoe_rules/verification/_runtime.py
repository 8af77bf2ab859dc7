"""ONNX Runtime, imported when something runs, on models that need not be files."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.feeds import drop_caches
from qmoe_rules.loading import load

__all__ = ["RunError", "check_provider", "run", "run_file"]

Array = npt.NDArray[Any]

# Where a model that comes as bytes has its external data.
_FOLDER = "session.model_external_initializers_file_folder_path"

_EXTRA = "qmoe_rules.verification/"

_LONGEST = 300  # characters of a message


class RunError(Exception):
    """What ONNX Runtime says about a model that it does not load or run."""


def check_provider(provider: str) -> None:
    """Checks that an execution provider can run.

    Raises:
        ConfigError: ONNX Runtime is not installed, or has no such provider.
    """
    available = _onnxruntime().get_available_providers()
    if provider not in available:
        raise ConfigError(
            f"provider={provider!r}; this build of ONNX Runtime has {', '.join(available)}"
        )


def run(
    model: bytes,
    folder: str | os.PathLike[str],
    feeds: Mapping[str, Array],
    provider: str,
    *,
    fall_back: bool = False,
) -> dict[str, Array]:
    """Runs a model once and returns its outputs by name.

    Args:
        model: A serialized model.
        folder: Where its external data are.
        feeds: Its inputs by name.
        provider: The execution provider.
        fall_back: Whether the CPU provider may run what this one does not take.

    Raises:
        RunError: The model was not loaded, or did not run.
    """
    runtime = _onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.add_session_config_entry(_FOLDER, os.fspath(folder))
    providers = [provider]
    if provider != "CPUExecutionProvider":
        if fall_back:
            providers.append("CPUExecutionProvider")
        else:
            options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = runtime.InferenceSession(model, options, providers=providers)
        # numpy has no bfloat16 of its own, and ONNX Runtime hands none out.
        names = [out.name for out in session.get_outputs() if out.type != "tensor(bfloat16)"]
        return dict(zip(names, map(np.asarray, session.run(names, dict(feeds))), strict=True))
    except Exception as error:  # it has a class of its own for every status, and none above them
        raise RunError(_reason(error)) from error


def run_file(
    path: Path, feeds: Mapping[str, Array], provider: str, extra: Sequence[str] = ()
) -> dict[str, Array]:
    """Runs a model file once and returns its outputs by name.

    Args:
        path: The .onnx file.
        feeds: Its inputs by name; attention does without caches that are empty.
        provider: The execution provider; the CPU provider runs what it does not take.
        extra: Names of intermediate values of its graph, which are returned too, in float32.

    Raises:
        RunError: The model was not loaded, or did not run.
    """
    try:
        model = load(path)
    except SourceError as error:
        raise RunError(str(error)) from error
    drop_caches(model, feeds)
    values = ir.convenience.create_value_mapping(model.graph, include_subgraphs=False)
    wanted = {f"{_EXTRA}{name}": name for name in extra}
    for output, name in wanted.items():
        wide = ir.val(output, ir.DataType.FLOAT)
        model.graph.append(
            ir.node("Cast", [values[name]], {"to": ir.DataType.FLOAT}, outputs=[wide])
        )
        model.graph.outputs.append(wide)
    names = {str(value.name) for value in model.graph.inputs}
    given = {name: array for name, array in feeds.items() if name in names}
    proto = ir.to_proto(model).SerializeToString()
    found = run(proto, path.parent, given, provider, fall_back=True)
    return {wanted.get(name, name): array for name, array in found.items()}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        if isinstance(error.__cause__ or error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None  # its extension says of Ctrl-C that it failed
        raise ConfigError(
            f"verification needs ONNX Runtime ({error}); pip install 'qmoe-rules[runtime]'"
        ) from error
    return onnxruntime


def _reason(error: Exception) -> str:
    """Returns the first line of what ONNX Runtime says, without the number of its status."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
