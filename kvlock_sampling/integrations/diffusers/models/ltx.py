"""LTX-Video: LTXPipeline.

- The transformer takes tokens, (batch, time * height * width, channels * patch), not a grid: they are packed here.
- Latents: (VAE's - mean) * scaling_factor / std, statistics held by the VAE. Flow, velocity, time 0 to 1000.
- The schedule's shift grows with the number of tokens (mu), so it needs the clip's size: `video.given(clip)`.
- Some VAEs finish the denoising while they decode: `decode_timestep`, `decode_noise_scale`.

Source: diffusers `pipelines/ltx/pipeline_ltx.py`; LTX-Video, arXiv 2501.00103.
"""

import math
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from ....types import PipelineError
from ....utils.fields import check_number
from ..schedule import flow_times
from .base import Conditioning, PipelineVideo, ask


class LTXVideo(PipelineVideo):
    """LTX-Video, text to video.

    `frame_rate` is the clip's, in frames per second, and sets the speed of motion. A VAE that denoises has the flow
    time `decode_timestep` left, by default 0, and gets noise of `decode_noise_scale`, by default as much. `cond` holds
    "text" (batch, tokens, dim); "mask" (batch, tokens), True for real tokens.
    """

    family = "LTX-Video"
    prompt_parts = ("text", "mask")

    def __init__(
        self,
        pipe: Any,
        *,
        frame_rate: float = 25.0,
        decode_timestep: float = 0.0,
        decode_noise_scale: float | None = None,
        **options: Any,
    ) -> None:
        unit = " It is in frames per second; the default is 25."
        self.frame_rate = check_number("frame_rate", frame_rate, PipelineError, unit, above=0.0)
        self.decode_timestep = check_number("decode_timestep", decode_timestep, PipelineError)
        noise = self.decode_timestep if decode_noise_scale is None else decode_noise_scale
        self.decode_noise_scale = check_number("decode_noise_scale", noise, PipelineError)
        super().__init__(pipe, **options)

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, patch: Any, scale: Any) -> Tensor:
        """`scale` is seconds and pixels per latent, of the rotary embedding."""
        t, h, w = (size // step for size, step in zip(z.shape[2:], patch, strict=True))
        steps = dict(zip(("pt", "ph", "pw"), patch, strict=True))
        tokens = rearrange(z, "b c (t pt) (h ph) (w pw) -> b (t h w) (c pt ph pw)", **steps)
        read = {"num_frames": t, "height": h, "width": w, "rope_interpolation_scale": scale}
        out = ask(network, tokens.to(dtype), time, cond, encoder_attention_mask=cond["mask"], **read)
        return rearrange(out, "b (t h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, **steps)

    def _call_options(self) -> dict[str, Any]:
        time, space = self.compression
        return {"patch": self.patch, "scale": (time / self.frame_rate, space, space)}

    channels = property(lambda self: self.transformer.config.in_channels // math.prod(self.patch))

    def _times(self, steps: int) -> Tensor:
        given: dict[str, Any] = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if self.pipe.scheduler.config.get("use_dynamic_shifting"):
            given["mu"] = self._mu(self.pipe.scheduler.config)
        return flow_times(self.pipe.scheduler, num_inference_steps=steps, **given)

    def _mu(self, config: Any) -> float:
        """Logarithm of the shift: linear in the number of latents."""
        if self._shape is None:
            raise PipelineError(
                "LTX-Video's schedule depends on the size of the clip, which is not known yet.\n"
                "  kv.from_pipeline(pipe).given(clip).sigmas(30), or a static shift: kv.from_pipeline(pipe, shift=3.0)."
            )
        from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift

        (t, s), (frames, height, width) = self.compression, self._shape[2:]
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        points = [config.get(name, default) for name, default in names.items()]
        return calculate_shift(((frames - 1) // t + 1) * (height // s) * (width // s), *points)

    def _decode(self, raw: Tensor) -> Tensor:
        vae = self.pipe.vae
        if not vae.config.timestep_conditioning:
            return vae.decode(raw, None, return_dict=False)[0]
        times = raw.new_full((len(raw),), self.decode_timestep)
        if self.decode_noise_scale:
            # Every decode adds the same noise, not a run's: source and edit must differ only where their latents do.
            drawn: Any = {"generator": torch.Generator().manual_seed(0x6465636F), "device": "cpu"}
            noise = torch.randn(raw.shape[1:], **drawn).to(raw)
            raw = torch.lerp(raw, noise.expand_as(raw), self.decode_noise_scale)
        return vae.decode(raw, times, return_dict=False)[0]
