"""Sample clips into a contact sheet:  cd benchmarks; python -m world.stage_samples WEIGHTS sheet.png [PROMPT ...]"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvlock_sampling import CFGDenoiser, samplers
from kvlock_sampling.app.edit import start_noise
from kvlock_sampling.tiny import TinyVideo, TinyWan, sample_scene

from .sheet import sample_sheet
from .train_stage import load_weights


@torch.inference_mode()
def sample(
    video: TinyVideo,
    prompts: list[str],
    *,
    sampler: str = "euler",
    steps: int = 30,
    guidance: float | Callable[[float], float] = 3.0,
    seed: int = 0,
    batch: int = 50,
) -> Tensor:
    """Sample one clip for each prompt, (len(prompts), 3, frames, height, width) in [-1, 1]; clip i has seed + i.

    Guidance is a scale, or a function of the noise level.
    """
    scale = guidance if callable(guidance) else lambda _: guidance
    guided = CFGDenoiser(video.denoiser)

    def model(x: Tensor, sigma: Tensor, **args: Any) -> Tensor:
        return guided(x, sigma, **args, cond_scale=scale(float(sigma[0])))

    sigmas, clips = video.sigmas(steps), []
    for first in range(0, len(prompts), batch):
        part = prompts[first : first + batch]
        x = (
            start_noise(torch.zeros(len(part), 3, video.frames, *video.size, device=sigmas.device), seed + first)
            * sigmas[0]
        )
        given = {"cond": video.prompt(part), "uncond": video.prompt([""] * len(part))}
        clips.append(video.decode(samplers.run(sampler, model, x, sigmas, extra_args=given, seed=seed + first)))
    return torch.cat(clips).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("weights", type=Path)
    parser.add_argument("sheet", type=Path)
    parser.add_argument("prompts", nargs="*", help="prompts of held-out scenes by default")
    parser.add_argument("--count", type=int, default=12, help="number of held-out prompts")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    network = TinyWan()
    load_weights(network, given.weights)
    prompts = given.prompts or [sample_scene(i).prompt for i in range(given.count)]
    clips = sample(TinyVideo(network), prompts, steps=given.steps, guidance=given.guidance, seed=given.seed)
    sample_sheet(clips, prompts, given.sheet, columns=3)


if __name__ == "__main__":
    main()
