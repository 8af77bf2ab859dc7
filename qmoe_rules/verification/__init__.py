"""`verify`: whether a converted model is what the float model was, but for the quantization.

Every converted node is checked by itself, so that an error has a place: its weights against the
float ones, its attributes, routing and biases, and what an execution provider computes with it
against the float64 reference. Everything outside the experts must be the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy.typing as npt

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError, SourceError
from qmoe_rules.feeds import Feed, random_feeds
from qmoe_rules.mappings import told_when_lost
from qmoe_rules.stored import STORED_LAYOUTS
from qmoe_rules.verification._comparison import Comparison
from qmoe_rules.verification._conversion import Captured, Settings, obstacle
from qmoe_rules.verification._nodes import check_node
from qmoe_rules.verification._pairing import Pair, Source, pairs
from qmoe_rules.verification._report import (
    Failure,
    NodeResult,
    OutputResult,
    ProjectionResult,
    VerificationReport,
)
from qmoe_rules.verification._runtime import check_provider
from qmoe_rules.verification._whole import WholeRun, given_feeds, run_both

__all__ = [
    "Failure",
    "NodeResult",
    "OutputResult",
    "ProjectionResult",
    "VerificationReport",
    "verify",
]


@told_when_lost()
def verify(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    *,
    inputs: Mapping[str, npt.ArrayLike] | None = None,
    seed: int = 0,
    tokens: int = 64,
    provider: str = "CPUExecutionProvider",
    source_layout: str | None = None,
    whole_model: bool = True,
) -> VerificationReport:
    """Checks a converted model against the float model, node by node and as a whole.

    `docs/verification.md` lists the checks and the tolerances.

    Args:
        before: The float model: an .onnx file, or a folder that holds one.
        after: The converted model.
        inputs: Inputs of the whole model by name; a mask, positions and an empty cache follow from
            tokens. The nodes are then fed with what reaches them. Otherwise everything is fed
            with random values.
        seed: Of the random values.
        tokens: Rows that each node is fed with, and length of random sequences.
        provider: ONNX Runtime's name of the execution provider to run on. A node that it does not
            compute is checked with the float64 reference alone, and a note says so.
        source_layout: The layout of QMoE nodes that do not state theirs, `"raw"` or
            `"cutlass_sm80"`; what the provider takes them for where it is left out.
        whole_model: Whether to compare the outputs of the whole models too, for which each is in
            memory in turn.

    Returns:
        What was found. `raise_if_failed` turns it into an error.

    Raises:
        ConfigError: An argument is wrong, the float model does not run on `inputs`, or there is no
            ONNX Runtime.
        SourceError: A model cannot be used.
        TypeError: A model is no path, or `inputs` no dictionary.

    Example:
        >>> # verify("model.onnx", "model-int4").raise_if_failed()
    """
    if tokens < 1:
        raise ConfigError(f"tokens={tokens}; it is at least 1")
    if seed < 0:
        raise ConfigError(f"seed={seed}; it is at least 0")
    if source_layout not in (None, *STORED_LAYOUTS):
        choices = " or ".join(map(repr, STORED_LAYOUTS))
        raise ConfigError(f"source_layout={source_layout!r}; it may be {choices}")
    check_provider(provider)
    first, second = Source.of(before), Source.of(after)
    feeds = None if inputs is None else given_feeds(first.model, inputs)
    comparison = Comparison(first.model, second.model)
    found = pairs(first.model, second.model, comparison.met)
    for pair in found:  # a difference on the way must not hide what lies behind it
        if pair.before is not None and pair.after is not None:
            comparison.walk(pair.before.outputs[0], pair.after.outputs[0])
    settings = Settings(second.path.parent, provider, tokens, seed, source_layout)
    given = feeds is not None
    names = [_names(pair, first, second) if given else None for pair in found]
    run = WholeRun("not asked for")
    if feeds is not None or whole_model:
        made = _random(first, tokens, seed) if feeds is None else feeds
        reasons = (obstacle(pair, provider) for pair in found)
        reason = next((each for each in reasons if each), None)
        if isinstance(made, str):
            run = WholeRun(f"not run: {made}")
        else:
            run = run_both(first, second, made, _extra(names), provider, reason)
        if given and run.refused:
            raise ConfigError(
                f"the float model does not run on the given inputs: {run.refused}; without inputs "
                "its nodes are fed with random values"
            )
    captured = [_captured(run, each) for each in names]
    nodes = tuple(
        check_node(pair, comparison, each, settings)
        for pair, each in zip(found, captured, strict=True)
    )
    texts = dict.fromkeys(each.text for each in comparison.differences)
    failures = [Failure("outside", text) for text in texts]
    if not any(pair.after is not None and ops.is_op(pair.after, "QMoE") for pair in found):
        failures.insert(0, Failure("pairing", "the converted model has no QMoE"))
    told = run.told or f"ran on {'the given' if given else 'random'} inputs"
    if given and all(each is None for each in captured):
        told = f"{told}; the nodes were fed with random values, not with the given inputs"
    return VerificationReport(provider, nodes, (*failures, *run.failures), run.outputs, told)


def _random(source: Source, tokens: int, seed: int) -> Feed | str:
    """Returns random inputs for a model, or why they cannot be made."""
    try:
        return random_feeds(source.model, tokens, seed)
    except (ConfigError, SourceError) as error:
        return f"{error}; give inputs"


Names = tuple[int, tuple[str, str]]
"""Which model has the values that reach a node, 0 or 1, and what it calls them."""


def _names(pair: Pair, before: Source, after: Source) -> Names | None:
    """Returns where to find what reaches a node, None where no file has it.

    Experts that were fused have no router logits in the float model; then it is the other model's.
    """
    for side, (node, source) in enumerate(((pair.before, before), (pair.after, after))):
        given = {} if node is None else ops.inputs(node)
        values = [given.get(name) for name in ("input", "router_probs")]
        names = [source.names.get(value) for value in values if value is not None]
        if len(names) == 2 and names[0] and names[1]:
            return side, (names[0], names[1])
    return None


def _extra(names: Sequence[Names | None]) -> tuple[list[str], list[str]]:
    """Returns the names of each model."""
    known = [each for each in names if each is not None]
    first, second = ([name for side, both in known for name in both if side == i] for i in (0, 1))
    return first, second


def _captured(run: WholeRun, names: Names | None) -> Captured | None:
    if names is None:
        return None
    x, router = (run.values[names[0]].get(name) for name in names[1])
    return None if x is None or router is None else (x, router)
