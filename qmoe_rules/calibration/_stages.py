"""Cutting a graph at its MoE layers.

Stage 0 is what can be computed before any layer; stage s + 1 is what can be computed when the
layers behind stage s are done. Between the stages the layers themselves run, in numpy. Whatever no
layer depends on, such as the head of a language model, belongs to no stage.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.calibration._experts import Layer
from qmoe_rules.errors import SourceError

__all__ = ["Stage", "layers_of", "stages_of"]

_Depths = dict[ir.Value, int | None]
"""How many layers lie one behind the other before a value; None for constants."""


@dataclass(frozen=True)
class Stage:
    """A part of the graph, and the layers that run behind it.

    Attributes:
        layers: The layers.
        inputs: What it reads: graph inputs, and what earlier stages and layers have left.
        outputs: What it computes for its layers and for later stages; it may be nothing.
        kept: What is still needed when its layers are done: names of values.
    """

    layers: tuple[Layer, ...]
    inputs: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    kept: frozenset[str]

    @property
    def needs(self) -> Iterator[ir.Value]:
        """What has to be there, for its own part of the graph or for its layers."""
        yield from self.inputs
        for layer in self.layers:
            yield from layer.sees

    def model(self, whole: ir.Model) -> ir.Model:
        """Returns the part of the graph as a model of its own."""
        graph = ir.convenience.extract(whole.graph, self.inputs, self.outputs)
        functions = [function.clone() for function in whole.functions.values()]
        return ir.Model(graph, ir_version=whole.ir_version, functions=functions)


def layers_of(model: ir.Model) -> tuple[list[Layer], dict[str, str]]:
    """Returns the layers that are calibrated, and why others are not, by name.

    Raises:
        SourceError: There are no layers, or several of one name.
    """
    layers: dict[str, Layer] = {}
    left: dict[str, str] = {}
    depths = _depths(model.graph, ())
    for node in ops.nodes(model, "MoE"):
        found: Layer | str = "it is inside a subgraph"
        if node.graph is model.graph:
            found = Layer.of(node)
        if isinstance(found, Layer) and any(depths[value] is None for value in found.sees):
            found = "what it sees does not depend on the model's inputs"
        if isinstance(found, Layer):
            output = node.outputs[0]  # which a rule may have left without a type
            output.type = ir.TensorType(ir.DataType.from_numpy(found.weights["fc2"].dtype))
        if isinstance(found, str):
            left[ops.label(node)] = found
        elif layers.setdefault(found.name, found) is not found:
            raise SourceError(f"two MoE nodes are named {found.name!r}")
    if not layers:
        reasons = "; ".join(f"{node}: {reason}" for node, reason in left.items())
        if not left and any(ops.nodes(model, "QMoE")):
            reasons = "its experts are quantized already; calibrate the float model"
        raise SourceError(f"there is no MoE node to calibrate{': ' if reasons else ''}{reasons}")
    return list(layers.values()), left


def stages_of(model: ir.Model, layers: Sequence[Layer]) -> list[Stage]:
    """Cuts a graph.

    Args:
        model: The model.
        layers: Its layers, none of which has constant inputs.

    Returns:
        The stages, in the order in which they run.
    """
    depths = _depths(model.graph, layers)
    ready = {value for value in model.graph.inputs if not value.is_initializer()}
    ready.update(layer.node.outputs[0] for layer in layers)
    by_stage: dict[int, list[Layer]] = {}
    for layer in layers:
        by_stage.setdefault(_deepest(layer.node.inputs, depths) or 0, []).append(layer)
    wanted: dict[int, dict[ir.Value, None]] = {stage: {} for stage in by_stage}
    stages: list[Stage] = []
    kept: frozenset[str] = frozenset()
    for index in sorted(by_stage, reverse=True):
        seen = [value for layer in by_stage[index] for value in layer.sees]
        _want(seen, wanted, depths, ready)
        outputs = tuple(wanted[index])
        inputs = tuple(_boundary(outputs, index, depths, ready))
        _want(inputs, wanted, depths, ready)
        stages.append(Stage(tuple(by_stage[index]), inputs, outputs, kept))
        kept |= {str(value.name) for value in (*seen, *inputs)} - {str(v.name) for v in outputs}
    return stages[::-1]


def _want(
    values: Iterable[ir.Value],
    wanted: dict[int, dict[ir.Value, None]],
    depths: _Depths,
    ready: set[ir.Value],
) -> None:
    """Asks the stages that compute some values to leave them behind."""
    for value in values:
        if value not in ready:
            depth = depths[value]
            if depth is None:
                raise AssertionError(f"{value.name} is constant and was asked for")
            wanted[depth][value] = None


def _boundary(
    outputs: Iterable[ir.Value],
    index: int,
    depths: _Depths,
    ready: set[ir.Value],
) -> Iterator[ir.Value]:
    """Yields what has to be there already for a stage to compute its outputs."""
    pending, visited = list(outputs), set(outputs)
    while pending:
        node = pending.pop().producer()
        for value in _dependencies(node) if node is not None else ():
            if value in visited:
                continue
            visited.add(value)
            depth = depths[value]
            if value in ready or (depth is not None and depth < index):
                yield value
            else:
                pending.append(value)


def _depths(graph: ir.Graph, layers: Sequence[Layer]) -> _Depths:
    """Returns the depths of all values of a graph."""
    cuts = {layer.node for layer in layers}
    depths: _Depths = dict.fromkeys(graph.initializers.values())
    depths |= {value: 0 for value in graph.inputs if not value.is_initializer()}
    for node in graph:
        depth = _deepest(_dependencies(node), depths)
        if depth is not None and node in cuts:
            depth += 1
        depths |= dict.fromkeys(node.outputs, depth)
    return depths


def _deepest(values: Iterable[ir.Value | None], depths: _Depths) -> int | None:
    found = [depths.get(value) for value in values if value is not None]
    return max((depth for depth in found if depth is not None), default=None)


def _dependencies(node: ir.Node) -> Iterator[ir.Value]:
    """Yields what a node reads, from inside its subgraphs too."""
    yield from (value for value in node.inputs if value is not None)
    for attribute in node.attributes.values():
        bodies: Iterable[ir.Graph] = ()
        if attribute.type == ir.AttributeType.GRAPH:
            bodies = [attribute.as_graph()]
        elif attribute.type == ir.AttributeType.GRAPHS:
            bodies = attribute.as_graphs()
        for body in bodies:
            for inner in ir.traversal.RecursiveGraphIterator(body):
                yield from (v for v in inner.inputs if v is not None and v.graph is node.graph)
