"""HunyuanVideo: HunyuanVideoPipeline.

- Distilled guidance: the transformer reads a scale (`embedded_guidance`); plain guidance on top is off by default.
- Text: hidden states of a language model with a mask, and pooled CLIP features.
- Latents: VAE's * scaling_factor. Flow, velocity, time 0 to 1000.

Source: diffusers `pipelines/hunyuan_video/pipeline_hunyuan_video.py`; HunyuanVideo, arXiv 2412.03603.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..schedule import flow_times
from .base import Branch, Conditioning, PipelineVideo, finite


class HunyuanBranch(Branch):
    """cond: "text" (batch, tokens, dim); "mask" (batch, tokens), 1 for real tokens; "pooled" (batch, dim)."""

    def __init__(self, transformer: nn.Module, channels: int, guidance: float) -> None:
        super().__init__(transformer, channels)
        self.guidance = guidance

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        return network(
            hidden_states=z.to(dtype),
            timestep=time,
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"].to(dtype),
            pooled_projections=cond["pooled"],
            guidance=torch.full((len(z),), self.guidance, dtype=dtype, device=z.device) * 1000,
            return_dict=False,
        )[0]


class HunyuanFlow(PipelineVideo):
    """What HunyuanVideo and HunyuanVideo 1.5 share: patches, schedule, and the scale of latents."""

    @property
    def patch(self) -> tuple[int, int, int]:
        config = self.transformer.config
        return config.patch_size_t, config.patch_size, config.patch_size

    def _times(self, steps: int) -> Tensor:
        return flow_times(self.pipe.scheduler, sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])

    def _normalise(self, latents: Tensor) -> Tensor:
        return latents * self.pipe.vae.config.scaling_factor

    def _denormalise(self, latents: Tensor) -> Tensor:
        return latents / self.pipe.vae.config.scaling_factor


class HunyuanVideo(HunyuanFlow):
    """HunyuanVideo, text to video.

    embedded_guidance: the scale the transformer reads; default: the pipeline's.
    prompt_template: what the language model is told around the prompt; default: the pipeline's.
    Other options: see `PipelineVideo`.
    """

    family = "HunyuanVideo"
    scale_name = "true_cfg_scale"

    def __init__(
        self,
        pipe: Any,
        *,
        embedded_guidance: float | None = None,
        prompt_template: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.embedded_guidance, self.prompt_template = embedded_guidance, prompt_template
        super().__init__(pipe, **options)

    def _denoiser(self) -> Any:
        requested = self._default("guidance_scale", 6.0) if self.embedded_guidance is None else self.embedded_guidance
        scale = finite("embedded_guidance", requested)
        return self._flow(HunyuanBranch(self.transformer, self.transformer.config.in_channels, scale))

    def _encode_text(self, text: str) -> Conditioning:
        template = {} if self.prompt_template is None else {"prompt_template": self.prompt_template}
        embeds, pooled, mask = self.pipe.encode_prompt(
            [text], max_sequence_length=self.max_sequence_length, device=self.device, **template
        )
        return {"text": embeds, "mask": mask, "pooled": pooled}
