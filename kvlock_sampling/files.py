"""Files are there whole or not at all: written under a temporary name in the same folder, then renamed."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path beside `path`; it becomes `path` when the block ends well, and is removed when it does not.

    Missing folders are made. The temporary name keeps the suffix, for writers that look at it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex[:8]}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], content: str | bytes) -> Path:
    """Write text or bytes to `path`. Returns the path."""
    data = content.encode() if isinstance(content, str) else content
    with atomic(path) as temporary:
        temporary.write_bytes(data)
    return Path(path)
