"""What a drawn model is: its layers and what is special about each, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from qmoe_rules.testing._printing import Brief
from qmoe_rules.testing._weights import WeightDesign

__all__ = ["ACTIVATIONS", "BEHIND", "FORMS", "LayerDesign", "ModelDesign"]

FORMS = ("plain", "interleaved", "halves", "fc3")
"""Where the linear rows are: nowhere, or in fc1 (`swiglu_fusion` 1 or 2), or in fc3."""

ACTIVATIONS = {
    "plain": ("relu", "silu", "gelu", "identity"),
    "interleaved": ("swiglu", "geglu"),
    "halves": ("swiglu", "geglu"),
    "fc3": ("silu", "swiglu", "gelu", "geglu"),
}
"""The values of `activation_type` by form."""

BEHIND = ("", "Identity", "Transpose", "Reshape", "Squeeze", "Cast", "Concat", "Split", "Slice")
"""Nodes that a weight may lie behind."""


_STEPS = WeightDesign()


@dataclass(frozen=True, repr=False)
class LayerDesign(Brief):
    """One layer of experts.

    Attributes:
        experts: E.
        inter: I.
        k: Experts per token.
        activation: The attribute `activation_type`.
        form: One of `FORMS`.
        biases: Which of fc1, fc2 and fc3 have biases.
        normalize: The attribute `normalize_routing_weights`; like the next ones, None leaves it
            out.
        alpha: `activation_alpha`.
        beta: `activation_beta`.
        limit: `swiglu_limit`.
        weights: What the weights and biases are made of.
        home: Where they live: `"initializer"` or `"constant"` (Constant nodes).
        behind: One of `BEHIND`, the node between the stored weights and the MoE.
        place: Where the MoE is: `"main"`, `"function"` (a model-local function), `"if"` or `"loop"`
            (which repeats it).
        inside: Whether the weights are in that function or body too; in a function they are
            Constant nodes.
        shared: Whether it has the weights of the layer before, and its sizes and activation.
        router: Where the router logits come from: `"input"` or `"matmul"`.
    """

    experts: int = 1
    inter: int = 32
    k: int = 1
    activation: str = "relu"
    form: str = "plain"
    biases: tuple[str, ...] = ()
    normalize: int | None = None
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None
    weights: WeightDesign = _STEPS
    home: str = "initializer"
    behind: str = ""
    place: str = "main"
    inside: bool = False
    shared: bool = False
    router: str = "input"

    @property
    def fusion(self) -> int:
        """The attribute `swiglu_fusion`."""
        return {"interleaved": 1, "halves": 2}.get(self.form, 0)

    @property
    def projections(self) -> tuple[str, ...]:
        """The projections that it has."""
        return ("fc1", "fc2", "fc3") if self.form == "fc3" else ("fc1", "fc2")

    def shape(self, projection: str, hidden: int) -> tuple[int, int, int]:
        """Returns (E, N, K) of a projection."""
        if projection == "fc2":
            return self.experts, hidden, self.inter
        return self.experts, self.inter * (2 if self.fusion else 1), hidden


_LAYER = LayerDesign()


@dataclass(frozen=True, repr=False)
class ModelDesign(Brief):
    """A model with layers of experts, one after the other.

    Attributes:
        layers: The layers.
        hidden: H.
        dtype: The activation type, `"float32"`, `"float16"` or `"bfloat16"`.
        rank: 2 for x [tokens, H], 3 for [batch, sequence, H].
        opset: Version of the standard operators.
        named: Whether the MoE nodes have names.
        residual: Whether every layer is scaled before and added to what went in.
        annotated: Whether the model, its nodes and its values have doc strings and metadata.
    """

    layers: tuple[LayerDesign, ...] = (_LAYER,)
    hidden: int = 32
    dtype: str = "float32"
    rank: int = 2
    opset: int = 21
    named: bool = True
    residual: bool = False
    annotated: bool = False
