"""`Segment`: a part of the model in ONNX Runtime.

bfloat16 becomes float32 throughout: ONNX Runtime's CPU provider has hardly any bfloat16 kernels,
numpy has no such type, and the statistics only gain.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from qmoe_rules import ops
from qmoe_rules.errors import SourceError
from qmoe_rules.saving import save

__all__ = ["Segment"]

Array = npt.NDArray[Any]

_WIDENED = {"to", "dtype", "output_dtype", "stash_type"}
_LOOKUP = re.compile(
    r"Name:'([^']*)' .*out of data bounds, idx=(-?\d+) must be within .* range \[-?\d+,(-?\d+)\]"
)
_SILENT = 4  # ONNX Runtime's errors come as exceptions too


class Segment:
    """A model that is written to a folder for as long as its session lives."""

    def __init__(
        self,
        model: ir.Model,
        dtypes: Mapping[str, np.dtype],
        folder: Path,
        providers: Sequence[str],
    ) -> None:
        """Starts a session.

        Args:
            model: The model; it is changed.
            dtypes: The types of its inputs, where the model may not know them.
            folder: Where it may be written.
            providers: The execution providers.

        Raises:
            SourceError: ONNX Runtime does not take the model.
        """
        for value in model.graph.inputs:
            value.type = ir.TensorType(
                value.dtype or ir.DataType.from_numpy(dtypes[str(value.name)])
            )
        _widen(model)
        self._dtypes = {str(v.name): v.dtype.numpy() for v in model.graph.inputs if v.dtype}
        self._names = [str(value.name) for value in model.graph.outputs]
        self._folder = tempfile.TemporaryDirectory(dir=folder, prefix="segment-")
        try:
            self._session = _session(model, Path(self._folder.name) / "model.onnx", providers)
        except BaseException:
            self._folder.cleanup()
            raise

    def __call__(self, feed: Mapping[str, Array]) -> dict[str, Array]:
        """Returns the outputs by name.

        Raises:
            SourceError: ONNX Runtime cannot run it on this feed, or an output is no tensor.
        """
        given = {name: np.asarray(array, self._dtypes[name]) for name, array in feed.items()}
        try:
            outputs = self._session.run(self._names, given)
        except Exception as error:  # of many types, none of them public
            raise SourceError(f"ONNX Runtime cannot run the model: {_reason(error)}") from error
        for name, output in zip(self._names, outputs, strict=True):
            if not isinstance(output, np.ndarray) or output.dtype.hasobject:
                raise SourceError(
                    f"the model cannot be cut at {name}, which is no tensor of numbers"
                )
        return dict(zip(self._names, outputs, strict=True))

    def __enter__(self) -> Segment:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        del self._session
        self._folder.cleanup()


def _session(model: ir.Model, path: Path, providers: Sequence[str]) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise SourceError(
            f"calibration runs the model in ONNX Runtime: pip install onnxruntime ({error})"
        ) from error
    save(model, path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    try:
        return onnxruntime.InferenceSession(path, options, providers=list(providers))
    except Exception as error:  # of many types, none of them public
        raise SourceError(
            f"ONNX Runtime cannot run the model with {', '.join(providers)}: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Returns what ONNX Runtime says, in one line, without the number of its status."""
    text = " ".join(str(error).split())
    if found := _LOOKUP.search(text):
        node, row, last = found.groups()
        return (
            f"node {node!r} looks up row {row} of a table of {int(last) + 1}; is a feed longer "
            "than the model allows, or of another type or tokenizer?"
        )
    return re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)


def _widen(model: ir.Model) -> None:
    """Turns bfloat16 into float32, in place."""
    for graph in ops.graphs(model):
        for value in (*graph.inputs, *graph.initializers.values()):
            _widen_value(value)
        for node in graph:
            for value in node.outputs:
                _widen_value(value)
            for attribute in list(node.attributes.values()):
                if attribute.name in _WIDENED and attribute.value == ir.DataType.BFLOAT16:
                    node.attributes.add(ir.AttrInt64(attribute.name, ir.DataType.FLOAT))
                elif isinstance(attribute.value, ir.TensorProtocol) and (
                    wide := _widened(attribute.value)
                ):
                    node.attributes.add(ir.AttrTensor(attribute.name, wide))


def _widen_value(value: ir.Value) -> None:
    if value.dtype == ir.DataType.BFLOAT16:
        value.dtype = ir.DataType.FLOAT
    if value.const_value is not None and (wide := _widened(value.const_value)) is not None:
        value.const_value = wide


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol | None:
    """Returns a bfloat16 tensor in float32, made when it is asked for; None for any other."""
    if tensor.dtype != ir.DataType.BFLOAT16:
        return None
    make = partial(_wide_copy, tensor)
    return ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _wide_copy(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name)
