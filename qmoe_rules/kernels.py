"""Kernels: what one provider makes of one kind of weights, as data, and of a node that has them.

A kernel that does not do what a node says either refuses to run, or computes something else
without a word. The tables keep the two apart, because only the second goes unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from qmoe_rules.formats import Spec
from qmoe_rules.layouts import LAYOUTS

__all__ = [
    "GARBAGE",
    "GATED",
    "INTERLEAVED",
    "REFUSED",
    "RIGHT",
    "TRAPS",
    "UNKNOWN",
    "Facts",
    "Fault",
    "Kernel",
    "Specs",
    "Stored",
    "Trap",
    "listed",
    "worst",
]

RIGHT = "right"
"""The kernel computes what the node says."""
GARBAGE = "computes garbage"
"""The kernel computes something else, without a word."""
REFUSED = "refuses to run"
"""The kernel does not load the node, or fails when it runs."""
UNKNOWN = "cannot be known from the file"
"""What the kernel computes depends on what the file does not say."""

INTERLEAVED = {"geglu": "geglu", "gelu": "geglu", "silu": "swiglu", "swiglu": "swiglu"}
"""What an activation with an fc3 is called where gate and linear rows are both in fc1."""
GATED = frozenset(INTERLEAVED.values())
"""Activations whose fc1 rows hold a gate and a linear half."""

Specs = Mapping[str, Spec]
"""How the projections of a node are stored, by name: fc1, fc2 and, where there is one, fc3."""


@dataclass(frozen=True)
class Fault:
    """Why a node does not run right.

    Attributes:
        verdict: `GARBAGE`, `REFUSED` or `UNKNOWN`.
        reason: The fault in words.
        about: What would have to change: `"storage"` (format, block size, zero points), `"layout"`,
            `"type"`, `"activation"`, `"sizes"`, `"file"` (it contradicts itself, or is not
            complete) or the name of a trap.
    """

    verdict: str
    reason: str
    about: str


def worst(faults: Iterable[Fault | None], order: tuple[str, ...]) -> Fault | None:
    """Returns the first fault with the verdict that comes first in `order`, or None."""
    found = [fault for fault in faults if fault is not None]
    return min(found, key=lambda fault: order.index(fault.verdict), default=None)


@dataclass(frozen=True)
class Trap:
    """Something a node may ask for that only some kernels do.

    Attributes:
        what: The wish in words.
        ignored: What a kernel does that passes over it, in words.
    """

    what: str
    ignored: str


TRAPS: dict[str, Trap] = {
    "sparse_mixer": Trap(
        "use_sparse_mixer=1", "ignores use_sparse_mixer=1 and would route differently"
    ),
    "limit_after_activation": Trap(
        "swiglu_limit_after_activation=1", "ignores swiglu_limit_after_activation=1"
    ),
    "normalize": Trap(
        "normalize_routing_weights=0 without router_weights",
        "renormalizes the routing weights, in spite of normalize_routing_weights=0",
    ),
    "router_weights": Trap(
        "router_weights other than Softmax(router_probs)",
        "never reads router_weights, and they are not Softmax(router_probs)",
    ),
    "unknown_router_weights": Trap(
        "router_weights other than Softmax(router_probs)",
        "never reads router_weights, and whether they are Softmax(router_probs) is not known",
    ),
    "fused_without_gate": Trap(
        "swiglu_fusion with an activation that has no gate",
        "reads out of bounds where swiglu_fusion is set and the activation has no gate",
    ),
    "no_gate": Trap(
        "swiglu_fusion=0 without fc3",
        "takes gate and linear rows for interleaved, where swiglu_fusion=0 does not say it",
    ),
    "fc3": Trap("a separate fc3", "ignores fc3"),
    "fused_fc3": Trap("swiglu_fusion with a separate fc3", "ignores fc3"),
    "fc3_biases": Trap("biases with a separate fc3", "misplaces biases with a separate fc3"),
    "scale_type": Trap("scales of another type than the input's", "misreads the scales' type"),
    "negative_block": Trap("block_size=-1", "takes block_size=-1 for the size of a block"),
    "computed_weights": Trap(
        "raw weights that other nodes compute", "misreads weights that other nodes compute"
    ),
    "no_global_scale": Trap("weights without global scales", "misses the global scales"),
    "signed_scales": Trap("negative scales", "misreads negative scales"),
}
"""By name. `Kernel.outcomes` says what becomes of each, `Facts.traps` which a node has."""


@dataclass(frozen=True)
class Facts:
    """What a provider needs to know about one MoE or QMoE node.

    Attributes:
        dtype: The activation type, `"float32"`, `"float16"` or `"bfloat16"`.
        activation: The operator's `activation_type`.
        fusion: The operator's `swiglu_fusion`.
        hidden: H, columns of fc1 and rows of fc2.
        inter: I, columns of fc2.
        sparse_mixer: Whether `use_sparse_mixer` is set.
        limit_after_activation: Whether `swiglu_limit_after_activation` is set.
        fc3: Whether the linear rows are in an fc3 of their own.
        limited: Whether `swiglu_limit` is present.
        scales: Types of the scales of blocks and rows, where they are not the activation type.
        others: The traps that nothing above tells.
    """

    dtype: str
    activation: str
    fusion: int
    hidden: int
    inter: int
    sparse_mixer: bool = False
    limit_after_activation: bool = False
    fc3: bool = False
    limited: bool = True
    scales: frozenset[str] = frozenset()
    others: frozenset[str] = frozenset()

    @property
    def gated(self) -> bool:
        """Whether fc1 holds gate and linear rows."""
        return self.activation in GATED and not self.fc3

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of every projection, gate and up being fused in fc1 where there is no fc3."""
        fc1 = (self.inter * (2 if self.gated else 1), self.hidden)
        shapes = {"fc1": fc1, "fc2": (self.hidden, self.inter)}
        return {**shapes, "fc3": fc1} if self.fc3 else shapes

    @property
    def traps(self) -> frozenset[str]:
        """What the node asks for that only some kernels do, but for its gate."""
        flags = {
            "sparse_mixer": self.sparse_mixer,
            "limit_after_activation": self.limit_after_activation,
        }
        return self.others | {name for name, is_set in flags.items() if is_set}


@dataclass(frozen=True)
class Stored:
    """How a QMoE's weights lie in a file.

    Attributes:
        specs: How the projections are stored.
        prepacked: The attribute `weights_prepacked`, -1 where it is absent.
        layouts: The orders that the bytes may have, as far as the file tells; none where no order
            fits every projection.
    """

    specs: Specs
    prepacked: int
    layouts: frozenset[str]


@dataclass(frozen=True)
class Kernel:
    """What one provider does with one format, or with float weights.

    Attributes:
        source: The ONNX Runtime it was measured on, or whose source says so.
        measured: Whether it was measured.
        blocks: Block sizes that it takes; 0 is one scale per row (or per expert, for fp8).
        reads: The layouts as which it reads bytes, by `weights_prepacked`: several where its
            versions differ, none where it is not known. It refuses a value that is not there.
        dtypes: Activation types that it has.
        activations: Activations that it has.
        fusions: Values of `swiglu_fusion` that gated activations may have.
        misread_halves: Activation types with which it takes gate and linear rows apart, as halves
            of fc1 (`swiglu_fusion=2`) or in fc3, and may misread them: ONNX Runtime times several
            implementations and keeps the fastest, and they do not agree.
        fc3: Activations with which it takes an fc3.
        zero_points: Block sizes with which it reads zero points right.
        even_blocks: Whether zero points are right only where K / block_size is even.
        partial_blocks: Whether K may end inside a block.
        divisor: H and I must be multiples of it.
        signed: Whether the scales of blocks may be negative.
        scales: Types that its scales may have, besides the activation type.
        outcomes: What becomes of a node with a trap, by its name; others are `REFUSED`.
        approximate: By block size, how it is less exact than its weights.
        since: The first ONNX Runtime that has it, where older ones do not load the node.
        packed: The kernel that takes `weights_prepacked=1` in later versions, where it is another.
    """

    source: str
    measured: bool
    blocks: frozenset[int]
    reads: Mapping[int, frozenset[str]]
    dtypes: frozenset[str]
    activations: frozenset[str]
    fusions: frozenset[int]
    misread_halves: frozenset[str] = frozenset()
    fc3: frozenset[str] = frozenset()
    zero_points: frozenset[int] = frozenset()
    even_blocks: bool = False
    partial_blocks: bool = False
    divisor: int = 1
    signed: bool = True
    scales: frozenset[str] = frozenset()
    outcomes: Mapping[str, str] = field(default_factory=dict)
    approximate: Mapping[int, str] = field(default_factory=dict)
    since: str | None = None
    packed: Kernel | None = None

    @property
    def layouts(self) -> frozenset[str]:
        """The layouts that it reads as they are meant, stated or not stated."""
        return frozenset(
            layout
            for prepacked, layouts in self.reads.items()
            for layout in layouts
            if len(layouts) == 1 and prepacked in (-1, LAYOUTS[layout].prepacked)
        )

    def spec_faults(self, spec: Spec, name: str) -> Iterator[Fault]:
        """Yields what is wrong with a way to store a projection; the subject is the provider.

        Args:
            spec: The way.
            name: What it is called.
        """
        size = spec.block_size
        if size not in self.blocks:
            reason = f"does not take block_size={size} with {name} (it takes {listed(self.blocks)})"
            larger = 256 in self.blocks and size > 256 and not size & (size - 1)
            yield Fault(UNKNOWN if larger else REFUSED, reason, "storage")
        if spec.symmetric or size in self.zero_points:
            return
        if not self.zero_points:
            yield Fault(REFUSED, f"takes no zero points with {name}", "storage")
        else:
            reason = (
                f"takes no zero points with {name} and block_size={size} "
                f"(it does with {listed(self.zero_points)})"
            )
            yield Fault(REFUSED, reason, "storage")

    def node_faults(self, facts: Facts, name: str, label: str = "") -> Iterator[Fault]:
        """Yields what is wrong with a node, whatever its weights.

        Args:
            facts: The node.
            name: What its weights are called.
            label: The same, with a space before it, where other kernels differ.
        """
        if facts.dtype not in self.dtypes:
            reason = f"has no {facts.dtype}{label} kernel (it has {listed(self.dtypes)})"
            yield Fault(REFUSED, reason, "type")
        if facts.activation not in self.activations:
            reason = (
                f"has no{label} kernel for activation {facts.activation!r} "
                f"(it has {listed(self.activations)})"
            )
            yield Fault(REFUSED, reason, "activation")
        yield from self._gate_faults(facts, name)
        if facts.hidden % self.divisor or facts.inter % self.divisor:
            reason = (
                f"needs hidden and inter sizes divisible by {self.divisor}, and they are "
                f"{facts.hidden} and {facts.inter}"
            )
            yield Fault(self.outcomes.get("sizes", REFUSED), reason, "sizes")

    def column_faults(self, columns: int, spec: Spec) -> Iterator[Fault]:
        """Yields what is wrong with K columns stored so."""
        blocks = spec.blocks(columns)
        if self.even_blocks and not spec.symmetric and spec.block_size and blocks % 2:
            reason = (
                f"misreads the zero points of an odd number of blocks, and K={columns} has "
                f"{blocks} of block_size={spec.block_size}"
            )
            yield Fault(GARBAGE, reason, "storage")

    def partial_faults(self, columns: int, spec: Spec) -> Iterator[Fault]:
        """Yields what is wrong with a last block that is not full."""
        partial = spec.block_size and columns % spec.block_size
        if partial and not self.partial_blocks and not spec.format.square:
            reason = f"wants whole blocks, and K={columns} with block_size={spec.block_size}"
            yield Fault(REFUSED, reason, "storage")

    def trap_faults(self, traps: Iterable[str]) -> Iterator[Fault]:
        """Yields what becomes of traps, by name."""
        for name in sorted(traps):
            trap, outcome = TRAPS[name], self.outcomes.get(name, REFUSED)
            reasons = {
                GARBAGE: trap.ignored,
                REFUSED: f"does not honour {trap.what}",
                UNKNOWN: f"is not known to honour {trap.what}",
            }
            if outcome != RIGHT:
                yield Fault(outcome, reasons[outcome], name)

    def layout_faults(self, stored: Stored) -> Iterator[Fault]:
        """Yields how it reads other bytes than there are."""
        name, given = stored.specs["fc1"].format.name, stored.prepacked
        said = "weights_prepacked is not stated" if given == -1 else f"weights_prepacked={given}"
        if given not in self.reads:
            reason = f"wants weights_prepacked={listed(self.reads)} with {name}, and {said}"
            yield Fault(REFUSED, reason, "layout")
            return
        read = self.reads[given]
        shown, meant = " or ".join(sorted(read)), " or ".join(sorted(stored.layouts))
        if not read:
            yield Fault(UNKNOWN, f"is not known to take {said} with {name}", "layout")
        elif not read & stored.layouts:
            reason = (
                f"takes the bytes for {shown} ones, as {said}; their shape says "
                f"{meant or 'one layout in fc1 and another in fc2'}"
            )
            yield Fault(GARBAGE, reason, "layout")
        elif read != stored.layouts or len(read) > 1:
            reason = f"takes the bytes for {shown} ones, as {said}; they may be {meant}"
            yield Fault(UNKNOWN, reason, "layout")

    def _gate_faults(self, facts: Facts, name: str) -> Iterator[Fault]:
        if facts.fc3 and (facts.fusion or facts.activation not in self.fc3):
            yield from self.trap_faults(["fused_fc3" if facts.fusion else "fc3"])
        elif facts.fc3:
            yield from self._half_faults(facts, "fc3", name)
        elif not facts.gated and facts.fusion:
            reason = (
                f"has no gate to fuse with activation {facts.activation!r} and "
                f"swiglu_fusion={facts.fusion}"
            )
            for fault in self.trap_faults(["fused_without_gate"]):
                yield replace(fault, reason=reason)
        elif facts.activation == "swiglu" and not facts.fusion and "no_gate" in self.outcomes:
            yield from self.trap_faults(["no_gate"])  # geglu's fusion is never guessed
        elif facts.gated and facts.fusion not in self.fusions:
            reason = f"does not take swiglu_fusion={facts.fusion} (it takes {listed(self.fusions)})"
            yield Fault(REFUSED, reason, "activation" if facts.fusion else "no_gate")
        elif facts.gated and facts.fusion == 2:
            yield from self._half_faults(facts, "swiglu_fusion=2", name)

    def _half_faults(self, facts: Facts, apart: str, name: str) -> Iterator[Fault]:
        if facts.dtype in self.misread_halves:
            reason = f"may misread {apart} with {facts.dtype} and {name}, by the kernel it picks"
            yield Fault(GARBAGE, reason, "activation")


def listed(values: Iterable[int] | Iterable[str]) -> str:
    """Returns values in order, as they are written."""
    return ", ".join(str(value) for value in sorted(values))
