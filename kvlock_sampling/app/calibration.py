"""Measure what calm runs of a model reach, and write it into a preset: thresholds that fit this model and clip size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..policy import Policy, stateless
from ..presets import Preset, load_preset
from ..types import Control, Observation, PolicyError, SourceError
from ..variance import Estimator
from ..variance.thresholds import DEFAULT_ESTIMATOR, Band, reference_bands, threshold_curve
from .edit import edit_video
from .models import VideoModel, read_pair

_NONE = "no clips to calibrate on; give a few dozen, e.g. --clips 32 for the embedded model."


class Example(NamedTuple):
    """A clip whose ordinary run is calm: pixels (3, T, H, W), mask (1, T, H, W), and its own prompt."""

    clip: Tensor
    mask: Tensor
    prompt: str


@dataclass(frozen=True)
class Calibration:
    """A preset with a measured threshold curve, the bands it was read from, and how many measurements there were."""

    preset: Preset
    bands: list[Band]
    measurements: int


@stateless
def resting(obs: Observation) -> Control:
    """Measure, lock nothing, and leave guidance as requested."""
    return Control(lock=0.0)


def calibrate(
    model: VideoModel,
    examples: Sequence[Example],
    *,
    policy: str | Policy | Preset = "default",
    estimator: Estimator | None = None,
    quantile: float = 0.95,
    bands: int = 12,
    steps: int = 30,
    sampler: Any = "dpmpp_2m",
    seed: int = 0,
    batch: int = 8,
    on_clip: Callable[[], None] | None = None,
) -> Calibration:
    """Run `examples` unlocked, composited, with measuring on; return `policy` with the curve of the `quantile`.

    estimator: what to measure with; default: the one that the preset `policy` names, or the lock's own default.
    risk is then 1 where a run moves more than a share `quantile` of calm ones does at this noise level.

    Raises:
        EstimatorError: too few measurements.  SourceError: no examples.  PolicyError: a policy that reads no risk.
    """
    if not examples:
        raise SourceError(_NONE)
    given = load_preset(policy) if isinstance(policy, str) else policy
    base = given if isinstance(given, Preset) else Preset(given)
    if not base.policy.uses_risk:
        raise PolicyError(
            f"policy={policy!r} reads no risk, so it has no use for a threshold; expected one that does, e.g. "
            'policy="default" or policy="sigmoid".'
        )
    meter = estimator or base.estimator or DEFAULT_ESTIMATOR
    points: list[tuple[float, float]] = []
    for first in range(0, len(examples), batch):
        part = examples[first : first + batch]
        edit = edit_video(
            torch.stack([e.clip for e in part]),
            torch.stack([e.mask for e in part]),
            [e.prompt for e in part],
            model=model,
            sampler=sampler,
            steps=steps,
            policy=resting,
            estimator=meter,
            seed=seed + first,
            composite=True,
        )
        points += [(float(r["sigma"]), float(r["variance"])) for r in edit.trace.rows()]
        if on_clip is not None:
            for _ in part:
                on_clip()
    found = reference_bands(points, quantile=quantile, bands=bands)
    rounded = [b._replace(sigma=float(f"{b.sigma:.4g}"), quantile=float(f"{b.quantile:.4g}")) for b in found]
    preset = replace(base, threshold=threshold_curve(rounded), estimator=meter)
    return Calibration(preset, found, len(points))


def scenes(count: int, *, first: int = 800_000) -> list[Example]:
    """Examples for the embedded model: scenes of its world, each re-made under its own prompt inside its mask.

    Raises:
        SourceError: a count below 1.
    """
    from ..tiny.world import edit_mask, render, sample_scene

    if count < 1:
        raise SourceError(_NONE)
    drawn = [sample_scene(first + i, empty=0.0) for i in range(count)]
    return [Example(c, edit_mask(s, s), s.prompt) for c, s in zip(render(drawn), drawn, strict=True)]


def folder(path: Path, model: VideoModel) -> list[Example]:
    """Examples from a folder: NAME.mp4 (or gif, webm, mov), NAME.mask.png (or a film), and NAME.txt with the prompt.

    Raises:
        SourceError: a clip without its mask or prompt.
    """
    examples = []
    for clip in sorted(p for p in path.glob("*") if p.suffix in (".mp4", ".gif", ".webm", ".mov")):
        if ".mask" in clip.suffixes:
            continue
        masks = sorted(path.glob(f"{clip.stem}.mask.*"))
        text = clip.with_suffix(".txt")
        if not masks or not text.is_file():
            raise SourceError(
                f"{clip.name} needs {clip.stem}.mask.png (white = edit) and {clip.stem}.txt (its prompt) beside it."
            )
        source, mask = read_pair(model, clip, masks[0], pad=False)
        examples.append(Example(source.pixels, mask, text.read_text(encoding="utf-8").strip()))
    return examples
