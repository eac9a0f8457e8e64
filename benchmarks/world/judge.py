"""Judge what a clip of the stage shows, and whether an edit is right.

What a clip shows is read by a small network that was trained on renders (`train_judge.py`): a frame network, pooled
over the clip, for colour, shape, glow and post; a network on all frames together for motion.

What an edit left behind, or added, is measured against the source and the true render, both of which are known:

    leftover = (clip - target) . (source - target) / |source - target|^2      over a region
    intruder = largest connected area outside the mask that lies off the line from source to target

leftover is 1 if a region is still the source's, 0 if it is the target's: a dead shadow has 1 in the effect region.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from kvlock_sampling.tiny import Scene, render
from kvlock_sampling.tiny.world import COLOURS, FRAMES, MOTIONS, SHAPES, regions

WEIGHTS = Path(__file__).with_name("judge.safetensors")
CLASSES: dict[str, tuple[object, ...]] = {
    "colour": (*COLOURS, None),
    "shape": (*SHAPES, None),
    "glowing": (False, True),
    "post": (False, True),
    "motion": tuple(MOTIONS),
}
DEPARTURE = 0.35  # distance in RGB, in units of [-1, 1], at which a pixel is neither the source's nor the target's
LEFTOVER = 0.4  # of a region: from here on an edit is unfinished
INTRUDER = 16  # pixels in one frame: from here on something is there that should not be


class Judge(nn.Module):
    """Classify clips (batch, 3, FRAMES, 64, 64): logits (batch, classes) for every name of `CLASSES`."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            *_conv(3, 24, 5, 2), *_conv(24, 48, 3, 2), *_conv(48, 64, 3, 2), *_conv(64, 96, 3, 1)
        )
        self.clip = nn.Sequential(
            *_conv(3 * FRAMES, 32, 5, 2), *_conv(32, 48, 3, 2), *_conv(48, 64, 3, 2), *_conv(64, 80, 3, 2), nn.Flatten()
        )
        self.sizes = [len(CLASSES[name]) for name in ("colour", "shape", "glowing", "post")]
        self.read = nn.Linear(3 * 96, sum(self.sizes))
        self.motion = nn.Linear(80 * 16, len(MOTIONS))

    def forward(self, clips: Tensor, frames: Sequence[int] = range(FRAMES)) -> dict[str, Tensor]:
        """Read colour, shape, glow and post from the given frames, and motion from all."""
        some = clips[:, :, list(frames)].transpose(1, 2)
        maps = self.frame(some.flatten(0, 1)).unflatten(0, some.shape[:2])
        strongest, mean = maps.amax((3, 4)), maps.mean((1, 3, 4))
        seen = self.read(torch.cat([strongest.mean(1), strongest.amax(1), mean], dim=1)).split(self.sizes, dim=1)
        logits = dict(zip(("colour", "shape", "glowing", "post"), seen, strict=True))
        return {**logits, "motion": self.motion(self.clip(clips.flatten(1, 2)))}


def _conv(channels: int, out: int, size: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out, size, stride, size // 2, bias=False), nn.BatchNorm2d(out), nn.ReLU()


class Verdict(NamedTuple):
    """What one clip shows. Without an object, colour, shape, motion and glowing are None."""

    colour: str | None
    shape: str | None
    motion: str | None
    glowing: bool | None
    post: bool

    def right(self, scene: Scene) -> dict[str, bool]:
        """Whether each attribute that this scene has is the one shown."""
        right = {"shape": self.shape == scene.shape, "post": self.post == scene.post}
        if scene.shape is not None:
            right |= {name: getattr(self, name) == getattr(scene, name) for name in ("colour", "motion", "glowing")}
        return right


@cache
def trained_judge() -> Judge:
    """The network with the weights in this folder."""
    network = Judge().eval().requires_grad_(False)
    network.load_state_dict({name: value.float() for name, value in load_file(WEIGHTS).items()})
    return network


@torch.no_grad()
def judge(clips: Tensor, *, network: Judge | None = None, chunk: int = 32) -> list[Verdict]:
    """Read what clips (batch, 3, 8, 64, 64) in [-1, 1] show."""
    verdicts = []
    for part in clips.float().split(chunk):
        logits = (network or trained_judge())(part)
        for i in range(len(part)):
            # A clip without an object has neither shape nor colour: the two decide together.
            shape, colour = (logits[name][i].log_softmax(0) for name in ("shape", "colour"))
            post = bool(logits["post"][i].argmax())
            if shape[-1] + colour[-1] > shape[:-1].max() + colour[:-1].max():
                verdicts.append(Verdict(None, None, None, None, post))
                continue
            named = [list(COLOURS)[int(colour[:-1].argmax())], SHAPES[int(shape[:-1].argmax())]]
            motion, glowing = list(MOTIONS)[int(logits["motion"][i].argmax())], bool(logits["glowing"][i].argmax())
            verdicts.append(Verdict(*named, motion, glowing, post))
    return verdicts


def rates(verdicts: Sequence[Verdict], scenes: Sequence[Scene]) -> dict[str, float]:
    """Rate in [0, 1] at which each attribute is right, over the scenes that have it; "all" is every attribute."""
    right = [verdict.right(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    found = {name: [r[name] for r in right if name in r] for name in ("colour", "shape", "motion", "glowing", "post")}
    found["all"] = [all(r.values()) for r in right]
    return {name: sum(hits) / len(hits) if hits else math.nan for name, hits in found.items()}


def leftover(clips: Tensor, sources: Tensor, targets: Tensor, region: Tensor) -> Tensor:
    """How much of the source is left in a region: 1 = all, 0 = none, (batch,); 0 if source and target agree there.

    Args:
        clips: Edited clips (batch, 3, T, H, W).
        sources: What was edited.
        targets: The true results.
        region: (batch, 1, T, H, W), 0 or 1.
    """
    change = ((sources - targets) * region).flatten(1)
    energy = change.square().sum(1)
    return ((clips - targets).flatten(1) * change).sum(1) / energy.clamp(min=1e-9) * (energy > 0)


def intruder(clips: Tensor, sources: Tensor, targets: Tensor, mask: Tensor) -> Tensor:
    """Largest connected area outside the mask that is neither source nor target, nor between them, (batch,) in pixels.

    Clips are smoothed by 3 x 3 pixels, so that noise does not count. Arguments are those of `leftover`; mask: 1 = edit.
    """
    smooth = nn.AvgPool3d((1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    change, wanted = smooth(clips - sources), smooth(targets - sources)
    share = (change * wanted).sum(1, keepdim=True) / wanted.square().sum(1, keepdim=True).clamp(min=1e-9)
    off = (change - share.clamp(0, 1) * wanted).square().sum(1).sqrt()
    # Smoothing mixes in up to one pixel of the mask.
    outside = F.max_pool3d(mask, (1, 3, 3), 1, (0, 1, 1))[:, 0] == 0
    return torch.tensor([max(map(_largest_area, clip)) for clip in (off > DEPARTURE) & outside])


def _largest_area(frame: Tensor) -> int:
    labels, _ = ndimage.label(frame.numpy())
    return int(max([0, *ndimage.sum_labels(frame.numpy(), labels, range(1, labels.max() + 1))]))


class EditVerdict(NamedTuple):
    """What one edit made.

    Attributes:
        shows: What the clip shows.
        wrong: The attributes of the target that it does not show.
        inside: `leftover` of the mask.
        effect: `leftover` of the effect region: dead shadows and glow, or missing ones.
        intruder: Pixels of what should not be there.
    """

    shows: Verdict
    wrong: tuple[str, ...]
    inside: float
    effect: float
    intruder: int

    @property
    def right(self) -> bool:
        """Every attribute of the target, nothing left of the source, and nothing that should not be there."""
        finished = max(self.inside, self.effect) < LEFTOVER
        return not self.wrong and finished and self.intruder < INTRUDER


def judge_edits(clips: Tensor, sources: Sequence[Scene], targets: Sequence[Scene]) -> list[EditVerdict]:
    """Judge edited clips (batch, 3, 8, 64, 64) of scenes whose true results are known."""
    before, after, (mask, effect, _) = render(sources), render(targets), regions(sources, targets)
    inside, outside = (leftover(clips, before, after, region).tolist() for region in (mask, effect))
    areas, verdicts = intruder(clips, before, after, mask).tolist(), judge(clips)
    wrong = [
        tuple(name for name, right in verdict.right(target).items() if not right)
        for verdict, target in zip(verdicts, targets, strict=True)
    ]
    return [EditVerdict(*row) for row in zip(verdicts, wrong, inside, outside, areas, strict=True)]
