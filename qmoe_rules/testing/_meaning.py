"""`assert_same_meaning`: two models compute the same, but for what quantization costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.facts import constant_weights
from qmoe_rules.feeds import complete, inputs_of, random_feeds
from qmoe_rules.formats import FORMATS, SCALE_DTYPES, Spec
from qmoe_rules.passes import prepare
from qmoe_rules.testing._evaluation import CPU, AnyModel, copied, evaluate, stored, write
from qmoe_rules.verification import VerificationReport, verify
from qmoe_rules.verification._comparison import Comparison
from qmoe_rules.verification._pairing import comparable
from qmoe_rules.verification._tolerances import tolerance_of

__all__ = ["assert_same_meaning"]

Arrays = Mapping[str, npt.NDArray[Any]]

_FLOAT = Spec(FORMATS["int4"])  # exact on every provider, as float weights are


def assert_same_meaning(
    before: AnyModel,
    after: AnyModel,
    *,
    feeds: Mapping[str, npt.ArrayLike] | None = None,
    seed: int = 0,
    tokens: int = 16,
) -> None:
    """Asserts that a rewritten model means what it meant.

    Where MoE nodes became QMoE, `verify` must find nothing: the weights of every expert are as
    close to the float ones as their format explains, each node computes what its stored weights
    mean (in ONNX Runtime, within the tolerance of its kernel path, or else in the float64
    reference), and everything else is the same. Otherwise both models are run, in ONNX Runtime
    where its CPU provider computes them right, or else with the float64 reference for the experts,
    and their outputs must agree to rounding.

    Args:
        before: The model as it was.
        after: The rewritten model; neither is changed.
        feeds: Inputs by name; random ones where they are left out.
        seed: Of random inputs.
        tokens: Length of random sequences.

    Raises:
        AssertionError: It does not; the message says which node or output, and where.
        ConfigError: There is no ONNX Runtime, or the inputs are not known from the model.

    Example:
        >>> model = build_model(ModelDesign())
        >>> assert_same_meaning(model, rewrite(model.clone(), moe_to_qmoe_rules(bits=8)))
    """
    if _quantized(after) > _quantized(before):
        report = _verified(before, after, feeds, seed, tokens)
        if not report.passed:
            raise AssertionError(f"the model does not mean what it meant: {report}")
        return
    different = list(_differences(before, after, feeds, seed, tokens))
    if different:
        raise AssertionError("\n".join((*different, *_where(before, after))))


def _quantized(model: AnyModel) -> int:
    return sum(1 for _ in ops.nodes(copied(model), "QMoE"))


def _verified(
    before: AnyModel,
    after: AnyModel,
    feeds: Mapping[str, npt.ArrayLike] | None,
    seed: int,
    tokens: int,
) -> VerificationReport:
    with tempfile.TemporaryDirectory() as folder:
        return verify(
            write(before, Path(folder) / "before.onnx"),
            write(after, Path(folder) / "after.onnx"),
            inputs=feeds,
            seed=seed,
            tokens=tokens,
        )


def _where(before: AnyModel, after: AnyModel) -> Iterator[str]:
    """Yields what is not the same bit for bit, node by node; it may be why the outputs differ."""
    first, second = comparable(copied(before)), comparable(copied(after))
    comparison = Comparison(first, second)
    for node in comparison.met:
        given = ops.inputs(node)
        for difference in comparison.take(list(given.values())[1:], given["input"]):
            yield f"{ops.label(node)}: {difference.text}"
    for difference in comparison.differences:
        yield difference.text


def _differences(
    before: AnyModel,
    after: AnyModel,
    feeds: Mapping[str, npt.ArrayLike] | None,
    seed: int,
    tokens: int,
) -> Iterator[str]:
    """Yields what the outputs of two models do not agree about, in words."""
    model = copied(before)
    given = random_feeds(model, tokens, seed)
    if feeds is not None:
        needed = inputs_of(model)
        given = complete(feeds, needed, list(needed))
    found = evaluate((before, after), given)
    first, second = found.outputs
    if list(first) != list(second):
        yield f"the outputs are {', '.join(second)}, and were {', '.join(first)}"
    nodes = max(_tolerance(prepare(copied(each))) for each in (before, after))
    for name in (name for name in first if name in second):
        dtype = first[name].dtype.name
        own = tolerance_of(CPU, _FLOAT, dtype).error if dtype in SCALE_DTYPES else 0.0
        if text := _difference(first[name], second[name], max(nodes, own)):
            yield f"output {name} {text} (both computed by {found.where})"


def _difference(before: npt.NDArray[Any], after: npt.NDArray[Any], allowed: float) -> str | None:
    if (before.dtype, before.shape) != (after.dtype, after.shape):
        was, now = (f"{each.dtype} {list(each.shape)}" for each in (before, after))
        return f"is {now}, and was {was}"
    wide, found = before.astype(np.float64), after.astype(np.float64)
    same = (wide == found) | (np.isnan(wide) & np.isnan(found))
    with np.errstate(invalid="ignore"):
        distance = np.where(same, 0.0, np.abs(found - wide))
    distance = np.where(np.isnan(distance), np.inf, distance)
    size = float(np.linalg.norm(np.where(np.isfinite(wide), wide, 0.0)))
    error = float(np.linalg.norm(distance)) / (size or 1.0)
    if error <= allowed:
        return None
    worst = np.unravel_index(int(distance.argmax()), distance.shape)
    place = [int(index) for index in worst]
    return (
        f"is {error:.3g} off what it was, relatively, and {allowed:g} is the most; most of all at "
        f"{place}: {found[worst]:g}, and was {wide[worst]:g}"
    )


def _tolerance(model: ir.Model) -> float:
    """Returns how far the outputs of a model may be off: what its nodes may be, added up."""
    return sum(_node_tolerance(node) for node in ops.nodes(model, "MoE", "QMoE"))


def _node_tolerance(node: ir.Node) -> float:
    """Returns how far a node may be off; the widest tolerance where its weights are not known."""
    kinds, dtypes = [(_FLOAT, False)], ["float32", "float16", "bfloat16"]
    if ops.is_op(node, "QMoE"):
        found = stored(node)
        if not isinstance(found, str):
            kinds = [(each.spec, each.is_rescaled) for each in found.values()]
            dtypes = [each.dtype.name for each in found.values() if each.dtype] or dtypes
    else:
        weights = constant_weights(ops.inputs(node))
        if not isinstance(weights, str):
            dtypes = [weights["fc1"].dtype.name]
    level = ops.attributes(node)["accuracy_level"] if ops.is_op(node, "QMoE") else None
    return max(
        tolerance_of(CPU, spec, dtype, level, rescaled=rescaled).error
        for spec, rescaled in kinds
        for dtype in dtypes
    )
