"""The lock inside ComfyUI: what the nodes of `comfyui/` do. ComfyUI is imported when a model is locked, not before.

- `ComfyLock(source, mask, ...).patch(model)`: a MODEL whose sampling is locked.
"""

from .host import ComfyLock

__all__ = ["ComfyLock"]
