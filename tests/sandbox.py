"""Runs the `qmoe` command in a process of its own, within limits, and watches what it touches.

One server imports everything once and forks for every run, so that a run costs milliseconds. A run
that takes too long, or too much memory, is ended by the system.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 10
"""Of processor time that a run may take; waiting counts three times as little."""
MEMORY = 1 << 30
"""Bytes that a run may take, beyond what the imported libraries do."""
_ADDRESSES = 3 << 30  # every thread reserves far more addresses than it uses

_CHANGES = frozenset({"os.setxattr", "os.symlink"}) | frozenset(
    f"os.{name}"
    for name in (
        "chmod",
        "chown",
        "link",
        "mkdir",
        "remove",
        "rename",
        "rmdir",
        "truncate",
        "utime",
    )
)
_STRANGE = ("socket.", "subprocess.", "os.exec", "os.fork", "os.system", "os.posix_spawn")


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        status: The exit status, negative where a signal ended it.
        stdout: What it printed.
        stderr: What it printed as an error.
        read: The files that it opened from Python.
        changed: The files that it opened for writing, made, moved or removed.
        strange: Events that a run has no use for: sockets, other processes.
        memory: Bytes that it took at most, beyond what the server has.
    """

    status: int
    stdout: str
    stderr: str
    read: list[str]
    changed: list[str]
    strange: list[str]
    memory: int

    @property
    def printed(self) -> str:
        """Everything that a terminal would show."""
        return self.stdout + self.stderr


class Sandbox:
    """The server, as long as the context lasts."""

    def __enter__(self) -> Sandbox:
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "COLUMNS": "100"}
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.sandbox"],
            cwd=Path(__file__).parents[1],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_error: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait()
        assert self._server.stdout is not None
        self._server.stdout.close()

    def __call__(self, *arguments: object, folder: Path) -> Outcome:
        """Runs `qmoe` with these arguments.

        Args:
            *arguments: The arguments.
            folder: Where the run may put temporary files.
        """
        return self.together([arguments], folder)[0]

    def together(self, runs: Sequence[Sequence[object]], folder: Path) -> list[Outcome]:
        """Runs `qmoe` several times at once, each with its arguments."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        texts = [[os.fsdecode(str(each)) for each in arguments] for arguments in runs]
        self._server.stdin.write(json.dumps({"runs": texts, "folder": str(folder)}) + "\n")
        self._server.stdin.flush()
        return [Outcome(**each) for each in json.loads(self._server.stdout.readline())]


@contextmanager
def opened_in(folder: Path) -> Iterator[list[str]]:
    """Collects the names of what any process opens in a folder, whatever library does it.

    The list is filled when the context ends.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    opened: list[str] = []
    descriptor = libc.inotify_init1(os.O_NONBLOCK)
    assert descriptor >= 0
    is_opened = 0x20
    assert libc.inotify_add_watch(descriptor, os.fsencode(folder), is_opened) >= 0
    try:
        yield opened
        try:
            data = os.read(descriptor, 1 << 20)
        except BlockingIOError:
            data = b""
        while data:
            length = int.from_bytes(data[12:16], sys.byteorder)
            opened.append(os.fsdecode(data[16 : 16 + length].rstrip(b"\0")))
            data = data[16 + length :]
    finally:
        os.close(descriptor)


def serve() -> None:
    """Answers requests until there are no more."""
    import numpy as np
    import onnxruntime  # noqa: F401

    import qmoe_rules.cli._running  # noqa: F401
    from qmoe_rules.formats import FORMATS, Spec
    from qmoe_rules.quantizers.rtn import rtn

    for dtype in (np.float32, np.float16):
        rtn(np.ones((32, 32), dtype), Spec(FORMATS["int4"], 0))
    for line in sys.stdin:
        request = json.loads(line)
        folder = Path(request["folder"])
        children = []
        for number, arguments in enumerate(request["runs"]):
            streams = [folder / f".{number}-{name}" for name in ("stdout", "stderr", "events")]
            child = os.fork()
            if not child:
                _run(arguments, folder, *streams)
            children.append((child, streams))
        outcomes = [vars(_outcome(child, streams)) for child, streams in children]
        print(json.dumps(outcomes), flush=True)  # noqa: T201


def _outcome(child: int, streams: Sequence[Path]) -> Outcome:
    """Waits for a child to end."""
    _, status, usage = os.wait4(child, 0)
    stdout, stderr, events = (
        path.read_text("utf-8", "surrogateescape") if path.exists() else "" for path in streams
    )
    for path in streams:
        path.unlink(missing_ok=True)
    seen: dict[str, list[str]] = {"read": [], "changed": [], "strange": []}
    for each in events.splitlines():
        kind, what = json.loads(each)
        seen[kind].append(what)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    memory = max(usage.ru_maxrss - own, 0) * 1024
    return Outcome(os.waitstatus_to_exitcode(status), stdout, stderr, memory=memory, **seen)


def _run(arguments: Sequence[str], folder: Path, *streams: Path) -> None:
    """Runs the command in a child; does not return."""
    status = 70
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(3 * SECONDS)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (size + _ADDRESSES, size + _ADDRESSES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number, path in enumerate(streams[:2], 1):
            os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ["TMPDIR"] = str(folder)
        os.chdir(folder)
        _watch(os.open(streams[2], os.O_CREAT | os.O_WRONLY | os.O_APPEND))

        from qmoe_rules.cli import main

        status = main(arguments)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(log: int) -> None:
    """Writes to a descriptor what the process does to files."""

    def note(kind: str, what: object) -> None:
        text = os.fsdecode(what) if isinstance(what, (str, bytes, os.PathLike)) else repr(what)
        os.write(log, json.dumps([kind, text]).encode() + b"\n")

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(given[0], (str, bytes)):
            writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
            note("changed" if given[2] & writes else "read", os.path.abspath(given[0]))
        elif event.startswith(_STRANGE):
            note("strange", f"{event} {given}")
        elif event in _CHANGES:
            inside = "."
            if event in ("os.remove", "os.rmdir") and given[1] >= 0:
                inside = os.readlink(f"/proc/self/fd/{given[1]}")
            for path in given[1:2] if event == "os.symlink" else given[:2]:
                if isinstance(path, (str, bytes, os.PathLike)):
                    note("changed", os.path.abspath(os.path.join(inside, os.fsdecode(path))))

    sys.addaudithook(hook)


if __name__ == "__main__":
    serve()
