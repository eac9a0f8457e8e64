"""Make edits whose true results are known, in several ways from the same noise, and score them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock_sampling.app.edit import Edit, VideoModel, edit_video
from kvlock_sampling.policy import Constant, LockAbove, Windowed
from kvlock_sampling.tiny.world import MOTIONS, SPEED, Scene, coverage, edit_mask, render
from kvlock_sampling.video.metrics import masked_psnr, masked_ssim

from .judge import judge
from .temporal import temporal_error

VARIANTS: dict[str, dict[str, Any]] = {
    "unlocked": {"policy": Constant(lock=0.0)},
    "composited": {"policy": Constant(lock=0.0), "composite": True},
    "fixed 0.5": {"policy": Constant(lock=0.5)},
    "full lock": {"policy": Constant(lock=1.0)},
    "early lock": {"policy": LockAbove(Constant(lock=0.0), above=1.0)},
    "late lock": {"policy": Windowed(Constant(lock=1.0), below=1.0)},
    "paper": {"policy": "paper"},
    "threshold": {"policy": "threshold"},
    "sigmoid": {"policy": "sigmoid"},
    "PID": {"policy": "pid"},
    "default": {"policy": "default"},
}


class Task(NamedTuple):
    """A batch of edits: source clips, masks (1 = edit), true results, prompts of edit and source, target scenes."""

    source: Tensor
    mask: Tensor
    truth: Tensor
    prompts: list[str]
    source_prompts: list[str]
    targets: list[Scene]


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


def make_task(pairs: Sequence[tuple[Scene, Scene]]) -> Task:
    """Render (source, target) scenes, e.g. of `world.sample_edit`, into a task."""
    sources, targets = [s for s, _ in pairs], [t for _, t in pairs]
    return Task(
        source=render(sources),
        mask=torch.stack([edit_mask(s, t) for s, t in pairs]),
        truth=render(targets),
        prompts=[t.prompt for t in targets],
        source_prompts=[s.prompt for s in sources],
        targets=targets,
    )


def score(task: Task, edit: Edit) -> Score:
    """Compare an edit with the truth: background against the source, inside the mask against the true render."""
    keep = 1 - task.mask
    verdicts = judge(edit.pixels)
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
    motions, regions = [], []
    for mask, scene in zip(task.mask, task.targets, strict=True):
        dx, dy = MOTIONS[scene.motion][1]
        motions.append(scene.pan if scene.shape is None else (SPEED * dx, SPEED * dy))
        regions.append(mask if scene.shape is None else (coverage(scene) > 0.99).float().unsqueeze(0))
    return temporal_error(pixels, torch.tensor(motions), torch.stack(regions))


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
