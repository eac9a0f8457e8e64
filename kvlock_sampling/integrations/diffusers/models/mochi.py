"""Mochi 1: MochiPipeline.

- Runs backwards: the transformer is told 1000 - time, and predicts x0 - noise, the velocity's opposite.
- The schedule is half linear, half quadratic, and the scheduler turns it around (`invert_sigmas`).
- Latents: (VAE's - latents_mean) * scaling_factor / latents_std; time is compressed by 6.

Source: diffusers `pipelines/mochi/pipeline_mochi.py`; genmo's Mochi 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..schedule import flow_times
from .base import Branch, Conditioning, PipelineVideo

THRESHOLD = 0.025
"""Flow time that the linear half of the schedule covers."""


class MochiBranch(Branch):
    """cond: "text" (batch, tokens, dim); "mask" (batch, tokens), True for real tokens."""

    def __init__(self, transformer: nn.Module, channels: int, train_steps: float) -> None:
        super().__init__(transformer, channels)
        self.train_steps = train_steps

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        return -network(
            hidden_states=z.to(dtype),
            encoder_hidden_states=cond["text"],
            timestep=self.train_steps - time,
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]


class MochiVideo(PipelineVideo):
    """Mochi, text to video. See `PipelineVideo` for the options."""

    family = "Mochi"

    @property
    def compression(self) -> tuple[int, int]:
        return int(self.pipe.vae_temporal_scale_factor), int(self.pipe.vae_spatial_scale_factor)

    @property
    def patch(self) -> tuple[int, int, int]:
        size = self.transformer.config.patch_size
        return 1, size, size

    def _denoiser(self) -> Any:
        return self._flow(MochiBranch(self.transformer, self.transformer.config.in_channels, self.train_steps))

    def _encode_text(self, text: str) -> Conditioning:
        embeds, mask, *_ = self.pipe.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return {"text": embeds, "mask": mask}

    def _times(self, steps: int) -> Tensor:
        return flow_times(self.pipe.scheduler, sigmas=linear_quadratic(steps))

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, scale = self._statistics(latents)
        return (latents - mean) * scale

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, scale = self._statistics(latents)
        return latents / scale + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        factor = like.new_tensor(config.scaling_factor)
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is None or std is None:
            return like.new_zeros(()), factor
        return like.new_tensor(mean).view(1, -1, 1, 1, 1), factor / like.new_tensor(std).view(1, -1, 1, 1, 1)


def linear_quadratic(steps: int) -> np.ndarray:
    """Flow times from 1 down, (steps,): the first half falls evenly from 1 to 1 - THRESHOLD, the second ever faster
    to 0, as smoothly as a parabola can join on.

    >>> linear_quadratic(4).round(3).tolist()
    [1.0, 0.988, 0.975, 0.725]
    """
    linear = steps // 2
    if not linear:
        return np.ones(steps)
    slope, rest = THRESHOLD / linear, steps - linear
    i = np.arange(steps)
    k = (i - linear) / rest  # 0 where the parabola begins, 1 at the end; it starts with the line's slope
    gone = np.where(i < linear, slope * i, THRESHOLD + slope * rest * k + (1 - THRESHOLD - slope * rest) * k**2)
    return 1 - gone
