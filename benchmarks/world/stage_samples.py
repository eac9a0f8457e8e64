"""Sample clips into a contact sheet:  cd benchmarks; python -m world.stage_samples WEIGHTS sheet.png [PROMPT ...]

The Euler sampler of k-diffusion on the flow schedule, with classifier-free guidance. Each tile of the sheet is a clip.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from kvlock_sampling import samplers
from kvlock_sampling.denoisers import FlowDenoiser

from .stage import FRAMES, SIZE, sample_scene, tokenize
from .train_stage import StageWan, load_weights

SHOWN = (0, 2, 5, 7)


@torch.no_grad()
def sample(model: StageWan, words: Tensor, *, steps: int = 30, guidance: float = 3.0, seed: int = 0) -> Tensor:
    """Sample one clip for each row of words, (batch, 3, 8, 64, 64) in [-1, 1]."""
    denoiser = FlowDenoiser(model, prediction="x0")

    def guided(x: Tensor, sigma: Tensor) -> Tensor:
        cond = torch.cat([words, torch.zeros_like(words)])
        with_prompt, without = denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=cond).chunk(2)
        return without + guidance * (with_prompt - without)

    sigmas = samplers.flow_sigmas(steps, shift=3.0, t_max=0.98)
    noise = torch.randn(len(words), 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return samplers.get("euler")(guided, noise * sigmas[0], sigmas, disable=True).clamp(-1, 1)


def write_sheet(clips: Tensor, captions: list[str], path: Path, *, columns: int = 3, scale: int = 2) -> None:
    """Write a PNG: a captioned tile for each clip, with the frames SHOWN in a row."""
    tile_w, tile_h = SIZE * scale * len(SHOWN) + 8, SIZE * scale + 18
    rows = -(-len(clips) // columns)
    sheet = Image.new("RGB", (columns * tile_w, rows * tile_h), "white")
    pen = ImageDraw.Draw(sheet)
    for i, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        left, top = i % columns * tile_w, i // columns * tile_h
        pen.text((left, top + 2), caption, fill="black")
        frames = torch.cat([clip[:, t] for t in SHOWN], dim=2)
        pixels = ((frames + 1) * 127.5).round().byte().movedim(0, -1).numpy()
        picture = Image.fromarray(pixels).resize((pixels.shape[1] * scale, pixels.shape[0] * scale), Image.NEAREST)
        sheet.paste(picture, (left, top + 16))
    sheet.save(path)


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
    model = StageWan().eval()
    load_weights(model, given.weights)
    prompts = given.prompts or [sample_scene(i).prompt for i in range(given.count)]
    clips = sample(model, tokenize(prompts), steps=given.steps, guidance=given.guidance, seed=given.seed)
    write_sheet(clips, prompts, given.sheet)


if __name__ == "__main__":
    main()
