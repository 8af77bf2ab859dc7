"""`Statistics`: what one projection of one expert has seen of its inputs, from a calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Statistics"]


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
