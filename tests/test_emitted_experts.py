"""The MoE or QMoE that experts become computes what they did, in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import RewriteRule

from qmoe_rules import ops, reference
from qmoe_rules.rules import apply_rules
from qmoe_rules.rules._experts import Emitted, Experts, Parts, emit_moe
from qmoe_rules.rules._routing import Routing
from qmoe_rules.slices import TensorSlices
from tests.moe_models import Array, Graph, relative_error, run

EXPERTS, HIDDEN, INTER, CHOSEN = 4, 64, 32, 2
SIZES = {"gate": (INTER, HIDDEN), "up": (INTER, HIDDEN), "down": (HIDDEN, INTER)}
QUANTIZED = {
    "expert_weight_bits": 4,
    "block_size": 32,
    "quant_type": "int",
    "weights_prepacked": 0,
}

Arrays = Mapping[str, Array]


def arrays_of(name: str, bias: bool, seed: int) -> dict[str, Array]:
    rows, columns = SIZES[name]
    rng = np.random.default_rng([seed, len(name)])
    arrays: dict[str, Array] = {
        "weights": rng.standard_normal((EXPERTS, rows, columns), np.float32)
    }
    if bias:
        arrays["bias"] = rng.standard_normal((EXPERTS, rows), np.float32)
    return arrays


def quantized(arrays: Arrays, zero_points: bool) -> dict[str, Array]:
    """Returns codes, scales and zero points as QMoE stores them, drawn like the arrays' shapes."""
    experts, rows, columns = arrays["weights"].shape
    rng = np.random.default_rng(rows * columns)
    made: dict[str, Array] = {
        **arrays,
        "weights": rng.integers(0, 256, (experts, rows, columns // 2), np.uint8),
        "scales": rng.random((experts, rows, columns // 32), np.float32) / 16,
    }
    if zero_points:
        made["zero_points"] = rng.integers(0, 256, (experts, rows, -(-columns // 64)), np.uint8)
    return made


def real(arrays: Arrays) -> Array:
    """Returns the numbers that weights stand for."""
    if "scales" not in arrays:
        return arrays["weights"]
    scales = arrays["scales"]
    offset = np.full_like(scales, 8)
    if "zero_points" in arrays:
        offset = _nibbles(arrays["zero_points"])[..., : scales.shape[-1]]
    found: Array = (_nibbles(arrays["weights"]) - offset.repeat(32, -1)) * scales.repeat(32, -1)
    return found


def _nibbles(array: Array) -> Array:
    return np.stack([array & 15, array >> 4], -1).reshape(*array.shape[:-1], -1).astype(np.int64)


class Layer:
    """Experts with their arrays, in a graph in which one node stands for them."""

    def __init__(
        self,
        activation: str = "swiglu",
        bias: bool = False,
        bits: int = 0,
        zero_points: bool = False,
        direct: bool = False,
        normalize: bool = True,
        k: int = CHOSEN,
        shape: tuple[int, ...] = (5,),
        **fields: Any,
    ) -> None:
        names = ("gate", "up", "down") if activation == "swiglu" else ("gate", "down")
        floats = {name: arrays_of(name, bias, 0) for name in names}
        self.arrays = {
            name: quantized(arrays, zero_points) if bits else arrays
            for name, arrays in floats.items()
        }
        self.shape, self.graph = shape, Graph()
        axes = [f"axis{number}" for number in range(len(shape))]
        self.x = self.graph.input("x", np.float32, (*axes, HIDDEN))
        self.indices = self.graph.input("indices", np.int64, (*axes, k))
        self.weights = self.graph.input("weights", np.float32, (*axes, k))
        self.logits = self.graph.input("logits", np.float32, (*axes, EXPERTS))
        logits = self.logits if direct else None
        routing = Routing(self.indices, self.weights, k, EXPERTS, logits, normalize)
        self.experts = Experts(
            self.x,
            routing,
            self.parts("gate"),
            self.parts("up") if "up" in names else None,
            self.parts("down"),
            activation,
            home=self.graph.weight("home", np.zeros(1, np.float32)),
            key=("experts",),
            storage=QUANTIZED if bits else {},
            **{"alpha": 1.0, "beta": 0.0, "limit": None, **fields},
        )
        self.made: list[Emitted] = []

    def parts(self, name: str) -> Parts:
        return {
            part: TensorSlices(ir.tensor(array), name) for part, array in self.arrays[name].items()
        }

    def model(self, *layers: Experts) -> ir.Model:
        """Returns a model in which one node for each of some experts was replaced."""
        outputs = [
            self.graph.op("Layer", *self.graph.inputs, out=f"y{i}", like=self.x, domain="test")
            for i in range(len(layers))
        ]
        model = self.graph.model(*outputs)

        def pattern(op: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
            return op.Layer(a, b, c, d, _domain="test", _outputs=["layer"])

        def emit(op: Any, layer: ir.Value, **_: Any) -> ir.Value:
            number = int(str(layer.name)[1:])
            self.made.append(emit_moe(op, layers[number], f"layer{number}"))
            return self.made[-1].output

        assert apply_rules(model, [RewriteRule(pattern, emit)])
        return model

    def feeds(self) -> dict[str, Array]:
        rng = np.random.default_rng(1)
        routing = self.experts.routing
        chosen = rng.random((*self.shape, max(EXPERTS, routing.k))).argsort(-1)[..., : routing.k]
        return {
            "x": rng.standard_normal((*self.shape, HIDDEN), np.float32),
            "indices": chosen % EXPERTS,
            "weights": rng.random((*self.shape, routing.k), np.float32) * 3,
            "logits": rng.standard_normal((*self.shape, EXPERTS), np.float32),
        }

    def expected(self, feeds: Arrays) -> Array:
        """Returns what the experts compute in float64."""
        experts, x = self.experts, feeds["x"].reshape(-1, HIDDEN)
        first, down = self.arrays["gate"], self.arrays["down"]
        fc1, fc1_bias = real(first), first.get("bias")
        if experts.up is not None:
            up = self.arrays["up"]
            fc1 = _woven(fc1, real(up))
            fc1_bias = None if fc1_bias is None else _woven(fc1_bias, up["bias"])
        y = reference.moe(
            x,
            fc1=fc1,
            fc2=real(down),
            fc1_bias=fc1_bias,
            fc2_bias=down.get("bias"),
            activation_type=experts.activation,
            activation_alpha=experts.alpha,
            activation_beta=experts.beta,
            swiglu_fusion=int(experts.up is not None),
            swiglu_limit=experts.limit,
            **self.routed(feeds),
        )
        return y.reshape(feeds["x"].shape)

    def routed(self, feeds: Arrays) -> dict[str, Any]:
        routing = self.experts.routing
        logits = feeds["logits"].reshape(-1, EXPERTS)
        if routing.logits is not None:
            return {
                "router_probs": logits,
                "k": routing.k,
                "normalize_routing_weights": routing.normalize,
            }
        table = np.zeros_like(logits)
        indices, weights = (feeds[n].reshape(-1, routing.k) for n in ("indices", "weights"))
        np.add.at(table, (np.arange(len(table))[:, None], indices), weights)
        return {"router_probs": table, "router_weights": table, "k": min(routing.k, EXPERTS)}


def _woven(first: Array, second: Array) -> Array:
    """Returns the rows of both in turn."""
    return np.stack([first, second], 2).reshape(len(first), -1, *first.shape[2:])


GPTOSS: dict[str, Any] = {"bias": True, "alpha": 1.702, "beta": 1.0, "limit": 0.5}
FORMS: list[dict[str, Any]] = [
    {},
    {"bias": True, "shape": (2, 5)},
    {"direct": True},
    {"direct": True, "normalize": False, "shape": (2, 5)},
    {"activation": "relu", "bias": True},
    {"activation": "silu", "direct": True},
    {"k": 3 * EXPERTS},  # every expert is chosen three times
    GPTOSS,
    {**GPTOSS, "bits": 4, "zero_points": True},
    {"bits": 4},
    {"bits": 4, "activation": "relu", "direct": True},
    {"bits": 4, "direct": True, "normalize": False, "shape": (2, 5)},
]


@pytest.mark.parametrize("form", FORMS)
def test_the_node_computes_what_the_experts_did(form: dict[str, Any]) -> None:
    layer = Layer(**form)
    model, feeds = layer.model(layer.experts), layer.feeds()
    used = {str(each.name) for each in model.graph.inputs if each.uses()}
    model.graph.inputs[:] = [each for each in model.graph.inputs if each.name in used]
    found = run(model, {name: array for name, array in feeds.items() if name in used})[0]
    assert relative_error(found, layer.expected(feeds)) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_every_attribute_and_input_of_the_node(form: dict[str, Any]) -> None:
    layer = Layer(**form)
    layer.model(layer.experts)
    (made,) = layer.made
    gated, bits = layer.experts.up is not None, form.get("bits", 0)
    assert (made.node.name, made.node.op_type) == ("layer0", "QMoE" if bits else "MoE")
    attributes = {name: attribute.value for name, attribute in made.node.attributes.items()}
    limit = form.get("limit")
    assert attributes == {
        "activation_type": layer.experts.activation,
        "activation_alpha": pytest.approx(form.get("alpha", 1.0)),
        "activation_beta": form.get("beta", 0.0),
        "k": min(form.get("k", CHOSEN), EXPERTS),
        "normalize_routing_weights": int(form.get("normalize", True)),
        "swiglu_fusion": int(gated),
        "use_sparse_mixer": 0,
        **(QUANTIZED if bits else {}),
        **({} if limit is None else {"swiglu_limit": limit}),
    }
    given = {name: value for name, value in ops.inputs(made.node).items() if value is not None}
    parts = ["experts_weights"]
    parts += ["experts_bias"] * ("bias" in form) + ["scales"] * bool(bits)
    parts += ["zero_points"] * ("zero_points" in form)
    planned = {f"{fc}_{part}" for fc in ("fc1", "fc2") for part in parts}
    own = {"router_weights"} if bits and not form.get("normalize", True) else set()
    assert set(given) == {"input", "router_probs", *own, *planned}
    assert given["input"] is layer.x
    for slot in planned:
        assert given[slot].name == f"layer0.{slot}"
        assert given[slot] in made.planned
    assert len(made.planned) == len(planned)
    (output,) = made.node.outputs
    assert (output.type, output.shape) == (layer.x.type, layer.x.shape)
    assert (output is made.output) == form.get("direct", False)


def test_equal_experts_share_their_weights_and_others_do_not() -> None:
    layer = Layer(direct=True)
    other = replace(layer.experts, up=layer.experts.gate, key=("others",))
    layer.model(layer.experts, other, layer.experts)
    first, second, third = (made.planned for made in layer.made)
    assert first == third
    assert not set(first) & set(second)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bits", [0, 4])
def test_the_type_of_the_activations(dtype: Any, bits: int) -> None:
    layer = Layer(bits=bits)
    down = {**layer.arrays["down"]}
    part = "scales" if bits else "weights"
    down[part] = down[part].astype(dtype)
    parts = {name: TensorSlices(ir.tensor(array), name) for name, array in down.items()}
    assert replace(layer.experts, down=parts).dtype == ir.DataType.from_numpy(np.dtype(dtype))
