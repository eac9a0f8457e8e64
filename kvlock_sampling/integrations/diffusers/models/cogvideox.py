"""CogVideoX 1.0 and 1.5: CogVideoXPipeline, CogVideoXVideoToVideoPipeline.

- A DDPM model, not a flow: prediction_type "v_prediction" or "epsilon", steps 0 to 999 of a table that ends in pure
  noise (zero terminal SNR). At whole steps the map to sigma is exact, between them log-linear.
- The transformer takes (batch, time, channels, height, width), and rotary tables that depend on the size.
- The VAE returns 8 k + 1 frames as they were, and other numbers as more. 1.5 has patches of two latent frames: the
  2 k + 1 of a clip get one more in front, a copy of the first, as in the pipelines, and decoding drops it.

Source: diffusers `pipelines/cogvideo/pipeline_cogvideox.py`; CogVideoX, arXiv 2408.06072.
"""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .... import masks
from ....denoisers import EpsDenoiser, Preconditioned, VDenoiser
from ....types import PipelineError
from ..schedule import ddpm_sigmas, ddpm_time
from .base import Conditioning, PipelineVideo, ask


class Rotary:
    """A video's rotary tables. A KV cache, which tells models apart by public attributes, sees none of its pipeline."""

    def __init__(self, video: "CogVideoXVideo") -> None:
        self._video, self._tables = video, dict[tuple[int, int, int], Any]()

    def __call__(self, t: int, h: int, w: int) -> tuple[Tensor, Tensor] | None:
        video = self._video
        if not video.transformer.config.use_rotary_positional_embeddings:
            return None
        if (t, h, w) not in self._tables:
            space, make = video.compression[1], video.pipe._prepare_rotary_positional_embeddings
            self._tables[t, h, w] = make(h * space, w * space, t, video.device)
        return self._tables[t, h, w]


class CogVideoXVideo(PipelineVideo):
    """CogVideoX, text to video. `cond` holds "text" (batch, tokens, dim).

    Options as in `PipelineVideo`, without `shift`: CogVideoX is no flow model.
    """

    family = "CogVideoX"

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, rotary: Any = None) -> Tensor:
        frames_first = z.transpose(1, 2).to(dtype)
        return ask(network, frames_first, time, cond, image_rotary_emb=rotary(*z.shape[2:])).transpose(1, 2)

    def _call_options(self) -> dict[str, Any]:
        return {"rotary": Rotary(self)}

    def _check_scheduler(self) -> None:
        scheduler = self.pipe.scheduler
        kind = scheduler.config.get("prediction_type")
        if kind not in ("v_prediction", "epsilon") or not hasattr(scheduler, "alphas_cumprod"):
            raise PipelineError(
                f"{type(scheduler).__name__} with prediction_type={kind!r}; expected 'v_prediction' or 'epsilon'.\n"
                "  pipe.scheduler = CogVideoXDDIMScheduler.from_config(pipe.scheduler.config)"
            )
        if self.shift is not None:
            raise PipelineError(f"shift={self.shift}: CogVideoX is no flow model and has no shift; leave it out.")

    @property
    def usual(self) -> tuple[int, int, int]:
        config, space = self.transformer.config, self.compression[1]
        return config.sample_frames, config.sample_height * space, config.sample_width * space

    def _denoiser(self) -> Preconditioned:
        self._levels = ddpm_sigmas(self.pipe.scheduler.alphas_cumprod, top=self.t_max / (1 - self.t_max))
        kind = VDenoiser if self.pipe.scheduler.config.prediction_type == "v_prediction" else EpsDenoiser
        return kind(self._branch(), time=partial(ddpm_time, self._levels), model_dtype=torch.float32)

    def _times(self, steps: int) -> Tensor:
        scheduler = copy.deepcopy(self.pipe.scheduler)
        scheduler.set_timesteps(steps)
        sigmas = self._levels[scheduler.timesteps.long().cpu()].unique().flip(0)
        return sigmas / (1 + sigmas)

    def _latent_frames(self, most: int) -> int:
        return max(1, most - (most + 1) % 2)

    def lock_mask(self, mask: Any) -> Tensor:
        """Return the mask at the latents' size, with the first frame's mask for the frame in front of 1.5's latents.

        A still mask needs `given(clip)` first, for the number of frames.
        """
        frames = None if self._shape is None else self._shape[2]
        temporal, spatial = self.compression
        return self._padded(masks.latent_mask(masks.as_mask(mask, frames=frames), temporal=temporal, spatial=spatial))

    def _padded(self, latents: Tensor) -> Tensor:
        return torch.cat([latents[:, :, :1]] * (-latents.shape[2] % self.patch[0]) + [latents], dim=2)

    def unpadded(self, latents: Tensor) -> Tensor:
        # An even number of frames was padded: the VAE's own numbers are odd.
        return latents[:, :, 1 - latents.shape[2] % 2 :]
