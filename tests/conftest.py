"""What the tests share: real models, and small ones made to measure."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from qmoe_rules.quantizers.engine import kernels
from tests.calibrated import Call, noted_calls
from tests.command import Run
from tests.sandbox import Sandbox
from tests.workers import dask_cluster

MODELS = Path(__file__).parent / "models"
# More real models, where the project is checked out beside them.
SHARED = Path(__file__).parents[2] / "shared"

# The same examples in every run, however busy the machine is; the fuzz tests draw others.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")


@pytest.fixture
def tiny_fp32() -> Path:
    """A byte-level language model: 2 MoE layers, 8 experts, hidden and inter 128, top-2."""
    return MODELS / "bytelm-tiny8-fp32" / "model.onnx"


@pytest.fixture
def tiny_fp16() -> Path:
    """The same model in float16."""
    return MODELS / "bytelm-tiny8-fp16" / "model.onnx"


@pytest.fixture(params=["fp32", "fp16"])
def tiny(request: pytest.FixtureRequest) -> Path:
    """The model in either type."""
    path: Path = request.getfixturevalue(f"tiny_{request.param}")
    return path


@pytest.fixture
def source(tiny_fp32: Path, tmp_path: Path) -> Path:
    """A copy of the float32 model that a test may alter."""
    shutil.copytree(tiny_fp32.parent, tmp_path / "source")
    return tmp_path / "source" / tiny_fp32.name


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a model is to be saved: in a folder that is not there yet."""
    return tmp_path / "out" / "model.onnx"


@pytest.fixture
def model_folder(source: Path) -> Path:
    """A folder with a copy of the float32 model and the files that come with a model."""
    folder = source.parent
    (folder / "config.json").write_text('{"model": "tiny"}')
    (folder / "tokenizer" / "merges").mkdir(parents=True)
    (folder / "tokenizer" / "merges" / "a.txt").write_text("a b")
    return folder


@pytest.fixture
def qmoe(capsys: pytest.CaptureFixture[str]) -> Run:
    """The `qmoe` command, in this process."""
    return Run(capsys)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What the methods gptq and search are called with; they round to nearest instead."""
    return noted_calls(monkeypatch)


@pytest.fixture
def shared() -> Path:
    """The folder of shared models; skips the test where it is absent."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs the shared models beside the project")
    return SHARED


@pytest.fixture(scope="session")
def sandbox() -> Iterator[Sandbox]:
    """The `qmoe` command within limits, for all tests; skips where the system keeps none."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("the sandbox asks Linux to keep the limits")
    with Sandbox() as server:
        yield server


@pytest.fixture(scope="module")
def compiled_engine() -> None:
    """Without it, every comparison of the engines would compare numpy with itself."""
    assert kernels() is not None


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Dask cluster of two worker processes."""
    with dask_cluster(2) as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    """A client of the cluster, when both workers are there: one that was killed comes back."""
    with cluster.get_client() as client:
        client.wait_for_workers(2, timeout=60)
        yield client
