"""`Statistics`: what one projection of one expert has seen of its inputs.

`Calibration` is a file of them, one safetensors file for a model, read one expert at a time. With
E experts of K columns it holds, for every MoE node and for its fc1 and fc2:

* `{node}/{projection}/tokens`, int64 [E]
* `{node}/{projection}/mean_square`, float32 [E, K]
* `{node}/{projection}/hessian/{expert}`, float32 [K, K], for experts that saw any token, in files
  that have Hessians
* `{node}/fc1/hessian`, float32 [K, K], over the tokens of all experts, in the same files

and in its metadata `format`, `version`, `fingerprints` (of every node, as JSON), `data` (a hash of
what the model was run on), `tokens` (how many went through the model) and `hessian`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qmoe_rules.errors import ConfigError, SourceError

__all__ = ["PROJECTIONS", "Calibration", "ProjectionStatistics", "Statistics"]

_FORMAT, _VERSION = "qmoe_rules.calibration", "2"

PROJECTIONS = ("fc1", "fc2")
"""The projections of a node whose gate and linear rows are in fc1, as every provider takes them."""

# The mean of the squares of n normal numbers is off by sqrt(2/n), which is 18 % here.
_TOKENS_FOR_MEAN = 64
# A Hessian of fewer rows than columns is singular; of twice as many it is fairly well known.
_TOKENS_PER_COLUMN = 2


@dataclass(frozen=True)
class Statistics:
    """What is known of the rows x that a projection is multiplied with, y = x @ W.T.

    Attributes:
        tokens: How many rows x there were: tokens that were routed to the expert.
        mean_square: float32 [K], the mean of x^2 over those rows; all zero where there were none.
        hessian: float32 [K, K], the mean of g^2 * x x^T over those rows, g being the weight that
            the router gave the expert; None where it was not collected.
    """

    tokens: int
    mean_square: npt.NDArray[np.float32]
    hessian: npt.NDArray[np.float32] | None = None


class Calibration:
    """The statistics of every expert of a model, in a file.

    Attributes:
        path: The file.
        fingerprints: The MoE nodes by name, each with a hash of what it computes.
        tokens: How many tokens went through the model.
        hessian: Whether there are Hessians.
        data: A hash of the data that the model was run on.

    Example:
        >>> # calibration = Calibration.load("calibration.safetensors")
        >>> # calibration.statistics("layers.0.moe", "fc1", 3).mean_square
    """

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Takes the metadata of a file at its word; `load` is how to get one that is checked."""
        self.path = path
        self.fingerprints: dict[str, str] = _fingerprints(metadata["fingerprints"])
        self.tokens = int(metadata["tokens"])
        self.hessian = metadata["hessian"] == "true"
        self.data = metadata["data"]
        self._counts: dict[tuple[str, str], npt.NDArray[np.int64]] = {}

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Opens a file and checks everything in it but the Hessians, which are checked when read.

        Raises:
            SourceError: There is no such file, it is no calibration, or it is broken.
        """
        path = Path(path).absolute()
        file = _open(path)
        metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise SourceError(f"{path} is not a calibration file (see qmoe calibrate)")
        if metadata.get("version") != _VERSION:
            raise SourceError(
                f"{path} has version {metadata.get('version')} of the calibration format, and "
                f"{_VERSION} is known"
            )
        try:
            calibration = cls(path, metadata)
        except (KeyError, ValueError) as error:
            raise SourceError(f"{path} is broken: its metadata: {error}") from error
        for node in calibration.fingerprints:
            for projection in PROJECTIONS:
                calibration._check(node, projection)
        return calibration

    @staticmethod
    def metadata(
        fingerprints: Mapping[str, str], *, data: str, tokens: int, hessian: bool
    ) -> dict[str, str]:
        """Returns the metadata of a file to be written; the arguments are the attributes."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "fingerprints": json.dumps(dict(fingerprints)),
            "data": data,
            "tokens": str(tokens),
            "hessian": "true" if hessian else "false",
        }

    @property
    def nodes(self) -> tuple[str, ...]:
        """The names of the MoE nodes, in the order of the model."""
        return tuple(self.fingerprints)

    def counts(self, node: str, projection: str) -> npt.NDArray[np.int64]:
        """Returns how many tokens every expert saw, int64 [E]."""
        key = (node, projection)
        if key not in self._counts:
            self._counts[key] = self._tensor(node, projection, "tokens")
        return self._counts[key]

    def columns(self, node: str, projection: str) -> int:
        """Returns K, the columns of a projection."""
        return int(self._slice(node, projection, "mean_square").get_shape()[-1])

    def statistics(self, node: str, projection: str, expert: int) -> Statistics:
        """Returns everything that is known of one expert, exactly as it was measured.

        Args:
            node: Name of the MoE node.
            projection: `"fc1"` or `"fc2"`.
            expert: Index of the expert.

        Raises:
            SourceError: The file is broken.
            ConfigError: The node is not in the file.
        """
        known = self._without_hessian(node, projection, expert)
        if not self.hessian or not known.tokens:
            return known
        hessian = self._hessian(node, projection, f"hessian/{expert}")
        return Statistics(known.tokens, known.mean_square, hessian)

    def pooled(self, node: str, projection: str) -> npt.NDArray[np.float32]:
        """Returns the mean of x^2 over the tokens of all experts, float32 [K]."""
        counts = self.counts(node, projection).astype(np.float64)
        squares = self._tensor(node, projection, "mean_square")
        pooled: npt.NDArray[np.float32] = counts @ squares / max(counts.sum(), 1.0)
        return pooled.astype(np.float32)

    def pooled_hessian(self, node: str) -> npt.NDArray[np.float32]:
        """Returns the Hessian of fc1 over the tokens of all experts, float32 [H, H].

        fc2 has none: the inputs of one expert's fc2 have nothing to do with those of another's.
        """
        return self._hessian(node, "fc1", "hessian")

    def for_expert(
        self, node: str, projection: str, expert: int, *, hessian: bool = True
    ) -> Statistics | None:
        """Returns what a quantizer should go by for one expert.

        That is what the expert has seen itself, where it saw enough: 64 tokens for the mean of
        x^2, and 2 K tokens for its Hessian. Without enough for that there is none, so that the
        quantizer does what the mean alone allows; and an expert of fewer than 64 tokens has the
        mean over all experts, and keeps its own count.

        All experts see inputs of the same kind in fc1, and a Hessian of few tokens fits those
        better than it fits others: there the one of all experts takes part, for 2 K tokens.

        Args:
            node: Name of the MoE node.
            projection: `"fc1"` or `"fc2"`.
            expert: Index of the expert.
            hessian: Whether the quantizer wants a Hessian.

        Returns:
            The statistics, or None where no expert of the node saw a token.
        """
        counts = self.counts(node, projection)
        if hessian and self.hessian and counts[expert] >= self.enough(node, projection, True):
            known = self.statistics(node, projection, expert)
            return known if projection != "fc1" else self._shrunk(node, known)
        if counts[expert] >= self.enough(node, projection, False):
            return self._without_hessian(node, projection, expert)
        if not counts.any():
            return None
        return Statistics(int(counts[expert]), self.pooled(node, projection))

    def _shrunk(self, node: str, known: Statistics) -> Statistics:
        """Returns statistics of fc1 with a Hessian that leans towards that of all experts."""
        share = self.enough(node, "fc1", True) / known.tokens
        hessian = self.pooled_hessian(node)
        hessian *= np.float32(share)
        hessian += np.asarray(known.hessian)
        hessian /= np.float32(1 + share)
        return Statistics(known.tokens, known.mean_square, hessian)

    def fallbacks(self, node: str, projection: str, *, hessian: bool) -> list[int]:
        """Returns the experts for which `for_expert` has less than a quantizer wants."""
        few = self.counts(node, projection) < self.enough(node, projection, hessian)
        return [int(expert) for expert in np.flatnonzero(few)]

    def enough(self, node: str, projection: str, hessian: bool) -> int:
        """Returns how many tokens are enough for a Hessian, or for a mean."""
        if not hessian:
            return _TOKENS_FOR_MEAN
        return max(_TOKENS_PER_COLUMN * self.columns(node, projection), _TOKENS_FOR_MEAN)

    def check(self, fingerprints: Mapping[str, str]) -> None:
        """Refuses a file that is of another model.

        Args:
            fingerprints: Of the model's nodes, by name (see `fingerprints.fingerprints`).

        Raises:
            ConfigError: No node has a name of the file, or one that has computes something else.
        """
        if fingerprints and not fingerprints.keys() & self.fingerprints.keys():
            raise ConfigError(
                f"{self.path} is of another model: it has no node {next(iter(fingerprints))}"
            )
        for node, fingerprint in fingerprints.items():
            if self.fingerprints.get(node, fingerprint) != fingerprint:
                raise ConfigError(
                    f"{self.path} is of another model: the weights or attributes of node {node} "
                    "are not those that were calibrated"
                )

    def check_shape(self, node: str, projection: str, experts: int, columns: int) -> None:
        """Refuses a file whose statistics of a projection are of another shape.

        Args:
            node: Name of the MoE node, which is in the file.
            projection: `"fc1"` or `"fc2"`.
            experts: E of the weights.
            columns: K of the weights.

        Raises:
            SourceError: The file is broken: of the same model it has the same shapes.
        """
        found = (len(self.counts(node, projection)), self.columns(node, projection))
        if found != (experts, columns):
            raise self._broken(
                f"{node}/{projection} has {found[0]} experts and {found[1]} columns; the weights "
                f"have {experts} and {columns}"
            )

    @property
    def identity(self) -> tuple[object, ...]:
        """What equal calibrations have in common, whichever files they are in."""
        model = hashlib.blake2b(json.dumps(self.fingerprints).encode(), digest_size=8).hexdigest()
        return model, self.data, self.tokens, self.hessian

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.identity == other.identity

    def __hash__(self) -> int:
        return hash(self.identity)

    def __reduce__(self) -> tuple[Any, ...]:
        return Calibration.load, (str(self.path),)

    def __repr__(self) -> str:
        model, data, tokens, hessian = self.identity
        kind = "Hessians" if hessian else "means"
        return f"Calibration({kind} of {tokens} tokens, model {model}, data {data})"

    @functools.cached_property
    def _file(self) -> Any:
        return _open(self.path)

    def _check(self, node: str, projection: str) -> None:
        counts = self.counts(node, projection)
        squares = self._tensor(node, projection, "mean_square")
        name = f"{node}/{projection}"
        if counts.ndim != 1 or squares.ndim != 2 or len(counts) != len(squares):
            shapes = f"tokens {list(counts.shape)} and mean_square {list(squares.shape)}"
            raise self._broken(f"{name} has {shapes}")
        if (counts < 0).any() or (squares < 0).any():
            raise self._broken(f"{name} has negative counts or squares")
        for expert in np.flatnonzero(counts) if self.hessian else ():
            self._slice(node, projection, f"hessian/{expert}")
        if self.hessian and projection == "fc1" and counts.any():
            self._slice(node, projection, "hessian")

    def _without_hessian(self, node: str, projection: str, expert: int) -> Statistics:
        squares = self._slice(node, projection, "mean_square")
        return Statistics(
            int(self.counts(node, projection)[expert]), squares[expert : expert + 1][0]
        )

    def _hessian(self, node: str, projection: str, part: str) -> npt.NDArray[np.float32]:
        hessian: npt.NDArray[np.float32] = self._tensor(node, projection, part)
        if hessian.shape != (self.columns(node, projection),) * 2:
            raise self._broken(f"{node}/{projection}/{part} is {list(hessian.shape)}")
        return hessian

    def _slice(self, node: str, projection: str, part: str) -> Any:
        """Returns a tensor that has not been read yet."""
        from safetensors import SafetensorError

        if node not in self.fingerprints or projection not in PROJECTIONS:
            known = f"{' and '.join(PROJECTIONS)} of {', '.join(self.nodes)}"
            raise ConfigError(f"{self.path} has no {node}/{projection}; it has {known}")
        name, dtype = f"{node}/{projection}/{part}", "I64" if part == "tokens" else "F32"
        try:
            found = self._file.get_slice(name)
        except SafetensorError as error:
            raise self._broken(f"it has no {name}") from error
        if found.get_dtype() != dtype:
            raise self._broken(f"{name} is {found.get_dtype()}, not {dtype}")
        return found

    def _tensor(self, node: str, projection: str, part: str) -> npt.NDArray[Any]:
        from safetensors import SafetensorError

        try:
            array: npt.NDArray[Any] = self._slice(node, projection, part)[...]
        except SafetensorError as error:  # of a tensor without numbers
            raise self._broken(f"{node}/{projection}/{part}: {error}") from error
        if not np.isfinite(array).all():
            raise self._broken(f"{node}/{projection}/{part} holds an infinity or a NaN")
        return array

    def _broken(self, reason: str) -> SourceError:
        return SourceError(f"{self.path} is broken: {reason}")


@dataclass(frozen=True)
class ProjectionStatistics:
    """The statistics of one projection of one node; equal ones are of equal calibrations.

    Attributes:
        calibration: Where they are read from.
        node: Name of the MoE node.
        projection: `"fc1"` or `"fc2"`.
        hessian: Whether the quantizer wants Hessians.
    """

    calibration: Calibration
    node: str
    projection: str
    hessian: bool = False

    def __call__(self, expert: int) -> Statistics | None:
        """Returns what a quantizer should go by for one expert."""
        return self.calibration.for_expert(self.node, self.projection, expert, hessian=self.hessian)

    @property
    def enough(self) -> int:
        """How many tokens an expert must have seen for all that the quantizer wants."""
        return self.calibration.enough(self.node, self.projection, self.hessian)

    def fallbacks(self) -> list[int]:
        """Returns the experts that saw fewer."""
        return self.calibration.fallbacks(self.node, self.projection, hessian=self.hessian)


def _fingerprints(text: str) -> dict[str, str]:
    try:
        found = json.loads(text)
    except RecursionError:
        found = None
    if not isinstance(found, dict) or not all(isinstance(each, str) for each in found.values()):
        raise ValueError("fingerprints are no hashes by name")
    return found


def _open(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe may never end
            raise SourceError(f"cannot read {path}: it is no regular file")
        return safe_open(path, framework="numpy")
    except FileNotFoundError:
        raise SourceError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"cannot read {path}: {reason}") from error
    except SafetensorError as error:
        raise SourceError(f"{path} is not a calibration file: {error}") from error
