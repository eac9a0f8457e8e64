"""What a bank refuses, and what it only warns of."""

from ..types import KVLockError


class BankError(KVLockError, RuntimeError):
    """A bank that cannot be: settings, a directory, a key or a level that does not fit."""


class BankWarning(UserWarning):
    """A file of a bank that is ignored: the run goes on, and the level is computed and written again."""
