"""Targets: what an execution provider's MoE and QMoE kernels accept and compute right.

A `Kernel` is what one provider does with one format, a `Provider` is all of its kernels
(`providers.py` holds the tables). A `Target` is what a user asks for: one provider, or several that
must all be right with the same file. A node that a provider would refuse, or worse compute
wrongly, is never made; `judge` says of a node that somebody else made what would become of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from qmoe_rules.formats import Spec
from qmoe_rules.kernels import (
    GARBAGE,
    REFUSED,
    RIGHT,
    TRAPS,
    UNKNOWN,
    Facts,
    Fault,
    Kernel,
    Specs,
    Stored,
    listed,
    worst,
)

__all__ = ["Provider", "Target"]

# A node that is refused computes nothing; of several providers, one that computes garbage is worse.
_IN_ONE = (REFUSED, GARBAGE, UNKNOWN)
_IN_ALL = (GARBAGE, REFUSED, UNKNOWN)


@dataclass(frozen=True)
class Provider:
    """The contract of one execution provider.

    Attributes:
        name: The provider, as users say it.
        kernels: What it does with QMoE, by name of the format.
        mixed: The kernel that takes fc1 and fc2 of different formats, where there is one.
        mixes: The formats that it takes.
        moe: What it does with MoE, whose weights are float; None where nothing is known of it.
        is_cpu: Whether it runs what other providers do not take.
        is_closed: Whether nobody has seen what it does with what the tables lack.
        reads_prepacked: Whether it knows the attribute `weights_prepacked`.
        wants_limit: Whether `swiglu_limit` must be present, an infinite one for none.
        falls_back: Activation types without a QMoE kernel, and the provider that ONNX Runtime hands
            such nodes to without a word: slower, and right only where that one is.
        newer: By activation or trap, from which ONNX Runtime on it loads.
    """

    name: str
    kernels: Mapping[str, Kernel]
    mixed: Kernel | None = None
    mixes: frozenset[str] = frozenset()
    moe: Kernel | None = None
    is_cpu: bool = False
    is_closed: bool = False
    reads_prepacked: bool = True
    wants_limit: bool = False
    falls_back: Mapping[str, Provider] = field(default_factory=dict)
    newer: Mapping[str, str] = field(default_factory=dict)

    def reads_normalize(self, specs: Specs) -> bool:
        """Returns whether the kernel of a storage honours `normalize_routing_weights=0`.

        Where it does not, the routing weights must come in as the input `router_weights`.
        """
        kernel = self.kernel(specs)
        return kernel is not None and kernel.outcomes.get("normalize") == RIGHT

    def refuse_specs(self, specs: Specs) -> str | None:
        """Returns why no node could be stored so, or None."""
        return _reason(self.spec_faults(specs))

    def spec_faults(self, specs: Specs, packed: bool = False) -> Iterator[Fault]:
        """Yields what is wrong with every node stored so; the arguments are those of `kernel`."""
        kernel = self.kernel(specs, packed)
        if kernel is not None:
            for spec in specs.values():
                yield from self._named(kernel.spec_faults(spec, _called(specs)))
            return
        unknown = [
            spec.format.name for spec in specs.values() if spec.format.name not in self.kernels
        ]
        fc1, fc2 = specs["fc1"].format.name, specs["fc2"].format.name
        lacking = (
            f"has no kernel for {unknown[0]}"
            if unknown
            else (f"does not take {fc1} in fc1 and {fc2} in fc2")
        )
        yield Fault(REFUSED, f"{self.name} {lacking}", "storage")

    def layouts(self, specs: Specs) -> frozenset[str]:
        """Returns the layouts that the kernel of a storage reads."""
        kernel = self.kernel(specs)
        return kernel.layouts if kernel else frozenset()

    def refuse_layout(self, layout: str, specs: Specs) -> str | None:
        """Returns why the kernel would misread `layout`, or None."""
        read = self.layouts(specs)
        if layout in read:
            return None
        return f"{self.name} misreads layout {layout!r} (it reads {listed(read)})"

    def refuse(self, facts: Facts, specs: Specs) -> str | None:
        """Returns why a node with these facts, stored so, would not run right, or None."""
        return _reason(self._node_faults(facts, specs))

    def judge(self, facts: Facts, stored: Stored | None) -> Fault | None:
        """Returns what is worst with a node that is there, or None where it runs right.

        Args:
            facts: The node.
            stored: How a QMoE's weights lie in the file; None for a MoE.
        """
        if stored is None:
            return self._worst(self._float_faults(facts))
        if facts.dtype in self.falls_back:
            return self.falls_back[facts.dtype].judge(facts, stored)
        fault, kernel = self._worst(self._faults(facts, stored)), self.kernel(stored.specs)
        if kernel is None or kernel.packed is None or stored.prepacked != 1:
            return fault
        later = self._worst(self._faults(facts, stored, packed=True))
        return _either(fault, later, str(kernel.packed.since))

    def kernel(self, specs: Specs, packed: bool = False) -> Kernel | None:
        """Returns the kernel that takes projections stored so, or None.

        Args:
            specs: How they are stored.
            packed: Whether to return the one for `weights_prepacked=1`, where it is another.
        """
        names = {spec.format.name for spec in specs.values()}
        if len(names) > 1:
            return self.mixed if names <= self.mixes else None
        found = self.kernels.get(*names)
        return found.packed if found and found.packed and packed else found

    def _worst(self, faults: Iterable[Fault]) -> Fault | None:
        return worst(map(_doubted, faults) if self.is_closed else faults, _IN_ONE)

    def _faults(self, facts: Facts, stored: Stored, packed: bool = False) -> Iterator[Fault]:
        yield from self.spec_faults(stored.specs, packed)
        yield from self._node_faults(facts, stored.specs, packed)
        kernel = self.kernel(stored.specs, packed)
        if kernel is None:
            return
        yield from self._named(kernel.layout_faults(stored))
        for name, spec in stored.specs.items():
            yield from self._named(kernel.partial_faults(facts.shapes[name][1], spec))
        if not facts.scales <= kernel.scales:
            yield from self._named(kernel.trap_faults(["scale_type"]))
        if self.wants_limit and not facts.limited:
            yield Fault(REFUSED, f"{self.name} wants swiglu_limit to be present", "swiglu_limit")

    def _node_faults(self, facts: Facts, specs: Specs, packed: bool = False) -> Iterator[Fault]:
        kernel = self.kernel(specs, packed)
        if kernel is None:
            return
        for name, spec in specs.items():
            found = kernel.node_faults(facts, _called(specs), _label(spec))
            yield from self._named(found)
            yield from self._named(kernel.column_faults(facts.shapes[name][1], spec))
        yield from self._named(kernel.trap_faults(facts.traps))

    def _float_faults(self, facts: Facts) -> Iterator[Fault]:
        if self.moe is None:
            yield Fault(UNKNOWN, f"what {self.name} does with MoE is not known", "type")
            return
        yield from self._named(self.moe.node_faults(facts, "MoE"))
        yield from self._named(self.moe.trap_faults(facts.traps))

    def _named(self, faults: Iterable[Fault]) -> Iterator[Fault]:
        for fault in faults:
            yield replace(fault, reason=f"{self.name} {fault.reason}")


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
    def reads_prepacked(self) -> bool:
        """Whether every provider knows the attribute `weights_prepacked`."""
        return all(provider.reads_prepacked for provider in self.providers)

    @property
    def wants_limit(self) -> bool:
        """Whether some provider wants `swiglu_limit` to be present."""
        return any(provider.wants_limit for provider in self.providers)

    def reads_normalize(self, specs: Specs) -> bool:
        """Returns whether every provider honours `normalize_routing_weights=0`, stored so."""
        return all(provider.reads_normalize(specs) for provider in self.providers)

    def signed(self, format: str) -> bool:
        """Returns whether every provider takes negative scales of blocks with a format."""
        kernels = (provider.kernels.get(format) for provider in self.providers)
        return all(kernel is None or kernel.signed for kernel in kernels)

    def layouts(self, specs: Specs) -> frozenset[str]:
        """Returns the layouts that every provider reads, stored so."""
        return frozenset.intersection(*(provider.layouts(specs) for provider in self.providers))

    def objections(self, specs: Specs) -> int:
        """Returns how many reasons the providers have against every node stored so."""
        return sum(len(list(provider.spec_faults(specs))) for provider in self.providers)

    def refuse_storage(self, specs: Specs, layout: str | None) -> str | None:
        """Returns the first provider's reason against every node stored so, or None.

        Args:
            specs: How the projections are stored.
            layout: The order of the bytes; None where it may be any.
        """
        if reason := _first(provider.refuse_specs(specs) for provider in self.providers):
            return reason
        if layout is not None:
            return _first(provider.refuse_layout(layout, specs) for provider in self.providers)
        if self.layouts(specs):
            return None
        reads = (f"{each.name} ({listed(each.layouts(specs))})" for each in self.providers)
        return f"no layout of {_called(specs)} is read by both {' and '.join(reads)}"

    def refuse(self, facts: Facts, specs: Specs) -> str | None:
        """Returns the first provider's reason against a node stored so, or None.

        What `refuse_storage` refuses may not be asked about.
        """
        on_cpu = any(provider.is_cpu for provider in self.providers)
        asked = (p for p in self.providers if not (on_cpu and facts.dtype in p.falls_back))
        return _first(provider.refuse(facts, specs) for provider in asked)

    def judge(self, facts: Facts, stored: Stored | None) -> Fault | None:
        """Returns what is worst with a node that is there, or None where it runs right.

        Args:
            facts: The node.
            stored: How a QMoE's weights lie in the file; None for a MoE.
        """
        return worst((provider.judge(facts, stored) for provider in self.providers), _IN_ALL)

    def is_approximate(self, specs: Specs, block_size: int) -> bool:
        """Returns whether a provider computes projections stored so less exactly than it could.

        Args:
            specs: How they are stored.
            block_size: Columns that share a scale in the one that is asked about.
        """
        kernels = (provider.kernel(specs) for provider in self.providers)
        return any(kernel and block_size in kernel.approximate for kernel in kernels)

    def warnings(self, facts: Facts, specs: Specs) -> tuple[str, ...]:
        """Returns what the owner of a node should know about the providers.

        Args:
            facts: The node.
            specs: How it is stored; empty for a MoE.
        """
        warnings: dict[str, None] = {}
        for provider in self.providers:
            kernel = provider.kernel(specs) if specs else provider.moe
            for size in {spec.block_size: None for spec in specs.values()}:
                if kernel and size in kernel.approximate:
                    warnings[f"{provider.name} {kernel.approximate[size]}"] = None
            if kernel and not kernel.measured:
                warnings[f"{provider.name}: {kernel.source}; not measured"] = None
            if kernel and kernel.since:
                warnings[
                    f"{provider.name} loads {_called(specs) or 'MoE'} from ONNX Runtime "
                    f"{kernel.since} on"
                ] = None
            if specs and facts.dtype in provider.falls_back:
                warnings[
                    f"{provider.name} has no {facts.dtype} kernel: ONNX Runtime runs such nodes on "
                    "the CPU"
                ] = None
            for wish in sorted({facts.activation, *facts.traps} & provider.newer.keys()):
                what = TRAPS[wish].what if wish in TRAPS else wish
                oldest = provider.newer[wish]
                warnings[f"{provider.name} loads {what} from ONNX Runtime {oldest} on"] = None
        return tuple(warnings)


def _doubted(fault: Fault) -> Fault:
    """Returns what is to be thought of a refusal that nobody has seen."""
    if fault.verdict != REFUSED:
        return fault
    return replace(fault, verdict=UNKNOWN, reason=f"{fault.reason}, as far as is known")


def _either(before: Fault | None, later: Fault | None, since: str) -> Fault | None:
    """Returns what is wrong with a node that versions of a provider treat differently."""
    fault = worst((before, later), _IN_ALL)
    if fault is None:
        return None
    verdict = fault.verdict if before and later else UNKNOWN
    texts = [found.reason if found else "it is right" for found in (before, later)]
    reason = f"before ONNX Runtime {since}, {texts[0]}; from then on, {texts[1]}"
    return Fault(verdict, reason, "layout")


def _called(specs: Specs) -> str:
    """Returns the formats in words."""
    return " and ".join(dict.fromkeys(spec.format.name for spec in specs.values()))


def _label(spec: Spec) -> str:
    """Returns the format of a kernel in words, where it is not an ordinary one."""
    plain = spec.format.quant_type == "int" and spec.format.bits != 3
    return "" if plain else f" {spec.format.name}"


def _reason(faults: Iterator[Fault]) -> str | None:
    fault = next(faults, None)
    return fault.reason if fault else None


def _first(reasons: Iterable[str | None]) -> str | None:
    return next((reason for reason in reasons if reason), None)
