"""A clip as the transformer of a pipeline sees it: encoded, and normalised by the VAE's own statistics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...types import SourceError
from ...video.pixels import as_clips, check_floats, check_pixels
from .errors import PipelineError


def encode_clip(vae: Any, pixels: Tensor) -> Tensor:
    """Latents of clips, float32, on the VAE's device: the mode of its posterior, (latents - mean) / std.

    vae: an `AutoencoderKLWan`, e.g. `pipe.vae`, or any whose config has `latents_mean` and `latents_std`.
    pixels: (3, frames, height, width) or (batch, 3, frames, height, width) in [-1, 1], tensor or array; frames 1 + a
        multiple of the VAE's temporal compression, sides multiples of its spatial one.

    Raises:
        SourceError: pixels that are no clip, are not in [-1, 1], or that the VAE would cut.
        PipelineError: a VAE without those statistics; use `kv.from_pipeline(pipe).encode(pixels)`.
    """
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        raise PipelineError(
            f"{type(vae).__name__} does not say how its latents are normalised (config.latents_mean, latents_std).\n"
            "  For a classic pipeline of a known family: kv.from_pipeline(pipe).encode(pixels)."
        )
    clips = as_clips(pixels)
    check_floats(clips)
    _check_shape(clips, vae)
    check_pixels(clips)
    with torch.no_grad():
        latents = vae.encode(clips.to(vae.device, vae.dtype)).latent_dist.mode().float()
    low, spread = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (mean, std))
    return (latents - low) / spread


def _check_shape(clips: Tensor, vae: Any) -> None:
    """A VAE drops frames and rows that fill no latent, without a word."""
    time, space = _compression(vae, "temporal"), _compression(vae, "spatial")
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise SourceError(
            f"clip has shape {tuple(clips.shape)}; expected (3, frames, height, width) or (batch, 3, frames, height, "
            "width). Frames first, as images come: clip.transpose(0, 1)."
        )
    frames, height, width = clips.shape[2:]
    fits = (max(frames - 1, 0) // time * time + 1, *(max(1, side // space) * space for side in (height, width)))
    if (frames, height, width) != fits:
        raise SourceError(
            f"clip has {frames} frames of {height} x {width}; {type(vae).__name__} takes 1 + {time} * n frames and "
            f"sides of {space} * n, so it would cut this one. The next it takes: {fits[0]} of {fits[1]} x {fits[2]}.\n"
            f"  clip = kvlock_sampling.video.read_clip(path, frames={fits[0]}, size={fits[1:]}).pixels"
        )


def _compression(vae: Any, axis: str) -> int:
    """Pixels per latent; 1, which fits everything, where the VAE does not say."""
    named = (getattr(vae.config, f"scale_factor_{axis}", None), getattr(vae, f"{axis}_compression_ratio", None))
    return next((int(factor) for factor in named if isinstance(factor, int | float)), 1)
