"""Strategies for MoE nodes and for whole models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import SearchStrategy

from qmoe_rules import ops
from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.providers import TARGETS
from qmoe_rules.testing._building import build_model
from qmoe_rules.testing._designs import ACTIVATIONS, BEHIND, FORMS, LayerDesign, ModelDesign
from qmoe_rules.testing._layers import SUBGRAPHS, Choices, Kind, every_kind, layers, settled
from qmoe_rules.testing._weights import WeightDesign, weight_designs

__all__ = ["model_designs", "moe_models", "moe_nodes"]

_SIZES = (32, 64, 96, 128, 20)
_OPSETS = (21, 13, 17, 18, 20, 22)
_BFLOAT16_IN_SUBGRAPHS = 16  # the first opset whose If and Loop take it
_PLAIN = ModelDesign()


def model_designs(
    *,
    runs_on: str | None = None,
    min_layers: int = 1,
    max_layers: int | None = None,
    max_experts: int = 4,
    dtypes: Collection[str] | None = None,
    forms: Collection[str] | None = None,
    activations: Collection[str] | None = None,
    hidden_sizes: Collection[int] = _SIZES,
    inter_sizes: Collection[int] = _SIZES,
    opsets: Collection[int] = _OPSETS,
    weights: SearchStrategy[WeightDesign] | None = None,
    allow_biases: bool = True,
    allow_shared_weights: bool = True,
    allow_nodes_before_weights: bool = True,
    allow_constant_nodes: bool = True,
    allow_functions: bool = True,
    allow_subgraphs: bool = True,
    allow_computed_routers: bool = True,
    allow_residuals: bool = True,
    allow_annotations: bool = True,
    allow_unnamed_nodes: bool = True,
) -> SearchStrategy[ModelDesign]:
    """Returns a strategy for designs of models with MoE nodes; `build_model` makes the models.

    Designs are plain data, and print as the Python that makes them again: for an `@example`, or
    for a test of its own. They shrink to one layer with one expert and nothing special.

    Args:
        runs_on: A target whose providers all run every MoE right, `"cpu"`, `"cuda"`, `"portable"`
            or `"webgpu"`, by the tables of `qmoe_rules.providers`. Otherwise the models are valid,
            and may be for no provider in particular.
        min_layers: The fewest layers.
        max_layers: The most; 2, or `min_layers`, where it is left out.
        max_experts: The largest E.
        dtypes: Activation types: float32, float16, bfloat16; all that `runs_on` has where they are
            left out, and so on.
        forms: Where the linear rows of an expert are: `"plain"` (nowhere), `"interleaved"`
            (`swiglu_fusion=1`), `"halves"` (`swiglu_fusion=2`), `"fc3"`.
        activations: Values of `activation_type`: relu, silu, gelu, identity, swiglu, geglu.
        hidden_sizes: Values of H; the first is the simplest.
        inter_sizes: Values of I.
        opsets: Versions of the standard operators, from 13.
        weights: What weights are made of.
        allow_biases: Whether experts may have biases, all or some of them.
        allow_shared_weights: Whether a layer may have the weights of the one before.
        allow_nodes_before_weights: Whether weights may lie behind a Transpose, Reshape, Cast, ...
        allow_constant_nodes: Whether weights may be Constant nodes.
        allow_functions: Whether a MoE may be in a model-local function.
        allow_subgraphs: Whether a MoE may be in an If or a Loop.
        allow_computed_routers: Whether router logits may be computed, and not only come in.
        allow_residuals: Whether there may be other nodes around the layers.
        allow_annotations: Whether there may be doc strings and metadata.
        allow_unnamed_nodes: Whether MoE nodes may have no name.

    Example:
        >>> designs = model_designs(runs_on="cpu", dtypes=["float16"], allow_functions=False)
    """
    kinds = _kinds(
        runs_on,
        _known("dtypes", dtypes, tuple(SCALE_DTYPES)),
        _known("forms", forms, FORMS),
        _known("activations", activations, tuple(_flat(ACTIVATIONS.values()))),
        allow_biases,
    )
    max_layers = max(min_layers, 2) if max_layers is None else max_layers
    _check_counts(min_layers, max_layers, max_experts)
    for name, sizes, least in (
        ("hidden_sizes", hidden_sizes, 1),
        ("inter_sizes", inter_sizes, 1),
        ("opsets", opsets, 13),
    ):
        if not sizes or min(sizes) < least:
            raise InvalidArgument(f"{name}={sizes!r}; it holds numbers from {least}")
    # Everything that may be switched off, as what there is to choose from: the first is simplest.
    places = ["main"]
    places += [*SUBGRAPHS] * allow_subgraphs + ["function"] * allow_functions
    choices = Choices(
        kinds,
        max_experts,
        tuple(inter_sizes),
        weight_designs(allow_extremes=False) if weights is None else weights,
        ("initializer", "constant") if allow_constant_nodes else ("initializer",),
        BEHIND if allow_nodes_before_weights else ("",),
        tuple(places),
        ("input", "matmul") if allow_computed_routers else ("input",),
        allow_shared_weights,
    )
    flags = {
        "residual": allow_residuals,
        "annotated": allow_annotations,
        "named": allow_unnamed_nodes,
    }
    return _designs(
        {
            dtype: st.lists(layers(choices, dtype), min_size=min_layers, max_size=max_layers)
            for dtype in dict.fromkeys(kind.dtype for kind in kinds)
        },
        hidden=st.sampled_from(tuple(hidden_sizes)),
        rank=st.sampled_from([2, 3]),
        opset=st.sampled_from(tuple(opsets)),
        changed=st.sampled_from(_subsets([name for name, is_on in flags.items() if is_on])),
        constants=allow_constant_nodes,
    )


def moe_models(**options: Any) -> SearchStrategy[ir.Model]:
    """Returns a strategy for models with MoE nodes.

    A failing example is printed as `build_model(...)` of its design. For a `ModelProto`, map it:
    `moe_models().map(onnx_ir.to_proto)`.

    Args:
        **options: Those of `model_designs`.

    Example:
        >>> models = moe_models(runs_on="cpu", max_layers=3)
    """
    return model_designs(**options).map(build_model)


def moe_nodes(**options: Any) -> SearchStrategy[ir.Node]:
    """Returns a strategy for MoE nodes, each alone in the main graph of a model, which is `graph`.

    Args:
        **options: Those of `model_designs`, but for the numbers of layers.

    Example:
        >>> nodes = moe_nodes(activations=["swiglu"], allow_biases=False)
    """
    switches = {"allow_functions": False, "allow_subgraphs": False, **options}
    return moe_models(**switches, min_layers=1, max_layers=1).map(_only_node)


def _only_node(model: ir.Model) -> ir.Node:
    (node,) = ops.nodes(model, "MoE")
    return node


def _designs(
    drawn: Mapping[str, SearchStrategy[list[LayerDesign]]],
    constants: bool,
    **fields: SearchStrategy[Any],
) -> SearchStrategy[ModelDesign]:
    """Returns a strategy for models, given one for their layers by activation type."""

    def of_dtype(dtype: str) -> SearchStrategy[ModelDesign]:
        make = functools.partial(_design, dtype, constants)
        return st.builds(make, layers=drawn[dtype], **fields)

    strategies = {dtype: of_dtype(dtype) for dtype in drawn}
    return st.sampled_from(list(drawn)).flatmap(strategies.__getitem__)


def _design(
    dtype: str,
    constants: bool,
    layers: Sequence[LayerDesign],
    changed: Sequence[str],
    **fields: int,
) -> ModelDesign:
    """Returns a model; `changed` are the flags that are not as they are by default."""
    flags = {name: not getattr(_PLAIN, name) for name in changed}
    subgraphs = dtype != "bfloat16" or fields["opset"] >= _BFLOAT16_IN_SUBGRAPHS
    fitting = settled(layers, subgraphs=subgraphs, constants=constants)
    return ModelDesign(fitting, dtype=dtype, **fields, **flags)  # type: ignore[arg-type]


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    sizes = range(len(names) + 1)
    return [each for size in sizes for each in itertools.combinations(names, size)]


def _kinds(
    runs_on: str | None,
    dtypes: tuple[str, ...],
    forms: tuple[str, ...],
    activations: tuple[str, ...],
    allow_biases: bool,
) -> tuple[Kind, ...]:
    if runs_on is not None and runs_on not in TARGETS:
        raise InvalidArgument(f"runs_on={runs_on!r}; it may be {', '.join(map(repr, TARGETS))}")
    kinds = tuple(
        kind
        for kind in every_kind(runs_on)
        if kind.dtype in dtypes
        and kind.form in forms
        and kind.activation in activations
        and (allow_biases or not kind.biases)
    )
    if not kinds:
        where = "" if runs_on is None else f"runs_on={runs_on!r} runs no MoE with "
        raise InvalidArgument(
            f"{where}dtypes {list(dtypes)}, forms {list(forms)} and activations "
            f"{list(activations)}{'' if where else ' fit no MoE'}"
        )
    return kinds


def _known(name: str, given: Collection[str] | None, known: Sequence[str]) -> tuple[str, ...]:
    """Returns those of the known names that are given, all where none are."""
    if given is None:
        return tuple(known)
    if isinstance(given, str) or (unknown := [each for each in given if each not in known]):
        wrong = given if isinstance(given, str) else unknown[0]
        raise InvalidArgument(
            f"{name}: {wrong!r}; it is a collection of {', '.join(dict.fromkeys(known))}"
        )
    return tuple(given)


def _flat(groups: Collection[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group))


def _check_counts(min_layers: int, max_layers: int, max_experts: int) -> None:
    if not 1 <= min_layers <= max_layers:
        raise InvalidArgument(f"min_layers={min_layers}, max_layers={max_layers}; 1 <= min <= max")
    if max_experts < 1:
        raise InvalidArgument(f"max_experts={max_experts}; it is at least 1")
