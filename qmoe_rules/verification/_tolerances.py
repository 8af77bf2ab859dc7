"""How far an execution provider may be from the float64 reference, by kernel path, as data.

Figures are ||difference|| / ||reference|| of one QMoE node on hidden states of unit variance and
on those of real models. `docs/verification.md` shows what was measured; a wrong layout, a wrong
zero point or other experts come to 0.3 and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qmoe_rules.formats import Spec
from qmoe_rules.providers import TARGETS

__all__ = ["PROVIDERS", "TOLERANCES", "Tolerance", "runs_on", "tolerance_of"]

PROVIDERS: Mapping[str, str] = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "NvTensorRTRTXExecutionProvider": "trt-rtx",
    "WebGpuExecutionProvider": "webgpu",
}
"""The targets whose tables say what a provider computes, by ONNX Runtime's names."""


@dataclass(frozen=True)
class Tolerance:
    """One kernel path; a field that is None fits everything.

    Attributes:
        error: The relative error that is allowed.
        why: What makes the path as exact as it is.
        provider: ONNX Runtime's name of the provider.
        formats: Names of formats.
        blocks: Block sizes.
        dtype: The activation type.
        accuracy_level: QMoE's attribute.
        rescaled: Whether a global scale is no power of two.
    """

    error: float
    why: str
    provider: str | None = None
    formats: frozenset[str] | None = None
    blocks: frozenset[int] | None = None
    dtype: str | None = None
    accuracy_level: int | None = None
    rescaled: bool | None = None

    def fits(
        self, provider: str, spec: Spec, dtype: str, accuracy_level: int | None, rescaled: bool
    ) -> bool:
        """Returns whether a node of this kind takes the path."""
        return (
            self.provider in (None, provider)
            and (self.formats is None or spec.format.name in self.formats)
            and (self.blocks is None or spec.block_size in self.blocks)
            and self.dtype in (None, dtype)
            and self.accuracy_level in (None, accuracy_level)
            and self.rescaled in (None, rescaled)
        )


_CPU, _WEBGPU = "CPUExecutionProvider", "WebGpuExecutionProvider"
_BLOCKS = frozenset({16, 32, 64, 128, 256})
_INT8, _INT2 = frozenset({"int8"}), frozenset({"int2"})
_FP4 = frozenset({"mxfp4", "nvfp4"})

TOLERANCES = (
    Tolerance(2.5e-2, "activations rounded to int8", _CPU, _INT8, _BLOCKS),
    Tolerance(2.5e-2, "activations rounded to int8", _CPU, blocks=_BLOCKS, accuracy_level=4),
    Tolerance(2.5e-2, "products looked up in tables", _CPU, _INT2, _BLOCKS - {16}),
    Tolerance(2.5e-2, "global scales rounded", _CPU, _FP4, dtype="float32", rescaled=True),
    Tolerance(2.5e-2, "activations rounded to int8", _WEBGPU),
    Tolerance(1e-5, "float32 throughout", dtype="float32"),
    Tolerance(2e-3, "float16 activations", dtype="float16"),
    Tolerance(1.5e-2, "bfloat16 activations", dtype="bfloat16"),
)
"""The first row that fits a node counts."""


def tolerance_of(
    provider: str,
    spec: Spec,
    dtype: str,
    accuracy_level: int | None = None,
    *,
    rescaled: bool = False,
) -> Tolerance:
    """Returns the row of a kernel path.

    Args:
        provider: ONNX Runtime's name of the provider.
        spec: How a projection is stored.
        dtype: The activation type, `"float32"`, `"float16"` or `"bfloat16"`.
        accuracy_level: QMoE's attribute, None where it is absent.
        rescaled: Whether a global scale is no power of two (`StoredProjection.is_rescaled`).
    """
    kind = (provider, spec, dtype, accuracy_level, rescaled)
    return next(row for row in TOLERANCES if row.fits(*kind))


def runs_on(provider: str, dtype: str) -> str:
    """Returns the provider that ONNX Runtime hands a QMoE of an activation type to."""
    target = PROVIDERS.get(provider)
    handed = target is not None and dtype in TARGETS[target].providers[0].falls_back
    return _CPU if handed else provider
