"""`VerificationReport`: what was checked of a converted model, and what was found."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qmoe_rules.errors import VerificationError

__all__ = [
    "CONVERTED",
    "FLOAT",
    "KEPT",
    "MISSING",
    "Failure",
    "NodeResult",
    "OutputResult",
    "ProjectionResult",
    "VerificationReport",
]

CONVERTED = "converted"
"""A QMoE that takes the place of a float MoE."""
KEPT = "kept"
"""A QMoE that is in both models."""
FLOAT = "stays in float"
"""A MoE that is in both models."""
MISSING = "missing"
"""A node that only one of the models has, or that became something else."""

_TOLD = 8  # failures that the summary tells


@dataclass(frozen=True)
class Failure:
    """A check that failed.

    Attributes:
        check: Which one: `pairing`, `outside`, `attributes`, `routing`, `biases`, `stored`,
            `weights`, `scales`, `execution`, `kept` or `outputs`.
        reason: What was found, and what should have been.
        node: The node, empty for the whole model.
    """

    check: str
    reason: str
    node: str = ""

    def __str__(self) -> str:
        return f"{self.check}: {f'{self.node}: ' if self.node else ''}{self.reason}"


@dataclass(frozen=True)
class ProjectionResult:
    """How far the stored weights of one projection are from the float ones.

    Attributes:
        projection: `"fc1"` or `"fc2"`.
        stored: How it is stored, such as `"int4 block 32"`.
        bits: Bits per weight, scales and zero points included.
        expert: The worst expert.
        error: Its ||stored - float|| / ||float||.
        bound: What `error` may be.
        follow: The least correlation, over the experts, of the stored scales with those that
            the float weights ask for; None where there are too few, or all are alike.
        errors: The error of every expert.
    """

    projection: str
    stored: str
    bits: float
    expert: int
    error: float
    bound: float
    follow: float | None
    errors: tuple[float, ...]


@dataclass(frozen=True)
class NodeResult:
    """What was found out about one node.

    Attributes:
        node: The node's name.
        status: `CONVERTED`, `KEPT`, `FLOAT` or `MISSING`.
        projections: The weights, where the node was converted.
        output_error: The relative difference of what the stored and the float weights compute, both
            in float64: what quantization costs.
        execution_error: The relative difference of what the provider and the float64 reference
            compute with the stored weights; None where the provider was not asked.
        tolerance: What `execution_error` may be.
        inputs: Where the hidden states and router logits came from.
        notes: What the owner should know.
        failures: The checks that failed.
    """

    node: str
    status: str
    projections: tuple[ProjectionResult, ...] = ()
    output_error: float | None = None
    execution_error: float | None = None
    tolerance: float | None = None
    inputs: str = ""
    notes: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()

    def failing(self, *failures: Failure) -> NodeResult:
        """Returns the same with more failures, which get the node's name."""
        named = (dataclasses.replace(failure, node=self.node) for failure in failures)
        return dataclasses.replace(self, failures=(*self.failures, *named))

    def noting(self, note: str) -> NodeResult:
        """Returns the same with one note more."""
        return dataclasses.replace(self, notes=(*self.notes, note))


@dataclass(frozen=True)
class OutputResult:
    """How far an output of the whole converted model is from that of the float model.

    Attributes:
        name: The output.
        error: ||converted - float|| / ||float||.
        divergence: For logits, the mean KL(float || converted) in nats; else None.
        agreement: For logits, how often both rank the same class first; else None.
    """

    name: str
    error: float
    divergence: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class VerificationReport:
    """What `verify` found.

    Attributes:
        provider: The execution provider that ran.
        nodes: One result per MoE and QMoE node, in the order of the float model.
        failures: The checks that failed and belong to no node.
        outputs: The outputs of the whole model, where both models ran.
        whole_model: What the whole models were fed with, or why they did not run.
    """

    provider: str
    nodes: tuple[NodeResult, ...] = ()
    failures: tuple[Failure, ...] = ()
    outputs: tuple[OutputResult, ...] = ()
    whole_model: str = ""

    @property
    def failed(self) -> tuple[Failure, ...]:
        """Every check that failed, of the whole model and of each node."""
        return tuple(self._failed())

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failed

    def count(self, status: str) -> int:
        """Returns how many nodes have this status."""
        return sum(node.status == status for node in self.nodes)

    def raise_if_failed(self) -> None:
        """Turns failed checks into one error.

        Raises:
            VerificationError: Some check failed; the message names the first few.
        """
        if self.failed:
            raise VerificationError(self.summary())

    def summary(self) -> str:
        """Returns one line that says what was checked and what failed."""
        counts = ((self.count(status), status) for status in (CONVERTED, KEPT, FLOAT, MISSING))
        found = ", ".join(f"{count} {status}" for count, status in counts if count)
        failed = self.failed
        if not failed:
            return f"{found}; all checks passed"
        checks = "1 check failed" if len(failed) == 1 else f"{len(failed)} checks failed"
        reasons = [str(failure) for failure in failed[:_TOLD]]
        if len(failed) > _TOLD:
            reasons.append(f"and {len(failed) - _TOLD} more")
        return f"{f'{found}; ' if found else ''}{checks}: {'; '.join(reasons)}"

    def __str__(self) -> str:
        return self.summary()

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain data; None stands for infinity and for what is no number."""
        plain: dict[str, Any] = _plain({"passed": self.passed, **dataclasses.asdict(self)})
        return plain

    def to_json(self) -> str:
        """Returns `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def _failed(self) -> Iterator[Failure]:
        yield from self.failures
        for node in self.nodes:
            yield from node.failures


def _plain(data: Any) -> Any:
    """Returns nested data without the numbers that JSON has no word for."""
    if isinstance(data, dict):
        return {name: _plain(value) for name, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
