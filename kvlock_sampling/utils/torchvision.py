"""Import diffusers beside a torchvision that is installed but cannot be imported.

k-diffusion depends on torchvision, and the package index serves a CUDA build of it. Beside a CPU build of torch its
import fails ("operator torchvision::nms does not exist"). diffusers only checks that torchvision is installed, so the
import of its models fails as well. Python treats a module as absent while its entry in `sys.modules` is None.
"""

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
    except Exception:  # A mismatched binary raises RuntimeError, OSError, ImportError or AttributeError.
        return True
    return False


@contextmanager
def broken_torchvision_hidden() -> Iterator[None]:
    """Hide a broken torchvision from the imports inside the block. A working one stays visible."""
    if not torchvision_is_broken():
        yield
        return
    present = "torchvision" in sys.modules  # then it is hidden already
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if not present:
            sys.modules.pop("torchvision", None)
