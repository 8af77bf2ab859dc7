"""What can go wrong, one class per cause, all under `QMoEError`."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "QMoEError",
    "SaveError",
    "SourceError",
    "UnsupportedNodeError",
    "VerificationError",
]


class QMoEError(Exception):
    """Base of every error that this library raises on purpose."""


class ConfigError(QMoEError, ValueError):
    """A recipe, or an argument, that no model could satisfy. Raised before any work starts."""


class SourceError(QMoEError, ValueError):
    """The source model cannot be used: missing, truncated, not ONNX, or weights not finite."""


class UnsupportedNodeError(QMoEError):
    """Some node could not be converted. Raised after the sweep, where the caller is strict."""


class SaveError(QMoEError, OSError):
    """The destination cannot be written. The source is untouched, and so is the destination."""


class VerificationError(QMoEError):
    """A converted model is not what the float model was; the message says which checks failed."""
