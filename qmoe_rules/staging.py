"""`Staging`: files that appear in a folder all at once, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from qmoe_rules.errors import QMoEError, SaveError
from qmoe_rules.report import human_bytes

__all__ = ["HIDDEN", "Staging", "naming_errors", "resolved"]

HIDDEN = ".qmoe-"
"""How the names of hidden folders begin."""

_LOCK = "lock"


class Staging:
    """A hidden folder whose files move into the destination folder in the end.

    Attributes:
        destination: The folder that the files are for; it need not exist yet.
        path: The hidden folder, on the same disk.
        exclusive: Files of an `unfinished` folder by the name that they will have in the
            destination, where they must not replace another.
        obsolete: Returns the files of the destination that `commit` deletes last. It is asked when
            no other save can change them any more.
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
        self.exclusive: dict[str, Path] = {}
        self.obsolete: Callable[[], list[Path]] = list
        self._made: list[Path] = []
        self._closing = contextlib.ExitStack()

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
        except BaseException:
            self._closing.close()
            self._remove_made()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._closing:
            kept = error is not None and self._kept_as is not None and self._has_begun()
            shutil.rmtree(self.path if kept else self._hidden, ignore_errors=True)
        if error is not None:
            self._remove_made()
        if not kept and sys.platform == "win32":  # which does not remove a file that is locked
            with contextlib.suppress(OSError):
                (self._hidden / _LOCK).unlink()
                self._hidden.rmdir()

    def unfinished(self, work: str = "new") -> Path:
        """Returns a folder for files that are still written.

        Args:
            work: What is written, as a name: what an interrupted save has left of the same work is
                in the folder, and whatever was left of any other is gone. A worker that goes on
                after its save has ended writes to the files of its own work, or to none.
        """
        folder = self._hidden / "unfinished" / work
        with naming_errors(self.destination):
            folder.mkdir(parents=True, exist_ok=True)
            for other in folder.parent.iterdir():
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)
        return folder

    def has(self, name: str) -> bool:
        """Returns whether the destination has a file of this name, or will have it."""
        return os.path.lexists(self.destination / name) or (self.path / name).exists()

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
            SaveError: A file cannot be put in place, and the one named `last` has not been then.
        """
        with naming_errors(self.destination):
            if not self.destination.exists():
                self._appear()
                return
            with _alone_in(self.destination):
                self._replace(last)

    def _appear(self) -> None:
        """Makes the destination in one step."""
        for name, file in self.exclusive.items():
            file.replace(self.path / name)
        try:
            self.path.rename(self.destination)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            raise _overtaken(self.destination) from None

    def _replace(self, last: str) -> None:
        """Puts the files in place one after the other."""
        files = [file for file in sorted(self.path.rglob("*")) if file.is_file()]
        moves = {file: self.destination / file.relative_to(self.path) for file in files}
        for target in moves.values():
            self._refuse_obstacle(target)
        final = moves.pop(self.path / last)
        obsolete = set(self.obsolete()).difference(moves.values())
        with contextlib.ExitStack() as undo:
            for name, file in self.exclusive.items():
                self._claim(name, file, undo)
            for file, target in moves.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
            # From here on nothing is taken back: the new model may be in place.
            put_back = undo.pop_all()
        try:
            (self.path / last).replace(final)
        except OSError:
            put_back.close()
            raise
        for file in obsolete:
            with contextlib.suppress(OSError):
                file.unlink()

    def _has_begun(self) -> bool:
        return any(self._hidden.glob("unfinished/*/*"))

    def _claim(self, name: str, file: Path, undo: contextlib.ExitStack) -> None:
        """Moves a file to a name of the destination that nobody else has, even by now."""
        target = self.destination / name
        try:
            target.open("xb").close()
        except FileExistsError:
            raise _overtaken(target) from None
        undo.callback(target.unlink, missing_ok=True)
        file.replace(target)
        undo.callback(target.replace, file)

    def _hide(self, parent: Path) -> Path:
        if self._kept_as is None:
            return Path(tempfile.mkdtemp(dir=parent, prefix=HIDDEN))
        named = os.fsencode(self.destination / self._kept_as)
        name = f"{HIDDEN}resume-{hashlib.blake2b(named, digest_size=8).hexdigest()}"
        # The destination may have come to exist since a save was interrupted.
        earlier = self.destination.parent / name
        hidden = earlier if earlier.is_dir() else parent / name
        hidden.mkdir(mode=0o700, exist_ok=True)
        if not self._closing.enter_context(_locked(hidden / _LOCK)):
            raise SaveError(f"another process is saving {self.destination / self._kept_as}")
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


def _overtaken(path: Path) -> SaveError:
    return SaveError(f"cannot write {path}: another save has written it by now")


_held: dict[Path, object] = {}  # locks are held by processes: this one keeps its saves apart


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Holds a lock file for a while, and tells whether it does: another may hold it.

    The system lets go of it when this process ends, however it ends, and whatever processes it
    has started: these do not inherit a lock of this kind.
    """
    mine = object()
    if _held.setdefault(path, mine) is not mine:
        yield False
        return
    try:
        with path.open("ab") as file:
            yield _lock(file.fileno()) and _is_still(path, file.fileno())
    finally:
        del _held[path]


def _is_still(path: Path, descriptor: int) -> bool:
    """Returns whether a path is of an open file: another process may have removed it meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

    def _alone_in(_folder: Path) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()  # it cannot lock a folder

else:
    import fcntl

    def _lock(descriptor: int) -> bool:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @contextlib.contextmanager
    def _alone_in(folder: Path) -> Iterator[None]:
        """Lets one save at a time put its files into a folder, and find out what they replace."""
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # of file systems without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


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
