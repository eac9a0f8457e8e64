"""Wan 2.1 and 2.2, text to video: WanPipeline, WanVideoToVideoPipeline. The base of Wan's other pipelines.

- Latents: (VAE's - latents_mean) / latents_std. Flow, velocity, time 0 to 1000.
- Two experts (Wan 2.2 A14B): `transformer` for times from boundary_ratio * 1000 up, `transformer_2` below.
- expand_timesteps (Wan 2.2 TI2V-5B): one time per token; for text to video they are all equal.

Source: diffusers `pipelines/wan/pipeline_wan.py`; Wan, arXiv 2503.20314.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import Branch, Conditioning, PipelineVideo


class WanBranch(Branch):
    """Calls a Wan transformer, or the one of two that is in charge.  cond: "text" (batch, tokens, dim)."""

    def __init__(
        self,
        transformer: nn.Module,
        channels: int,
        transformer_2: nn.Module | None = None,
        boundary: float | None = None,
        per_token: bool = False,
        train_steps: float = 1000.0,
    ) -> None:
        super().__init__(transformer, channels)
        self.transformer_2 = transformer_2
        self.boundary = boundary if transformer_2 is not None else None
        self.per_token, self.train_steps = per_token, train_steps

    def expert(self, time: Tensor) -> nn.Module:
        if self.boundary is None or self.transformer_2 is None:
            return self.transformer
        # One noise level per call: a lock asks for that, and samplers do nothing else.
        high, low = self.transformer, self.transformer_2
        chosen, other = (high, low) if float(time.max()) >= self.boundary else (low, high)
        if type(getattr(other, "_hf_hook", None)).__name__ == "CpuOffload":
            other.to("cpu")  # offloading looks ahead only, and a run may go back up the noise levels
        return chosen

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        times = self._times(network, z, time) if self.per_token else time
        return self._ask(network, z.to(dtype), times, cond)

    def _times(self, network: Any, z: Tensor, time: Tensor) -> Tensor:
        """(batch, tokens): every token's time."""
        patch = network.config.patch_size
        t, h, w = (size // step for size, step in zip(z.shape[2:], patch, strict=True))
        return time[:, None].expand(-1, t * h * w)

    def _ask(self, network: nn.Module, z: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return network(hidden_states=z, timestep=times, encoder_hidden_states=cond["text"], return_dict=False)[0]


class WanVideo(PipelineVideo):
    """Wan, text to video. See `PipelineVideo` for the options."""

    family = "Wan"
    branch: type[WanBranch] = WanBranch

    def _denoiser(self) -> Any:
        config = self.pipe.config
        ratio = config.get("boundary_ratio")
        branch = self.branch(
            self.transformer,
            channels=self.pipe.vae.config.z_dim,
            transformer_2=getattr(self.pipe, "transformer_2", None),
            boundary=None if ratio is None else ratio * self.train_steps,
            per_token=bool(config.get("expand_timesteps")),
            train_steps=self.train_steps,
        )
        return self._flow(branch)

    def _encode_text(self, text: str) -> Conditioning:
        embeds, _ = self.pipe.encode_prompt(
            [text], do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=self.device
        )
        return {"text": embeds}

    def _normalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def _denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.pipe.vae.config
        mean, std = (like.new_tensor(v).view(1, -1, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        return mean, std
