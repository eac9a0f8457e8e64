"""CogVideoX 1.0 and 1.5: CogVideoXPipeline, CogVideoXVideoToVideoPipeline.

- A DDPM model, not a flow: prediction_type "v_prediction" or "epsilon", steps 0 to 999 of a table, which for CogVideoX
  ends in pure noise (zero terminal SNR). At whole steps the map to sigma is exact, between them log-linear.
- The transformer takes (batch, time, channels, height, width), and rotary tables that depend on the size.
- Latents: VAE's * scaling_factor.
- The VAE brings 8 k + 1 frames back as they were, other counts as more. 1.5 has patches of two latent frames, and
  the 2 k + 1 of a clip get one more in front, a copy of the first, as in the pipelines; decoding drops it.

Source: diffusers `pipelines/cogvideo/pipeline_cogvideox.py`; CogVideoX, arXiv 2408.06072.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .... import masks
from ....denoisers import EpsDenoiser, VDenoiser
from ..errors import PipelineError
from ..schedule import DiscreteClock, levels
from .base import Branch, Conditioning, PipelineVideo

RotaryTables = Callable[[int, int, int], tuple[Tensor, Tensor] | None]


class CogVideoXBranch(Branch):
    """cond: "text" (batch, tokens, dim).  rotary: latent (time, height, width) -> the tables of that size, or None."""

    def __init__(self, transformer: nn.Module, channels: int, rotary: RotaryTables) -> None:
        super().__init__(transformer, channels)
        self.rotary = rotary

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        t, h, w = z.shape[2:]
        return network(
            hidden_states=z.transpose(1, 2).to(dtype),
            encoder_hidden_states=cond["text"],
            timestep=time,
            image_rotary_emb=self.rotary(t, h, w),
            return_dict=False,
        )[0].transpose(1, 2)


class CogVideoXVideo(PipelineVideo):
    """CogVideoX, text to video. `shift` is not among its options, since it is no flow model; see `PipelineVideo`."""

    family = "CogVideoX"
    _tables: dict[tuple[int, int, int], Any]

    def _check_scheduler(self) -> None:
        scheduler = self.pipe.scheduler
        kind = scheduler.config.get("prediction_type")
        if kind not in ("v_prediction", "epsilon") or not hasattr(scheduler, "alphas_cumprod"):
            raise PipelineError(
                f"{type(scheduler).__name__} with prediction_type={kind!r}; CogVideoX is understood with "
                "'v_prediction' or 'epsilon' on a table alphas_cumprod.\n"
                "  pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)"
            )
        if self.shift is not None:
            raise PipelineError(f"shift={self.shift}: CogVideoX is no flow model and has no shift; leave it away.")

    @property
    def patch(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.patch_size_t or 1, config.patch_size, config.patch_size

    @property
    def usual(self) -> tuple[int, int, int]:
        config, space = self.transformer.config, self.compression[1]
        return config.sample_frames, config.sample_height * space, config.sample_width * space

    def _denoiser(self) -> Any:
        self._tables = {}
        self._clock = DiscreteClock(self.pipe.scheduler.alphas_cumprod, top=self.t_max / (1 - self.t_max))
        branch = CogVideoXBranch(self.transformer, self.transformer.config.in_channels, self._rotary)
        kind = VDenoiser if self.pipe.scheduler.config.prediction_type == "v_prediction" else EpsDenoiser
        return kind(branch, time=self._clock.time, model_dtype=torch.float32)

    def _rotary(self, t: int, h: int, w: int) -> tuple[Tensor, Tensor] | None:
        if not self.transformer.config.use_rotary_positional_embeddings:
            return None
        size = (t, h, w)
        if size not in self._tables:
            space = self.compression[1]
            self._tables[size] = self.pipe._prepare_rotary_positional_embeddings(h * space, w * space, t, self.device)
        return self._tables[size]

    def _encode_text(self, text: str) -> Conditioning:
        embeds, _ = self.pipe.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return {"text": embeds}

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        """The noise levels of the scheduler's own steps, and a final 0; see `PipelineVideo.sigmas`."""
        return levels(self._times, steps, strength, t_max=1.0)  # the clock's top is finite: nothing to cut

    def _times(self, steps: int) -> Tensor:
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(steps)
        sigmas = self._clock.sigma(scheduler.timesteps).unique().flip(0)
        return sigmas / (1 + sigmas)

    def _latent_frames(self, most: int) -> int:
        return max(1, most - (most + 1) % 2)

    def _padding(self, frames: int) -> int:
        """Latent frames in front of a clip of so many of them."""
        return -frames % self.patch[0]

    def lock_mask(self, mask: Any) -> Tensor:
        """At the size of the latents, (batch, 1, time, height, width): the frame in front has the first one's mask.

        mask: at the clip's size, as `masks.as_mask` reads; a still mask needs `given(clip)` first, for the frames.
        """
        frames = None if self._shape is None else self._shape[2]
        temporal, spatial = self.compression
        latent = masks.latent_mask(masks.as_mask(mask, frames=frames), temporal=temporal, spatial=spatial)
        return self._padded(latent)

    def _padded(self, frames: Tensor) -> Tensor:
        return torch.cat([frames[:, :, :1]] * self._padding(frames.shape[2]) + [frames], dim=2)

    def _normalise(self, latents: Tensor) -> Tensor:
        return self._padded(latents) * self.pipe.vae.config.scaling_factor

    def _denormalise(self, latents: Tensor) -> Tensor:
        # An even number of frames was padded, since the VAE's own are odd.
        return latents[:, :, 1 - latents.shape[2] % 2 :] / self.pipe.vae.config.scaling_factor
