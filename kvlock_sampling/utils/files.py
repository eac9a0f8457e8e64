"""Files are there whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from ..types import KVLockError


@contextmanager
def atomic(
    path: str | os.PathLike[str], *, renaming: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[Path]:
    """A temporary path beside `path`; it becomes `path` when the block ends well, and is removed when it does not.

    Missing folders are made. The temporary name keeps the suffix, for writers that look at it. renaming: a context in
    which the temporary gets its name, a lock, say.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        with renaming():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder, and those it is in, also where another process removes an empty one at the same moment.

    Raises:
        OSError: it cannot be made.
    """
    for _ in range(10):
        with suppress(FileExistsError, FileNotFoundError):  # it was there, and is not any more
            return folder.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Make sure that a file can be written there, before the work that fills it. Missing folders are made.

    Raises:
        KVLockError: it cannot, and why.
    """
    try:
        if Path(path).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        with atomic(path) as temporary:
            temporary.touch()
            raise _Tried
    except _Tried:
        return
    except OSError as error:
        raise KVLockError(
            f"{os.fspath(path)!r} cannot be written: {error.strerror or error}.\n  Name a file in a folder of yours."
        ) from error


class _Tried(Exception):  # noqa: N818 - leaves `atomic` without the file coming to be
    pass


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write text or bytes to `path`. Returns the path."""
    data = content.encode() if isinstance(content, str) else content
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)
