"""`build_model`: the onnx-ir model that a design describes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.formats import SCALE_DTYPES
from qmoe_rules.testing._designs import LayerDesign, ModelDesign
from qmoe_rules.testing._graph import Graph

__all__ = ["build_model"]

Array = npt.NDArray[Any]
Weights = dict[str, ir.Value]

_LOCAL = "local"  # the domain of the functions
_REPEATS = 2  # of a loop


def build_model(design: ModelDesign) -> ir.Model:
    """Returns the model that a design describes.

    Its inputs are x [tokens, H] or [batch, sequence, H], `router{i}` [tokens, E] for every layer
    that computes no router logits itself, and `flag{i}`, a bool, for every layer in an If. Its
    output is y, like x.

    Args:
        design: The design; equal ones make equal models.

    Example:
        >>> model = build_model(ModelDesign(layers=(LayerDesign(experts=4, k=2),)))
    """
    return _Builder(design).model()


@dataclass
class _Builder:
    """A model under construction."""

    design: ModelDesign
    graph: Graph = field(default_factory=Graph)
    functions: list[ir.Function] = field(default_factory=list)
    shared: Weights = field(default_factory=dict)  # those of the layer before, where it has any

    @property
    def dtype(self) -> np.dtype:
        return SCALE_DTYPES[self.design.dtype]

    @property
    def opsets(self) -> dict[str, int]:
        return {"": self.design.opset, ops.DOMAIN: 1}

    def model(self) -> ir.Model:
        design, graph = self.design, self.graph
        leading = ("tokens",) if design.rank == 2 else ("batch", "sequence")
        x = graph.input("x", self.dtype, (*leading, design.hidden))
        for index, layer in enumerate(design.layers):
            x = self._layer(index, layer, x)
        # A layer computes x last, and the output of a model has a name of its own.
        x.name = "y"
        opsets = self.opsets | ({_LOCAL: 1} if self.functions else {})
        model = graph.model(x, opsets=opsets, functions=self.functions)
        imports = [onnx.helper.make_opsetid("", design.opset)]
        model.ir_version = max(8, onnx.helper.find_min_ir_version_for(imports))
        if design.annotated:
            _annotate(model)
        return model

    def _layer(self, index: int, layer: LayerDesign, x: ir.Value) -> ir.Value:
        prefix, graph, before = f"l{index}_", self.graph, x
        if self.design.residual:
            scale = np.full(self.design.hidden, 0.5, self.dtype)
            x = graph.op("Mul", x, graph.weight(f"{prefix}norm", scale), out=f"{prefix}x", like=x)
        router = self._router(index, layer, x)
        if not layer.shared:
            self.shared = {} if layer.inside else self._weights(graph, index, layer)
        place = {
            "main": self._in_main,
            "function": self._in_function,
            "if": self._in_if,
            "loop": self._in_loop,
        }[layer.place]
        y = place(index, layer, x, router)
        if not self.design.residual:
            return y
        return graph.op("Add", before, y, out=f"{prefix}sum", like=x)

    def _router(self, index: int, layer: LayerDesign, x: ir.Value) -> ir.Value:
        graph, prefix = self.graph, f"l{index}_"
        if layer.router == "input":
            return graph.input(f"router{index}", self.dtype, ("tokens", layer.experts))
        shape = (self.design.hidden, layer.experts)
        weight = np.random.default_rng(index).standard_normal(shape).astype(self.dtype)
        value = graph.weight(f"{prefix}router", weight)
        logits = graph.op("MatMul", x, value, out=f"{prefix}logits")
        logits.type = ir.TensorType(ir.DataType.from_numpy(self.dtype))
        if self.design.rank == 2:
            return logits
        flat = graph.weight(f"{prefix}flat", np.array([-1, layer.experts]))
        rows = graph.op("Reshape", logits, flat, out=f"{prefix}rows")
        rows.type = logits.type
        return rows

    # Weights

    def _weights(self, graph: Graph, index: int, layer: LayerDesign, home: str = "") -> Weights:
        """Adds the weights and biases of a layer to a graph or a body."""
        home, found = home or layer.home, {}
        for salt, name in enumerate(layer.projections):
            shape = layer.shape(name, self.design.hidden)
            # The sums of products stay near 1, whatever K is.
            unit = 2.0 ** -np.round(np.log2(shape[2]) / 2)
            own = layer.weights.salted(salt)
            array = own.array(shape, self.dtype, unit)
            found[name] = _stored(graph, f"l{index}_{name}", array, layer.behind, home)
            if name in layer.biases:
                bias = own.array((shape[0], 1, shape[1]), self.dtype, 0.5)[:, 0]
                found[f"{name}_bias"] = graph.weight(f"l{index}_{name}_bias", bias, home)
        return found

    # Places

    def _moe(
        self,
        graph: Graph,
        index: int,
        layer: LayerDesign,
        x: ir.Value,
        router: ir.Value,
        weights: Weights,
    ) -> ir.Value:
        given: dict[str, Any] = {
            "k": layer.k if layer.k != 1 else None,
            "activation_type": layer.activation if layer.activation != "relu" else None,
            "swiglu_fusion": layer.fusion or None,
            "normalize_routing_weights": layer.normalize,
            "activation_alpha": layer.alpha,
            "activation_beta": layer.beta,
            "swiglu_limit": layer.limit,
        }
        attributes = {name: value for name, value in given.items() if value is not None}
        name = f"/layers.{index}/moe" if self.design.named else None
        return graph.moe(x, router, weights, out=f"l{index}_y", name=name, **attributes)

    def _in_main(self, index: int, layer: LayerDesign, x: ir.Value, router: ir.Value) -> ir.Value:
        return self._moe(self.graph, index, layer, x, router, self.shared)

    def _in_function(
        self, index: int, layer: LayerDesign, x: ir.Value, router: ir.Value
    ) -> ir.Value:
        body, arguments = Graph(), {"x": x, "router": router, **self.shared}
        inner = {name: ir.val(f"inner_{name}") for name in arguments}
        body.inputs.extend(inner.values())
        weights = {name: inner[name] for name in self.shared}
        if layer.inside:
            weights = self._weights(body, index, layer, "constant")
        y = self._moe(body, index, layer, inner["x"], inner["router"], weights)
        graph = body.done(y, opsets=self.opsets)
        name = f"Experts{index}"
        self.functions.append(ir.Function(_LOCAL, name, graph=graph, attributes=[]))
        out = f"l{index}_call"
        return self.graph.op(name, *arguments.values(), out=out, like=x, domain=_LOCAL)

    def _in_if(self, index: int, layer: LayerDesign, x: ir.Value, router: ir.Value) -> ir.Value:
        flag = self.graph.input(f"flag{index}", np.bool_, ())
        then, other = Graph(), Graph()
        y = self._in_body(then, index, layer, x, router)
        same = other.op("Identity", x, out=f"l{index}_same", like=x)
        return self.graph.op(
            "If",
            flag,
            out=f"l{index}_if",
            like=x,
            then_branch=then.done(y),
            else_branch=other.done(same),
        )

    def _in_loop(self, index: int, layer: LayerDesign, x: ir.Value, router: ir.Value) -> ir.Value:
        body, prefix = Graph(), f"l{index}_"
        body.input(f"{prefix}step", np.int64, ())
        proceed = body.input(f"{prefix}proceed", np.bool_, ())
        state = ir.val(f"{prefix}state", x.dtype, x.shape)
        body.inputs.append(state)
        y = self._in_body(body, index, layer, state, router)
        on = body.op("Identity", proceed, out=f"{prefix}on", like=proceed)
        count = self.graph.weight(f"{prefix}count", np.array(_REPEATS))
        true = self.graph.weight(f"{prefix}true", np.array(True))
        inner = body.done(on, y)
        return self.graph.op("Loop", count, true, x, out=f"{prefix}loop", like=x, body=inner)

    def _in_body(
        self, body: Graph, index: int, layer: LayerDesign, x: ir.Value, router: ir.Value
    ) -> ir.Value:
        weights = self._weights(body, index, layer) if layer.inside else self.shared
        return self._moe(body, index, layer, x, router, weights)


def _stored(graph: Graph, name: str, array: Array, behind: str, home: str) -> ir.Value:
    """Adds a weight [E, N, K] and the node that it lies behind, and returns what that computes."""
    if not behind:
        return graph.weight(name, array, home)
    sources, extra, attributes = _BEHIND[behind](array)
    values = [
        graph.weight(f"{name}_stored{place}", each, home) for place, each in enumerate(sources)
    ]
    values += [
        graph.weight(f"{name}_{behind}{place}", each, home) for place, each in enumerate(extra)
    ]
    if behind != "Split":
        return graph.op(behind, *values, out=name, like=array, **attributes)
    node = ir.node("Split", values, attributes, num_outputs=2)
    for output, ending in zip(node.outputs, ("", "_rest"), strict=True):
        output.name = f"{name}{ending}"
    graph.nodes.append(node)
    return node.outputs[0]


def _transposed(array: Array) -> _Stored:
    return [array.transpose(0, 2, 1)], [], {"perm": [0, 2, 1]}


def _reshaped(array: Array) -> _Stored:
    return [array.reshape(-1, array.shape[2])], [np.array(array.shape)], {}


def _squeezed(array: Array) -> _Stored:
    return [array[None]], [np.array([0])], {}


def _cast(array: Array) -> _Stored:
    other = np.float16 if array.dtype == np.float32 else np.float32
    return [array.astype(other)], [], {"to": ir.DataType.from_numpy(array.dtype).value}


def _concatenated(array: Array) -> _Stored:
    half = array.shape[1] // 2
    return [array[:, :half], array[:, half:]], [], {"axis": 1}


def _split(array: Array) -> _Stored:
    sizes = np.array([array.shape[1], 1])
    return [np.concatenate([array, array[:, :1]], axis=1)], [sizes], {"axis": 1}


def _sliced(array: Array) -> _Stored:
    experts = len(array)
    bounds = [np.array([1]), np.array([experts + 1])]
    return [np.concatenate([array[:1], array])], bounds, {}


_Stored = tuple[list[Array], list[Array], dict[str, Any]]
"""What is stored, the further inputs of the node, and its attributes."""

_BEHIND: dict[str, Callable[[Array], _Stored]] = {
    "Identity": lambda array: ([array], [], {}),
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Squeeze": _squeezed,
    "Cast": _cast,
    "Concat": _concatenated,
    "Split": _split,
    "Slice": _sliced,
}


def _annotate(model: ir.Model) -> None:
    """Adds doc strings and metadata wherever a model may have them."""
    model.producer_name, model.producer_version, model.domain = "exporter", "1.0", "example"
    model.model_version, model.doc_string = 3, "a model"
    model.metadata_props["origin"] = "model"
    for graph in ops.graphs(model):
        graph.doc_string = "a graph"
        graph.metadata_props["origin"] = str(graph.name)
        for count, node in enumerate(graph):
            node.doc_string = f"node {count}"
            node.metadata_props["position"] = str(count)
            for output in node.outputs:
                output.metadata_props["from"] = node.op_type
