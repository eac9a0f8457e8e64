"""Which files of a directory are the KV cache's own. Nothing else in it is ever removed.

A name alone proves little: another tool may well keep a `manifest.json` in a folder that is named by 32 hex digits.
- a level is the KV cache's if its folder's manifest says so, or its own header does (a manifest may have been lost);
- a manifest is the KV cache's if it can be read, has this KV cache's form, and names the folder that it is in;
- a temporary is the KV cache's by its name, which is spelled out to the last digit: it may have no content yet.
What has a KV cache's name and is not its own counts towards the limit all the same, so that counting reads no file.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if sys.platform != "win32":
    import fcntl

STALE = 3600.0
"""Seconds after which a temporary file belongs to nobody, where no lock tells it."""

MANIFEST = "manifest.json"
ENTRY = "kvlock_bank"
"""What a level file's header says of the level is under this name."""

_LEVEL_STEM = r"sigma-\d\.\d{16}e[+-]\d{2,3}"
_FOLDER = re.compile(r"[0-9a-f]{32}")
_LEVEL = re.compile(rf"{_LEVEL_STEM}\.safetensors")
_TEMPORARY = re.compile(rf"\.(?:{_LEVEL_STEM}\.[0-9a-f]{{8}}\.tmp\.safetensors|manifest\.[0-9a-f]{{8}}\.tmp\.json)")


class File(NamedTuple):
    """A file with a KV cache's name as it was found: its folder's name and its own, bytes, and when it was last used."""

    folder: str
    name: str
    size: int
    used: int

    @property
    def is_level(self) -> bool:
        """Whether it is a level; else a manifest or a temporary."""
        return _LEVEL.fullmatch(self.name) is not None

    @property
    def is_stale(self) -> bool:
        """Whether it has not been touched for so long that nobody is writing it."""
        return time.time() - self.used / 1e9 > STALE


def files_in(root: Path) -> list[File]:
    """Every file with a KV cache's name in a directory, of all keys."""
    return [file for name in names_in(root) if _FOLDER.fullmatch(name) for file in files_of(root, name)]


def files_of(root: Path, folder: str) -> list[File]:
    """Every file with a KV cache's name in one folder."""
    found = []
    for name in names_in(root / folder):
        if name == MANIFEST or _LEVEL.fullmatch(name) or _TEMPORARY.fullmatch(name):
            with suppress(OSError):  # gone meanwhile
                about = os.stat(root / folder / name)
                found.append(File(folder, name, about.st_size, about.st_mtime_ns))
    return found


def names_in(folder: Path) -> list[str]:
    """What is in a folder; nothing where there is none."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def has_manifest(folder: Path) -> bool:
    """Whether the folder's manifest is this KV cache's: of its form, whatever the version, and of this folder."""
    try:
        about = json.loads((folder / MANIFEST).read_text())
    except (ValueError, OSError, RecursionError):
        return False
    return isinstance(about, dict) and {"version", "key"} <= about.keys() and _names(about.get("fingerprint"), folder)


def is_own_level(path: Path) -> bool:
    """Whether a level file's own header says that it belongs in its folder."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > os.fstat(file.fileno()).st_size:
                return False
            about = json.loads(json.loads(file.read(size))["__metadata__"][ENTRY])
        return _names(about["key"], path.parent)
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return False


def _names(fingerprint: Any, folder: Path) -> bool:
    return isinstance(fingerprint, str) and fingerprint[:32] == folder.name


def hold(out: BinaryIO, until: ExitStack) -> bool:
    """Mark a temporary as being written, also while it gets its name: its lock goes when `until` ends, or the process.

    Returns whether it is there: somebody may have taken it for a killed writer's before it was marked.
    """
    if sys.platform == "win32":
        return True
    kept = os.dup(out.fileno())  # one lock with `out`, which is closed before the file is renamed
    until.callback(os.close, kept)
    with suppress(OSError):  # a file system without locks
        fcntl.flock(kept, fcntl.LOCK_EX)
    return os.fstat(kept).st_nlink > 0


def remove_abandoned(root: Path, file: File) -> int:
    """Remove a temporary that nobody is writing: by its lock; by its age on Windows, and where files have no locks.

    Returns the bytes that are free now: 0 where it stays, and for files of other kinds.
    """
    if not _TEMPORARY.fullmatch(file.name):
        return 0
    path = root / file.folder / file.name
    try:
        if file.is_stale:
            path.unlink()
            return file.size
        if sys.platform != "win32":
            with open(path, "r+b") as claim:
                fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()  # with the lock held: a writer that is about to mark it sees that it is gone
            return file.size
    except OSError:  # it is being written, or others were faster
        pass
    return 0
