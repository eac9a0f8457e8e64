"""The lock inside diffusers' own pipelines, and diffusers' pipelines as models to edit with.

- `locked(pipe, ...)`: a `with` block in which a classic Wan pipeline samples under a lock.
- `KVLockGuider`: a guider for modular pipelines, and for classic ones that take a guider.
- `encode_clip(vae, pixels)`: the source's latents, as the transformer sees them.
- `from_pipeline(pipe)`, `load_pipeline(folder)`: a pipeline as a model for `edit_video` and any k-diffusion sampler.

Policies, presets, estimators and traces are those of `KVLock`. `locked` and `KVLockGuider` do not need k-diffusion.
"""

# ruff: noqa: E402 - what follows imports diffusers
from ...utils.extras import hide_broken_torchvision, require

hide_broken_torchvision()
require("diffusers", "diffusers")

from ...types import PipelineError
from .guider import KVLockGuider
from .latents import encode_clip
from .models.load import from_pipeline, load_pipeline
from .pipeline import locked

__all__ = ["KVLockGuider", "PipelineError", "encode_clip", "from_pipeline", "load_pipeline", "locked"]
