"""Workers in other processes: a Dask cluster, and what makes a worker die."""

from __future__ import annotations

import os
from typing import Any

import pytest

from qmoe_rules import quantizers
from tests.saves import SLABS


def dask_cluster(workers: int) -> Any:
    """A Dask cluster of worker processes."""
    distributed = pytest.importorskip("distributed")
    return distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, dashboard_address=":0", silence_logs="CRITICAL"
    )


def dies_in_the_tenth_slab() -> None:
    rtn, calls = quantizers.METHODS["rtn"], iter(range(SLABS))

    def deadly(*arguments: Any) -> Any:
        if next(calls) == 9:
            os._exit(1)
        return rtn(*arguments)

    quantizers.METHODS["rtn"] = deadly
