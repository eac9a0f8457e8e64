"""Import optional packages: name the extra to install when one is missing, and hide a torchvision that is broken."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from ..types import KVLockError


def require(module: str, extra: str) -> ModuleType:
    """Import a module, e.g. "PIL.Image", of an extra, e.g. "video". Raises KVLockError if it is not installed."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != package:
            raise  # The package is installed, and one of its own dependencies is missing.
        raise KVLockError(
            f"this needs {package}, which is not installed.\n  pip install 'kvlock-sampling[{extra}]'"
        ) from error


def hide_broken_torchvision() -> None:
    """Let all later imports take a broken torchvision for absent, as Python does where `sys.modules` holds None.

    k-diffusion depends on it, and the package index serves a CUDA build, whose import fails beside a CPU build of
    torch; diffusers only checks that it is installed, so the import of its models fails as well.
    """
    if "torchvision" not in sys.modules and find_spec("torchvision") is not None:
        try:
            import_module("torchvision")
        except Exception:  # A mismatched binary raises RuntimeError, OSError, ImportError or AttributeError.
            sys.modules["torchvision"] = None  # type: ignore[assignment]
