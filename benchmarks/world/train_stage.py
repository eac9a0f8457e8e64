"""Train the model of the stage:  cd benchmarks; python -m world.train_stage --out FOLDER

Rectified flow on an endless stream of random scenes: x0 prediction with the velocity loss, logit-normal times, Muon for
the matrices of the blocks and AdamW for everything else. The learning rate falls linearly to zero over --minutes of
training, so the same command suits a busy CPU and a GPU. Weights are averaged over the last eighth or so of the run.

The post is small, so the loss hardly depends on its word. Each scene therefore comes with and without a post, and
--post-weight counts the pixels where the two differ more in the clip without one. The region is then independent of
what that clip shows, so the best prediction stays the posterior mean. Whether a post appears is decided at flow times
of 0.8 to 0.97: --time-mean 2.2 --time-std 0.8 trains there. --reading-only trains just the parts that read the prompt,
to teach a new word to finished weights.

An object that stands still in a panning room must move like the room, whose patterns are faint, so this hardly counts
either. --still gives a share of the pairs to one scene standing still and moving, under the same noise. It is decided
at noise levels of 4 to 8: --still-mean 1.85 --still-std 0.45 trains five of six such pairs there.

A run can be killed at any time. The same command resumes it from FOLDER/checkpoint.pt.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from kvlock_sampling.tiny import TinyWan, render, sample_scene, tokenize
from kvlock_sampling.tiny.model import WORDS
from kvlock_sampling.utils.files import atomic

TRAIN_SEED = 1_000_000_000  # scenes below this seed are held out
PROMPT_DROPOUT, POST_DROPOUT = 0.12, 0.10
READING = ("attn2", "norm2", "text_embedder", "emb.")  # the parts that read the prompt, by their parameters' names
WORD_FACTOR = 10.0  # of the embedding's learning rate: a word's row is trained only where the word occurs
AVERAGE_POWER = 8  # weight of step k in the average of n steps: about (k / n) ** (AVERAGE_POWER - 1)


def load_weights(model: TinyWan, path: Path) -> None:
    """Load weights. Words that the file does not know get random rows of the same size as the others."""
    state = {name: value.float() for name, value in load_file(path).items()}
    words = state["emb.weight"]
    new = torch.randn(len(WORDS) - len(words), words.shape[1], generator=torch.Generator().manual_seed(2))
    state["emb.weight"] = torch.cat([words, words.std() * new])
    model.load_state_dict(state)


def save_weights(weights: dict[str, Tensor], path: Path, about: dict[str, object]) -> None:
    """Write float16 safetensors with `about` in the header."""
    half = {name: value.half().contiguous().cpu() for name, value in weights.items()}
    with atomic(path) as temporary:
        save_file(half, temporary, metadata={"about": json.dumps(about)})


def build_optimizers(model: nn.Module, muon_lr: float, adamw_lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for everything else. Each group keeps its largest rate as "peak"."""
    muon, adamw = [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        matrix = "blocks." in name and parameter.ndim == 2
        rate = muon_lr if matrix else WORD_FACTOR * adamw_lr if name.startswith("emb.") else adamw_lr
        (muon if matrix else adamw).append({"params": [parameter], "lr": rate, "peak": rate})
    return [
        torch.optim.Muon(muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(adamw, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def make_batch(step: int, size: int, still: float = 0.0) -> tuple[Tensor, Tensor]:
    """Clips and words of a step, in pairs with and without a post, then the share `still` of pairs standing still and
    moving. The same step always gives the same batch.
    """
    first, scenes = TRAIN_SEED + 10 * step * size, []
    drawn, generator = map(sample_scene, range(first, first + 10 * size)), torch.Generator().manual_seed(step)
    moving = round(still * (size // 2))
    for scene in islice((scene for scene in drawn if scene.post), size // 2 - moving):
        scenes += [scene, replace(scene, post=False)]
    for scene in islice((scene for scene in drawn if scene.shape is not None), moving):
        way = "moving left" if float(torch.rand((), generator=generator)) < 0.5 else "moving right"
        scenes += [replace(scene, motion="standing still"), replace(scene, motion=way)]
    words = tokenize([scene.prompt for scene in scenes])
    pairs = words.view(size // 2, 2, -1)
    pairs[torch.rand(size // 2, generator=generator) < POST_DROPOUT, :, -1] = 0
    pairs[torch.rand(size // 2, generator=generator) < PROMPT_DROPOUT] = 0
    return render(scenes), words


@dataclass(frozen=True)
class Batches(Dataset[tuple[Tensor, Tensor]]):
    """`make_batch` for a data loader, which prepares batches in other processes."""

    size: int
    still: float = 0.0

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        return make_batch(step, self.size, self.still)


def draw_times(
    pairs: int, last: int, usual: tuple[float, float], deciding: tuple[float, float], generator: torch.Generator
) -> Tensor:
    """Flow times (pairs,), whose logits have the (mean, std) `usual`, those of the `last` pairs `deciding`."""
    draws = torch.randn(pairs, generator=generator, device=generator.device)
    first = pairs - last
    return torch.cat([usual[0] + usual[1] * draws[:first], deciding[0] + deciding[1] * draws[first:]]).sigmoid()


def flow_errors(model: Callable[..., Tensor], clips: Tensor, words: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Velocity error of an x0 prediction, (x0_hat - x0) / max(t, 0.1)."""
    tt = t.view(-1, 1, 1, 1, 1)
    error = model((1 - tt) * clips + tt * noise, t, words).float() - clips
    return error / tt.clamp(min=0.1)


def post_weights(clips: Tensor, weight: float) -> Tensor:
    """Weights (batch, 1, 8, 64, 64) of the pixels of pairs: 1 + weight where a clip lacks a post."""
    weights = torch.ones_like(clips[:, :1])
    weights[1::2] += weight * ((clips[0::2] - clips[1::2]).abs().amax(dim=1, keepdim=True) > 0.02)
    return weights


@torch.no_grad()
def validate(model: nn.Module, device: str, scenes: int = 64) -> dict[str, float]:
    """Losses on held-out scenes with fixed noise.

    Returns:
        "loss", "low" and "high": the mean over all noise levels, over the lower half and over the upper half.
        "wrong_post" - "high": what the upper half loses if the prompt says the opposite about the post.
    """
    held_out = [sample_scene(i) for i in range(scenes)]
    levels = torch.special.ndtri((torch.arange(scenes) + 0.5) / scenes)
    t = torch.sigmoid(0.6 + 1.1 * levels)
    clips, words = render(held_out), tokenize([scene.prompt for scene in held_out])
    noise = torch.randn(clips.shape, generator=torch.Generator().manual_seed(0))
    wrong = words.clone()
    wrong[:, -1] = len(WORDS) - 1 + len(WORDS) - 2 - words[:, -1]

    def losses(words: Tensor, part: slice) -> Tensor:
        rows = [a[part].to(device).split(16) for a in (clips, words, t, noise)]
        return torch.cat([flow_errors(model, *row).square().mean(dim=(1, 2, 3, 4)) for row in zip(*rows, strict=True)])

    low, high = losses(words, slice(0, scenes // 2)).mean(), losses(words, slice(scenes // 2, None)).mean()
    found = {"loss": (low + high) / 2, "low": low, "high": high}
    found["wrong_post"] = losses(wrong, slice(scenes // 2, None)).mean()
    return {name: round(float(value), 6) for name, value in found.items()}


def train(
    out: Path,
    *,
    minutes: float,
    start: Path | None = None,
    batch: int = 16,
    muon_lr: float = 2e-3,
    adamw_lr: float = 1e-3,
    time_mean: float = 0.6,
    time_std: float = 1.1,
    post_weight: float = 0.0,
    still: float = 0.0,
    still_mean: float | None = None,
    still_std: float = 0.45,
    reading_only: bool = False,
    device: str = "cpu",
    workers: int = 0,
    save_every: float = 180.0,
    fast: bool = False,
) -> None:
    """Train, or resume training, in a folder.

    Args:
        out: folder of checkpoint.pt, log.jsonl and stage.safetensors, the averaged weights in float16.
        minutes: training time until the learning rate is zero, over all resumed runs.
        start: weights to begin with; random ones by default.
        batch: clips per step, an even number.
        muon_lr: largest learning rate of the block matrices.
        adamw_lr: largest learning rate of all other parameters.
        time_mean: of the logit of the flow time; larger values train more on high noise, where the layout is decided.
        time_std: of the logit of the flow time.
        post_weight: further weight of the pixels of a post in the clip that lacks it.
        still: share of the pairs that are one scene standing still and moving.
        still_mean: as time_mean, for five of six of these pairs; None for time_mean.
        still_std: as time_std, for the same.
        reading_only: train only the parts that read the prompt.
        device: "cpu" or "cuda".
        workers: processes that render batches; 0 renders in the training process.
        save_every: seconds between checkpoints.
        fast: compiled blocks and bfloat16 matrix products.
    """
    torch.manual_seed(0)
    model = TinyWan()
    if start:
        load_weights(model, start)
    model.to(device)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not reading_only or any(part in name for part in READING))
    optimizers = build_optimizers(model, muon_lr, adamw_lr)
    average = {name: value.clone() for name, value in model.state_dict().items()}
    averaged = TinyWan().to(device).eval()
    generator = torch.Generator(device).manual_seed(0)
    step, before = 0, 0.0
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        average, step, before = state["average"], state["step"], state["seconds"]
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"].cpu())

    def record(seconds: float, loss: float) -> None:
        averaged.load_state_dict(average)
        row = {"step": step, "minutes": round(seconds / 60, 2), "training": loss, **validate(averaged, device)}
        with open(out / "log.jsonl", "a") as log:
            log.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def save(seconds: float) -> None:
        state = {
            "step": step,
            "seconds": seconds,
            "model": model.state_dict(),
            "average": average,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": generator.get_state(),
        }
        with atomic(checkpoint) as temporary:
            torch.save(state, temporary)
        about: dict[str, object] = {"world": "stage", "step": step, "batch": batch, "minutes": round(seconds / 60, 1)}
        save_weights(average, out / "stage.safetensors", about)

    out.mkdir(parents=True, exist_ok=True)
    if fast:
        for block in model.dit.blocks:
            block.compile()
    steps = range(step, 10**9)
    loader = DataLoader(Batches(batch, still), None, sampler=steps, num_workers=workers, pin_memory=device != "cpu")
    batches = iter(loader)
    began = last = time.time()
    recent: list[Tensor] = []
    if not step:
        record(0.0, float("nan"))
    while (seconds := before + time.time() - began) < 60 * minutes:
        factor = min(1.0, (step + 1) / 50) * (1 - seconds / (60 * minutes))
        for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
            group["lr"] = group["peak"] * factor
        clips, words = (a.to(device, non_blocking=True) for a in next(batches))
        deciding = 0 if still_mean is None else round(still * (batch // 2) * 5 / 6)
        t = draw_times(batch // 2, deciding, (time_mean, time_std), (still_mean or 0.0, still_std), generator)
        noise = torch.randn(batch // 2, *clips.shape[1:], generator=generator, device=device)
        t, noise = (a.repeat_interleave(2, dim=0) for a in (t, noise))  # the same for both of a pair
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=fast):
            errors = flow_errors(model, clips, words, t, noise)
            weights = post_weights(clips, post_weight)
            weights[batch - 2 * round(still * (batch // 2)) :] = 1  # pairs that stand still and move
            loss = (weights * errors.square()).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        keep = (1 - 1 / step) ** AVERAGE_POWER
        torch._foreach_lerp_(list(average.values()), list(model.state_dict().values()), 1 - keep)
        recent.append(loss.detach())
        if time.time() - last > save_every:
            record(seconds, float(torch.stack(recent).mean()))
            save(seconds)
            last, recent = time.time(), []
    if recent:
        record(seconds, float(torch.stack(recent).mean()))
        save(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/stage"), help="folder of the checkpoint and the log")
    parser.add_argument("--start", type=Path, help="safetensors to begin with; random weights by default")
    parser.add_argument("--minutes", type=float, default=110.0, help="training time until the learning rate is zero")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--adamw-lr", type=float, default=1e-3)
    parser.add_argument("--time-mean", type=float, default=0.6, help="mean logit of the flow time")
    parser.add_argument("--time-std", type=float, default=1.1, help="spread of the logit of the flow time")
    parser.add_argument("--post-weight", type=float, default=0.0, help="further weight of a missing post's pixels")
    parser.add_argument("--still", type=float, default=0.0, help="share of pairs that stand still and move")
    parser.add_argument("--still-mean", type=float, help="as --time-mean, for five of six of these pairs")
    parser.add_argument("--still-std", type=float, default=0.45, help="as --time-std, for the same")
    parser.add_argument("--reading-only", action="store_true", help="train only the parts that read the prompt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that render batches")
    parser.add_argument("--save-every", type=float, default=180.0, help="seconds between checkpoints")
    parser.add_argument("--fast", action="store_true", help="compiled blocks and bfloat16 matrix products")
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
