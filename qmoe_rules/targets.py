"""Targets: what an execution provider's QMoE kernels accept and compute right.

A `Kernel` is what one provider does with one format, a `Provider` is all of its kernels and how
they route (`providers.py` holds the tables). A `Target` is what a user asks for: one provider, or
several that must all be right with the same file. A node that a provider would refuse, or worse
compute wrongly, is never converted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from qmoe_rules.formats import Spec

__all__ = ["GATED", "Facts", "Kernel", "Provider", "Specs", "Target"]

# Activations whose fc1 rows hold a gate and a linear half.
GATED = frozenset({"geglu", "swiglu"})

Specs = Mapping[str, Spec]
"""How the projections of a node are stored, by name: fc1 and fc2."""


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

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every projection, gate and up being fused in fc1."""
        rows = self.inter * (2 if self.activation in GATED else 1)
        return {"fc1": (rows, self.hidden), "fc2": (self.hidden, self.inter)}


@dataclass(frozen=True)
class Kernel:
    """What one provider does with one format.

    Attributes:
        source: The ONNX Runtime it was measured on, or whose source says so.
        measured: Whether it was measured.
        blocks: Block sizes that it takes; 0 is one scale per row (or per expert, for fp8).
        layouts: Orders of the stored bytes that it reads as they are meant.
        dtypes: Activation types that it has.
        activations: Activations that it has.
        fusions: Values of `swiglu_fusion` that gated activations may have.
        zero_points: Block sizes with which it reads zero points right.
        even_blocks: Whether zero points are right only where K / block_size is even.
        divisor: H and I must be multiples of it.
        mixed: The other formats that fc2 may have where fc1 has this one.
        signed: Whether the scales of blocks may be negative.
        approximate: By block size, how it is less exact than its weights.
        since: The first ONNX Runtime that has it, where older ones do not load the node.
    """

    source: str
    measured: bool
    blocks: frozenset[int]
    layouts: frozenset[str]
    dtypes: frozenset[str]
    activations: frozenset[str]
    fusions: frozenset[int]
    zero_points: frozenset[int] = frozenset()
    even_blocks: bool = False
    divisor: int = 1
    mixed: frozenset[str] = frozenset()
    signed: bool = True
    approximate: Mapping[int, str] = field(default_factory=dict)
    since: str | None = None


@dataclass(frozen=True)
class Provider:
    """The contract of one execution provider's QMoE.

    Attributes:
        name: The provider, as users say it.
        kernels: What it does, by name of the format.
        is_cpu: Whether it runs what other providers do not take.
        reads_normalize: Whether `normalize_routing_weights=0` is honoured; where it is not, the
            routing weights must come in as the input `router_weights`.
        reads_prepacked: Whether it knows the attribute `weights_prepacked`.
        sparse_mixer: Whether `use_sparse_mixer=1` is honoured.
        limit_after_activation: Whether `swiglu_limit_after_activation=1` is honoured.
        wants_limit: Whether `swiglu_limit` must be present, an infinite one for none.
        falls_back: Activation types without a kernel, which ONNX Runtime hands to the CPU
            provider: slower, and right only where the CPU provider accepts the same file.
        newer: By activation, from which ONNX Runtime on it loads.
    """

    name: str
    kernels: Mapping[str, Kernel]
    reads_normalize: bool
    is_cpu: bool = False
    reads_prepacked: bool = True
    sparse_mixer: bool = False
    limit_after_activation: bool = False
    wants_limit: bool = False
    falls_back: frozenset[str] = frozenset()
    newer: Mapping[str, str] = field(default_factory=dict)

    def refuse_specs(self, specs: Specs) -> str | None:
        """Returns why no node could be stored so, or None."""
        return _first(self._refuse_spec(spec) for spec in specs.values()) or self._mixed(specs)

    def refuse_layout(self, layout: str, specs: Specs) -> str | None:
        """Returns why the kernel would misread `layout`, or None."""
        read = self.kernels[specs["fc1"].format.name].layouts
        if specs["fc1"].format != specs["fc2"].format:
            read &= {"raw"}  # widths are mixed in raw bytes only
        if layout not in read:
            return f"{self.name} misreads layout {layout!r} (it reads {_listed(read)})"
        return None

    def refuse(self, facts: Facts, specs: Specs) -> str | None:
        """Returns why a node with these facts, stored so, would not run right, or None."""
        return _first(
            refusal
            for name, spec in specs.items()
            for refusal in (
                self._refuse_facts(facts, self.kernels[spec.format.name], spec),
                self._refuse_odd_blocks(facts.shapes[name][1], spec),
            )
        ) or self._refuse_routing(facts)

    def _refuse_spec(self, spec: Spec) -> str | None:
        name, kernel = spec.format.name, self.kernels.get(spec.format.name)
        if kernel is None:
            return f"{self.name} has no kernel for {name}"
        if spec.block_size not in kernel.blocks:
            return (
                f"{self.name} does not take block_size={spec.block_size} with {name} "
                f"(it takes {_listed(kernel.blocks)})"
            )
        if not spec.symmetric and not kernel.zero_points:
            return f"{self.name} takes no zero points with {name}"
        if not spec.symmetric and spec.block_size not in kernel.zero_points:
            return (
                f"{self.name} takes no zero points with {name} and block_size={spec.block_size} "
                f"(it does with {_listed(kernel.zero_points)})"
            )
        return None

    def _mixed(self, specs: Specs) -> str | None:
        fc1, fc2 = specs["fc1"].format.name, specs["fc2"].format.name
        if fc1 == fc2 or fc2 in self.kernels[fc1].mixed:
            return None
        return f"{self.name} does not take {fc1} in fc1 and {fc2} in fc2"

    def _refuse_facts(self, facts: Facts, kernel: Kernel, spec: Spec) -> str | None:
        name = "" if spec.format.quant_type == "int" else f" {spec.format.name}"
        if spec.format.bits == 3:
            name = " int3"
        if facts.dtype not in kernel.dtypes:
            return (
                f"{self.name} has no {facts.dtype}{name} kernel (it has {_listed(kernel.dtypes)})"
            )
        if facts.activation not in kernel.activations:
            return (
                f"{self.name} has no{name} kernel for activation {facts.activation!r} "
                f"(it has {_listed(kernel.activations)})"
            )
        if facts.activation not in GATED and facts.fusion:
            return (
                f"{self.name} has no gate to fuse with activation {facts.activation!r} and "
                f"swiglu_fusion={facts.fusion}"
            )
        if facts.activation in GATED and facts.fusion not in kernel.fusions:
            return (
                f"{self.name} does not take swiglu_fusion={facts.fusion} "
                f"(it takes {_listed(kernel.fusions)})"
            )
        if facts.hidden % kernel.divisor or facts.inter % kernel.divisor:
            return (
                f"{self.name} needs hidden and inter sizes divisible by {kernel.divisor}, and they "
                f"are {facts.hidden} and {facts.inter}"
            )
        return None

    def _refuse_odd_blocks(self, columns: int, spec: Spec) -> str | None:
        odd = spec.block_size and spec.blocks(columns) % 2
        if spec.symmetric or not odd or not self.kernels[spec.format.name].even_blocks:
            return None
        return (
            f"{self.name} misreads the zero points of an odd number of blocks, and K={columns} has "
            f"{spec.blocks(columns)} of block_size={spec.block_size}"
        )

    def _refuse_routing(self, facts: Facts) -> str | None:
        if facts.sparse_mixer and not self.sparse_mixer:
            return f"{self.name} ignores use_sparse_mixer=1 and would route differently"
        if facts.limit_after_activation and not self.limit_after_activation:
            return f"{self.name} does not honour swiglu_limit_after_activation=1"
        return None


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

    @property
    def reads_prepacked(self) -> bool:
        """Whether every provider knows the attribute `weights_prepacked`."""
        return all(provider.reads_prepacked for provider in self.providers)

    @property
    def wants_limit(self) -> bool:
        """Whether some provider wants `swiglu_limit` to be present."""
        return any(provider.wants_limit for provider in self.providers)

    def signed(self, format: str) -> bool:
        """Returns whether every provider takes negative scales of blocks with a format."""
        kernels = (provider.kernels.get(format) for provider in self.providers)
        return all(kernel is None or kernel.signed for kernel in kernels)

    def refuse_storage(self, specs: Specs, layout: str) -> str | None:
        """Returns the first provider's reason against every node stored so, or None."""
        return _first(provider.refuse_specs(specs) for provider in self.providers) or _first(
            provider.refuse_layout(layout, specs) for provider in self.providers
        )

    def refuse(self, facts: Facts, specs: Specs) -> str | None:
        """Returns the first provider's reason against a node stored so, or None.

        What `refuse_storage` refuses may not be asked about.
        """
        on_cpu = any(provider.is_cpu for provider in self.providers)
        asked = (p for p in self.providers if not (on_cpu and facts.dtype in p.falls_back))
        return _first(provider.refuse(facts, specs) for provider in asked)

    def warnings(self, facts: Facts, specs: Specs) -> tuple[str, ...]:
        """Returns what the owner of a converted node should know about the providers."""
        warnings: dict[str, None] = {}
        for provider in self.providers:
            for spec in specs.values():
                kernel = provider.kernels[spec.format.name]
                if spec.block_size in kernel.approximate:
                    warnings[f"{provider.name} {kernel.approximate[spec.block_size]}"] = None
                if not kernel.measured:
                    warnings[f"{provider.name}: {kernel.source}; not measured"] = None
                if kernel.since:
                    warnings[
                        f"{provider.name} loads {spec.format.name} from ONNX Runtime "
                        f"{kernel.since} on"
                    ] = None
            if facts.dtype in provider.falls_back:
                warnings[
                    f"{provider.name} has no {facts.dtype} kernel: ONNX Runtime runs such nodes on "
                    "the CPU"
                ] = None
            if facts.activation in provider.newer:
                oldest = provider.newer[facts.activation]
                warnings[
                    f"{provider.name} loads {facts.activation} from ONNX Runtime {oldest} on"
                ] = None
        return tuple(warnings)


def _listed(values: frozenset[int] | frozenset[str]) -> str:
    return ", ".join(str(value) for value in sorted(values))


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
