"""The tables: what each execution provider's MoE and QMoE kernels accept, and what they compute.

Every row says which ONNX Runtime it was measured on, or that it was read in its source.
`docs/providers.md` shows the measurements.
"""

from __future__ import annotations

from dataclasses import replace

from qmoe_rules.kernels import GARBAGE, RIGHT, UNKNOWN, Kernel
from qmoe_rules.targets import Provider, Target

__all__ = ["CPU", "CUDA", "TARGETS", "TRT_RTX", "WEBGPU"]

_FLOAT, _HALF = frozenset({"float32", "float16"}), frozenset({"float16", "bfloat16"})
_PLAIN = frozenset({"gelu", "identity", "relu", "silu"})
_SIZES = frozenset({16, 32, 64, 128, 256})
_NONE: frozenset[int] = frozenset()

# Orders of bytes, as the values of `Kernel.reads`.
_RAW, _SM80 = frozenset({"raw"}), frozenset({"cutlass_sm80"})
_N_PACKED, _K_PACKED = frozenset({"n_packed"}), frozenset({"k_packed"})

_CPU_INT = Kernel(
    source="onnxruntime 1.32.0",
    measured=True,
    blocks=_SIZES | {0},
    reads={-1: _RAW, 0: _RAW, 1: _RAW},
    dtypes=_FLOAT,
    activations=_PLAIN | {"swiglu"},
    fusions=frozenset({1}),
    zero_points=_SIZES | {0},
    partial_blocks=True,
    scales=_FLOAT,
    outcomes={
        "computed_weights": RIGHT,
        "fused_without_gate": GARBAGE,
        "normalize": GARBAGE,
        "router_weights": RIGHT,
        "signed_scales": RIGHT,
        "sparse_mixer": GARBAGE,
        "unknown_router_weights": RIGHT,
    },
)
# 1.32's kernel for packed integers, int3 and 4-bit floating-point codes.
_CPU_SHARED = replace(
    _CPU_INT,
    blocks=frozenset({32, 64, 128}),
    dtypes=_FLOAT | _HALF,
    activations=frozenset({"swiglu"}),
    zero_points=_NONE,
    partial_blocks=False,
    scales=frozenset(),
    outcomes={
        "computed_weights": RIGHT,
        "normalize": RIGHT,
        "router_weights": RIGHT,
        "signed_scales": RIGHT,
        "unknown_router_weights": RIGHT,
    },
    since="1.32",
)
# 1.31 takes such bytes for raw ones.
_CPU_PACKED = replace(_CPU_SHARED, reads={1: _SM80}, divisor=64)
_CPU_FP4 = replace(_CPU_SHARED, reads={1: _K_PACKED}, divisor=32)

CPU = Provider(
    name="the CPU provider",
    is_cpu=True,
    kernels={
        "int2": replace(
            _CPU_INT,
            approximate=dict.fromkeys(
                _SIZES - {16}, "looks int2 products up in tables, up to 2 % off"
            ),
            packed=_CPU_PACKED,
        ),
        "int3": replace(_CPU_SHARED, reads={0: _RAW}, dtypes=_HALF, signed=False),
        "int4": replace(_CPU_INT, packed=_CPU_PACKED),
        "int8": replace(
            _CPU_INT,
            approximate=dict.fromkeys(
                _SIZES, "rounds activations to int8 with blockwise int8, 1 to 2 % off"
            ),
        ),
        "mxfp4": replace(
            _CPU_FP4,
            blocks=frozenset({32}),
            outcomes={**_CPU_FP4.outcomes, "no_global_scale": RIGHT},
        ),
        "nvfp4": replace(_CPU_FP4, blocks=frozenset({16})),
    },
    moe=replace(
        _CPU_INT,
        blocks=_NONE,
        reads={},
        outcomes={"fused_without_gate": RIGHT, "normalize": RIGHT, "sparse_mixer": GARBAGE},
    ),
)

_CUDA_INT = Kernel(
    source="onnxruntime-gpu 1.31.1 on an H200",
    measured=True,
    blocks=_SIZES - {16} | {0},
    reads={-1: _SM80, 0: _RAW, 1: _SM80},
    dtypes=_HALF,
    activations=_PLAIN | {"geglu", "swiglu"},
    fusions=frozenset({1, 2}),
    zero_points=_SIZES - {16},
    divisor=64,
    outcomes={
        "limit_after_activation": RIGHT,
        "negative_block": RIGHT,
        "no_gate": UNKNOWN,
        "normalize": RIGHT,
        "router_weights": GARBAGE,
        "signed_scales": RIGHT,
        "sparse_mixer": GARBAGE,
        "unknown_router_weights": UNKNOWN,
    },
)
# Of int2 and of mixed widths, and float MoE: what does not fit the fast kernels is dequantized.
_CUDA_DENSE = replace(_CUDA_INT, blocks=_SIZES, reads={0: _RAW}, divisor=1, misread_halves=_HALF)
_CUDA_FP4 = replace(
    _CUDA_INT,
    reads=dict.fromkeys((-1, 0, 1), _N_PACKED),
    activations=_PLAIN | {"swiglu"},
    zero_points=_NONE,
)

CUDA = Provider(
    name="the CUDA provider",
    kernels={
        "int2": _CUDA_DENSE,
        "int4": replace(_CUDA_INT, even_blocks=True),
        "int8": _CUDA_INT,
        "mxfp4": replace(
            _CUDA_FP4,
            blocks=frozenset({32}),
            outcomes={**_CUDA_FP4.outcomes, "sizes": GARBAGE},
        ),
        # 1.32 takes K-packed bytes with 1, under the shape of N-packed ones.
        "nvfp4": replace(
            _CUDA_FP4,
            blocks=frozenset({16}),
            reads={-1: _N_PACKED, 0: _N_PACKED, 1: _N_PACKED | _K_PACKED},
            divisor=16,
            misread_halves=_HALF,
        ),
    },
    mixed=_CUDA_DENSE,
    mixes=frozenset({"int2", "int4", "int8"}),
    moe=replace(
        _CUDA_DENSE,
        blocks=_NONE,
        reads={},
        dtypes=_FLOAT | _HALF,
        fc3=frozenset({"swiglu"}),
        outcomes={
            "fc3": UNKNOWN,
            "fc3_biases": GARBAGE,
            "fused_fc3": UNKNOWN,
            "fused_without_gate": UNKNOWN,
            "limit_after_activation": RIGHT,
            "no_gate": UNKNOWN,
            "normalize": RIGHT,
            "sparse_mixer": UNKNOWN,
        },
    ),
    falls_back={"float32": CPU},
    newer={"geglu": "1.32", "limit_after_activation": "1.32"},
)

_WEBGPU_INT = Kernel(
    source="read in the source of onnxruntime 1.32",
    measured=False,
    blocks=_SIZES | {0},
    reads={-1: _RAW, 0: _RAW},
    dtypes=_FLOAT,
    activations=_PLAIN | {"swiglu"},
    fusions=frozenset({1, 2}),
    fc3=_PLAIN | {"swiglu"},
    # It takes them for many tokens and refuses them for one: a decoder's first step would fail.
    zero_points=_NONE,
    outcomes={
        "computed_weights": UNKNOWN,
        "fc3_biases": RIGHT,
        "limit_after_activation": UNKNOWN,
        "negative_block": GARBAGE,
        "no_gate": UNKNOWN,
        # Versions before 1.31 ignore it without a word; with router_weights they refuse the node.
        "normalize": UNKNOWN,
        "router_weights": RIGHT,
        "scale_type": UNKNOWN,
        "signed_scales": RIGHT,
        "unknown_router_weights": RIGHT,
    },
    since="1.31",
)

WEBGPU = Provider(
    name="the WebGPU provider",
    kernels={
        "int4": _WEBGPU_INT,
        "int8": _WEBGPU_INT,
        "fp8": replace(
            _WEBGPU_INT, blocks=frozenset({128}), scales=frozenset({"float32"}), partial_blocks=True
        ),
    },
    moe=replace(_WEBGPU_INT, blocks=_NONE, reads={}),
)

TRT_RTX = Provider(
    name="the TensorRT-RTX provider",
    kernels={
        "int4": Kernel(
            source="as onnxruntime-genai 0.18 writes for it; version 2.0.0.40 was reported wrong",
            measured=False,
            blocks=frozenset({128}),
            reads={-1: _RAW, 0: frozenset()},
            dtypes=_HALF,
            activations=frozenset({"swiglu"}),
            fusions=frozenset({1}),
            signed=False,
            outcomes={"unknown_router_weights": UNKNOWN},
        ),
    },
    is_closed=True,
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
