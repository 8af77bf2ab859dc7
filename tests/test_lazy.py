"""Planned tensors: nothing early, the same bytes however they are asked for, a bounded cache."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from onnxscript.rewriter import rewrite

from qmoe_rules import lazy
from qmoe_rules.errors import SourceError
from qmoe_rules.formats import FORMATS, Spec
from qmoe_rules.layouts import LAYOUTS
from qmoe_rules.lazy import PlannedTensor, Projection, plan_values
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import METHODS
from qmoe_rules.quantizers.floats import float_rtn
from qmoe_rules.quantizers.rtn import rtn_numpy
from qmoe_rules.rules import moe_to_qmoe_rules
from qmoe_rules.slabs import Slab
from qmoe_rules.statistics import Statistics
from qmoe_rules.weights import ExpertWeights
from tests.moe_models import Array, Experts, Graph, layers, single

FOUR = Spec(FORMATS["int4"], 32)
SHAPE = (3, 32, 128)
PARTS = ("weights", "scales")
# (spec, layout) of every format, with zero points and without.
STORED = [
    *(
        (Spec(FORMATS[f"int{bits}"], block), layout)
        for bits, block in ((4, 0), (4, 32), (8, 0), (8, 64), (2, 16))
        for layout in ("raw", "cutlass_sm80")
    ),
    (Spec(FORMATS["int3"], 32, signed=False), "raw"),
    *(
        (Spec(FORMATS[f"int{bits}"], block, symmetric=False), "raw")
        for bits, block in ((2, 0), (4, 0), (4, 128), (8, 32))
    ),
    *((Spec(FORMATS["mxfp4"], 32), layout) for layout in ("n_packed", "k_packed")),
    *((Spec(FORMATS["nvfp4"], 16), layout) for layout in ("n_packed", "k_packed")),
    (Spec(FORMATS["fp8"], 128), "raw"),
    (Spec(FORMATS["fp8"]), "raw"),
]
each_storage = pytest.mark.parametrize(
    ("spec", "layout"), STORED, ids=[f"{spec}, {layout}" for spec, layout in STORED]
)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> lazy._Cache:
    """Gives every test a cache of its own."""
    cache = lazy._Cache(1 << 20)
    monkeypatch.setattr(lazy, "_cache", cache)
    return cache


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of all weights that the quantizer was given."""
    quantizer, calls = METHODS["rtn"], list[tuple[int, ...]]()

    def counted(
        weight: Array, spec: Spec, statistics: Statistics | None = None
    ) -> QuantizedWeights:
        calls.append(weight.shape)
        return quantizer(weight, spec, statistics)

    monkeypatch.setitem(METHODS, "rtn", counted)
    return calls


def weight(dtype: Any = np.float32) -> Array:
    return np.random.default_rng(5).standard_normal(SHAPE).astype(dtype)


def projection_of(array: Array, spec: Spec = FOUR, layout: str = "raw") -> Projection:
    return Projection(ExpertWeights(ir.tensor(array), "fc1"), spec, layout, "rtn")


def tensors_of(projection: Projection) -> dict[str, PlannedTensor]:
    return {part: PlannedTensor(projection, part, f"fc1_{part}") for part in projection.parts}


def stored_bytes(array: Array, spec: Spec, layout: str) -> dict[str, bytes]:
    """Returns what must be stored, by the plain numpy quantizers."""
    quantize = rtn_numpy if spec.format.element is None else float_rtn
    stored: dict[str, bytes] = {}
    for expert in array:
        quantized = quantize(expert, spec)
        parts = quantized.parts()
        parts["weights"] = LAYOUTS[layout].store(quantized.packed, spec.format.bits)
        stored = {part: stored.get(part, b"") + parts[part].tobytes() for part in parts}
    return stored


def by_tofile(tensor: PlannedTensor) -> bytes:
    file = io.BytesIO()
    tensor.tofile(file)
    return file.getvalue()


WAYS: dict[str, Callable[[PlannedTensor], bytes]] = {
    "tofile": by_tofile,
    "tobytes": lambda tensor: tensor.tobytes(),
    "numpy": lambda tensor: tensor.numpy().tobytes(),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@each_storage
def test_bytes_are_those_of_the_plain_quantizer(spec: Spec, layout: str, dtype: Any) -> None:
    array = weight(dtype)
    wanted = stored_bytes(array, spec, layout)
    tensors = tensors_of(projection_of(array, spec, layout))
    assert tensors.keys() == wanted.keys()
    for part, tensor in tensors.items():
        assert tensor.nbytes == len(wanted[part])
        for way in WAYS.values():
            assert way(tensor) == wanted[part]


@each_storage
def test_a_permutation_of_experts_permutes_what_is_stored(spec: Spec, layout: str) -> None:
    array = np.concatenate([weight(), 2 * weight()[::-1] - 1])
    order = [4, 0, 5, 2, 1, 3]
    moved = tensors_of(projection_of(array[order], spec, layout))
    for part, tensor in tensors_of(projection_of(array, spec, layout)).items():
        experts = tensor.numpy()
        assert moved[part].tobytes() == experts[order].tobytes()
        assert moved[part].tobytes() != experts.tobytes() or part == "global_scale"


def test_shapes_and_types_are_known_without_computing(computed: list[tuple[int, ...]]) -> None:
    tensors = tensors_of(projection_of(weight(np.float16)))
    assert tensors["weights"].shape == ir.Shape([3, 32, 64])
    assert tensors["scales"].shape == ir.Shape([3, 32, 4])
    assert tensors["weights"].dtype == ir.DataType.UINT8
    assert tensors["scales"].dtype == ir.DataType.FLOAT16
    assert tensors["weights"].nbytes == 3 * 32 * 64
    assert tensors["scales"].nbytes == 3 * 32 * 4 * 2
    assert tensors["weights"].projection.nbytes == 3 * 32 * (64 + 4 * 2)
    assert not computed


@pytest.mark.parametrize("limit", [0, 1, 700, 1 << 20])
@pytest.mark.parametrize("order", list(itertools.permutations([*PARTS, *PARTS], 3)))
def test_any_order_and_any_cache_give_the_same_bytes(
    order: tuple[str, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy, "_cache", lazy._Cache(limit))
    array = weight()
    wanted, tensors = stored_bytes(array, FOUR, "raw"), tensors_of(projection_of(array))
    for part, way in zip(order, WAYS.values(), strict=True):
        assert way(tensors[part]) == wanted[part]


def test_scales_follow_the_weights_for_free(computed: list[tuple[int, ...]]) -> None:
    tensors = tensors_of(projection_of(weight()))
    by_tofile(tensors["weights"])
    assert len(computed) == 3
    by_tofile(tensors["scales"])
    assert len(computed) == 3


def held(cache: lazy._Cache) -> int:
    return sum(array.nbytes for slab in cache._slabs.values() for array in slab.values())


@pytest.mark.parametrize("order", [PARTS, PARTS[::-1]], ids=["weights first", "scales first"])
def test_the_cache_stays_within_its_bound(
    order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    scales = 32 * 4 * 4  # bytes of one expert's scales
    cache = lazy._Cache(2 * scales + 1)
    monkeypatch.setattr(lazy, "_cache", cache)
    projections = [projection_of(weight() + index) for index in range(3)]
    seen = set()
    for part in order:
        for projection in projections:
            for expert in (2, 0, 1):
                projection.part(part, expert)
                seen.add(held(cache))
                assert held(cache) == cache._size
    assert seen == {scales, 2 * scales}


def slab_of(number: int) -> Slab:
    return {"scales": np.full(4, number, np.uint8)}


def test_the_cache_drops_what_was_used_longest_ago() -> None:
    cache = lazy._Cache(8)
    cache.put((0, 0), slab_of(0))
    cache.put((1, 0), slab_of(1))
    assert cache.get((0, 0), "scales") is not None
    cache.put((2, 0), slab_of(2))
    assert [number for number in range(3) if cache.get((number, 0), "scales") is not None] == [0, 2]


def test_a_sweep_over_more_than_the_cache_holds_keeps_its_beginning() -> None:
    """Dropping the oldest instead would drop each slab before the sweep comes back to it."""
    cache = lazy._Cache(8)
    for expert in range(4):
        cache.put((0, expert), slab_of(expert))
    assert [n for n in range(4) if cache.get((0, n), "scales") is not None] == [0, 1]


def test_weights_are_never_kept(empty_cache: lazy._Cache) -> None:
    projection = projection_of(weight())
    by_tofile(PlannedTensor(projection, "weights", "fc1"))
    assert all("weights" not in slab for slab in empty_cache._slabs.values())


def test_projections_never_share_cached_parts() -> None:
    """Two weights of the same name and shape are two projections."""
    arrays = [weight(), weight() * 2]
    tensors = [tensors_of(projection_of(array)) for array in arrays]
    for part in PARTS:
        for array, planned in zip(arrays, tensors, strict=True):
            assert planned[part].tobytes() == stored_bytes(array, FOUR, "raw")[part]


# --- In a model ----------------------------------------------------------------------------------


def planned_model() -> ir.Model:
    return rewrite(layers(2, Experts(bias=False)), [*moe_to_qmoe_rules(block_size=32)])


def planned_tensors(model: ir.Model) -> Iterator[PlannedTensor]:
    for value in model.graph.initializers.values():
        assert isinstance(value.const_value, PlannedTensor)
        yield value.const_value


def test_planning_computes_nothing(computed: list[tuple[int, ...]]) -> None:
    model = planned_model()
    model.clone()
    assert sum(tensor.nbytes for tensor in planned_tensors(model)) > 0
    assert "PlannedTensor" in repr(model.graph.initializers)
    first = next(planned_tensors(model))
    shown = "PlannedTensor<UINT8,[3,384,64]>('weights' of Projection('layer0_fc1', int4 block 32"
    assert repr(first).startswith(shown)
    assert not computed


def test_onnx_ir_saves_the_same_bytes(tmp_path: Path) -> None:
    model = planned_model()
    ir.save(model, tmp_path / "model.onnx", external_data="model.onnx.data")
    saved = ir.load(tmp_path / "model.onnx")
    assert saved.graph.initializers.keys() == model.graph.initializers.keys()
    for tensor in planned_tensors(model):
        stored = saved.graph.initializers[str(tensor.name)].const_value
        assert isinstance(stored, ir.ExternalTensor)
        assert stored.tobytes() == tensor.tobytes()
        assert (stored.dtype, stored.shape) == (tensor.dtype, tensor.shape)


@pytest.mark.parametrize("workers", [1, 4])
def test_saving_twice_gives_the_same_file(tmp_path: Path, workers: int) -> None:
    digests = set()
    model = planned_model()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "model.onnx"
        ir.save(model, path, external_data="model.onnx.data", max_workers=workers)
        data = path.with_name("model.onnx.data").read_bytes()
        digests.add((hashlib.sha256(data).hexdigest(), path.read_bytes()))
    assert len(digests) == 1
    assert list(planned_tensors(model))  # still planned


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("way", ["ir.save", *WAYS])
def test_weights_that_are_not_finite_name_the_expert(tmp_path: Path, way: str, bad: float) -> None:
    array = weight()
    array[1, 7, 100] = bad
    graph = Graph()
    source = graph.weight("layer.fc1", array)
    model = graph.model(source)
    view = ExpertWeights.of(source)
    assert isinstance(view, ExpertWeights)
    plan_values(source, Projection(view, FOUR, "raw", "rtn"))
    planned = model.graph.initializers["layer.fc1_scales"].const_value
    assert isinstance(planned, PlannedTensor)
    message = (
        r"^weight 'layer\.fc1', expert 1: row 7 holds an infinity or a NaN; quantization needs "
        r"finite weights$"
    )
    save = partial(
        ir.save, model, tmp_path / "model.onnx", external_data="data", size_threshold_bytes=0
    )
    ask: Callable[[], object] = save if way == "ir.save" else partial(WAYS[way], planned)
    with pytest.raises(SourceError, match=message):
        ask()
    assert not list(tmp_path.iterdir())


def test_a_quantizer_of_the_wrong_shape_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor that wrote too much would run into its neighbour's bytes."""

    def blockless(
        weight: Array, spec: Spec, statistics: Statistics | None = None
    ) -> QuantizedWeights:
        return rtn_numpy(weight, Spec(spec.format))

    monkeypatch.setitem(METHODS, "rtn", blockless)
    with pytest.raises(AssertionError, match="scales"):
        tensors_of(projection_of(weight()))["weights"].tobytes()


def test_planned_values_live_beside_their_source() -> None:
    model = single()
    source = model.graph.initializers["fc1"]
    view = ExpertWeights.of(source)
    assert isinstance(view, ExpertWeights)
    values = plan_values(source, Projection(view, FOUR, "raw", "rtn"))
    assert [value.name for value in values.values()] == ["fc1_quantized", "fc1_scales"]
    assert all(model.graph.initializers[str(v.name)] is v for v in values.values())
    again = plan_values(source, Projection(view, FOUR, "raw", "rtn"))
    assert again == values
    other = plan_values(source, Projection(view, Spec(FORMATS["int8"]), "raw", "rtn"))
    assert [value.name for value in other.values()] == ["fc1_quantized_1", "fc1_scales_1"]
