"""Targets: what an execution provider's QMoE kernel accepts and computes right, as data.

Each `Provider` is one kernel's contract, with the ONNX Runtime it was measured on. A `Target` is
what a user asks for: one provider, or several that must all be right with the same file. A node
that a provider would refuse, or worse compute wrongly, is never converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qmoe_rules.formats import Spec

__all__ = ["GATED", "TARGETS", "Facts", "Provider", "Target"]

# Activations whose fc1 rows hold a gate and a linear half.
GATED = frozenset({"geglu", "swiglu"})


@dataclass(frozen=True)
class Facts:
    """What a provider needs to know about one MoE node.

    Attributes:
        dtype: The activation type, `"float32"`, `"float16"` or `"bfloat16"`.
        activation: The operator's `activation_type`.
        fusion: The operator's `swiglu_fusion`.
        hidden: H, columns of fc1 and rows of fc2.
        inter: I, columns of fc2.
        sparse_mixer: Whether `use_sparse_mixer` is set.
        limit_after_activation: Whether `swiglu_limit_after_activation` is set.
    """

    dtype: str
    activation: str
    fusion: int
    hidden: int
    inter: int
    sparse_mixer: bool = False
    limit_after_activation: bool = False


@dataclass(frozen=True)
class Provider:
    """The contract of one execution provider's QMoE kernel.

    Attributes:
        name: The provider, as users say it.
        source: Where the rows come from: measured on which ONNX Runtime, or read in its source.
        dtypes: Activation types that have a kernel.
        activations: Activations that have a kernel.
        fusions: Values of `swiglu_fusion` that gated activations may have.
        blocks: Block sizes by width of a code; 0 is one scale per row.
        layouts: Orders of the stored bytes that the kernel reads as they are meant.
        divisor: H and I must be multiples of it.
        reads_normalize: Whether `normalize_routing_weights=0` is honoured; where it is not, the
            routing weights must come in as the input `router_weights`.
        sparse_mixer: Whether `use_sparse_mixer=1` is honoured.
        limit_after_activation: Whether `swiglu_limit_after_activation=1` is honoured.
        approximate: By (width, whether blockwise), how the kernel is less exact than its weights.
        falls_back: Activation types without a kernel, which ONNX Runtime hands to the CPU
            provider: slower, and right only where the CPU provider accepts the same file.
        newer: By activation, from which ONNX Runtime on it loads.
    """

    name: str
    source: str
    dtypes: frozenset[str]
    activations: frozenset[str]
    fusions: frozenset[int]
    blocks: Mapping[int, frozenset[int]]
    layouts: frozenset[str]
    divisor: int
    reads_normalize: bool
    sparse_mixer: bool
    limit_after_activation: bool
    approximate: Mapping[tuple[int, bool], str] = field(default_factory=dict)
    falls_back: frozenset[str] = frozenset()
    newer: Mapping[str, str] = field(default_factory=dict)

    def refuse_spec(self, spec: Spec) -> str | None:
        """Returns why no node could be stored as `spec`, or None."""
        blocks = self.blocks.get(spec.format.bits, frozenset())
        if not blocks:
            return f"{self.name} has no kernel for {spec.format.name}"
        if spec.block_size not in blocks:
            return (
                f"{self.name} does not take block_size={spec.block_size} with {spec.format.name} "
                f"(it takes {_listed(blocks)})"
            )
        return None

    def refuse_layout(self, layout: str) -> str | None:
        """Returns why the kernel would misread `layout`, or None."""
        if layout not in self.layouts:
            return f"{self.name} misreads layout {layout!r} (it reads {_listed(self.layouts)})"
        return None

    def refuse(self, facts: Facts) -> str | None:
        """Returns why this kernel cannot run a node with these facts right, or None."""
        if facts.dtype not in self.dtypes:
            return f"{self.name} has no {facts.dtype} kernel (it has {_listed(self.dtypes)})"
        if facts.activation not in self.activations:
            return (
                f"{self.name} has no kernel for activation {facts.activation!r} "
                f"(it has {_listed(self.activations)})"
            )
        if facts.activation not in GATED and facts.fusion:
            return (
                f"{self.name} has no gate to fuse with activation {facts.activation!r} and "
                f"swiglu_fusion={facts.fusion}"
            )
        if facts.activation in GATED and facts.fusion not in self.fusions:
            return (
                f"{self.name} does not take swiglu_fusion={facts.fusion} "
                f"(it takes {_listed(self.fusions)})"
            )
        if facts.hidden % self.divisor or facts.inter % self.divisor:
            return (
                f"{self.name} needs hidden and inter sizes divisible by {self.divisor}, and they "
                f"are {facts.hidden} and {facts.inter}"
            )
        if facts.sparse_mixer and not self.sparse_mixer:
            return f"{self.name} ignores use_sparse_mixer=1 and would route differently"
        if facts.limit_after_activation and not self.limit_after_activation:
            return f"{self.name} does not honour swiglu_limit_after_activation=1"
        return None


def _listed(values: frozenset[int] | frozenset[str]) -> str:
    return ", ".join(str(value) for value in sorted(values))


CPU = Provider(
    name="the CPU provider",
    source="measured with onnxruntime 1.32.0",
    dtypes=frozenset({"float16", "float32"}),
    activations=frozenset({"gelu", "identity", "relu", "silu", "swiglu"}),
    fusions=frozenset({1}),
    blocks={bits: frozenset({0, 16, 32, 64, 128, 256}) for bits in (4, 8)},
    # 1.31 reads packed bytes as raw ones, and 1.32 does so for int8.
    layouts=frozenset({"raw"}),
    divisor=1,
    reads_normalize=False,
    sparse_mixer=False,
    limit_after_activation=False,
    approximate={(8, True): "rounds activations to int8 with blockwise int8, 1 to 2 % off"},
)

CUDA = Provider(
    name="the CUDA provider",
    source="measured with onnxruntime-gpu 1.31.1 on an H200; geglu read in 1.32's schema",
    dtypes=frozenset({"bfloat16", "float16"}),
    activations=frozenset({"geglu", "gelu", "identity", "relu", "silu", "swiglu"}),
    fusions=frozenset({1, 2}),
    blocks={bits: frozenset({0, 32, 64, 128, 256}) for bits in (4, 8)},
    layouts=frozenset({"cutlass_sm80", "raw"}),
    divisor=64,
    reads_normalize=True,
    sparse_mixer=False,
    limit_after_activation=True,
    falls_back=frozenset({"float32"}),
    newer={"geglu": "1.32"},
)


@dataclass(frozen=True)
class Target:
    """What the converted model must run on.

    Attributes:
        name: The public name, a value of the recipe's `target`.
        providers: The providers that must all accept and compute the same file.
    """

    name: str
    providers: tuple[Provider, ...]

    @property
    def reads_normalize(self) -> bool:
        """Whether every provider honours `normalize_routing_weights=0` by itself."""
        return all(provider.reads_normalize for provider in self.providers)

    def refuse_spec(self, spec: Spec) -> str | None:
        """Returns the first provider's reason against `spec`, or None."""
        return _first(provider.refuse_spec(spec) for provider in self.providers)

    def refuse_layout(self, layout: str) -> str | None:
        """Returns the first provider's reason against `layout`, or None."""
        return _first(provider.refuse_layout(layout) for provider in self.providers)

    def refuse(self, facts: Facts, spec: Spec, layout: str) -> str | None:
        """Returns the first provider's reason against a node, or None.

        Where another target takes the same node, stored in the same way, the reason names it.
        """
        reason = self._refuse(facts)
        if reason is None:
            return None
        others = [
            name
            for name, target in TARGETS.items()
            if not (
                target._refuse(facts) or target.refuse_spec(spec) or target.refuse_layout(layout)
            )
        ]
        return reason + (f"; target={others[0]!r} takes it" if others else "")

    def warnings(self, facts: Facts, spec: Spec) -> tuple[str, ...]:
        """Returns what the owner of a converted node should know about the providers."""
        key = (spec.format.bits, bool(spec.block_size))
        warnings = []
        for provider in self.providers:
            if key in provider.approximate:
                warnings.append(f"{provider.name} {provider.approximate[key]}")
            if facts.dtype in provider.falls_back:
                warnings.append(
                    f"{provider.name} has no {facts.dtype} kernel: ONNX Runtime runs such nodes on "
                    "the CPU"
                )
            if facts.activation in provider.newer:
                oldest = provider.newer[facts.activation]
                warnings.append(
                    f"{provider.name} loads {facts.activation} from ONNX Runtime {oldest} on"
                )
        return tuple(warnings)

    def _refuse(self, facts: Facts) -> str | None:
        on_cpu = CPU in self.providers
        asked = (p for p in self.providers if not (on_cpu and facts.dtype in p.falls_back))
        return _first(provider.refuse(facts) for provider in asked)


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)


TARGETS: dict[str, Target] = {
    "portable": Target("portable", (CPU, CUDA)),
    "cpu": Target("cpu", (CPU,)),
    "cuda": Target("cuda", (CUDA,)),
}
