"""HunyuanVideo and HunyuanVideo 1.5, text to video: HunyuanVideoPipeline, HunyuanVideo15Pipeline.

- Latents: VAE's * scaling_factor. Flow, velocity, time 0 to 1000.
- 1.0: distilled guidance, the transformer reads a scale (`embedded_guidance`); plain guidance on top is off by default.
  Text: hidden states of a language model with a mask, and pooled CLIP features.
- 1.5: guidance is a component of the pipeline, its `guider`. After the noisy channels the transformer reads those of a
  first frame and its mask, and features of an image, all zero for text to video. Text: hidden states of a language
  model, and of a character model for quoted text, each with a mask.

Sources: diffusers `pipelines/hunyuan_video/`, `pipelines/hunyuan_video1_5/`; HunyuanVideo, arXiv 2412.03603.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ....types import PipelineError
from ....utils.fields import check_number
from ..schedule import flow_times
from .base import Conditioning, PipelineVideo, ask


class HunyuanVideo(PipelineVideo):
    """HunyuanVideo, text to video; its transformer reads the scale `embedded_guidance`, by default the pipeline's.

    `cond` holds "text" (batch, tokens, dim); "mask" (batch, tokens), 1 for real tokens; "pooled" (batch, dim).
    """

    family = "HunyuanVideo"
    prompt_parts = ("text", "pooled", "mask")
    scale_name = "true_cfg_scale"

    def __init__(self, pipe: Any, *, embedded_guidance: float | None = None, **options: Any) -> None:
        self.embedded_guidance = embedded_guidance
        super().__init__(pipe, **options)

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, guidance: float = 6.0) -> Tensor:
        scale = torch.full((len(z),), guidance, dtype=dtype, device=z.device) * 1000
        read = {"encoder_attention_mask": cond["mask"].to(dtype), "pooled_projections": cond["pooled"]}
        return ask(network, z.to(dtype), time, cond, guidance=scale, **read)

    def _call_options(self) -> dict[str, Any]:
        scale = self._default("guidance_scale", 6.0) if self.embedded_guidance is None else self.embedded_guidance
        return {"guidance": check_number("embedded_guidance", scale, PipelineError)}

    def _times(self, steps: int) -> Tensor:
        return flow_times(self.pipe.scheduler, sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])


class Hunyuan15Video(PipelineVideo):
    """HunyuanVideo 1.5, text to video.

    `cond` holds "text", "glyphs" (batch, tokens, dim); "mask", "glyph_mask" (batch, tokens), 1 for real tokens.
    Options as in `PipelineVideo`, without `max_sequence_length`: set the pipeline's `tokenizer_max_length` instead.
    """

    family = "HunyuanVideo 1.5"
    prompt_parts = ("text", "mask", "glyphs", "glyph_mask")
    _times = HunyuanVideo._times

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, **options: Any) -> None:
        if max_sequence_length is not None:
            raise PipelineError(f"no max_sequence_length here; set pipe.tokenizer_max_length = {max_sequence_length}.")
        if options.get("cfg_scale") is None:
            scale = getattr(pipe.guider, "guidance_scale", None)
            options["cfg_scale"] = scale if getattr(pipe.guider, "_enabled", True) else 1.0
        super().__init__(pipe, **options)

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, image: Any = (1, 1)) -> Tensor:
        no_frame = z.new_zeros(len(z), z.shape[1] + 1, *z.shape[2:])  # no first frame, and a mask that says so
        read = {"encoder_attention_mask": cond["mask"], "encoder_attention_mask_2": cond["glyph_mask"]}
        read |= {"encoder_hidden_states_2": cond["glyphs"], "image_embeds": z.new_zeros(len(z), *image, dtype=dtype)}
        # Time is in the weights' precision, as in the pipeline: the network does not cast it.
        return ask(network, torch.cat([z, no_frame], dim=1).to(dtype), time.to(dtype), cond, **read)

    def _call_options(self) -> dict[str, Any]:
        return {"image": (int(self.pipe.vision_num_semantic_tokens), int(self.pipe.vision_states_dim))}

    channels = property(lambda self: self.pipe.num_channels_latents)
