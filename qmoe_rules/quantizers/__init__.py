"""Quantizers: one file, one verb, (weight [N, K], spec, statistics) -> QuantizedWeights."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from qmoe_rules.formats import Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import gptq, rtn, search
from qmoe_rules.statistics import Statistics

__all__ = ["METHODS", "Quantizer"]

Quantizer = Callable[[npt.NDArray[np.generic], Spec, Statistics | None], QuantizedWeights]

METHODS: dict[str, Quantizer] = {"rtn": rtn.rtn, "search": search.search, "gptq": gptq.gptq}
