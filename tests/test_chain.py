"""A sum of weighted experts is read from whatever an exporter wrote, and nothing else is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules.rules._chain import Map, Mask, Term, chain_ending_in, mask_of, name_of, term_of
from qmoe_rules.rules._mlp import ALL, MLP
from tests.expert_graphs import Builder, Layer
from tests.moe_models import Arrays, run

T, H, K = 5, 4, 2


class Share(Builder):
    """Writes an expert's share of a sum, `y * sum(weights * (indices == 3))`."""

    def __init__(self, **fields: Any) -> None:
        super().__init__(Layer(**fields))
        self.y = self.graph.input("y", np.float32, ("T", H))
        self.indices = self.graph.input("indices", np.int64, ("T", K))
        self.weights = self.graph.input("weights", np.float32, ("T", K))

    def feeds(self) -> Arrays:
        rng = np.random.default_rng(0)
        return {
            "y": rng.standard_normal((T, H)).astype(np.float32),
            "indices": rng.permuted(np.tile(np.arange(2, 2 + K), (T, 1)), axis=1),
            "weights": rng.random((T, K)).astype(np.float32),
        }

    def shaped(self, value: ir.Value, *shape: int | str) -> ir.Value:
        value.shape = ir.Shape(shape)
        return value

    def equal(self, number: Any = 3, dtype: Any = np.int64) -> ir.Value:
        return self.op("Equal", self.indices, self.constant(number, dtype))

    def mask(self, equal: ir.Value | None = None) -> ir.Value:
        return self.op("Cast", equal or self.equal(), to=ir.DataType.FLOAT)

    def masked(self, mask: ir.Value | None = None) -> ir.Value:
        product = self.op("Mul", self.weights, mask or self.mask())
        return self.shaped(product, "T", K)

    def total(
        self,
        masked: ir.Value | None = None,
        axes: Any = (-1,),
        kind: str = "ReduceSum",
        **more: int,
    ) -> ir.Value:
        return self.op(kind, masked or self.masked(), self.constant(axes), **more)

    def column(self, axis: int = -1, keepdims: int = 0) -> ir.Value:
        total = self.op("Unsqueeze", self.total(keepdims=keepdims), self.constant([axis]))
        return self.shaped(total, "T", 1)

    def share(self, total: ir.Value | None = None) -> ir.Value:
        return self.op("Mul", self.y, total or self.total())


def with_attributes(b: Share) -> ir.Value:
    """As before opset 13."""
    total = b.op("ReduceSum", b.masked(), axes=[-1], keepdims=0)
    return b.share(b.op("Unsqueeze", total, axes=[-1]))


Writing = Callable[[Share], ir.Value | None]

SHARES: dict[str, tuple[Writing, int]] = {
    "kept": (lambda b: b.share(), 21),
    "kept expressly": (lambda b: b.share(b.total(keepdims=1)), 21),
    "along axis 1": (lambda b: b.share(b.total(axes=(1,))), 21),
    "a column": (lambda b: b.share(b.column()), 21),
    "a column along axis 1": (lambda b: b.share(b.column(axis=1)), 21),
    "attributes": (with_attributes, 12),
    "like the weights": (
        lambda b: b.share(b.total(b.masked(b.op("CastLike", b.equal(), b.weights)))),
        21,
    ),
    "a vector": (lambda b: b.share(b.total(b.masked(b.mask(b.equal([3]))))), 21),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", SHARES)
def test_a_share_is_what_it_says(name: str, swapped: bool) -> None:
    write, opset = SHARES[name]
    builder = Share(swapped=swapped)
    value = write(builder)
    assert value is not None
    term = term_of(value)
    assert term is not None
    assert (term.expert, term.value) == (3, builder.y)
    assert (term.indices, term.weights) == (builder.indices, builder.weights)
    assert set(term.nodes) == {n for n in builder.graph.nodes if n.op_type != "Constant"}
    assert term.mask.op_type in ("Cast", "CastLike")
    out = builder.op("Identity", value)
    out.type, out.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["T", H])
    feeds = builder.feeds()
    chosen = np.where(feeds["indices"] == 3, feeds["weights"], 0).sum(-1, keepdims=True)
    found = run(builder.graph.model(out, opsets={"": opset}), feeds)[0]
    assert np.allclose(found, feeds["y"] * chosen)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
    "value",
    [
        lambda b: b.op("Unsqueeze", b.y, b.constant([0])),
        lambda b: b.op("ReduceSum", b.y, b.constant([0]), keepdims=1),
        lambda b: b.op("ReduceSum", b.y, b.constant([0]), keepdims=0),
        lambda b: b.op("ReduceSum", b.y, b.constant([-1]), keepdims=1),
    ],
)
def test_what_is_weighted_may_be_computed_like_the_weight(
    value: Callable[[Share], ir.Value], swapped: bool
) -> None:
    builder = Share(swapped=swapped)
    builder.y = value(builder)
    term = term_of(builder.share())
    assert term is not None
    assert term.value is builder.y


def of_mask(equal: Callable[[Share], ir.Value]) -> Writing:
    return lambda b: b.share(b.total(b.masked(b.mask(equal(b)))))


NO_SHARES: dict[str, Writing] = {
    "nothing": lambda b: None,
    "an input": lambda b: b.y,
    "two axes too many": lambda b: b.share(b.column(keepdims=1)),
    "a row": lambda b: b.share(b.column(axis=0)),
    "a row of sums": lambda b: b.share(b.total(keepdims=0)),
    "sums of the tokens": lambda b: b.share(b.total(axes=(0,))),
    "sums of all": lambda b: b.share(b.total(axes=(0, 1))),
    "the largest": lambda b: b.share(b.total(kind="ReduceMax")),
    "no sum": lambda b: b.share(b.masked()),
    "shifted": lambda b: b.op("Add", b.y, b.total()),
    "divided": lambda b: b.op("Div", b.y, b.total()),
    "another Mul": lambda b: b.op("Mul", b.y, b.total(), domain="local"),
    "shifted weights": lambda b: b.share(b.total(b.op("Add", b.weights, b.mask()))),
    "weights": lambda b: b.share(b.total(b.weights)),
    "masked twice": lambda b: b.share(b.total(b.masked(b.op("Not", b.mask())))),
    "above": of_mask(lambda b: b.op("Greater", b.indices, b.constant(3))),
    "all": of_mask(lambda b: b.op("Equal", b.indices, b.indices)),
    "several": of_mask(lambda b: b.equal([3, 2])),
    "more axes": of_mask(lambda b: b.equal([[3]])),
    "a half": of_mask(lambda b: b.equal(3.5, np.float32)),
    "not a number": of_mask(lambda b: b.equal(np.nan, np.float32)),
    "of nothing": of_mask(lambda b: b.op("Equal", None, b.constant(3))),
    "no value": lambda b: b.op("Mul", None, b.total()),
    "no weights": lambda b: b.share(b.total(b.op("Mul", None, b.mask()))),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("name", NO_SHARES)
def test_what_only_looks_like_a_share_is_none(name: str, swapped: bool) -> None:
    assert term_of(NO_SHARES[name](Share(swapped=swapped))) is None


@pytest.mark.parametrize(("number", "dtype"), [(3, np.int64), (3.0, np.float32), (-1, np.int64)])
def test_a_mask_is_of_one_expert(number: float, dtype: Any) -> None:
    builder = Share()
    equal = builder.equal(number, dtype)
    cast = builder.mask(equal)
    nodes = cast.producer(), equal.producer()
    assert mask_of(cast) == Mask(int(number), builder.indices, *nodes)  # type: ignore[arg-type]
    assert mask_of(equal) is None
    assert mask_of(None) is None


@pytest.mark.parametrize("kind", ["Cast", "CastLike"])
@pytest.mark.parametrize("known", [ir.DataType.FLOAT, ir.DataType.FLOAT16, None])
def test_a_mask_of_another_type_than_the_weights(kind: str, known: ir.DataType | None) -> None:
    builder = Share()
    builder.weights.type = ir.TensorType(known) if known else None
    # Which has the type of the weights, whatever it is.
    like = builder.op("CastLike", builder.equal(), builder.weights)
    mask = builder.mask() if kind == "Cast" else like
    term = term_of(builder.share(builder.total(builder.masked(mask))))
    assert term is not None
    wrong = kind == "Cast" and known == ir.DataType.FLOAT16
    reason = "expert 3 has FLOAT16 weights and a FLOAT mask" if wrong else None
    assert term.refuse_mask() == reason


# Sums


class Sums:
    """Values that are called by names; a0 is the share of expert 0 in layer a."""

    def __init__(self) -> None:
        self.values: dict[str, ir.Value] = {}
        self.terms: dict[ir.Value, Term] = {}
        a, b, more, others = (ir.val(name) for name in ("ia", "ib", "wa", "wb"))
        # Layer c has the experts of a with other weights, d other experts with the same weights.
        routing = {"a": (a, more), "b": (b, others), "c": (a, others), "d": (b, more)}
        node = ir.node("Cast", [a])
        for layer, (indices, weights) in routing.items():
            for expert in range(3):
                value = self.values[f"{layer}{expert}"] = ir.val(f"{layer}{expert}")
                self.terms[value] = Term(expert, value, indices, weights, (), node)
        for name in "xy":
            self.values[name] = ir.val(name)

    def read(self, value: ir.Value | None) -> Term | None:
        return None if value is None else self.terms.get(value)

    def write(self, text: str) -> None:
        """Appends nodes, such as "s = a0 + a1; t = Relu s"."""
        for line in text.split("; "):
            name, _, right = line.partition(" = ")
            match right.split():
                case [first, "+", second]:
                    node = ir.node("Add", [self.values[first], self.values[second]])
                case [kind, *sources]:
                    domain, _, op_type = kind.rpartition(".")
                    node = ir.node(op_type, [self.values[s] for s in sources], domain=domain)
            node.outputs[0].name = name
            self.values[name] = node.outputs[0]


CHAINS: list[tuple[str, str, list[str] | None, str, str | None]] = [
    # What is written; the sum in question; its terms, its Adds and the rest.
    ("s = a0 + a1", "s", ["a0", "a1"], "s", None),
    ("s = a0 + a1; t = s + a2", "t", ["a2", "a0", "a1"], "ts", None),
    ("s = a0 + a1; t = a2 + s", "t", ["a2", "a0", "a1"], "ts", None),
    ("s = a0 + a1; t = s + a2", "s", None, "", None),
    ("s = a0 + a1; t = a2 + s", "s", None, "", None),
    ("s = a0 + a1; t = s + a2; u = Relu s", "s", None, "", None),
    ("s = a0 + a1; u = Relu s; t = s + a2", "s", None, "", None),
    ("s = x + a0", "s", ["a0"], "s", "x"),
    ("s = a0 + x", "s", ["a0"], "s", "x"),
    ("s = x + a0; t = s + a1", "t", ["a1", "a0"], "ts", "x"),
    ("s = a0 + x; t = a1 + s; u = t + a2", "u", ["a2", "a1", "a0"], "uts", "x"),
    ("s = a0 + x; t = s + y; u = t + a1", "u", ["a1"], "u", "t"),
    ("s = a0 + a0", "s", ["a0", "a0"], "s", None),
    ("s = a0 + a1; t = s + s", "s", ["a0", "a1"], "s", None),
    ("s = a0 + a1; t = s + s", "t", None, "", None),
    ("s = a0 + a1; t = s + x", "s", ["a0", "a1"], "s", None),
    ("s = a0 + a1; t = s + x", "t", None, "", None),
    ("s = x + y", "s", None, "", None),
    # Other layers, of which one value is the same
    *(
        case
        for other in "bcd"
        for case in (
            (f"s = a0 + {other}0", "s", ["a0"], "s", f"{other}0"),
            (f"s = a0 + a1; t = s + {other}0", "s", ["a0", "a1"], "s", None),
            (f"s = a0 + a1; t = s + {other}0", "t", [f"{other}0"], "t", "s"),
            (f"s = a0 + a1; t = {other}0 + s; u = t + a2", "u", ["a2"], "u", "t"),
        )
    ),
    # Other operators
    ("s = Sub a0 a1; t = s + a2", "t", ["a2"], "t", "s"),
    ("s = my.Add a0 a1; t = s + a2", "t", ["a2"], "t", "s"),
    ("s = a0 + a1; r = Relu s; t = r + a2", "t", ["a2"], "t", "r"),
    ("s = a0 + a1; t = Mul s a2", "s", ["a0", "a1"], "s", None),
    ("s = a0 + a1; t = my.Add s a2", "s", ["a0", "a1"], "s", None),
]


@pytest.mark.parametrize(("text", "name", "terms", "adds", "rest"), CHAINS)
def test_a_chain_has_the_terms_of_one_layer(
    text: str, name: str, terms: list[str] | None, adds: str, rest: str | None
) -> None:
    sums = Sums()
    sums.write(text)
    node = sums.values[name].producer()
    assert node is not None
    chain = chain_ending_in(node, sums.read)
    if terms is None:
        assert chain is None
        return
    assert chain is not None
    assert [term.value.name for term in chain.terms] == terms
    assert [add.outputs[0].name for add in chain.adds] == [*adds]
    assert chain.rest is (None if rest is None else sums.values[rest])


# Names


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["m.experts.0.gate", "m.experts.0.up", "m.experts.1.down"], "m.experts"),
        (["m.experts.1.up", "m.experts.10.up", "m.experts.12.down"], "m.experts"),
        (["m/experts/0/gate", "m/experts/1/gate", "m/experts/1/down"], "m/experts"),
        (["m.experts/0/gate", "m.experts/1/gate", "m.experts/1/down"], "m.experts"),
        (["m/experts.0.gate", "m/experts.1.gate", "m/experts.1.down"], "m/experts"),
        (["m/0.gate", "m/1.gate", "m/1.down"], "m"),
        (["a.x", "a.y", "a.z"], "a"),
        (["a.x", "a.y", "b.z"], "sum"),
        ([".x", ".y", ".z"], "sum"),
        (["same.w", "same.w", "same.w"], "same"),
        (["a.w", "a.w.x", "a.w.y"], "a"),
    ],
)
@pytest.mark.parametrize("node_name", ["sum", None])
def test_a_name_is_what_all_weights_share(
    names: list[str], expected: str, node_name: str | None
) -> None:
    gate, up, down = (Map((ir.val(name),)) for name in names)
    mlp = MLP(ir.val("x"), (gate, ALL), (up, ALL), down, "swiglu")
    node = ir.node("Add", [ir.val("x"), ir.val("y")], name=node_name)
    node.outputs[0].name = "total"
    if expected == "sum" and node_name is None:
        expected = "total"
    assert name_of([mlp], node) == expected
