"""Wan-VACE: WanVACEPipeline. The transformer reads the clip and the mask of the edit through its control layers.

Control: latents of what is kept, latents of what is to change, and the mask at pixel resolution folded into 64
channels. By default what is to change is grey, which is VACE's inpainting; `reactive="clip"` shows the old content.
Reference images are not offered: the pipeline generates them as extra frames before the clip, where a lock has no
source for them.

Source: VACE, arXiv 2503.07598; diffusers `pipelines/wan/pipeline_wan_vace.py`, whose own functions fold the control.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from .base import Conditioning, finite
from .wan import WanBranch, WanVideo


class WanVaceBranch(WanBranch):
    """cond: "text"; "control" (batch, 96, time, height, width); "strength" (batch, layers)."""

    def _ask(self, network: nn.Module, z: Tensor, times: Tensor, cond: Conditioning) -> Tensor:
        if "control" not in cond:
            raise PipelineError(
                "VACE reads the clip and its mask, which this prompt does not hold.\n"
                "  video = kv.from_pipeline(pipe).given(clip, mask); cond = video.prompt(text)"
            )
        return network(
            hidden_states=z,
            timestep=times,
            encoder_hidden_states=cond["text"],
            control_hidden_states=cond["control"].expand(len(z), -1, -1, -1, -1),
            control_hidden_states_scale=cond["strength"][0],
            return_dict=False,
        )[0]


class WanVaceVideo(WanVideo):
    """Wan-VACE.

    reactive: what the model sees where the mask is 1: "grey" (inpainting), or the "clip" itself.
    conditioning_scale: strength of the control. Other options: see `PipelineVideo`.
    """

    branch = WanVaceBranch

    def __init__(
        self,
        pipe: Any,
        *,
        reactive: Literal["grey", "clip"] = "grey",
        conditioning_scale: float = 1.0,
        **options: Any,
    ) -> None:
        if reactive not in ("grey", "clip"):
            raise PipelineError(f"reactive={reactive!r}; expected 'grey' (inpainting) or 'clip' (its old content).")
        self.reactive, self.conditioning_scale = reactive, finite("conditioning_scale", conditioning_scale)
        super().__init__(pipe, **options)

    def _condition(self, clips: Tensor, mask: Tensor) -> Conditioning:
        clips = clips.to(self.device).float()
        region = (mask.to(self.device) > 0.5).float().expand_as(clips)
        shown = clips * (1 - region) if self.reactive == "grey" else clips
        controls = []
        for clip, part in zip(shown.split(1), region.split(1), strict=True):  # the pipeline takes one clip at a time
            latents = self.pipe.prepare_video_latents(clip, part, [[]], None, self.device)
            folded = self.pipe.prepare_masks(part, [[]]).to(latents)
            controls.append(torch.cat([latents, folded], dim=1).float())
        layers = len(self.transformer.config.vace_layers)
        strength = controls[0].new_full((len(clips), layers), self.conditioning_scale)
        return {"control": torch.cat(controls), "strength": strength}
