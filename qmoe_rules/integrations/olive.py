"""`OnnxMoEQuantization`: the rewrite as a pass of Olive.

Olive finds passes in its package configuration. `python -m qmoe_rules.integrations.olive` prints
Olive's own one with this pass added, for `olive run --package-config`.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

try:
    from olive.hardware import AcceleratorSpec
    from olive.model import ONNXModelHandler
    from olive.model.utils import resolve_onnx_path
    from olive.package_config import OlivePackageConfig
    from olive.passes import Pass, PassModuleConfig
    from olive.passes.pass_config import BasePassConfig, PassConfigParam
except ImportError as error:
    raise ImportError(
        f"qmoe_rules.integrations.olive needs Olive: pip install 'qmoe-rules[olive]' ({error})"
    ) from error

from qmoe_rules.errors import ConfigError
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.options import OPTIONS
from qmoe_rules.pipeline import quantize
from qmoe_rules.quantizers import METHODS
from qmoe_rules.recipe import Recipe
from qmoe_rules.report import CONVERTED, SKIPPED

__all__ = ["OnnxMoEQuantization", "package_config"]

logger = logging.getLogger("olive.qmoe_rules")  # a child of Olive's, which shows it

_ARCH = 80


class OnnxMoEQuantization(Pass):
    """Quantizes the experts of an ONNX model: com.microsoft::MoE becomes com.microsoft::QMoE."""

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        parameters = {
            option.name: PassConfigParam(
                type_=list[str] if option.kind is list else option.kind,
                default_value=option.default,
                description=option.help,
            )
            for option in OPTIONS
        }
        parameters["force_arch"] = PassConfigParam(
            type_=int,
            default_value=_ARCH,
            description="The GPU architecture of the packed layout: 80, which all GPUs read.",
        )
        return parameters

    def _run_for_config(
        self, model: ONNXModelHandler, config: BasePassConfig, output_model_path: str
    ) -> ONNXModelHandler:
        path = Path(resolve_onnx_path(output_model_path, Path(model.model_path).name))
        report = quantize(model.model_path, path, _recipe(config))
        if report.count(CONVERTED):
            logger.info("%s", report)
        elif report.count(SKIPPED):
            report.raise_if_skipped()
        else:
            logger.warning("%s: %s", model.model_path, report)
        return ONNXModelHandler(model_path=path.parent, onnx_file_name=path.name)


def package_config() -> dict[str, Any]:
    """Returns Olive's package configuration with the pass of this module added."""
    text = Path(OlivePackageConfig.get_default_config_path()).read_text(encoding="utf-8")
    config: dict[str, Any] = json.loads(text)
    config["passes"]["OnnxMoEQuantization"] = {
        "module_path": "qmoe_rules.integrations.olive.OnnxMoEQuantization",
        "supported_providers": ["CPUExecutionProvider", "CUDAExecutionProvider"],
        "supported_accelerators": ["cpu", "gpu"],
        "supported_precisions": ["int4", "int8"],
        "supported_algorithms": sorted(PassModuleConfig.QUANT_ALGORITHMS.intersection(METHODS)),
        "supported_quantization_encodings": [],
    }
    return config


def _recipe(config: BasePassConfig) -> Recipe:
    """Returns the recipe that a pass configuration asks for; None stands for the default."""
    if config.force_arch not in (_ARCH, None):
        reason = LAYOUTS["cutlass_sm90"].refuse_shape(0, 0, 4)
        raise ConfigError(f"force_arch={config.force_arch}; it may be {_ARCH}: {reason}")
    given = {option.name: getattr(config, option.name) for option in OPTIONS}
    return Recipe.of(**{name: value for name, value in given.items() if value is not None})


if __name__ == "__main__":
    sys.stdout.write(json.dumps(package_config(), indent=2) + "\n")
