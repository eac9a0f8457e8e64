"""Write files atomically: under a temporary name in the same folder, then renamed."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

from ..types import KVLockError


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`, renamed to `path` if the block succeeds and removed otherwise.

    Missing folders are created. The temporary path keeps the suffix, because some writers read it, and is absolute,
    because ffmpeg takes what is before a colon for a protocol.
    """
    path = Path(os.path.realpath(os.path.expanduser(path)))  # a link stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise KVLockError if a file cannot be written, before the work that fills it. Nothing is created."""
    try:
        if (real := Path(os.path.realpath(os.path.expanduser(path)))).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if real.exists() and not os.access(real, os.W_OK):  # a rename would replace it all the same
            raise PermissionError(errno.EACCES, "it is write-protected")
        above = next(folder for folder in real.parents if folder.exists())
        with NamedTemporaryFile(dir=above, prefix=f".{real.stem}.", suffix=f".tmp{real.suffix}"):
            pass  # a name as long as that of `atomic`
    except OSError as error:
        raise KVLockError(
            f"{os.fspath(path)!r} cannot be written: {error.strerror or error}.\n  Name a file in a folder of yours."
        ) from error


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write text or bytes to `path` atomically and return the path."""
    with atomic(path) as temporary:
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    return Path(path)
