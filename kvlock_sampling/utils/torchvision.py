"""Import around a broken torchvision.

k-diffusion depends on torchvision, and the registry's torchvision is built for CUDA. Beside a CPU build of torch it is
installed but cannot be imported ("operator torchvision::nms does not exist"), and diffusers, which only asks whether
it is installed, then fails to import its models. While a module is None in `sys.modules`, Python calls it absent.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


def torchvision_is_broken() -> bool:
    """Whether torchvision is installed but fails to import."""
    if sys.modules.get("torchvision") is not None or find_spec("torchvision") is None:
        return False
    try:
        importlib.import_module("torchvision")
    except Exception:  # whatever a mismatched binary raises: RuntimeError, OSError, ImportError, AttributeError
        return True
    return False


@contextmanager
def broken_torchvision_hidden() -> Iterator[None]:
    """Make a broken torchvision look absent to the imports inside the block; a working one is left alone."""
    if not torchvision_is_broken():
        yield
        return
    missing = object()
    before = sys.modules.get("torchvision", missing)
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is missing:
            sys.modules.pop("torchvision", None)
        else:
            sys.modules["torchvision"] = before  # type: ignore[assignment]
