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


@contextmanager
def broken_torchvision_hidden() -> Iterator[None]:
    """Hide a broken torchvision from the imports inside the block. A working one stays visible."""
    hide = "torchvision" not in sys.modules and find_spec("torchvision") is not None
    if hide:
        try:
            importlib.import_module("torchvision")
            hide = False
        except Exception:  # A mismatched binary raises RuntimeError, OSError, ImportError or AttributeError.
            sys.modules["torchvision"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            sys.modules.pop("torchvision", None)
