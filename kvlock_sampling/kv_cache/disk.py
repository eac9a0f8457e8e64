"""How much a KV cache's directory may hold. Room is made, and claimed, before anything is written.

What counts are the bytes of files with the KV cache's names, of all keys: levels, manifests and temporaries. Room is made
by removing whole levels, see `Disk.writing`, and only what is the KV cache's own, see `own`. A claim is the temporary file
itself, made at its full size while the directory is locked (`flock` on DIR/.lock): every thread and process that looks
next counts what is still being written. Its writer holds a lock on it, so that a killed writer's claim is known for
one and removed at once; without locks (Windows, some network file systems) it stands for an hour.

A level that is removed while another process, or another KV cache of this one, has it mapped stays readable there (Windows
refuses to remove it, and the next one goes); the file system has its room back when the last of them lets go.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..utils.files import atomic, make_folder
from .own import MANIFEST, File, files_in, files_of, has_manifest, hold, is_own_level, names_in, remove_abandoned
from .sizes import readable

if sys.platform != "win32":
    import fcntl


class NoRoom(Exception):  # noqa: N818 - a signal, the shelf decides what follows
    """The limit leaves no room, whatever may be removed is removed; the text says it in numbers."""


@dataclass
class _Directory:
    """What this process knows of a directory, whatever the number of its KV caches: which shelves are open in it."""

    writers: threading.Lock = field(default_factory=threading.Lock)
    guard: threading.Lock = field(default_factory=threading.Lock)
    readers: dict[str, list[Reader]] = field(default_factory=dict)


_DIRECTORIES: dict[str, _Directory] = {}


class Reader:
    """An open shelf: the levels of its folder that its run has used stay while it is open."""

    def __init__(self, directory: _Directory, folder: str) -> None:
        self._directory, self._folder = directory, folder
        self._names: set[str] = set()
        with directory.guard:
            directory.readers.setdefault(folder, []).append(self)

    def use(self, path: Path) -> None:
        """This level is used now: it is kept for this run, and the last to go for others."""
        with self._directory.guard:
            self._names.add(path.name)
        now = time.time_ns()  # the clock of the file system is coarser than levels are quick
        with suppress(OSError):
            os.utime(path, ns=(now, now))

    def restart(self) -> None:
        """Another run begins: what was used so far may go like the levels of an earlier one."""
        with self._directory.guard:
            self._names.clear()

    def close(self) -> None:
        """The shelf is closed."""
        with self._directory.guard:
            others = self._directory.readers[self._folder]
            others.remove(self)
            if not others:
                del self._directory.readers[self._folder]

    def names(self) -> set[str]:
        """The levels it has used. Called with the guard held."""
        return self._names


class Disk:
    """A KV cache's directory and its limit in bytes; None is no limit. forget: told of levels that were removed."""

    def __init__(self, root: Path, limit: int | None, forget: Callable[[set[Path]], None]) -> None:
        self.root, self.limit, self._forget = root, limit, forget
        self._directory = _DIRECTORIES.setdefault(os.path.realpath(root), _Directory())

    @property
    def used(self) -> int:
        """Bytes of the KV cache's files now."""
        return sum(file.size for file in files_in(self.root))

    def opened(self, folder: Path) -> Reader:
        """A shelf opens this folder."""
        return Reader(self._directory, folder.name)

    @contextmanager
    def writing(
        self, path: Path, size: int, reader: Reader | None = None, *, pressing: bool = False
    ) -> Iterator[BinaryIO]:
        """A file of exactly `size` bytes to write, for which there is room. It gets its name when the block ends well.

        Levels that have to go: those of keys that no shelf of this process has open, least recently used first; then
        those of this folder that no open shelf has used in its run. `pressing`: also those that `reader` itself has
        used, where the run could not go on otherwise.

        Raises:
            NoRoom: nothing was written, and no level removed.
            OSError: it could not be written; nothing is left behind.
        """
        # Under the lock as well: whoever counts meanwhile would find the file under neither name, or both.
        renaming = nullcontext if self.limit is None else self._locked
        with (
            ExitStack() as end,
            atomic(path, renaming=renaming) as temporary,
            self._claim(path.parent, size, reader, pressing, temporary, end) as out,
        ):
            yield out

    def sweep(self, folder: Path) -> None:
        """Remove what killed runs have left in this folder, limit or not."""
        for file in files_of(self.root, folder.name):
            remove_abandoned(self.root, file)

    def trim(self, folder: Path) -> None:
        """Bring the directory within its limit, as far as levels may go; those of this folder go last."""
        if self.limit is not None:
            with suppress(OSError), self._room(folder, 0, None, False):
                pass

    def _claim(
        self, folder: Path, size: int, reader: Reader | None, pressing: bool, temporary: Path, end: ExitStack
    ) -> BinaryIO:
        """Open the temporary, at its full size where there is a limit, and marked as being written until `end`."""
        with nullcontext() if self.limit is None else self._room(folder, size, reader, pressing):
            out = _create(temporary, end)
            try:
                if self.limit is not None:
                    out.truncate(size)
            except BaseException:
                out.close()
                raise
            return out

    @contextmanager
    def _room(self, folder: Path, size: int, reader: Reader | None, pressing: bool) -> Iterator[None]:
        """Room for so many bytes, and the directory locked, so that it can be taken."""
        removed: set[Path] = set()
        try:
            with self._locked():
                self._make_room(folder.name, size, reader, pressing, removed)
                yield
        finally:
            if removed:  # not under the lock: who is told takes locks of his own
                self._forget(removed)

    def _make_room(self, own: str, size: int, reader: Reader | None, pressing: bool, removed: set[Path]) -> None:
        assert self.limit is not None
        files = files_in(self.root)
        excess = sum(file.size for file in files) + size - self.limit
        if excess <= 0:
            return
        excess -= self._remove_rubbish(files, own, removed)  # first, and whatever else comes of it
        able = self._removable(files, own, reader, pressing)
        freed = sum(file.size for file in able)
        if size and freed < excess:
            raise NoRoom(
                f"{self.root} may hold {readable(self.limit)} and this needs {readable(size)}, for which "
                f"{readable(excess)} would have to go, and {readable(freed) if freed else 'nothing'} may"
            )
        for file in able:
            if excess <= 0:
                break
            excess -= self._remove(file, removed) + self._remove_if_bare(file.folder, own)
        if size and excess > 0:
            raise NoRoom(f"{self.root} may hold {readable(self.limit)}, and levels in it cannot be removed")

    def _remove_rubbish(self, files: list[File], own: str, removed: set[Path]) -> int:
        """Remove temporaries of killed runs, and manifests of keys that have no level. Returns the bytes freed."""
        with self._directory.guard:
            alive = {own, *self._directory.readers, *(file.folder for file in files if file.is_level)}
        total = 0
        for file in files:
            left = file.name == MANIFEST and file.is_stale and file.folder not in alive
            if left and has_manifest(self.root / file.folder):
                freed = self._remove(file, removed)
            else:
                freed = remove_abandoned(self.root, file)
            total += freed + (self._remove_if_bare(file.folder, own) if freed else 0)
        return total

    def _removable(self, files: list[File], own: str, reader: Reader | None, pressing: bool) -> list[File]:
        """Levels that may go, the first to go first."""
        with self._directory.guard:
            at_own = self._directory.readers.get(own, ())
            used = set().union(*(r.names() for r in at_own if not (pressing and r is reader)))
            closed = {file.folder for file in files if file.is_level} - {own, *self._directory.readers}
        ours = {folder for folder in {own, *closed} if has_manifest(self.root / folder)}
        able = [
            file
            for file in files
            if file.is_level
            and (file.folder in closed or (file.folder == own and file.name not in used))
            and (file.folder in ours or is_own_level(self.root / file.folder / file.name))
        ]
        return sorted(able, key=lambda file: (file.folder == own, file.used, file.name))

    def _remove(self, file: File, removed: set[Path]) -> int:
        """Remove a file. Returns the bytes that are free now: 0 where it is held, as Windows does with mapped files."""
        path = self.root / file.folder / file.name
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return 0
        removed.add(path)
        return file.size

    def _remove_if_bare(self, name: str, own: str) -> int:
        """A folder that has lost its last level goes as well, unless a shelf has it open. Returns the bytes freed."""
        folder, size = self.root / name, 0
        if name == own or name in self._directory.readers or not set(names_in(folder)) <= {MANIFEST}:
            return 0
        if has_manifest(folder):
            with suppress(OSError):
                size = (folder / MANIFEST).stat().st_size
                (folder / MANIFEST).unlink()
        with suppress(OSError):
            folder.rmdir()
        return size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with self._directory.writers, open(self.root / ".lock", "ab") as file:
            if sys.platform != "win32":
                with suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _create(path: Path, end: ExitStack) -> BinaryIO:
    """A new file, marked as being written until `end`; made again where others remove it or its folder before it is."""
    for _ in range(10):
        make_folder(path.parent)
        with suppress(FileNotFoundError):
            out = open(path, "wb")  # noqa: SIM115 - whoever asked closes it
            if hold(out, end):
                return out
            out.close()
    raise FileNotFoundError(errno.ENOENT, "it is removed whenever it is made", os.fspath(path))
