"""For those who stay in diffusers: the lock inside its pipelines, with their own loops and schedulers.

- `locked(pipe, ...)`: a `with` block in which a classic Wan pipeline samples under a lock.
- `KVLockGuider`: a guider for modular pipelines, and for classic ones that take a guider.
- `encode_clip(vae, pixels)`: the source's latents, as the transformer sees them.

Everything a `KVLock` knows (policies, presets, estimators, traces) is the same here; k-diffusion is not involved.
"""

from .guider import KVLockGuider
from .latents import encode_clip
from .pipeline import locked

__all__ = ["KVLockGuider", "encode_clip", "locked"]
