"""The error and the warning of the KV cache."""

from ..types import KVLockError


class KVCacheError(KVLockError, RuntimeError):
    """A wrong setting, an unusable directory, or K/V that are not complete."""


class KVCacheWarning(UserWarning):
    """A level cannot be kept or used: its file is damaged or cannot be written, or the budget is too small."""
