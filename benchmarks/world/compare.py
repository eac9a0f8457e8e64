"""Make edits whose true results are known, in several ways from the same noise, and score them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock_sampling import tiny
from kvlock_sampling.app.edit import Edit, VideoModel, edit_video
from kvlock_sampling.policy import Constant, Windowed
from kvlock_sampling.video.metrics import masked_psnr

from .judge import judge

VARIANTS: dict[str, dict[str, Any]] = {
    "composited": {"policy": Constant(lock=0.0), "composite": True},
    "half lock, erased": {"policy": Constant(lock=0.5), "erase": True},
    "full lock": {"policy": Constant(lock=1.0)},
    "full lock at sigma >= 1": {"policy": Windowed(Constant(lock=1.0), above=1.0)},
    "paper": {"policy": "paper"},
    "static": {"policy": "static"},
    "static, anywhere": {"policy": "static", "reach": math.inf},
    "release": {"policy": "release"},
    "default": {"policy": "default"},
}


class World(NamedTuple):
    """What a comparison needs of a world; scenes have a `prompt`, a `colour` and a `shape`, None without an object.

    Attributes:
        render: Scenes to clips (batch, 3, T, H, W) in [-1, 1].
        edit_mask: Sources and targets to masks (batch, 1, T, H, W), 1 = edit.
        judge: Clips to verdicts with a `colour` and a `shape`.
    """

    render: Callable[[Sequence[Any]], Tensor]
    edit_mask: Callable[[Sequence[Any], Sequence[Any]], Tensor]
    judge: Callable[[Tensor], Sequence[Any]]


STAGE = World(tiny.render, tiny.edit_mask, judge)


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

    PSNR is in dB. colour and shape are 1 if the judge finds the right ones.
    """

    background_psnr: Tensor
    inside_psnr: Tensor
    colour: Tensor
    shape: Tensor
    nfe: int
    seconds: float


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
        inside_psnr=masked_psnr(edit.pixels, task.truth, task.mask),
        colour=torch.tensor(colour).float(),
        shape=torch.tensor(shape).float(),
        nfe=edit.nfe,
        seconds=edit.seconds,
    )


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
