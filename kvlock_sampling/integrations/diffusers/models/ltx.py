"""LTX-Video: LTXPipeline.

- The transformer takes tokens, (batch, time * height * width, channels * patch), not a grid: packed here.
- Latents: (VAE's - mean) * scaling_factor / std, statistics held by the VAE. Flow, velocity, time 0 to 1000.
- The schedule's shift grows with the number of tokens (mu), so it needs the clip's size: `video.given(clip)`.
- Some VAEs finish the denoising while they decode: `decode_timestep`, `decode_noise_scale`.

Source: diffusers `pipelines/ltx/pipeline_ltx.py`; LTX-Video, arXiv 2501.00103.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from ..errors import PipelineError
from ..schedule import flow_times
from .base import Branch, Conditioning, PipelineVideo, finite


class LTXBranch(Branch):
    """cond: "text" (batch, tokens, dim); "mask" (batch, tokens), True for real tokens.

    patch: (time, height, width).  scale: seconds and pixels per latent, of the rotary embedding.
    """

    def __init__(
        self, transformer: nn.Module, channels: int, patch: tuple[int, int, int], scale: tuple[float, float, float]
    ) -> None:
        super().__init__(transformer, channels)
        self.patch, self.scale = patch, scale

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        t, h, w = (size // step for size, step in zip(z.shape[2:], self.patch, strict=True))
        steps = dict(zip(("pt", "ph", "pw"), self.patch, strict=True))
        tokens = rearrange(z, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", **steps)
        out = network(
            hidden_states=tokens.to(dtype),
            encoder_hidden_states=cond["text"],
            timestep=time,
            encoder_attention_mask=cond["mask"],
            num_frames=t,
            height=h,
            width=w,
            rope_interpolation_scale=self.scale,
            return_dict=False,
        )[0]
        return rearrange(out, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, **steps)


class LTXVideo(PipelineVideo):
    """LTX-Video, text to video.

    frame_rate: of the clip, frames per second; the model moves things accordingly.
    decode_timestep, decode_noise_scale: flow time left to the VAE, and noise added for it, of VAEs that denoise.
    Other options: see `PipelineVideo`.
    """

    family = "LTX-Video"

    def __init__(
        self,
        pipe: Any,
        *,
        frame_rate: float = 25.0,
        decode_timestep: float = 0.0,
        decode_noise_scale: float | None = None,
        **options: Any,
    ) -> None:
        self.frame_rate = finite("frame_rate", frame_rate)
        if not self.frame_rate > 0:
            raise PipelineError(f"frame_rate={frame_rate}; expected frames per second > 0, e.g. frame_rate=25.")
        self.decode_timestep = finite("decode_timestep", decode_timestep)
        noise = self.decode_timestep if decode_noise_scale is None else decode_noise_scale
        self.decode_noise_scale = finite("decode_noise_scale", noise)
        super().__init__(pipe, **options)

    @property
    def compression(self) -> tuple[int, int]:
        return int(self.pipe.vae_temporal_compression_ratio), int(self.pipe.vae_spatial_compression_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        space = int(self.pipe.transformer_spatial_patch_size)
        return int(self.pipe.transformer_temporal_patch_size), space, space

    def _denoiser(self) -> Any:
        time, space = self.compression
        channels = self.transformer.config.in_channels // math.prod(self.patch)
        return self._flow(LTXBranch(self.transformer, channels, self.patch, (time / self.frame_rate, space, space)))

    def _encode_text(self, text: str) -> Conditioning:
        embeds, mask, *_ = self.pipe.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return {"text": embeds, "mask": mask}

    def _times(self, steps: int) -> Tensor:
        config = self.pipe.scheduler.config
        given: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if config.get("use_dynamic_shifting"):
            given["mu"] = self._mu(config)
        return flow_times(self.pipe.scheduler, num_inference_steps=steps, **given)

    def _mu(self, config: Any) -> float:
        """log of the shift: linear in the number of latents, through two points that the scheduler names."""
        if self._shape is None:
            raise PipelineError(
                "LTX-Video's schedule depends on the size of the clip, which is not known yet.\n"
                "  sigmas = kv.from_pipeline(pipe).given(clip).sigmas(30), or a static shift: "
                "kv.from_pipeline(pipe, shift=3.0)."
            )
        (t, s), (frames, height, width) = self.compression, self._shape[2:]
        count = ((frames - 1) // t + 1) * (height // s) * (width // s)
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        start, stop = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return start + (count - low) * (stop - start) / (high - low)

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std, factor = self._statistics(latents)
        return (latents - mean) * factor / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std, factor = self._statistics(latents)
        return latents * std / factor + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor, float]:
        vae = self.pipe.vae
        mean, std = (value.to(like).view(1, -1, 1, 1, 1) for value in (vae.latents_mean, vae.latents_std))
        return mean, std, float(vae.config.scaling_factor)

    def _decode(self, raw: Tensor) -> Tensor:
        vae = self.pipe.vae
        if not vae.config.timestep_conditioning:
            return vae.decode(raw, None, return_dict=False)[0]
        times = raw.new_full((len(raw),), self.decode_timestep)
        if self.decode_noise_scale:
            # The same noise for every decode: source and edit must differ only where their latents do.
            noise = torch.randn(raw.shape[1:], generator=torch.Generator().manual_seed(0)).to(raw)
            raw = torch.lerp(raw, noise.expand_as(raw), self.decode_noise_scale)
        return vae.decode(raw, times, return_dict=False)[0]
