"""Small models quantized by a calibration, and methods that note what they are called with."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from qmoe_rules import QuantizeMoEPass, Report
from qmoe_rules.formats import Spec
from qmoe_rules.quantized import QuantizedWeights
from qmoe_rules.quantizers import METHODS, rtn
from qmoe_rules.statistics import Statistics
from tests.calibrations import SMALL, several
from tests.moe_models import Array

Call = tuple[Array, Statistics | None]


def noted_calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Returns what gptq and search are called with; they round to nearest instead."""
    seen: list[Call] = []

    def method(weight: Array, spec: Spec, statistics: Statistics | None) -> QuantizedWeights:
        seen.append((np.array(weight), statistics))
        return rtn.rtn(weight, spec)

    for name in ("gptq", "search"):
        monkeypatch.setitem(METHODS, name, method)
    return seen


def feeds(count: int = 4) -> list[dict[str, Array]]:
    return several(SMALL, count)


def planned(model: ir.Model, **fields: Any) -> tuple[ir.Model, Report]:
    run = QuantizeMoEPass(block_size=16, target="cpu", **fields)
    run(model)
    return model, run.report
