"""`Staging`: files that appear in a folder all at once, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from qmoe_rules.errors import QMoEError, SaveError
from qmoe_rules.report import human_bytes

__all__ = ["Staging", "naming_errors", "resolved"]


class Staging:
    """A hidden folder whose files move into the destination folder in the end.

    Attributes:
        destination: The folder that the files are for; it need not exist yet.
        path: The hidden folder, on the same disk.
        unfinished: A folder beside it for files that are still written, which an interrupted save
            may leave to the next.
        exclusive: Names of files that must not replace another.
        obsolete: Files of the destination that `commit` deletes last.
    """

    def __init__(self, destination: Path, kept_as: str | None = None) -> None:
        """Prepares a staging folder.

        Args:
            destination: The folder that the files are for.
            kept_as: Under which name an interrupted save is kept, to go on from; None lets go of
                everything.
        """
        self.destination = destination
        self._kept_as = kept_as
        self.exclusive: set[str] = set()
        self.obsolete: list[Path] = []
        self._made: list[Path] = []

    def __enter__(self) -> Staging:
        # Beside a folder that does not exist yet, so that it can appear in one rename.
        parent = self.destination if self.destination.exists() else self.destination.parent
        try:
            with naming_errors(self.destination):
                self._make_folders(parent)
                self._refuse_long_name()
                self._hidden = self._hide(parent)
                self.path = self._hidden / "files"
                shutil.rmtree(self.path, ignore_errors=True)
                self.path.mkdir()  # with ordinary permissions, unlike the one around it
                self.unfinished = self._hidden / "unfinished"
                self.unfinished.mkdir(exist_ok=True)
        except BaseException:
            self._remove_made()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None or self._kept_as is None:
            shutil.rmtree(self._hidden, ignore_errors=True)
        if error is not None:
            self._remove_made()

    def has(self, name: str) -> bool:
        """Returns whether the destination has a file of this name, or will have it."""
        return (self.destination / name).exists() or (self.path / name).exists()

    def require_space(self, needed: int) -> None:
        """Raises SaveError where the disk has less than `needed` bytes left."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise SaveError(
                f"no space on the disk of {self.destination}: {human_bytes(needed)} needed, "
                f"{human_bytes(free)} free"
            )

    def commit(self, last: str) -> None:
        """Moves every file into the destination, the one named `last` at the very end.

        Raises:
            SaveError: A file cannot be put in place; nothing has been moved then.
        """
        with naming_errors(self.destination):
            if not self.destination.exists():
                self.path.rename(self.destination)
                return
            files = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
            files.sort(key=lambda file: file == self.path / last)
            moves = [(file, self.destination / file.relative_to(self.path)) for file in files]
            for _, target in moves:
                self._refuse_obstacle(target)
            for file, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                if file.name in self.exclusive:
                    os.link(file, target)  # fails where another save has taken the name meanwhile
                    file.unlink()
                else:
                    file.replace(target)
        for file in self.obsolete:
            with contextlib.suppress(OSError):
                file.unlink()

    def _hide(self, parent: Path) -> Path:
        if self._kept_as is None:
            return Path(tempfile.mkdtemp(dir=parent, prefix=".qmoe-"))
        hidden = parent / f".qmoe-resume-{self.destination.name}-{self._kept_as}"
        hidden.mkdir(mode=0o700, exist_ok=True)
        return hidden

    def _refuse_obstacle(self, target: Path) -> None:
        if target.is_dir():
            raise SaveError(f"cannot write {target}: it is a folder")
        for folder in target.parents:
            if folder == self.destination:
                return
            if folder.exists() and not folder.is_dir():
                raise SaveError(f"cannot write {target}: {folder} is a file")

    def _refuse_long_name(self) -> None:
        """Asks the system for a file that cannot be: its answer tells a name that is too long."""
        with contextlib.suppress(FileNotFoundError):
            self.destination.stat()

    def _make_folders(self, folder: Path) -> None:
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def resolved(path: Path) -> Path:
    """Returns the absolute path with symbolic links followed.

    Raises:
        SaveError: The path can be of no file: a loop of links, or a name that is too long.
    """
    with naming_errors(path):
        try:
            real = path.resolve()
        except RuntimeError as error:  # a loop of links, before Python 3.13
            raise SaveError(f"cannot write to {path}: {error}") from error
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            real.stat()
        return real


@contextlib.contextmanager
def naming_errors(destination: Path) -> Iterator[None]:
    """Turns an operating system error into one that names the destination."""
    try:
        yield
    except QMoEError:
        raise
    except shutil.Error as error:
        raise SaveError(f"cannot write to {destination}: {error}") from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise SaveError(f"cannot write to {destination}: {reason}") from error
