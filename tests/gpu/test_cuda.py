"""What a CUDA device makes of every case; needs onnxruntime-gpu and a device, or is skipped.

Every case runs in a process of its own, several at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from tests.gpu.case import Case
from tests.gpu.cases import cases, write
from tests.gpu.run_case import CUDA, read_cases, run_all

JOBS = 6
CASES = cases()

pytestmark = pytest.mark.skipif(
    CUDA not in ort.get_available_providers(), reason=f"this onnxruntime has no {CUDA}"
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, Any]]:
    """What became of every case, by name."""
    folder: Path = tmp_path_factory.mktemp("cases")
    write(folder, CASES)
    listed = read_cases(folder)
    (first,) = run_all(folder, listed[:1], jobs=1)
    if first["verdict"] == "no device":
        pytest.skip(first["message"])
    return {result["name"]: result for result in run_all(folder, listed, JOBS)}


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_the_device_does_what_the_contract_says(
    case: Case, results: Mapping[str, Mapping[str, Any]]
) -> None:
    result = results[case.name]
    assert result["verdict"] in case.verdicts, result
    assert case.message in result["message"], result
