"""Does the embedded model follow its prompt?  python benchmarks/embedded_model.py [--clips 200]

Generates clips for prompts drawn from the world, judges colour, shape and motion by exact matching against renders, and
writes benchmarks/results/embedded_model.json and the sample sheet docs/images/samples.png.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from world.judge import attribute_accuracy, judge
from world.sheet import sample_sheet

from kvlock_sampling import CFGDenoiser, samplers
from kvlock_sampling.app.edit import start_noise
from kvlock_sampling.tiny import load
from kvlock_sampling.tiny.world import FRAMES, SIZE, sample_scene
from kvlock_sampling.utils.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--cfg-scale", type=float, default=None, help="default: the model's")
    parser.add_argument("--dry", action="store_true", help="print only; write nothing")
    given = parser.parse_args()
    video = load(given.model)
    scale = video.cfg_scale if given.cfg_scale is None else given.cfg_scale
    scenes = [sample_scene(500_000 + i, empty=0.0) for i in range(given.clips)]
    sigmas = video.sigmas(given.steps)
    guided = CFGDenoiser(video.denoiser)
    started, clips = time.perf_counter(), []
    for first in range(0, len(scenes), 20):
        chunk = scenes[first : first + 20]
        like = torch.zeros(len(chunk), 3, FRAMES, SIZE, SIZE)
        extra = {
            "cond": video.prompt([s.prompt for s in chunk]),
            "uncond": video.prompt([""] * len(chunk)),
            "cond_scale": scale,
        }
        x = start_noise(like, 900_000 + first) * sigmas[0]
        clips.append(video.decode(samplers.run(given.sampler, guided, x, sigmas, extra_args=extra, seed=first)))
    made = torch.cat(clips)
    seconds = time.perf_counter() - started
    verdicts = judge(made)
    result = {
        "clips": len(scenes),
        "sampler": given.sampler,
        "steps": given.steps,
        "cfg_scale": scale,
        **attribute_accuracy(made, scenes),
        "median_quality": float(torch.tensor([v.quality for v in verdicts]).median()),
        "seconds": seconds,
    }
    print(json.dumps(result, indent=1))
    if not given.dry:
        write_atomically(ROOT / "benchmarks/results/embedded_model.json", json.dumps(result, indent=1) + "\n")
        (ROOT / "docs/images").mkdir(parents=True, exist_ok=True)
        sample_sheet(made[:24], [s.prompt for s in scenes[:24]], ROOT / "docs/images/samples.png")


if __name__ == "__main__":
    main()
