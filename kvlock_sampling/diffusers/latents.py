"""A clip as the transformer of a pipeline sees it: encoded, and normalised by the VAE's own statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pipelines.errors import PipelineError


def encode_clip(vae: Any, pixels: Tensor) -> Tensor:
    """Latents of clips, float32, on the VAE's device: the mode of its posterior, (latents - mean) / std.

    vae: an `AutoencoderKLWan`, e.g. `pipe.vae`, or any whose config has `latents_mean` and `latents_std`.
    pixels: (3, frames, height, width) or (batch, 3, frames, height, width) in [-1, 1].

    Raises:
        PipelineError: a VAE without those statistics; use `kv.from_pipeline(pipe).encode(pixels)`.
    """
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        raise PipelineError(
            f"{type(vae).__name__} does not say how its latents are normalised (config.latents_mean, latents_std).\n"
            "  For a classic pipeline of a known family: kv.from_pipeline(pipe).encode(pixels)."
        )
    clips = pixels if pixels.ndim == 5 else pixels.unsqueeze(0)
    with torch.no_grad():
        latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
    low, spread = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (mean, std))
    return (latents - low) / spread
