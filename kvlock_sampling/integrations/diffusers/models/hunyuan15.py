"""HunyuanVideo 1.5, text to video: HunyuanVideo15Pipeline.

- The transformer reads, behind the noisy channels, those of a first frame and its mask, and features of an image: all
  zero for text to video.
- Text: hidden states of a language model, and of a character model for what the prompt quotes, each with a mask.
- Latents: VAE's * scaling_factor. Flow, velocity, time 0 to 1000. Guidance is a part of the pipeline, its `guider`.

Source: diffusers `pipelines/hunyuan_video1_5/pipeline_hunyuan_video1_5.py`; Tencent's HunyuanVideo 1.5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import PipelineError
from .base import Branch, Conditioning
from .hunyuan import HunyuanFlow


class Hunyuan15Branch(Branch):
    """cond: "text", "glyphs" (batch, tokens, dim); "mask", "glyph_mask" (batch, tokens), 1 for real tokens.

    image: (tokens, dim) of the image features that are not there.
    """

    def __init__(self, transformer: nn.Module, channels: int, image: tuple[int, int]) -> None:
        super().__init__(transformer, channels)
        self.image = image

    def call(self, network: nn.Module, z: Tensor, time: Tensor, cond: Conditioning, dtype: torch.dtype) -> Tensor:
        nothing = z.new_zeros(len(z), self.channels + 1, *z.shape[2:])  # no first frame, and a mask that says so
        return network(
            hidden_states=torch.cat([z, nothing], dim=1).to(dtype),
            timestep=time.to(dtype),  # in the weights' precision, as the pipeline has it: the network does not cast it
            encoder_hidden_states=cond["text"],
            encoder_attention_mask=cond["mask"],
            encoder_hidden_states_2=cond["glyphs"],
            encoder_attention_mask_2=cond["glyph_mask"],
            image_embeds=torch.zeros(len(z), *self.image, dtype=dtype, device=z.device),
            return_dict=False,
        )[0]


class Hunyuan15Video(HunyuanFlow):
    """HunyuanVideo 1.5, text to video. The length of texts is the pipeline's `tokenizer_max_length`; other options: see
    `PipelineVideo`."""

    family = "HunyuanVideo 1.5"

    def __init__(self, pipe: Any, *, max_sequence_length: int | None = None, **options: Any) -> None:
        if max_sequence_length is not None:
            raise PipelineError(
                f"HunyuanVideo 1.5 takes no max_sequence_length; set pipe.tokenizer_max_length = {max_sequence_length}."
            )
        super().__init__(pipe, **options)

    def _default(self, name: str, otherwise: Any) -> Any:
        if name == self.scale_name:
            return getattr(self.pipe.guider, "guidance_scale", otherwise)
        return super()._default(name, otherwise)

    def _denoiser(self) -> Any:
        image = (int(self.pipe.vision_num_semantic_tokens), int(self.pipe.vision_states_dim))
        return self._flow(Hunyuan15Branch(self.transformer, self.pipe.num_channels_latents, image))

    def _encode_text(self, text: str) -> Conditioning:
        names = ("text", "mask", "glyphs", "glyph_mask")
        return dict(zip(names, self.pipe.encode_prompt([text], device=self.device), strict=True))
