"""Strategies for MoE nodes and for whole models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from hypothesis.strategies import DrawFn, SearchStrategy

from qmoe_rules import ops
from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.kernels import Facts
from qmoe_rules.providers import TARGETS
from qmoe_rules.testing._building import build_model
from qmoe_rules.testing._designs import ACTIVATIONS, BEHIND, FORMS, LayerDesign, ModelDesign
from qmoe_rules.testing._weights import WeightDesign, weight_designs

__all__ = ["model_designs", "moe_models", "moe_nodes"]

_SIZES = (32, 64, 96, 128, 20)
_OPSETS = (21, 13, 17, 18, 20, 22)
# Alpha, beta and limit of swiglu, as models have them.
_SCALED = ((None, None, None), (None, None, 0.5), (1.702, 1.0, 7.0), (1.702, None, None))
_SUBGRAPHS = ("if", "loop")
_BFLOAT16_IN_SUBGRAPHS = 16  # the first opset whose If and Loop take it


_PLAIN = ModelDesign()


@dataclass(frozen=True)
class _Kind:
    """A combination of what decides whether a provider runs a MoE."""

    dtype: str
    form: str
    activation: str
    biased: bool


def model_designs(
    *,
    runs_on: str | None = None,
    min_layers: int = 1,
    max_layers: int = 2,
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
        max_layers: The most.
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
    places += [*_SUBGRAPHS] * allow_subgraphs + ["function"] * allow_functions
    layers = _Layers(
        kinds,
        max_experts,
        tuple(inter_sizes),
        weight_designs(allow_extremes=False) if weights is None else weights,
        ("initializer", "constant") if allow_constant_nodes else ("initializer",),
        BEHIND if allow_nodes_before_weights else ("",),
        tuple(places),
        ("input", "matmul") if allow_computed_routers else ("input",),
        allow_shared_weights,
        allow_constant_nodes,
    )
    return _designs(
        layers,
        (min_layers, max_layers),
        {
            "hidden": tuple(hidden_sizes),
            "rank": (2, 3),
            "opset": tuple(opsets),
        },
        {
            "residual": allow_residuals,
            "annotated": allow_annotations,
            "named": allow_unnamed_nodes,
        },
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


@dataclass(frozen=True)
class _Layers:
    """What there is to choose from for a layer."""

    kinds: tuple[_Kind, ...]
    max_experts: int
    inter: Sequence[int]
    weights: SearchStrategy[WeightDesign]
    homes: Sequence[str]
    behind: Sequence[str]
    places: Sequence[str]
    routers: Sequence[str]
    may_share: bool
    may_be_constant: bool

    def draw(self, draw: DrawFn, dtype: str, before: LayerDesign | None) -> LayerDesign:
        """Draws a layer."""
        place = draw(st.sampled_from(self.places))
        router = draw(st.sampled_from(self.routers))
        normalize = draw(st.sampled_from([None, 0, 1]))
        shares = before is not None and not before.inside and self.may_share and draw(st.booleans())
        if shares and before is not None:
            own = {name: getattr(before, name) for name in _SHARED}
            inside = False
        else:
            own = self._experts(draw, dtype)
            inside = place in self._insides and draw(st.booleans())
        scaled: Sequence[Any] = _SCALED if own["activation"] == "swiglu" else _SCALED[:1]
        alpha, beta, limit = draw(st.sampled_from(scaled))
        return LayerDesign(
            **own,
            k=draw(st.integers(1, own["experts"])),
            normalize=normalize,
            alpha=alpha,
            beta=beta,
            limit=limit,
            place=place,
            inside=inside,
            shared=shares,
            router=router,
        )

    @property
    def _insides(self) -> tuple[str, ...]:
        """The places that may hold weights; a function holds them as Constant nodes."""
        return (*_SUBGRAPHS, *(["function"] if self.may_be_constant else []))

    def _experts(self, draw: DrawFn, dtype: str) -> dict[str, Any]:
        kind = draw(st.sampled_from([kind for kind in self.kinds if kind.dtype == dtype]))
        biases: tuple[str, ...] = ()
        if kind.biased:
            names = ("fc1", "fc2", "fc3") if kind.form == "fc3" else ("fc1", "fc2")
            chosen = draw(st.sets(st.sampled_from(names), min_size=1))
            biases = tuple(sorted(chosen))
        return {
            "experts": draw(st.integers(1, self.max_experts)),
            "inter": draw(st.sampled_from(self.inter)),
            "activation": kind.activation,
            "form": kind.form,
            "biases": biases,
            "weights": draw(self.weights),
            "home": draw(st.sampled_from(self.homes)),
            "behind": draw(st.sampled_from(self.behind)),
        }


# What a layer has in common with the one whose weights it shares.
_SHARED = ("experts", "inter", "activation", "form", "biases", "weights", "home", "behind")


@st.composite
def _designs(
    draw: DrawFn,
    layers: _Layers,
    counts: tuple[int, int],
    choices: dict[str, Sequence[Any]],
    flags: dict[str, bool],
) -> ModelDesign:
    dtype = draw(st.sampled_from(list(dict.fromkeys(kind.dtype for kind in layers.kinds))))
    fields = {name: draw(st.sampled_from(values)) for name, values in choices.items()}
    # All flags in one draw, because every draw takes time: those that differ from the default.
    changed = draw(st.sampled_from(_subsets([name for name, is_on in flags.items() if is_on])))
    fields |= {name: not getattr(_PLAIN, name) for name in changed}
    if dtype == "bfloat16" and fields["opset"] < _BFLOAT16_IN_SUBGRAPHS:
        flat = [place for place in layers.places if place not in _SUBGRAPHS]
        layers = replace(layers, places=flat)
    drawn: list[LayerDesign] = []
    for _ in range(draw(st.integers(*counts))):
        drawn.append(layers.draw(draw, dtype, drawn[-1] if drawn else None))
    return ModelDesign(tuple(drawn), dtype=dtype, **fields)


def _subsets(names: Sequence[str]) -> list[tuple[str, ...]]:
    sizes = range(len(names) + 1)
    return [each for size in sizes for each in itertools.combinations(names, size)]


def _kinds(
    runs_on: str | None,
    dtypes: tuple[str, ...],
    forms: tuple[str, ...],
    activations: tuple[str, ...],
    allow_biases: bool,
) -> tuple[_Kind, ...]:
    if runs_on is not None and runs_on not in TARGETS:
        raise InvalidArgument(f"runs_on={runs_on!r}; it may be {', '.join(map(repr, TARGETS))}")
    kinds = tuple(
        kind
        for kind in _every_kind(runs_on)
        if kind.dtype in dtypes
        and kind.form in forms
        and kind.activation in activations
        and (allow_biases or not kind.biased)
    )
    if not kinds:
        where = "" if runs_on is None else f"runs_on={runs_on!r} runs no MoE with "
        raise InvalidArgument(
            f"{where}dtypes {list(dtypes)}, forms {list(forms)} and activations "
            f"{list(activations)}{'' if where else ' fit no MoE'}"
        )
    return kinds


@functools.cache
def _every_kind(runs_on: str | None) -> tuple[_Kind, ...]:
    """Returns all kinds of MoE, or those that every provider of a target runs right."""
    kinds = (
        _Kind(dtype, form, activation, biased)
        for dtype in SCALE_DTYPES
        for biased in (False, True)
        for form in FORMS
        for activation in ACTIVATIONS[form]
    )
    return tuple(kind for kind in kinds if runs_on is None or _is_right(kind, runs_on))


def _is_right(kind: _Kind, target: str) -> bool:
    facts = Facts(
        kind.dtype,
        kind.activation,
        {"interleaved": 1, "halves": 2}.get(kind.form, 0),
        hidden=64,
        inter=64,
        fc3=kind.form == "fc3",
        others=frozenset({"fc3_biases"} if kind.form == "fc3" and kind.biased else ()),
    )
    return TARGETS[target].judge(facts, None) is None


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
