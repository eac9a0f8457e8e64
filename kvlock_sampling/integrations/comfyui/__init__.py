"""The lock inside ComfyUI: what the nodes of `comfyui/` do. ComfyUI is imported when a model is locked, not before.

- `ComfyLock(source, mask, ...).patch(model)`: a MODEL whose sampling is locked; `.around(sampler)`: a SAMPLER.
- `pixels`: the mask on the token grid, the trace as an image, and pasting of the original's pixels.
"""

from .host import ComfyLock
from .inputs import in_one_line, layer_indices

__all__ = ["ComfyLock", "in_one_line", "layer_indices"]
