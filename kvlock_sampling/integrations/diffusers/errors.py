"""The error of this wing."""

from ...types import KVLockError


class PipelineError(KVLockError, ValueError):
    """A pipeline cannot be loaded, is of no known family, or was given an argument that does not fit it."""
