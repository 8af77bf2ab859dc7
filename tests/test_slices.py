"""`Slices`, and what `resolve` makes of chains of nodes: the same numbers, slice by slice."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx.reference
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnxscript.rewriter import rewrite

from qmoe_rules import moe_to_qmoe_rules, ops
from qmoe_rules.errors import SourceError
from qmoe_rules.recipe import Recipe
from qmoe_rules.slices import (
    Combined,
    Joined,
    Lifted,
    Picked,
    Regrouped,
    SlicedTensor,
    Slices,
    TensorSlices,
    Unlifted,
)
from qmoe_rules.weights import resolve
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

SPREAD = "a reshape spreads the experts' axis after other changes"
MOVED = "the experts' axis moves after other changes; fold them first"
HOMES = ("memory", "file", "made")


def array_of(*shape: int, dtype: npt.DTypeLike = np.float32) -> Array:
    return np.arange(1, math.prod(shape) + 1).reshape(shape).astype(dtype)


def tensor_of(array: Array, home: str, folder: Path, name: str = "w") -> ir.TensorProtocol:
    """Returns a tensor in memory, in a file, or one that is made anew whenever it is asked."""
    dtype = ir.DataType.from_numpy(array.dtype)
    if home == "file":
        path = folder / f"{name}{len(list(folder.iterdir()))}"
        path.write_bytes(b"\xa5" * 4 + array.tobytes() + b"\xa5")
        return ir.ExternalTensor(
            path.name,
            4,
            array.nbytes,
            dtype,
            shape=ir.Shape(array.shape),
            name=name,
            base_dir=folder,
        )
    if home == "made":
        return ir.LazyTensor(lambda: ir.Tensor(array.copy()), dtype, ir.Shape(array.shape))
    return ir.Tensor(array, name=name)


def ranges(size: int) -> Iterator[tuple[int, int]]:
    """Yields every range of a first axis, the empty ones too."""
    return itertools.combinations_with_replacement(range(size + 1), 2)


def assert_reads(slices: Slices, array: Array) -> None:
    """Checks every range, then again after everything has been released."""
    assert (slices.shape, slices.dtype) == (array.shape, array.dtype)
    assert slices.nbytes == array.nbytes
    for _ in range(2):
        for start, stop in ranges(array.shape[0]):
            block = slices.read(start, stop)
            assert block.dtype == array.dtype
            assert block.shape == (stop - start, *array.shape[1:])
            assert block.tobytes() == array[start:stop].tobytes()
            slices.release(start, stop)


# --- The classes ---------------------------------------------------------------------------------

Made = tuple[Slices, Array]


def leaf(array: Array, home: str, folder: Path) -> TensorSlices:
    return TensorSlices(tensor_of(array, home, folder), "w")


def combined(home: str, folder: Path) -> Made:
    a, b = array_of(3, 2, 4), array_of(3, 5)
    sources = [leaf(a, home, folder), leaf(b, home, folder)]

    def function(x: Array, y: Array) -> Array:
        return np.concatenate([x.reshape(len(x), 8), y], axis=1)

    return Combined(sources, (3, 13), a.dtype, function), function(a, b)


def joined(home: str, folder: Path) -> Made:
    arrays = [array_of(2, 3), array_of(1, 3), array_of(3, 3)]
    sources: list[Slices] = [leaf(array, home, folder) for array in arrays]
    sources.insert(1, leaf(array_of(0, 3), "memory", folder))
    return Joined(sources), np.concatenate(arrays)


def picked(home: str, folder: Path) -> Made:
    return Picked(leaf(array_of(6, 3), home, folder), 2, 5), array_of(6, 3)[2:5]


def lifted(home: str, folder: Path) -> Made:
    return Lifted(leaf(array_of(4, 3), home, folder)), array_of(4, 3)[None]


def unlifted(home: str, folder: Path) -> Made:
    return Unlifted(leaf(array_of(1, 4, 3), home, folder)), array_of(4, 3)


def regrouped(home: str, folder: Path) -> Made:
    return Regrouped(leaf(array_of(6, 3), home, folder), 3), array_of(3, 2, 3)


def plain(home: str, folder: Path) -> Made:
    array = array_of(4, 3, 2, dtype=np.float16)
    return leaf(array, home, folder), array


CLASSES = [plain, combined, joined, picked, lifted, unlifted, regrouped]


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("make", CLASSES)
def test_every_range_reads_as_numpy_has_it(
    make: Callable[[str, Path], Made], home: str, tmp_path: Path
) -> None:
    slices, array = make(home, tmp_path)
    assert_reads(slices, array)


@pytest.mark.parametrize("make", CLASSES)
def test_the_tensors_of_every_source_are_known(
    make: Callable[[str, Path], Made], tmp_path: Path
) -> None:
    slices, _ = make("memory", tmp_path)
    assert len(slices.tensors) == {"combined": 2, "joined": 4}.get(make.__name__, 1)
    assert all(isinstance(tensor, ir.Tensor) for tensor in slices.tensors)


class Recorder(Slices):
    """Notes which slices are read and released."""

    def __init__(self, array: Array) -> None:
        self.shape = array.shape
        self.dtype = array.dtype
        self.array = array
        self.reads = list[tuple[int, int]]()
        self.releases = list[tuple[int, int]]()

    @property
    def tensors(self) -> tuple[ir.TensorProtocol, ...]:
        return (ir.tensor(self.array),)

    def read(self, start: int, stop: int) -> Array:
        self.reads.append((start, stop))
        block: Array = self.array[start:stop]
        return block

    def release(self, start: int, stop: int) -> None:
        self.releases.append((start, stop))


def test_only_what_is_asked_for_is_read_and_released() -> None:
    first, second, third = (Recorder(array_of(2, 3)) for _ in range(3))
    slices = Regrouped(Picked(Joined([first, second, third]), 1, 5), 2)
    slices.read(0, 1)
    slices.release(0, 1)
    slices.read(1, 2)
    slices.release(1, 2)
    assert first.reads == first.releases == [(1, 2)]
    assert second.reads == second.releases == [(0, 1), (1, 2)]
    assert third.reads == third.releases == [(0, 1)]


def test_slices_of_one_source_may_share_its_memory() -> None:
    source = Recorder(array_of(1, 4, 3))
    Unlifted(source).release(0, 4)
    assert source.releases == []
    whole = Recorder(array_of(4, 3))
    lifted = Lifted(whole)
    lifted.release(0, 0)
    lifted.release(0, 1)
    assert whole.releases == [(0, 4)]


def test_a_tensor_that_is_made_may_read_others(tmp_path: Path) -> None:
    inner = SlicedTensor(leaf(array_of(2, 3), "file", tmp_path), "inner")
    outer = ir.LazyTensor(lambda: ir.Tensor(inner.numpy() * 2), inner.dtype, inner.shape)
    assert_reads(TensorSlices(outer, "outer"), array_of(2, 3) * 2)


def test_a_missing_file_is_named_through_a_chain(tmp_path: Path) -> None:
    graph = Graph()
    value = graph.weight("w", array_of(2, 3, 4))
    value.const_value = tensor_of(array_of(2, 3, 4), "file", tmp_path)
    slices = resolve(graph.op("Transpose", value, out="t", perm=[0, 2, 1]))
    assert isinstance(slices, Slices)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(SourceError, match="cannot read weight 'w'"):
        slices.read(0, 1)


# --- Tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.uint8])
def test_a_sliced_tensor_is_the_array(dtype: npt.DTypeLike, tmp_path: Path) -> None:
    array = array_of(4, 3, 2, dtype=dtype)
    turned = array.transpose(0, 2, 1)
    source = leaf(array, "file", tmp_path)
    slices = Combined([source], turned.shape, array.dtype, lambda block: block.transpose(0, 2, 1))
    tensor = SlicedTensor(slices, "t")
    assert (tensor.name, tensor.shape, tensor.nbytes) == ("t", ir.Shape((4, 2, 3)), array.nbytes)
    assert tensor.dtype == ir.DataType.from_numpy(array.dtype)
    assert tensor.tobytes() == turned.tobytes()
    assert tensor.numpy().tobytes() == turned.tobytes()
    file = io.BytesIO()
    tensor.tofile(file)
    assert file.getvalue() == turned.tobytes()
    assert repr(tensor) == f"SlicedTensor<{tensor.dtype},[4,2,3]>(Combined, name='t')"


def test_a_sliced_tensor_streams() -> None:
    source = Recorder(array_of(3, 2, 2))
    SlicedTensor(source, "t").tofile(io.BytesIO())
    assert source.reads == source.releases == [(0, 1), (1, 2), (2, 3)]


def test_a_sliced_tensor_is_never_kept() -> None:
    source = Recorder(array_of(3, 2))
    tensor = SlicedTensor(source, "t")
    tensor.numpy()
    tensor.numpy()
    assert source.reads == [(0, 3), (0, 3)]


def test_a_sliced_tensor_is_resolved_to_its_slices() -> None:
    source = Recorder(array_of(3, 2))
    value = ir.Value(name="v", const_value=SlicedTensor(source, "t"))
    assert resolve(value) is source


# --- Chains of nodes -----------------------------------------------------------------------------


class Chain:
    """A chain of nodes on a constant, and the array that numpy makes of it."""

    def __init__(self, array: Array, home: str = "memory", folder: Path = Path(), opset: int = 21):
        self.graph = Graph()
        self.array = array
        self.opset = opset
        self._names = (f"v{index}" for index in itertools.count())
        self.value = self._weight = self.graph.weight("w", array)
        self._stored = array
        self.value.const_value = tensor_of(array, home, folder)

    def constant(self, numbers: Sequence[int], dtype: npt.DTypeLike = np.int64) -> ir.Value:
        home = "constant" if len(numbers) % 2 else "initializer"
        return self.graph.weight(next(self._names), np.array(numbers, dtype), home)

    def then(
        self,
        op_type: str,
        result: Array,
        *inputs: ir.Value | None,
        before: Sequence[ir.Value] = (),
        output: int = 0,
        outputs: int = 1,
        **attributes: Any,
    ) -> Chain:
        """Appends a node, of which one output goes on as `result`."""
        given = [*before, self.value, *inputs]
        node = ir.node(op_type, given, attributes, num_outputs=outputs)
        for value in node.outputs:
            value.name = next(self._names)
        self.graph.nodes.append(node)
        self.value, self.array = node.outputs[output], result
        return self

    def evaluated(self) -> Array:
        """Returns what the ONNX reference makes of the graph."""
        self.value.type = ir.TensorType(ir.DataType.from_numpy(self.array.dtype))
        self._weight.const_value = ir.Tensor(self._stored)  # the reference reads no files
        model = self.graph.model(self.value, opsets={"": self.opset})
        (result,) = onnx.reference.ReferenceEvaluator(ir.to_proto(model)).run(None, {})
        return np.asarray(result)

    def assert_right(self) -> None:
        slices = resolve(self.value)
        assert isinstance(slices, Slices), slices
        assert_reads(slices, self.array)
        evaluated = self.evaluated()
        assert evaluated.shape == self.array.shape
        assert evaluated.tobytes() == self.array.tobytes()


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


# --- Reasons -------------------------------------------------------------------------------------


def shape_that_is_computed(chain: Chain) -> None:
    shape = chain.graph.op("Abs", chain.constant([2, 3, 4]), out="shape")
    chain.then("Reshape", chain.array, shape)


def axes_that_may_be_overridden(chain: Chain) -> None:
    axes = chain.graph.weight("axes", np.array([0]), "overridable")
    chain.then("Unsqueeze", chain.array[None], axes)
    chain.graph.done(chain.value, opsets={"": 21})  # only a graph knows its inputs


def source_that_is_computed(chain: Chain) -> None:
    chain.then("Neg", chain.array).then("Transpose", chain.array)


def partner_that_is_computed(chain: Chain) -> None:
    other = chain.graph.op("Neg", chain.value, out="other")
    chain.then("Concat", chain.array, other, axis=1)


def foreign_operator(chain: Chain) -> None:
    other = chain.graph.op("Identity", chain.value, out="foreign", domain="elsewhere")
    chain.value = other


def wrong_shape_in_the_model(chain: Chain) -> None:
    chain.then("Transpose", chain.array)
    chain.value.shape = ir.Shape((2, 3, 4))


WHY: dict[str, tuple[Callable[[Chain], Any], str]] = {
    "computed shape": (
        shape_that_is_computed,
        "shape, which Reshape reads, is not a constant",
    ),
    "overridable axes": (
        axes_that_may_be_overridden,
        "axes, which Unsqueeze reads, is not a constant",
    ),
    "computed source": (source_that_is_computed, "v0 is not a constant"),
    "computed partner": (partner_that_is_computed, "other is not a constant"),
    "foreign operator": (foreign_operator, "foreign is not a constant"),
    "missing source": (
        lambda c: ops.producer(c.then("Identity", c.array).value).replace_input_with(0, None),
        "an input is missing",
    ),
    "other shape": (
        wrong_shape_in_the_model,
        "v0 is [4, 3, 2] where the model says [2, 3, 4]",
    ),
    "backwards": (
        lambda c: c.then(
            "Slice",
            c.array[::-1],
            c.constant([-1]),
            c.constant([-9]),
            c.constant([0]),
            c.constant([-1]),
        ),
        "v4 is cut out backwards",
    ),
    "old Slice": (
        lambda c: c.then("Slice", c.array[1:], starts=[1], ends=[2]),
        "v0 is cut by a Slice of before opset 10",
    ),
    "float8": (
        lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT8E4M3FN.value),
        "v0 is cast to FLOAT8E4M3FN",
    ),
    "wrong Reshape": (
        lambda c: c.then("Reshape", c.array, c.constant([5, -1])),
        "[2, 3, 4] cannot be reshaped to [5, 4]",
    ),
    "spread": (
        lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT16.value).then(
            "Reshape", c.array, c.constant([6, 4])
        ),
        SPREAD,
    ),
    "moved": (
        lambda c: c.then("Cast", c.array, to=ir.DataType.FLOAT16.value).then(
            "Transpose", c.array.T
        ),
        MOVED,
    ),
}


@pytest.mark.parametrize("case", WHY)
def test_what_cannot_be_read_has_a_reason(case: str) -> None:
    build, reason = WHY[case]
    chain = Chain(array_of(2, 3, 4))
    build(chain)
    assert resolve(chain.value) == reason


def test_a_scalar_is_no_weight() -> None:
    chain = Chain(np.array(3, np.float32))
    chain.then("Transpose", chain.array)
    assert resolve(chain.value) == "v0: Transpose cannot be read: list index out of range"


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
