"""Wan, image to video: WanImageToVideoPipeline. The transformer reads a first frame beside the noise.

- Wan 2.1 and 2.2 A14B: 4 channels that say which frames are given, and the latents of (first frame, then grey), are
  put behind the 16 noisy channels; Wan 2.1 also reads the frame's CLIP features.
- Wan 2.2 TI2V-5B (expand_timesteps): the first latent frame *is* the image, at time 0; the rest is at the clip's time.

Source: diffusers `pipelines/wan/pipeline_wan_i2v.py`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from .base import Conditioning
from .wan import WanBranch, WanVideo


class WanImageBranch(WanBranch):
    """cond: "text"; "frame", latents of the first frame (batch, 16, 1, height, width) where times are per token,
    otherwise channels beside the noise (batch, 20, time, height, width); "features" (batch, patches, dim), optional."""

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        if "frame" not in cond:
            raise PipelineError(
                "image to video reads the clip's first frame, which this prompt does not hold.\n"
                "  video = kv.from_pipeline(pipe).given(clip); cond = video.prompt(text)"
            )
        if not self.per_token:
            beside = torch.cat([z.to(dtype), cond["frame"].expand(len(z), -1, -1, -1, -1)], dim=1)
            return self._ask(network, beside, time, cond)
        known = cond["frame"].to(z)
        times = self._times(network, z, time).clone()
        times[:, : times.shape[1] // z.shape[2]] = 0  # tokens of the first frame, time being the outermost axis
        velocity = self._ask(network, torch.cat([known, z[:, :, 1:]], dim=2).to(dtype), times, cond)
        # The first frame is known, so x0-hat = z - t * v must be it.
        t = (time / self.train_steps).clamp(min=torch.finfo(torch.float32).tiny).view(-1, 1, 1, 1, 1)
        return torch.cat([(z[:, :, :1] - known) / t, velocity[:, :, 1:].to(z)], dim=2)

    def _ask(self, network: nn.Module, z: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        return network(
            hidden_states=z,
            timestep=times,
            encoder_hidden_states=cond["text"],
            encoder_hidden_states_image=cond.get("features"),
            return_dict=False,
        )[0]


class WanImageVideo(WanVideo):
    """Wan, image to video.

    image: the frame to start from, (3, height, width) in [-1, 1], e.g. the first frame edited by an image model;
        default: the clip's own first frame. Other options: see `PipelineVideo`.
    """

    branch = WanImageBranch

    def __init__(self, pipe: Any, *, image: Tensor | None = None, **options: Any) -> None:
        self.image = image
        super().__init__(pipe, **options)

    def starting_from(self, image: Tensor) -> WanImageVideo:
        """The same model with another frame to start from; see `image`."""
        other = copy.copy(self)
        other.image, other._clips = image, {}
        return other

    def _condition(self, clips: Tensor, mask: Tensor) -> Conditioning:
        first = clips[:, :, :1]
        if self.image is not None:
            if self.image.shape != clips.shape[1:2] + clips.shape[3:]:
                raise PipelineError(
                    f"image has shape {tuple(self.image.shape)}; expected (3, height, width) of the clip, "
                    f"(3, {clips.shape[3]}, {clips.shape[4]}), in [-1, 1]."
                )
            first = self.image[None, :, None].to(clips).expand(len(clips), -1, -1, -1, -1)
        found = {"features": self._features(first)} if self.transformer.config.image_dim is not None else {}
        if self.pipe.config.get("expand_timesteps"):
            return {"frame": self.encode(first), **found}
        grey = torch.zeros_like(clips[:, :, 1:])
        latents = self.encode(torch.cat([first, grey], dim=2))
        # One channel per pixel frame of a latent frame, 1 where that frame is given: the first stands for all of its.
        given = latents.new_zeros(len(clips), self.compression[0], *latents.shape[2:])
        given[:, :, 0] = 1
        return {"frame": torch.cat([given, latents], dim=1), **found}

    def _features(self, first: Tensor) -> Tensor:
        """CLIP features of the first frames, (batch, patches, dim)."""
        if getattr(self.pipe, "image_encoder", None) is None:
            raise PipelineError("this transformer reads CLIP features, and the pipeline has no image_encoder.")
        images = [pixels[:, 0].float().cpu() for pixels in first.add(1).div(2).clamp(0, 1)]
        pictures = self.pipe.video_processor.numpy_to_pil(torch.stack(images).permute(0, 2, 3, 1).numpy())
        return self.pipe.encode_image(pictures, self.device)
