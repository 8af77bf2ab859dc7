"""What a model is run on: feeds, read from files, made at random, and completed for the model.

A feed is a dictionary of arrays by input name, as ONNX Runtime takes it. Data for a language model
is mostly tokens; its other inputs (mask, positions, an empty cache) follow from them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import ConfigError, QMoEError, SourceError

__all__ = [
    "TOKEN_DTYPES",
    "Feed",
    "Input",
    "complete",
    "drop_caches",
    "inputs_of",
    "random_feeds",
    "read_feeds",
    "read_inputs",
    "require_feed",
]

Array = npt.NDArray[Any]
Feed = dict[str, Array]

TOKEN_DTYPES = ("uint8", "uint16", "int32", "int64")
"""The types of the numbers in a raw token file."""

# In an input that is made up; more than that is better given.
_MOST_NUMBERS = 1 << 26
_TOKENS, _EMBEDDINGS = "input_ids", "inputs_embeds"
# What a token id may go through before it looks up a row.
_THROUGH = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class Input:
    """An input that a model needs.

    Attributes:
        name: Its name.
        dtype: Its type; float32 for bfloat16, which numpy does not have.
        shape: Its sizes, None for those that are open; None where the rank is.
        rows: How many rows the tables have that its numbers look up whenever the model runs, None
            where they look up none.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | None, ...] | None
    rows: int | None = None


def inputs_of(model: ir.Model) -> dict[str, Input]:
    """Returns the inputs of a model that have no default, by name.

    Raises:
        SourceError: An input is no tensor of numbers.
    """
    found = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        name = str(value.name)
        if value.dtype is None or value.dtype == ir.DataType.STRING:
            raise SourceError(f"input {name} is no tensor of numbers")
        wide = value.dtype == ir.DataType.BFLOAT16
        shape = None
        if value.shape is not None:
            shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        dtype = np.dtype(np.float32) if wide else value.dtype.numpy()
        found[name] = Input(name, dtype, shape, _rows(value, in_branches=False))
    return found


def require_feed(feed: object) -> None:
    """Raises TypeError for what is no dictionary."""
    if not isinstance(feed, Mapping):
        raise TypeError(
            f"a feed is a dictionary of arrays by input name, not {type(feed).__name__}"
        )


def complete(feed: Mapping[str, Any], needed: Mapping[str, Input], known: Iterable[str]) -> Feed:
    """Returns exactly the inputs that are needed, in their types.

    What is missing follows from the tokens [batch, length], or embeddings, where its name says what
    it is: `attention_mask` is ones, `position_ids` count from 0, and `past...` is an empty cache.

    Args:
        feed: Arrays by input name.
        needed: The inputs that are needed, by name.
        known: Names of all inputs of the model.

    Raises:
        ConfigError: An input is unknown, missing, has another type, or looks up rows that are not
            there.
        TypeError: The feed is no dictionary.
    """
    require_feed(feed)
    arrays = {name: np.asarray(array) for name, array in feed.items()}
    if unknown := sorted(arrays.keys() - set(known)):
        raise ConfigError(f"the model has no input {unknown[0]!r}; it has {', '.join(known)}")
    completed = {}
    for name, wanted in needed.items():
        array = arrays[name] if name in arrays else _missing(wanted, arrays)
        if array is None:
            raise ConfigError(
                f"input {name!r} is missing (given: {', '.join(arrays) or 'none'}), and what it "
                "should be does not follow from its name"
            )
        if not np.can_cast(array.dtype, wanted.dtype, "same_kind"):
            raise ConfigError(f"input {name!r} is {array.dtype}; the model wants {wanted.dtype}")
        if wanted.shape is not None and not _fits(array.shape, wanted.shape):
            shown = ", ".join("?" if size is None else str(size) for size in wanted.shape)
            raise ConfigError(f"input {name!r} is {list(array.shape)}; the model wants [{shown}]")
        if wanted.rows is not None and array.size:
            furthest = int(array.max() if array.max() >= wanted.rows else array.min())
            if not -wanted.rows <= furthest < wanted.rows:
                raise ConfigError(
                    f"input {name!r} holds {furthest}, and looks up a table of {wanted.rows} rows; "
                    "are the data of another type, or of another tokenizer?"
                )
        completed[name] = array.astype(wanted.dtype, copy=False)
    return completed


def drop_caches(model: ir.Model, feed: Mapping[str, Any]) -> set[str]:
    """Removes, in place, the empty caches of attention nodes that may do without them.

    Their sizes are not always known, and a cache of another size than the node's is refused.

    Args:
        model: The model.
        feed: A feed. Caches that it lacks, and those that are empty in it, are removed.

    Returns:
        The names of the inputs that are gone.
    """
    dropped = set()
    given = {name for name, array in feed.items() if np.asarray(array).size}
    for value in [value for value in model.graph.inputs if value.name not in given]:
        uses = list(value.uses())
        if not all(use.node.op_type == "GroupQueryAttention" and use.idx in (3, 4) for use in uses):
            continue
        for node, index in uses:
            node.replace_input_with(index, None)
            node.attributes.pop("sliding_window_cache", None)  # how a cache is kept that is gone
        if uses:
            model.graph.inputs.remove(value)
            dropped.add(str(value.name))
    return dropped


def random_feeds(model: ir.Model, tokens: int, seed: int) -> Feed:
    """Returns random inputs that fit a model's signature, one sequence of them.

    Floating-point inputs are normally distributed; numbers that look up rows of a table are within
    it; a mask, positions and an empty cache follow as in `complete`.

    Args:
        model: The model.
        tokens: The length of the sequence, and of every dimension that is open and no batch.
        seed: Of the random values.

    Raises:
        ConfigError: What an input should be does not follow from the model.
        SourceError: An input is no tensor of numbers.
    """
    rng = np.random.default_rng(seed)
    needed = inputs_of(model)
    made = {}
    for value in model.graph.inputs:
        wanted = needed.get(str(value.name))
        if wanted and (array := _random(value, wanted, tokens, rng)) is not None:
            made[wanted.name] = array
    return complete(made, needed, list(needed))


def read_feeds(
    path: str | os.PathLike[str],
    inputs: Mapping[str, Input],
    *,
    name: str | None = None,
    dtype: str = "uint8",
    window: int = 256,
    windows: int = 128,
) -> Iterator[Feed]:
    """Reads data for a model.

    * `.npz` and `.safetensors` hold arrays by input name, `.npy` holds one of them. The first axis
      counts samples, each of which is one feed, [1, ...].
    * Any other file, and a `.npy` of one axis, holds tokens one after the other, which are cut
      into windows of one length, evenly spaced: [1, window].

    Args:
        path: The file.
        inputs: The model's inputs, from `inputs_of`.
        name: The input that an array without a name is for; `input_ids`, or the only input, where
            it is left out.
        dtype: The type of the numbers in a raw file of tokens, little-endian.
        window: Tokens per feed.
        windows: How many feeds at most; they never overlap.

    Raises:
        SourceError: The file cannot be read, or holds nothing.
        ConfigError: The arrays do not fit together, or it is not clear which input they are for.
    """
    path = Path(path)
    arrays = _arrays(path, dtype)
    if isinstance(arrays, dict):
        sizes = {len(array) if array.ndim else 0 for array in arrays.values()}
        if len(sizes) != 1 or not min(sizes):
            raise ConfigError(f"{path}: the arrays have no common first axis, which counts samples")
        chosen = _spread(sizes.pop(), 1, windows)
        return ({key: array[i : i + 1] for key, array in arrays.items()} for i in chosen)
    target = _target(inputs, name)
    if arrays.ndim > 1:
        chosen = _spread(len(arrays), 1, windows)
        return ({target: arrays[start : start + 1]} for start in chosen)
    chosen = _spread(len(arrays), window, windows)
    return ({target: arrays[None, start : start + window]} for start in chosen)


def read_inputs(
    path: str | os.PathLike[str],
    inputs: Mapping[str, Input],
    *,
    dtype: str = "uint8",
    window: int = 256,
) -> Feed:
    """Reads what a model is run on once: arrays as they are, or the first window of tokens.

    Args:
        path: A file as `read_feeds` takes it.
        inputs: The model's inputs, from `inputs_of`.
        dtype: The type of the numbers in a raw file of tokens, little-endian.
        window: Tokens, of a file that holds nothing else.

    Raises:
        SourceError: The file cannot be read, or holds nothing.
        ConfigError: It is not clear which input the data are for.
    """
    arrays = _arrays(Path(path), dtype)
    if isinstance(arrays, dict):
        return arrays
    if window < 1:
        raise ConfigError(f"window={window}; it may be any number from 1")
    return {_target(inputs, None): arrays if arrays.ndim > 1 else arrays[None, :window]}


def _arrays(path: Path, dtype: str) -> Array | dict[str, Array]:
    """Returns what a file holds, which is something."""
    found = _read(path, dtype)
    named = found if isinstance(found, dict) else {"": found}
    if not named or not any(array.size for array in named.values()):
        raise SourceError(f"{path} holds no data")
    return found


def _read(path: Path, dtype: str) -> Array | dict[str, Array]:
    try:
        if path.is_dir():
            raise SourceError(f"cannot read {path}: it is a folder; name a file of data")
        if path.suffix == ".npy":
            array: Array = np.load(path, mmap_mode="r")
            return array.reshape(-1) if not array.ndim else array
        if path.suffix == ".npz":
            with np.load(path) as file:
                return {name: file[name] for name in file.files}
        if path.suffix == ".safetensors":
            from safetensors.numpy import load_file

            return dict(load_file(path))
        if dtype not in TOKEN_DTYPES:
            raise ConfigError(f"dtype={dtype!r}; it may be {', '.join(TOKEN_DTYPES)}")
        size, wanted = path.stat().st_size, np.dtype(dtype).newbyteorder("<")
        if size % wanted.itemsize:
            raise SourceError(f"cannot read {path}: {size} bytes are no whole number of {dtype}")
        return np.fromfile(path, wanted)
    except QMoEError:
        raise
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # of many types, depending on who reads
        kind = path.suffix.removeprefix(".")
        raise SourceError(f"cannot read {path}: it is no {kind} file of numbers") from error


def _target(inputs: Mapping[str, Input], name: str | None) -> str:
    if name is not None:
        if name not in inputs:
            raise ConfigError(f"the model has no input {name!r}; it has {', '.join(inputs)}")
        return name
    if _TOKENS in inputs:
        return _TOKENS
    if len(inputs) == 1:
        return next(iter(inputs))
    raise ConfigError(f"which input are the data for? It may be {', '.join(inputs)}")


def _spread(length: int, window: int, windows: int) -> list[int]:
    """Returns where windows begin that are evenly spaced and do not overlap."""
    for what, size in (("window", window), ("windows", windows)):
        if size < 1:
            raise ConfigError(f"{what}={size}; it may be any number from 1")
    count = max(min(windows, length // window), 1)
    return [int(start) for start in np.linspace(0, max(length - window, 0), count)]


def _missing(wanted: Input, given: Mapping[str, Array]) -> Array | None:
    """Returns what an input is that follows from the others, or None."""
    leading = given.get(_TOKENS, given.get(_EMBEDDINGS))
    if leading is None or leading.ndim < 2 or wanted.shape is None:
        return None
    batch, length = leading.shape[:2]
    if wanted.name == "attention_mask" and len(wanted.shape) == 2:
        return np.ones((batch, length), wanted.dtype)
    if wanted.name == "position_ids":
        sizes = (*wanted.shape[:-2], batch, length)
        if None not in sizes:
            return np.broadcast_to(np.arange(length, dtype=wanted.dtype), sizes)
    if wanted.name.startswith("past"):
        first, *others = wanted.shape
        return np.zeros((first or batch, *(size or 0 for size in others)), wanted.dtype)
    return None


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        size in (None, actual) for actual, size in zip(shape, wanted, strict=True)
    )


def _random(value: ir.Value, wanted: Input, tokens: int, rng: np.random.Generator) -> Array | None:
    """Returns values for an input, None where they are unknown, or follow from others."""
    name = str(value.name).lower()
    if value.shape is None or value.dtype is None or name.startswith("past"):
        return None
    shape = [_size(size, tokens) for size in value.shape]
    if math.prod(shape) > _MOST_NUMBERS:
        raise ConfigError(f"input {value.name} has {math.prod(shape):.3g} numbers")
    if value.dtype.is_floating_point():
        return rng.standard_normal(shape).astype(wanted.dtype)
    if wanted.dtype == np.bool_:
        return np.asarray(rng.integers(0, 2, shape)).astype(np.bool_)
    rows = None if "mask" in name or "position" in name else _rows(value, in_branches=True)
    return None if rows is None else rng.integers(0, rows, shape, wanted.dtype)


def _size(size: int | ir.SymbolicDim, tokens: int) -> int:
    """Returns a size for a dimension: one sequence of some tokens."""
    if isinstance(size, int):
        return size
    return 1 if "batch" in str(size.value).lower() else tokens


def _rows(value: ir.Value, *, in_branches: bool) -> int | None:
    """Returns how many rows the tables have that a value looks up, None where it looks up none.

    What a branch looks up counts where that is asked for: it may be the branch that is not taken.
    """
    sizes = []
    pending, seen = [value], {value}
    while pending:
        for node, index in pending.pop().uses():
            if node.op_type in _THROUGH and index == 0:
                pending += [output for output in node.outputs if output not in seen]
                seen.update(node.outputs)
            counts = node.op_type == "Gather" and (in_branches or node.graph is value.graph)
            table = ops.static_shape(node.inputs[0]) if counts else None
            if index == 1 and table and table[0] and not node.attributes.get_int("axis", 0):
                sizes.append(table[0])
    return min(sizes, default=None)
