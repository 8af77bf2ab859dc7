"""`assert_untouched`: everything outside the experts is what it was, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.overrides import check_pattern, matches
from qmoe_rules.passes import prepare
from qmoe_rules.testing._evaluation import AnyModel, copied
from qmoe_rules.verification._comparison import Comparison, ancestors
from qmoe_rules.verification._nodes import attribute_differences
from qmoe_rules.verification._pairing import comparable

__all__ = ["assert_untouched"]

_OF_MODEL = (
    "ir_version",
    "producer_name",
    "producer_version",
    "domain",
    "model_version",
    "doc_string",
    "metadata_props",
)
_OF_VALUE = ("name", "dtype", "shape", "doc_string", "metadata_props")
_SHOWN = 8  # differences in a message


def assert_untouched(before: AnyModel, after: AnyModel, *, except_: Sequence[str] = ()) -> None:
    """Asserts that a rewrite has changed nothing outside the experts.

    That is: nodes and their attributes, names, doc strings and metadata, constants byte for byte
    and initializers by name, the inputs and outputs of the graph, opset versions, and what the
    model says about itself. The experts are the weights of MoE and QMoE nodes, the form of their
    gates, and whatever leads from a stored weight to them; their biases, router logits, routing and
    activation are not. Names of intermediate values do not matter, and what nothing uses, such as
    an initializer that was left behind, is left out. Functions that hold a MoE are inlined in both
    models first.

    Args:
        before: The model as it was.
        after: The rewritten model; neither is changed.
        except_: Names or patterns (as in a recipe) of nodes and values that may differ.

    Raises:
        AssertionError: Something differs; the message says what and where.

    Example:
        >>> model = build_model(ModelDesign())
        >>> assert_untouched(model, rewrite(model.clone(), moe_to_qmoe_rules(bits=8)))
    """
    for pattern in except_:
        check_pattern(pattern)
    models = prepare(copied(before)), prepare(copied(after))
    found = [text for names, text in _differences(*models) if not _is_excepted(names, except_)]
    if found:
        more = [f"and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise AssertionError("\n".join(("not untouched:", *found[:_SHOWN], *more)))


def _is_excepted(names: Sequence[str | None], patterns: Sequence[str]) -> bool:
    return any(matches(pattern, name) for pattern in patterns for name in names if name)


def _differences(before: ir.Model, after: ir.Model) -> Iterator[tuple[tuple[str | None, ...], str]]:
    """Yields what differs: what it is called, and what it is in words."""
    yield from _fields("the model", (), before, after, _OF_MODEL)
    yield from _fields("the graph", (), before.graph, after.graph, ("doc_string", "metadata_props"))
    for kind in ("inputs", "outputs"):
        for a, b in zip(getattr(before.graph, kind), getattr(after.graph, kind), strict=False):
            yield from _fields(f"graph {kind[:-1]} {a.name}", (a.name,), a, b, _OF_VALUE)
    was, now = (set(model.graph.opset_imports) for model in (before, after))
    used = {node.domain for node in before.graph.all_nodes()}
    for domain in sorted((now - was - {ops.DOMAIN}) | ((was - now) & used)):
        yield (domain,), f"opset import {domain} is {'new' if domain in now else 'gone'}"
    comparison = Comparison(comparable(before), comparable(after))
    for x, y in comparison.met.items():
        for _, text in attribute_differences(x, y):
            yield (x.name, x.outputs[0].name), f"{ops.label(x)}: {text}"
    experts = ancestors(*_weights(before))
    for difference in comparison.differences:
        producer = difference.at.producer()
        if difference.at not in experts:
            names = (difference.at.name, ops.label(producer) if producer else None)
            yield names, difference.text
    named = ("name", "doc_string", "metadata_props")
    for x, y in comparison.nodes:
        if x not in comparison.met and experts.isdisjoint(x.outputs):
            yield from _fields(f"node {ops.label(x)}", (x.name,), x, y, named)
    for a, b in comparison.values:
        if a.is_initializer() and not a.is_graph_input() and a not in experts:
            yield from _fields(f"initializer {a.name}", (a.name,), a, b, named)


def _weights(model: ir.Model) -> list[ir.Value]:
    """Returns the weights of all MoE and QMoE nodes, with scales and zero points."""
    return [
        value
        for node in ops.nodes(model, "MoE", "QMoE")
        for name, value in ops.inputs(node).items()
        if name.startswith("fc") and not name.endswith("_bias") and value is not None
    ]


def _fields(
    what: str, names: tuple[str | None, ...], before: Any, after: Any, fields: Sequence[str]
) -> Iterator[tuple[tuple[str | None, ...], str]]:
    for field in fields:
        was, now = (_plain(getattr(each, field)) for each in (before, after))
        if was != now:
            yield names, f"{field} of {what} is {now!r}, and was {was!r}"


def _plain(field: Any) -> Any:
    """Returns a field in a form that can be compared; what is empty and what is absent is alike."""
    if isinstance(field, ir.Shape):
        return [size if isinstance(size, int) else size.value for size in field]
    return field or None
