"""A VAE's latents as the transformer sees them: normalised by the VAE's own statistics."""

from typing import Any

import torch
from torch import Tensor

from ...types import PipelineError, SourceError
from ...video.read import as_clips, check_pixels


def encode_clip(vae: Any, pixels: Tensor) -> Tensor:
    """Encode clips to the latents that a pipeline's transformer sees, (latents - mean) * scaling_factor / std.

    Args:
        vae: The pipeline's VAE, e.g. `pipe.vae`.
        pixels: (3, frames, height, width) or (batch, 3, frames, height, width), tensor or array, in [-1, 1]. Frames
            are 1 + a multiple of the VAE's temporal compression, sides are multiples of its spatial compression.

    Returns:
        (batch, channels, time, height, width), float32, where the VAE computes: the mode of the posterior.

    Raises:
        SourceError: The pixels are not a clip, are not in [-1, 1], or have a size that the VAE would cut.
        PipelineError: The VAE names no statistics.
    """
    clips = as_clips(pixels)
    time, space = compression(vae)
    if clips.ndim != 5 or clips.shape[1] != 3:
        raise SourceError(
            f"clip has shape {tuple(clips.shape)}; expected (3, frames, height, width) or (batch, 3, frames, height, "
            "width). Frames first, as images come: clip.transpose(0, 1)."
        )
    frames, height, width = clips.shape[2:]
    fits = (max(frames - 1, 0) // time * time + 1, *(max(1, side // space) * space for side in (height, width)))
    if (frames, height, width) != fits:  # a VAE drops what fills no latent, without a warning
        raise SourceError(
            f"clip has {frames} frames of {height} x {width}; {type(vae).__name__} takes 1 + {time} * n frames and "
            f"sides of {space} * n.\n  clip = kv.video.read_clip(path, frames={fits[0]}, size={fits[1:]}).pixels"
        )
    check_pixels(clips)
    # An offloaded VAE lies on the host, or nowhere, until it runs; its hooks know where that will be.
    found = (getattr(getattr(part, "_hf_hook", None), "execution_device", None) for part in vae.modules())
    device = next((device for device in found if device is not None), vae.device)
    with torch.no_grad():
        # One by one: some VAEs take no batch, and a clip then is what it is alone.
        means = [vae.encode(clip.to(device, vae.dtype)).latent_dist.mode() for clip in clips.split(1)]
        return normalise(vae, torch.cat(means).float())


def normalise(vae: Any, latents: Tensor) -> Tensor:
    """The VAE's own latents, float32, as the transformer sees them."""
    mean, scale = _statistics(vae, latents)
    return (latents - mean) * scale


def denormalise(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `normalise`."""
    mean, scale = _statistics(vae, latents)
    return latents / scale + mean


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean of the VAE's latents and the factor to unit scale, per channel if the VAE names them so."""
    named = {**vae.config, **dict(vae.named_buffers(recurse=False))}
    mean, std, factor = (named.get(name) for name in ("latents_mean", "latents_std", "scaling_factor"))
    if factor is None and (mean is None or std is None):
        raise PipelineError(
            f"the config of {type(vae).__name__} has no scaling_factor, and no latents_mean with latents_std.\n"
            "  Normalise latents as its pipeline does, and pass those as source=."
        )
    scale = like.new_tensor(1.0 if factor is None else factor)
    if mean is None or std is None:
        return like.new_zeros(()), scale
    low, spread = (torch.as_tensor(values).to(like).view(1, -1, 1, 1, 1) for values in (mean, std))
    return low, scale / spread


def compression(vae: Any) -> tuple[int, int]:
    """Pixels per latent of a VAE, (time, space); 1 where the VAE does not say."""
    named = {**vae.config, **vars(vae)}
    default = {"temporal": 1, "spatial": 2 ** (len(named.get("block_out_channels", [0])) - 1)}
    ratios = (named.get(f"scale_factor_{a}") or named.get(f"{a}_compression_ratio") or default[a] for a in default)
    time, space = map(int, ratios)
    return time, space
