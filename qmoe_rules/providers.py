"""The tables: what each execution provider's QMoE kernels accept and compute right.

Every row says which ONNX Runtime it was measured on, or that it was read in its source.
`docs/providers.md` shows the measurements.
"""

from __future__ import annotations

from dataclasses import replace

from qmoe_rules.targets import Kernel, Provider, Target

__all__ = ["CPU", "CUDA", "TARGETS", "TRT_RTX", "WEBGPU"]

_RAW = frozenset({"raw"})
_FLOAT, _HALF = frozenset({"float32", "float16"}), frozenset({"float16", "bfloat16"})
_PLAIN = frozenset({"gelu", "identity", "relu", "silu"})
_SIZES = frozenset({16, 32, 64, 128, 256})

_CPU_INT = Kernel(
    source="onnxruntime 1.32.0",
    measured=True,
    blocks=_SIZES | {0},
    # 1.31 reads packed bytes as raw ones, and 1.32 does so for int8.
    layouts=_RAW,
    dtypes=_FLOAT,
    activations=_PLAIN | {"swiglu"},
    fusions=frozenset({1}),
    zero_points=_SIZES | {0},
)
_CPU_FP4 = replace(
    _CPU_INT,
    layouts=frozenset({"k_packed"}),
    dtypes=_FLOAT | _HALF,
    zero_points=frozenset(),
    divisor=32,
    since="1.32",
)

CPU = Provider(
    name="the CPU provider",
    is_cpu=True,
    kernels={
        "int2": replace(
            _CPU_INT,
            approximate=dict.fromkeys(
                _SIZES - {16}, "looks int2 products up in tables, up to 2 % off"
            ),
        ),
        "int3": replace(
            _CPU_INT,
            blocks=frozenset({32, 64, 128}),
            dtypes=_HALF,
            activations=frozenset({"swiglu"}),
            zero_points=frozenset(),
            signed=False,
            since="1.32",
        ),
        "int4": _CPU_INT,
        "int8": replace(
            _CPU_INT,
            approximate=dict.fromkeys(
                _SIZES, "rounds activations to int8 with blockwise int8, 1 to 2 % off"
            ),
        ),
        "mxfp4": replace(_CPU_FP4, blocks=frozenset({32})),
        "nvfp4": replace(_CPU_FP4, blocks=frozenset({16})),
    },
    reads_normalize=False,
)

_CUDA_INT = Kernel(
    source="onnxruntime-gpu 1.31.1 on an H200",
    measured=True,
    blocks=_SIZES - {16} | {0},
    layouts=_RAW | {"cutlass_sm80"},
    dtypes=_HALF,
    activations=_PLAIN | {"geglu", "swiglu"},
    fusions=frozenset({1, 2}),
    zero_points=_SIZES - {16},
    divisor=64,
)
_CUDA_FP4 = replace(
    _CUDA_INT,
    layouts=frozenset({"n_packed"}),
    activations=_PLAIN | {"swiglu"},
    zero_points=frozenset(),
    divisor=32,
)

CUDA = Provider(
    name="the CUDA provider",
    kernels={
        "int2": replace(
            _CUDA_INT,
            blocks=_SIZES,
            layouts=_RAW,
            zero_points=_SIZES - {16},
            mixed=frozenset({"int4", "int8"}),
        ),
        "int4": replace(_CUDA_INT, even_blocks=True, mixed=frozenset({"int2", "int8"})),
        "int8": replace(_CUDA_INT, mixed=frozenset({"int2", "int4"})),
        "mxfp4": replace(_CUDA_FP4, blocks=frozenset({32})),
        "nvfp4": replace(_CUDA_FP4, blocks=frozenset({16})),
    },
    reads_normalize=True,
    limit_after_activation=True,
    falls_back=frozenset({"float32"}),
    newer={"geglu": "1.32"},
)

_WEBGPU_INT = Kernel(
    source="read in the source of onnxruntime 1.32",
    measured=False,
    blocks=_SIZES | {0},
    layouts=_RAW,
    dtypes=_FLOAT,
    activations=_PLAIN | {"swiglu"},
    fusions=frozenset({1, 2}),
    # It takes them for many tokens and refuses them for one: a decoder's first step would fail.
    zero_points=frozenset(),
    since="1.31",
)

WEBGPU = Provider(
    name="the WebGPU provider",
    kernels={
        "int4": _WEBGPU_INT,
        "int8": _WEBGPU_INT,
        "fp8": replace(_WEBGPU_INT, blocks=frozenset({128})),
    },
    # Versions before 1.31 ignore it without a word; with router_weights they refuse the node.
    reads_normalize=False,
)

TRT_RTX = Provider(
    name="the TensorRT-RTX provider",
    kernels={
        "int4": Kernel(
            source="as onnxruntime-genai 0.18 writes for it; version 2.0.0.40 was reported wrong",
            measured=False,
            blocks=frozenset({128}),
            layouts=_RAW,
            dtypes=_HALF,
            activations=frozenset({"swiglu"}),
            fusions=frozenset({1}),
            signed=False,
        ),
    },
    reads_normalize=False,
    reads_prepacked=False,
    wants_limit=True,
)

TARGETS: dict[str, Target] = {
    "portable": Target("portable", (CPU, CUDA)),
    "cpu": Target("cpu", (CPU,)),
    "cuda": Target("cuda", (CUDA,)),
    "webgpu": Target("webgpu", (WEBGPU,)),
    "trt-rtx": Target("trt-rtx", (TRT_RTX,)),
}
