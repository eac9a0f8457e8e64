"""What a KV cache refuses, and what it only warns of."""

from ..types import KVLockError


class KVCacheError(KVLockError, RuntimeError):
    """A KV cache that cannot be: settings, a directory, a key or a level that does not fit."""


class KVCacheWarning(UserWarning):
    """A file of a KV cache that is ignored: the run goes on, and the level is computed and written again."""
