"""What `resolve` makes of chains of nodes: what the ONNX reference makes, slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnxscript.rewriter import rewrite

from qmoe_rules import moe_to_qmoe_rules, ops
from qmoe_rules.recipe import Recipe
from qmoe_rules.slices import SlicedTensor, Slices
from qmoe_rules.weights import resolve
from tests.chains import HOMES, MOVED, SPREAD, Chain, Recorder, array_of, assert_reads
from tests.moe_models import (
    Array,
    Experts,
    Graph,
    expected,
    inputs_of,
    relative_error,
    run,
    single,
    the_node,
)

Draw = Callable[[st.SearchStrategy[Any]], Any]


def identity(draw: Draw, chain: Chain) -> None:
    chain.then("Identity", chain.array)


def cast(draw: Draw, chain: Chain) -> None:
    dtype = np.dtype(draw(st.sampled_from([np.float16, np.float32, ml_dtypes.bfloat16])))
    to = ir.DataType.from_numpy(dtype).value
    chain.then("Cast", chain.array.astype(dtype), to=to)


def transpose(draw: Draw, chain: Chain) -> None:
    order = draw(st.none() | st.permutations(range(chain.array.ndim)))
    attributes: dict[str, Any] = {} if order is None else {"perm": list(order)}
    chain.then("Transpose", chain.array.transpose(order), **attributes)


def reshape(draw: Draw, chain: Chain) -> None:
    array = chain.array
    shape = draw(st.sampled_from(list(factorizations(array.size))))
    if draw(st.booleans()):  # the experts' axis stays
        rest = draw(st.sampled_from(list(factorizations(array.size // array.shape[0]))))
        shape = (array.shape[0], *rest)
    allowzero = draw(st.booleans())
    wanted = list(shape)
    if not allowzero:
        for axis, size in enumerate(array.shape[: len(wanted)]):
            if wanted[axis] == size and draw(st.booleans()):
                wanted[axis] = 0
    if draw(st.booleans()):
        wanted[draw(st.integers(0, len(wanted) - 1))] = -1
    attributes: dict[str, Any] = {"allowzero": 1} if allowzero else {}
    chain.then("Reshape", array.reshape(shape), chain.constant(wanted), **attributes)


def factorizations(size: int) -> Iterator[tuple[int, ...]]:
    """Yields the shapes of up to three axes that hold `size` elements."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    yield (size,)
    for first in divisors:
        yield first, size // first
        rest = size // first
        yield from ((first, n, rest // n) for n in divisors if rest % n == 0)


def squeeze(draw: Draw, chain: Chain) -> None:
    array = chain.array
    ones = [axis for axis, size in enumerate(array.shape) if size == 1]
    assume(len(ones) < array.ndim)
    if draw(st.booleans()):
        chain.then("Squeeze", array.squeeze())
        return
    assume(ones)
    axes = draw(st.lists(st.sampled_from(ones), min_size=1, unique=True))
    signed = [axis - draw(st.sampled_from([0, array.ndim])) for axis in axes]
    chain.then("Squeeze", array.squeeze(tuple(axes)), chain.constant(signed))


def unsqueeze(draw: Draw, chain: Chain) -> None:
    array = chain.array
    count = draw(st.integers(1, 2))
    rank = array.ndim + count
    axes = draw(st.lists(st.integers(0, rank - 1), min_size=count, max_size=count, unique=True))
    signed = [axis - draw(st.sampled_from([0, rank])) for axis in axes]
    chain.then("Unsqueeze", np.expand_dims(array, tuple(axes)), chain.constant(signed))


def concat(draw: Draw, chain: Chain) -> None:
    array = chain.array
    axis = draw(st.integers(0, array.ndim - 1))
    signed = axis - draw(st.sampled_from([0, array.ndim]))
    shape = list(array.shape)
    shape[axis] = draw(st.integers(1, 3))
    other = -array_of(*shape).astype(array.dtype)
    value = chain.graph.weight(f"other{len(chain.graph.nodes)}", other)
    if draw(st.booleans()):
        chain.then("Concat", np.concatenate([array, other], axis), value, axis=signed)
    else:
        chain.then("Concat", np.concatenate([other, array], axis), before=[value], axis=signed)


def split(draw: Draw, chain: Chain) -> None:
    array = chain.array
    axis = draw(st.integers(0, array.ndim - 1))
    size = array.shape[axis]
    cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else []
    sizes = np.diff([0, *cuts, size]).tolist()
    attributes: dict[str, Any] = {"axis": axis - draw(st.sampled_from([0, array.ndim]))}
    inputs = []
    if draw(st.booleans()):
        inputs.append(chain.constant(sizes))
    else:
        count = draw(st.sampled_from([n for n in (1, 2, 3) if -(-size // n) * (n - 1) < size]))
        sizes = [-(-size // count)] * (count - 1)
        sizes.append(size - sum(sizes))
        attributes["num_outputs"] = count
    output = draw(st.integers(0, len(sizes) - 1))
    parts = np.split(array, np.cumsum(sizes)[:-1], axis)
    chain.then("Split", parts[output], *inputs, output=output, outputs=len(sizes), **attributes)


def cut(draw: Draw, chain: Chain) -> None:
    array = chain.array
    given_axes = draw(st.booleans())
    count = draw(st.integers(1, array.ndim))
    axes = draw(st.permutations(range(array.ndim)))[:count] if given_axes else list(range(count))
    starts, ends, steps, where = [], [], [], [slice(None)] * array.ndim
    for axis in axes:
        size = array.shape[axis]
        start, step = draw(st.integers(-size - 2, size - 1)), draw(st.integers(1, 3))
        end = draw(st.integers(-size, size + 2) | st.just(2**63 - 1))
        where[axis] = slice(start, end, step)
        assume(len(range(*where[axis].indices(size))))
        starts.append(start)
        ends.append(end)
        steps.append(step)
    inputs: list[ir.Value | None] = [chain.constant(starts), chain.constant(ends)]
    inputs.append(chain.constant(axes) if given_axes else None)
    if any(step != 1 for step in steps) or draw(st.booleans()):
        inputs.append(chain.constant(steps))
    while inputs[-1] is None:
        inputs.pop()
    chain.then("Slice", array[tuple(where)], *inputs)


STEPS = [identity, cast, transpose, reshape, squeeze, unsqueeze, concat, split, cut]
HYPOTHESIS = settings(
    max_examples=60,
    suppress_health_check=[
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
    ],
)


@pytest.mark.parametrize("step", STEPS)
@HYPOTHESIS
@given(data=st.data())
def test_one_node(step: Callable[[Draw, Chain], None], data: st.DataObject, tmp_path: Path) -> None:
    """Everything that one node does to a stored tensor can be read."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    chain = Chain(array_of(*shape), data.draw(st.sampled_from(HOMES)), tmp_path)
    step(data.draw, chain)
    chain.assert_right()


@settings(HYPOTHESIS, max_examples=250)
@given(data=st.data())
def test_chains_of_nodes(data: st.DataObject, tmp_path: Path) -> None:
    """A chain is read right, or refused because its slices are not slices of the stored ones."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    chain = Chain(array_of(*shape), data.draw(st.sampled_from(HOMES)), tmp_path)
    for step in data.draw(st.lists(st.sampled_from(STEPS), min_size=2, max_size=5)):
        step(data.draw, chain)
        assume(chain.array.size <= 500)
    slices = resolve(chain.value)
    if isinstance(slices, str):
        assert slices in (SPREAD, MOVED)
    else:
        chain.assert_right()


@pytest.mark.parametrize("opset", [11, 12])
@pytest.mark.parametrize(
    ("op_type", "shape", "attributes", "expected"),
    [
        ("Squeeze", (3, 1, 2, 1), {"axes": [1, -1]}, lambda a: a.reshape(3, 2)),
        ("Squeeze", (1, 3, 2), {}, lambda a: a[0]),
        ("Unsqueeze", (3, 2), {"axes": [0]}, lambda a: a[None]),
        ("Unsqueeze", (3, 2), {"axes": [0, -2]}, lambda a: a.reshape(1, 3, 1, 2)),
        ("Split", (4, 3), {"split": [1, 2, 1]}, lambda a: a[1:3]),
        ("Split", (2, 6), {"axis": 1}, lambda a: a[:, 2:4]),
        ("Split", (2, 6), {"axis": -1, "split": [4, 1, 1]}, lambda a: a[:, 4:5]),
    ],
)
def test_attributes_of_old_opsets(
    op_type: str,
    shape: tuple[int, ...],
    attributes: dict[str, Any],
    expected: Callable[[Array], Array],
    opset: int,
) -> None:
    chain = Chain(array_of(*shape), opset=opset)
    result = expected(chain.array)
    count = 3 if op_type == "Split" else 1
    chain.then(op_type, result, output=count // 2, outputs=count, **attributes)
    chain.assert_right()


def test_an_overflow_in_a_cast_is_an_infinity() -> None:
    array = np.array([[1e6, -1e6, 1.0]], np.float32)
    halves = np.array([[np.inf, -np.inf, 1.0]], np.float16)
    slices = resolve(Chain(array).then("Cast", halves, to=ir.DataType.FLOAT16.value).value)
    assert isinstance(slices, Slices)
    assert_reads(slices, halves)


def test_experts_that_were_concatenated_are_read_one_by_one() -> None:
    """One matrix per expert, joined by rows and reshaped: no expert costs more than itself."""
    sources = [Recorder(array_of(4, 5) * index) for index in range(3)]
    graph = Graph()
    values = [
        ir.Value(name=f"e{index}", const_value=SlicedTensor(source, f"e{index}"))
        for index, source in enumerate(sources)
    ]
    rows = graph.op("Concat", *values, out="rows", axis=0)
    shape = graph.weight("shape", np.array([3, -1, 5]))
    slices = resolve(graph.op("Reshape", rows, shape, out="w"))
    assert isinstance(slices, Slices)
    assert slices.shape == (3, 4, 5)
    np.testing.assert_array_equal(slices.read(1, 2), sources[1].array[None])
    assert [source.reads for source in sources] == [[], [(0, 4)], []]


VIEWS: dict[str, Callable[[Chain], Chain]] = {
    "Identity": lambda c: c.then("Identity", c.array),
    "Cast to itself": lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT.value),
    "Transpose": lambda c: c.then("Transpose", c.array.transpose(0, 2, 1), perm=[0, 2, 1]),
    "Transpose of the first axis": lambda c: c.then("Transpose", c.array.T),
    "Reshape": lambda c: c.then("Reshape", c.array.reshape(4, 2, 3, 6), c.constant([0, 2, 3, -1])),
    "Reshape into groups": lambda c: c.then(
        "Reshape", c.array.reshape(2, 12, 6), c.constant([2, -1, 6])
    ),
    "Reshape out of groups": lambda c: c.then(
        "Reshape", c.array.reshape(24, 6), c.constant([-1, 6])
    ),
    "Squeeze": lambda c: c.then("Squeeze", c.array),
    "Unsqueeze": lambda c: c.then("Unsqueeze", c.array[None], c.constant([0])),
    "Split": lambda c: c.then("Split", c.array[2:], output=1, outputs=2, num_outputs=2),
    "Split of rows": lambda c: c.then(
        "Split", c.array[:, 3:], output=1, outputs=2, axis=1, num_outputs=2
    ),
    "Slice": lambda c: c.then("Slice", c.array[1:3], c.constant([1]), c.constant([3])),
    "Slice with a step": lambda c: c.then(
        "Slice",
        c.array[::2],
        c.constant([0]),
        c.constant([9]),
        c.constant([0]),
        c.constant([2]),
    ),
}


@pytest.mark.parametrize("case", VIEWS)
def test_views_are_not_copied(case: str) -> None:
    stored = array_of(4, 6, 6)
    chain = VIEWS[case](Chain(stored))
    slices = resolve(chain.value)
    assert isinstance(slices, Slices)
    for index in range(slices.shape[0]):
        assert np.shares_memory(slices.read(index, index + 1), stored)
    chain.assert_right()


@pytest.mark.parametrize("case", VIEWS)
def test_nothing_is_read_before_it_is_asked_for(case: str) -> None:
    asked = list[int]()

    def make() -> ir.TensorProtocol:
        asked.append(1)
        return ir.Tensor(array_of(4, 6, 6))

    chain = Chain(array_of(4, 6, 6))
    (weight, *_) = chain.graph.initializers
    weight.const_value = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape((4, 6, 6)))
    slices = resolve(VIEWS[case](chain).value)
    assert isinstance(slices, Slices)
    tensor = SlicedTensor(slices, "t")
    assert (tensor.shape, tensor.nbytes) == (ir.Shape(chain.array.shape), chain.array.nbytes)
    assert not asked
    assert tensor.tobytes() == chain.array.tobytes()
    assert asked


# --- End to end ----------------------------------------------------------------------------------


def halves_of(weight: Array) -> Array:
    """Returns interleaved rows [E, 2I, H] as [gate half | linear half]."""
    return np.concatenate([weight[:, 0::2], weight[:, 1::2]], axis=1)


def test_halves_that_the_graph_interleaves_are_quantized() -> None:
    """As mobius writes it: Reshape [E, 2, I, H], Transpose, Reshape [E, 2I, H]."""
    experts = Experts(bias=False)
    arrays = experts.arrays()
    e, i, h = experts.experts, experts.inter, experts.hidden
    graph = Graph()
    x, router = inputs_of(graph, experts)
    stored = graph.weight("gate_up", halves_of(arrays["fc1"]))
    shapes = [
        graph.weight(f"s{k}", np.array(s), "constant")
        for k, s in enumerate([[e, 2, i, h], [e, 2 * i, h]])
    ]
    apart = graph.op("Reshape", stored, shapes[0], out="apart")
    pairs = graph.op("Transpose", apart, out="pairs", perm=[0, 2, 1, 3])
    fc1 = graph.op("Reshape", pairs, shapes[1], out="fc1")
    weights = {"fc1": fc1, "fc2": graph.weight("fc2", arrays["fc2"])}
    attributes = {**experts.attributes, "k": 2, "normalize_routing_weights": 1}
    y = graph.moe(x, router, weights, **attributes)
    recipe = Recipe(bits=4, block_size=32)
    model = rewrite(graph.model(y), moe_to_qmoe_rules(recipe))
    assert [node.op_type for node in model.graph] == ["QMoE"]
    assert "gate_up" not in model.graph.initializers
    direct = rewrite(single(experts, **attributes), moe_to_qmoe_rules(recipe))
    for slot in ("fc1_experts_weights", "fc1_scales"):
        ours, theirs = (ops.inputs(the_node(each))[slot] for each in (model, direct))
        assert ours is not None
        assert theirs is not None
        assert ours.const_value is not None
        assert theirs.const_value is not None
        assert ours.const_value.tobytes() == theirs.const_value.tobytes()
    feeds = experts.feeds()
    wanted = expected(arrays, feeds, recipe.specs["fc1"], **attributes)
    assert relative_error(run(model, feeds)[0], wanted) <= 1e-5
