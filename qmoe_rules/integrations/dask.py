"""`cluster`: a Dask cluster as the executor of a save, for weights that many machines compute.

Only this module imports `distributed`. In Python any `Client` will do as well:
`save(model, path, executor=client.get_executor(), workers=...)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

from qmoe_rules.errors import ConfigError

__all__ = ["cluster"]

_PACKAGE = "qmoe-rules"
_TIMEOUT_SECONDS = 10


@contextmanager
def cluster(address: str, timeout: float = _TIMEOUT_SECONDS) -> Iterator[tuple[Executor, int]]:
    """Connects to a Dask cluster for a while.

    Args:
        address: Of the scheduler, such as tcp://127.0.0.1:8786.
        timeout: Seconds to wait for the scheduler, and for its first worker.

    Yields:
        What `save` takes as `executor` and as `workers`: as many as the cluster has threads.

    Raises:
        ConfigError: Dask is not installed, there is no scheduler at this address, it has no
            workers, or they have another version of this library, which may write other bytes.

    Example:
        >>> # with cluster("tcp://127.0.0.1:8786") as (executor, workers):
        >>> #     quantize("model.onnx", "quantized", executor=executor, workers=workers)
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise ConfigError(
            f"Dask is not installed: pip install 'qmoe-rules[dask]' ({error})"
        ) from error
    try:
        client = Client(address, timeout=timeout, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"there is no Dask scheduler at {address}: {error}") from error
    with client:
        _check_workers(client, address, timeout)
        # Not pure: a result that Dask remembers would stand for bytes of another file.
        yield client.get_executor(pure=False), sum(client.nthreads().values())


def _check_workers(client: Any, address: str, timeout: float) -> None:
    try:
        client.wait_for_workers(1, timeout=timeout)
    except TimeoutError:
        raise ConfigError(f"the Dask cluster at {address} has no workers") from None
    here = version(_PACKAGE)
    for worker, there in client.run(version, _PACKAGE, on_error="return").items():
        if isinstance(there, Exception):
            raise ConfigError(f"Dask worker {worker} has no {_PACKAGE}: {there}")
        if there != here:
            raise ConfigError(f"Dask worker {worker} has {_PACKAGE} {there}, and here is {here}")
