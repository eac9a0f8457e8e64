"""Import diffusers beside a torchvision that is installed but cannot be imported.

k-diffusion depends on torchvision, and the package index serves a CUDA build of it. Beside a CPU build of torch its
import fails ("operator torchvision::nms does not exist"). diffusers only checks that torchvision is installed, so the
import of its models fails as well. Python treats a module as absent while its entry in `sys.modules` is None.
"""

import importlib
import sys
from importlib.util import find_spec


def hide_broken_torchvision() -> None:
    """Let all later imports take a broken torchvision for absent. A working one stays visible."""
    if "torchvision" not in sys.modules and find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception:  # A mismatched binary raises RuntimeError, OSError, ImportError or AttributeError.
            sys.modules["torchvision"] = None  # type: ignore[assignment]
