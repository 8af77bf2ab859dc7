"""A search for the scales that cost least; what an expert sees decides what an error counts.

For integers, a block's scale (and its zero point, where there is one) is chosen so that
sum_k w_k (x_k - q_k)^2 is least, w being the mean square of what column k is multiplied with, or
1 where nothing is known of it. The scales tried are fractions of the one that reaches the block's
peak, with either sign where `Spec.signed` allows it, or fractions of the block's range, with the
zero points next to its middle. The best one is fitted to its codes by least squares, rounded to the
type that is stored, and the codes chosen anew, several times. Round to nearest takes part, so that
the choice is never worse than `rtn`'s, and weights that it keeps exactly stay exact.

Least squares shrink: what they leave is orthogonal to the codes, so the codes are shorter than the
weights, by 11 % of the square with 2 bits. Outputs that are all too small, layer after layer, harm
a model more than the same error at random. So in the end the scales of a row are multiplied by the
one factor that makes sum_k w_k x_k q_k = sum_k w_k x_k^2, which leaves the row's output as large as
it was. It is 1 where nothing is lost.

mxfp4 and nvfp4 choose among the scales next to `rtn`'s, and the expert's scale takes the factor.
fp8 is left to `rtn`: an error in a float is relative, so that its scale hardly matters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec, pack
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers._checks import check, check_statistics, finite_float32
from qmoe_rules.quantizers.engine import kernels
from qmoe_rules.quantizers.rtn import rtn, rtn_numpy, smallest_scale
from qmoe_rules.statistics import Statistics

__all__ = ["NumpyEngine", "candidates", "search", "search_numpy", "stored", "whole_gain"]
