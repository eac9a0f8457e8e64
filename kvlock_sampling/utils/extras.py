"""Import optional packages, and name the extra to install when one is missing."""

from importlib import import_module
from types import ModuleType

from ..types import KVLockError


def require(module: str, extra: str) -> ModuleType:
    """Import a module, e.g. "PIL.Image", that belongs to an extra of this library, e.g. "video".

    Raises:
        KVLockError: The package is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # The package is installed, and one of its own dependencies is missing.
        raise KVLockError(
            f"this needs {package}, which is not installed.\n  pip install 'kvlock-sampling[{extra}]'"
        ) from error
