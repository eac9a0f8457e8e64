"""The error of this room."""

from __future__ import annotations

from ...types import KVLockError


class PipelineError(KVLockError, ValueError):
    """A pipeline that cannot be loaded, is of no known family, or is used in a way it cannot mean."""
