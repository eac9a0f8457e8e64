"""Make edits whose true results are known, in several ways from the same noise, and score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock_sampling import tiny
from kvlock_sampling.app.edit import Edit, VideoModel, edit_video
from kvlock_sampling.policy import Constant, Windowed
from kvlock_sampling.tiny.world import MOTIONS, SPEED, coverage
from kvlock_sampling.video.metrics import masked_psnr

from .judge import judge
from .metrics import masked_ssim, temporal_error

VARIANTS: dict[str, dict[str, Any]] = {
    "composited": {"policy": Constant(lock=0.0), "composite": True},
    "half lock, erased": {"policy": Constant(lock=0.5), "erase": True},
    "full lock": {"policy": Constant(lock=1.0)},
    "full lock at sigma >= 1": {"policy": Windowed(Constant(lock=1.0), above=1.0)},
    "paper": {"policy": "paper"},
    "static": {"policy": "static"},
    "release": {"policy": "release"},
    "default": {"policy": "default"},
}


class World(NamedTuple):
    """What a comparison needs of a world; scenes have a `prompt`, a `colour` and a `shape`, None without an object.

    Attributes:
        render: Scenes to clips (batch, 3, T, H, W) in [-1, 1].
        edit_mask: Sources and targets to masks (batch, 1, T, H, W), 1 = edit.
        coverage: Scenes to the object's alpha (batch, 1, T, H, W).
        velocity: A scene to the (x, y) velocity of its object, or of its background without one, in pixels per frame.
        judge: Clips to verdicts with a `colour` and a `shape`.
    """

    render: Callable[[Sequence[Any]], Tensor]
    edit_mask: Callable[[Sequence[Any], Sequence[Any]], Tensor]
    coverage: Callable[[Sequence[Any]], Tensor]
    velocity: Callable[[Any], tuple[float, float]]
    judge: Callable[[Tensor], Sequence[Any]]


def _velocity(scene: tiny.Scene) -> tuple[float, float]:
    return scene.pan + (0.0 if scene.shape is None else SPEED * MOTIONS[scene.motion]), 0.0


STAGE = World(tiny.render, tiny.edit_mask, coverage, _velocity, judge)


class Task(NamedTuple):
    """A batch of edits: source clips, masks (1 = edit), true results, prompts of edit and source, target scenes."""

    source: Tensor
    mask: Tensor
    truth: Tensor
    prompts: list[str]
    source_prompts: list[str]
    targets: list[Any]
    world: World


class Score(NamedTuple):
    """Scores of one variant, per clip.

    PSNR is in dB, SSIM in [-1, 1]. Temporal error is along the known motion of the object, or of the background if the
    object was removed, in units of [-1, 1] squared. colour and shape are 1 if the judge finds the right ones.
    """

    background_psnr: Tensor
    background_ssim: Tensor
    inside_psnr: Tensor
    temporal: Tensor
    colour: Tensor
    shape: Tensor
    nfe: int
    seconds: float

    def summary(self) -> dict[str, float]:
        """Means over the clips, rounded for a table."""
        row = {name: float(getattr(self, name).mean()) for name in self._fields[:6]}
        return row | {"nfe": self.nfe, "seconds": self.seconds}


def make_task(pairs: Sequence[tuple[Any, Any]], world: World = STAGE) -> Task:
    """Render (source, target) scenes, e.g. of `tiny.sample_edit`, into a task."""
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    return Task(
        source=world.render(sources),
        mask=world.edit_mask(sources, targets),
        truth=world.render(targets),
        prompts=[t.prompt for t in targets],
        source_prompts=[s.prompt for s in sources],
        targets=targets,
        world=world,
    )


def score(task: Task, edit: Edit) -> Score:
    """Compare an edit with the truth: background against the source, inside the mask against the true render."""
    keep = 1 - task.mask
    verdicts = task.world.judge(edit.pixels)
    colour = [
        v.shape is None if t.shape is None else v.colour == t.colour
        for v, t in zip(verdicts, task.targets, strict=True)
    ]
    shape = [v.shape == t.shape for v, t in zip(verdicts, task.targets, strict=True)]
    return Score(
        background_psnr=masked_psnr(edit.pixels, task.source, keep),
        background_ssim=masked_ssim(edit.pixels, task.source, keep),
        inside_psnr=masked_psnr(edit.pixels, task.truth, task.mask),
        temporal=_temporal(task, edit.pixels),
        colour=torch.tensor(colour).float(),
        shape=torch.tensor(shape).float(),
        nfe=edit.nfe,
        seconds=edit.seconds,
    )


def _temporal(task: Task, pixels: Tensor) -> Tensor:
    """Temporal error of the true object along its motion; if it was removed, of the mask along the background's."""
    alive = torch.tensor([scene.shape is not None for scene in task.targets]).view(-1, 1, 1, 1, 1)
    region = torch.where(alive, (task.world.coverage(task.targets) > 0.99).float(), task.mask)
    motion = torch.tensor([task.world.velocity(scene) for scene in task.targets])
    return temporal_error(pixels, motion, region)


def compare(
    task: Task,
    model: VideoModel,
    variants: Mapping[str, Mapping[str, Any]],
    *,
    on_variant: Callable[[str], None] | None = None,
    **arguments: Any,
) -> dict[str, tuple[Edit, Score]]:
    """Edit the task once per variant, from the same noise. `arguments` go to `edit_video`."""
    results = {}
    for name, options in variants.items():
        edit = edit_video(
            task.source,
            task.mask,
            task.prompts,
            model=model,
            **{"source_prompt": task.source_prompts, **arguments, **options},
        )
        results[name] = (edit, score(task, edit))
        if on_variant is not None:
            on_variant(name)
    return results
