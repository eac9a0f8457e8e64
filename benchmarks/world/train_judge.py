"""Train the judge of the stage:  cd benchmarks; python -m world.train_judge --out FOLDER

Endless renders: plain scenes, scenes edited by pasting alone (so with dead shadows and glow), and scenes with a part of
the object missing, all blurred, noisy or with other contrast at random. What such a fault makes ambiguous is not asked.
A run can be killed at any time. The same command resumes it from FOLDER/checkpoint.pt.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlock_sampling.tiny import Scene, edit_mask, render, sample_edit, sample_scene
from kvlock_sampling.tiny.world import EDITS, FRAMES, MOTIONS, coverage
from kvlock_sampling.utils.files import atomic

from .judge import CLASSES, Judge, judge, rates
from .train_stage import save_weights

TRAIN_SEED = 2_000_000_000  # neither held out nor seen by the model that is judged
UNKNOWN = -100  # the class that cross-entropy ignores
MIRRORED = {"moving left": "moving right", "moving right": "moving left"}


def classes(scene: Scene) -> dict[str, int]:
    """The class of each attribute, UNKNOWN where a scene has none."""
    shown: dict[str, object] = {"shape": scene.shape, "post": scene.post, "colour": None}
    if scene.shape is not None:
        shown |= {"colour": scene.colour, "motion": scene.motion, "glowing": scene.glowing}
    return {name: known.index(shown[name]) if name in shown else UNKNOWN for name, known in CLASSES.items()}


def make_batch(step: int, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Clips and their classes; the same step always gives the same batch."""
    rng, generator = random.Random(f"judge:{step}"), torch.Generator().manual_seed(step)
    clips, rows = [], []
    for seed in range(TRAIN_SEED + step * size, TRAIN_SEED + (step + 1) * size):
        fault = rng.choices(("none", "pasted", "part"), (6, 3, 1))[0]
        source, scene = sample_edit(seed, rng.choice(EDITS))
        scene = sample_scene(seed, empty=0.2) if fault == "none" else scene
        row, clip = classes(scene), render([scene])
        if fault == "pasted":
            clip = render([source]).lerp(clip, edit_mask([source], [scene]))
            row["glowing"] = UNKNOWN if source.glowing != scene.glowing else row["glowing"]
        elif fault == "part" and scene.shape is not None:
            alpha, whole = coverage([scene]).amax((0, 1, 2)), render([replace(scene, shape=None)])
            cut = torch.zeros_like(alpha)
            middle = int((alpha.amax(0) > 0).nonzero().float().mean())
            cut[:, :middle] = 1
            cut = 1 - cut if rng.random() < 0.5 else cut
            clip = whole.lerp(clip, 1 - cut * (coverage([scene]) > 0).float())
            row |= dict.fromkeys(("shape", "motion", "glowing"), UNKNOWN)
        if rng.random() < 0.5:
            clip = clip.flip(-1)
            motion = MIRRORED.get(scene.motion, scene.motion)
            row["motion"] = row["motion"] if row["motion"] == UNKNOWN else list(MOTIONS).index(motion)
        if rng.random() < 0.4:
            clip = F.avg_pool3d(clip, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        clip = clip * rng.uniform(0.85, 1.2) + rng.uniform(-0.1, 0.1)
        noise = torch.randn(clip.shape, generator=generator)
        clips.append((clip + rng.choice((0.0, 0.05, 0.12)) * noise).clamp(-1, 1))
        rows.append(row)
    return torch.cat(clips), {name: torch.tensor([row[name] for row in rows]) for name in CLASSES}


def train(out: Path, *, minutes: float = 8.0, batch: int = 64, rate: float = 3e-3, save_every: float = 60.0) -> None:
    """Train, or resume training, in a folder.

    Args:
        out: Folder of checkpoint.pt, log.jsonl and judge.safetensors, the weights in float16.
        minutes: Training time until the learning rate is zero, over all resumed runs.
        batch: Clips per step.
        rate: Largest learning rate.
        save_every: Seconds between checkpoints.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    network = Judge()
    optimizer = torch.optim.AdamW(network.parameters(), rate, weight_decay=0.05)
    step, before, checkpoint = 0, 0.0, out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        network.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
    held_out = [sample_scene(i) for i in range(300)]
    exam = render(held_out)
    began = last = time.time()
    recent: list[float] = []
    while True:
        seconds = before + time.time() - began
        done = seconds >= 60 * minutes
        if done or time.time() - last > save_every:
            network.eval()
            right = {name: round(value, 3) for name, value in rates(judge(exam, network=network), held_out).items()}
            network.train()
            loss = round(sum(recent) / max(len(recent), 1), 4)
            row = {"step": step, "minutes": round(seconds / 60, 2), "loss": loss, **right}
            with open(out / "log.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)
            state = {"step": step, "seconds": seconds, "model": network.state_dict()}
            with atomic(checkpoint) as temporary:
                torch.save({**state, "optimizer": optimizer.state_dict()}, temporary)
            save_weights(network.state_dict(), out / "judge.safetensors", {"step": step})
            last, recent = time.time(), []
        if done:
            return
        warm, left = min(1.0, (step + 1) / 50), 1 - seconds / (60 * minutes)
        optimizer.param_groups[0]["lr"] = rate * warm * left
        clips, wanted = make_batch(step, batch)
        frames = random.Random(step).sample(range(FRAMES), 3)
        losses = [F.cross_entropy(logits, wanted[name]) for name, logits in network(clips, frames).items()]
        loss = torch.stack([value for value in losses if value.isfinite()]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
        recent.append(loss.item())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/judge"), help="folder of the checkpoint and the log")
    parser.add_argument("--minutes", type=float, default=8.0, help="training time until the learning rate is zero")
    parser.add_argument("--batch", type=int, default=64)
    train(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
