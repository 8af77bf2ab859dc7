"""Small models with `com.microsoft::MoE` nodes, made to measure, and what they should compute.

`Experts` draws the weights of one node. All sizes differ by default, so that a swapped or misread
axis cannot go unnoticed. For models of any kind there is `qmoe_rules.testing`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort

from qmoe_rules import ops, reference
from qmoe_rules.formats import Spec
from qmoe_rules.kernels import Specs
from qmoe_rules.quantizers.floats import float_rtn
from qmoe_rules.quantizers.rtn import rtn_numpy
from qmoe_rules.testing._graph import OPSETS as OPSETS
from qmoe_rules.testing._graph import SLOTS as SLOTS
from qmoe_rules.testing._graph import Graph as Graph

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Experts:
    """The weights and the inputs of one MoE node, drawn from a seed.

    Attributes:
        experts: E.
        hidden: H.
        inter: I.
        activation: The `activation_type`.
        bias: Whether fc1 and fc2 have biases.
        dtype: Of weights and activations.
        seed: Of everything random.
    """

    experts: int = 3
    hidden: int = 128
    inter: int = 192
    activation: str = "swiglu"
    bias: bool = True
    dtype: npt.DTypeLike = np.float32
    seed: int = 0

    @property
    def gated(self) -> bool:
        """Whether fc1 holds gate and linear rows, interleaved."""
        return self.activation in ("swiglu", "geglu")

    @property
    def attributes(self) -> dict[str, Any]:
        """The node attributes that belong to the activation."""
        return {"activation_type": self.activation, "swiglu_fusion": int(self.gated)}

    def arrays(self) -> Arrays:
        """Returns fc1 and fc2, and their biases."""
        rng = np.random.default_rng(self.seed)
        rows = self.inter * (2 if self.gated else 1)
        arrays = {
            "fc1": rng.standard_normal((self.experts, rows, self.hidden)) / self.hidden**0.5,
            "fc2": rng.standard_normal((self.experts, self.hidden, self.inter)) / self.inter**0.5,
        }
        if self.bias:
            arrays["fc1_bias"] = rng.standard_normal((self.experts, rows))
            arrays["fc2_bias"] = rng.standard_normal((self.experts, self.hidden))
        return {name: array.astype(self.dtype) for name, array in arrays.items()}

    def feeds(self, shape: Sequence[int] = (6,)) -> Arrays:
        """Returns x [*shape, H] and router_probs [tokens, E]."""
        rng = np.random.default_rng(self.seed + 1000)
        feeds = {
            "x": rng.standard_normal((*shape, self.hidden)),
            "router_probs": 2 * rng.standard_normal((int(np.prod(shape)), self.experts)),
        }
        return {name: array.astype(self.dtype) for name, array in feeds.items()}


def single(
    experts: Experts | None = None,
    *,
    shape: Sequence[int] = (6,),
    homes: Mapping[str, str] | None = None,
    opsets: Mapping[str, int] = OPSETS,
    **attributes: Any,
) -> ir.Model:
    """Returns a model of one MoE node, `moe`: x, router_probs -> y."""
    experts = experts or Experts()
    graph = Graph()
    x, router_probs = inputs_of(graph, experts, shape)
    weights = graph.weights(experts.arrays(), homes=homes)
    y = graph.moe(x, router_probs, weights, **{**experts.attributes, **attributes})
    return graph.model(y, opsets=opsets)


def layers(count: int, experts: Experts | None = None, **attributes: Any) -> ir.Model:
    """Returns MoE nodes `moe0`, `moe1`, ... in a row, each with its own weights."""
    experts = experts or Experts()
    graph = Graph()
    x, router_probs = inputs_of(graph, experts)
    for index in range(count):
        own = Experts(**{**vars(experts), "seed": index})
        weights = graph.weights(own.arrays(), f"layer{index}_")
        x = graph.moe(
            x,
            router_probs,
            weights,
            out=f"y{index}",
            name=f"moe{index}",
            **{**own.attributes, **attributes},
        )
    return graph.model(x)


def branches(
    then_body: Callable[[Graph, ir.Value, ir.Value], ir.Value],
    else_body: Callable[[Graph, ir.Value, ir.Value], ir.Value],
    graph: Graph | None = None,
) -> ir.Model:
    """Returns `y = If(flag)`, whose bodies see x and router_probs and may use `graph`'s weights.

    Args:
        then_body: Fills a body and returns its output.
        else_body: The same for the other one.
        graph: The outer graph, with whatever the bodies share.
    """
    graph = graph or Graph()
    flag = graph.input("flag", np.bool_, ())
    x, router_probs = inputs_of(graph, Experts())
    bodies: dict[str, Any] = {}
    for name, fill in (("then_branch", then_body), ("else_branch", else_body)):
        body = Graph()
        bodies[name] = body.done(fill(body, x, router_probs))
    y = graph.op("If", flag, out="y", like=x, name="if", **bodies)
    return graph.model(y)


def attending(experts: Experts | None = None) -> ir.Model:
    """Returns a model of attention with a cache, and a MoE, `moe`.

    As onnxruntime-genai exports them: only the attention knows how wide its heads are.
    """
    graph, experts = Graph(), experts or Experts(bias=False)
    x = graph.input("inputs_embeds", np.float32, ("batch", "length", experts.hidden))
    router = graph.input("router_probs", np.float32, ("length", experts.experts))
    cache = [
        graph.input(f"past_key_values.0.{part}", np.float32, ("batch", 2, "past", "width"))
        for part in ("key", "value")
    ]
    length = graph.op("Shape", x, out="length", start=1, end=2)
    total = graph.op("Cast", length, out="total", to=ir.DataType.INT32)
    last = graph.op("Sub", total, graph.weight("one", np.ones(1, np.int32)), out="last")
    attention = ir.node(
        "GroupQueryAttention",
        [x, x, x, *cache, last, total],
        {"num_heads": 2, "kv_num_heads": 2},
        domain="com.microsoft",
        num_outputs=3,
    )
    for value, name in zip(attention.outputs, ("attended", "key", "value"), strict=True):
        value.name, value.type = name, ir.TensorType(ir.DataType.FLOAT)
    attention.outputs[0].shape = x.shape
    graph.nodes.append(attention)
    weights = graph.weights(experts.arrays())
    y = graph.moe(attention.outputs[0], router, weights, k=2, **experts.attributes)
    return graph.model(y, *attention.outputs[1:])


def inputs_of(
    graph: Graph, experts: Experts, shape: Sequence[int] = (6,), prefix: str = ""
) -> tuple[ir.Value, ir.Value]:
    """Adds the graph inputs x and router_probs, whose token counts are left open."""
    batch = [f"{prefix}batch{axis}" for axis in range(len(shape))]
    x = graph.input(f"{prefix}x", experts.dtype, (*batch, experts.hidden))
    router = graph.input(f"{prefix}router_probs", experts.dtype, ("tokens", experts.experts))
    return x, router


def run(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Checks a model, runs it in onnxruntime on the CPU and returns its outputs."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    onnx.checker.check_model(proto)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [np.asarray(output) for output in session.run(None, dict(feeds))]


def relative_error(actual: Array, expected: Array) -> float:
    """Returns |actual - expected| / |expected|, after checking that the shapes agree."""
    assert actual.shape == expected.shape
    wide = expected.astype(np.float64)
    return float(np.linalg.norm(actual.astype(np.float64) - wide) / np.linalg.norm(wide))


def quantized(weight: Array, spec: Spec) -> Array:
    """Returns what [E, N, K] weights mean after round-to-nearest, by the plain numpy quantizers."""
    quantize = rtn_numpy if spec.format.element is None else float_rtn
    return np.stack([quantize(expert, spec).dequantize() for expert in weight])


def expected(
    arrays: Mapping[str, Array],
    feeds: Mapping[str, Array],
    spec: Spec | Specs | None,
    **attributes: Any,
) -> Array:
    """Returns what a MoE computes in float64, on quantized weights where `spec` is given.

    One spec stands for both projections.
    """
    specs = {"fc1": spec, "fc2": spec} if isinstance(spec, Spec) else spec or {}
    real: dict[str, Any] = {
        name: quantized(array, specs[name]) if name in specs else array
        for name, array in arrays.items()
    }
    return reference.moe(feeds["x"], feeds["router_probs"], **real, **attributes)


def nodes_of(model: ir.Model, *op_types: str) -> list[ir.Node]:
    """Returns the MoE or QMoE nodes of a model, in subgraphs and functions too."""
    return list(ops.nodes(model, *op_types))


def the_node(model: ir.Model, op_type: str = "QMoE") -> ir.Node:
    """Returns the only node of this operator."""
    (node,) = nodes_of(model, op_type)
    return node
