"""Mochi, text to video: MochiPipeline.

- The transformer reads 1000 - time, and predicts x0 - noise, the opposite of the velocity.
- The schedule is half linear, half quadratic, and the scheduler turns it around (`invert_sigmas`).

Source: diffusers `pipelines/mochi/pipeline_mochi.py`; genmo's Mochi 1.
"""

from typing import Any

from torch import Tensor

from ..schedule import flow_times, train_steps
from .base import Conditioning, PipelineVideo, ask

THRESHOLD = 0.025
"""Flow time that the linear half of the schedule covers."""


class MochiVideo(PipelineVideo):
    """Mochi, text to video. See `PipelineVideo` for the options.

    `cond` holds "text" (batch, tokens, dim); "mask" (batch, tokens), True for real tokens.
    """

    family = "Mochi"
    prompt_parts = ("text", "mask")

    @staticmethod
    def call(network: Any, z: Tensor, time: Tensor, cond: Conditioning, dtype: Any, steps: float = 1000.0) -> Tensor:
        return -ask(network, z.to(dtype), steps - time, cond, encoder_attention_mask=cond["mask"])

    def _call_options(self) -> dict[str, Any]:
        return {"steps": train_steps(self.pipe.scheduler)}

    def _times(self, steps: int) -> Tensor:
        from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

        # One step has no linear half, and diffusers' function divides by its length.
        times = linear_quadratic_schedule(steps, THRESHOLD) if steps > 1 else [1.0]
        return flow_times(self.pipe.scheduler, sigmas=times)
