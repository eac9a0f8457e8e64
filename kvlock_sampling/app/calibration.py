"""Calibrate thresholds: measure the variance of calm runs of a model, and write it into a preset."""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..masks import as_mask
from ..policy import Policy, Sigmoid
from ..presets import Preset, load_preset
from ..tiny import edit_mask, render, sample_scene
from ..types import EstimatorError, PolicyError, SourceError
from ..utils.fields import check_number, check_seed
from ..utils.warn import warn
from ..variance.thresholds import DEFAULT_ESTIMATOR, Band, ThresholdCurve, clips_needed, reference_bands
from ..video.media import FILMS, IMAGES, decoding
from ..video.read import as_clips
from .edit import edit_video
from .models import VideoModel, read_pair

_NONE = "no clips to calibrate on; give a few dozen, e.g. --clips 32 for the embedded model."


class Example(NamedTuple):
    """A clip (3, T, H, W) in [-1, 1] whose ordinary run is calm, its mask (1, T, H, W), 1 = edit, and its prompt."""

    clip: Tensor
    mask: Tensor
    prompt: str


class Calibration(NamedTuple):
    """The policy with its measured threshold curve and estimator, and quantiles of the variance over noise levels."""

    preset: Preset
    bands: list[Band]


def calibrate(
    model: VideoModel,
    examples: Sequence[Example],
    *,
    policy: str | os.PathLike[str] | Policy | Preset = "sigmoid",
    quantile: float = 0.95,
    bands: int = 12,
    steps: int = 30,
    sampler: Any = "dpmpp_2m",
    seed: int = 0,
    on_clip: Callable[[], None] = lambda: None,
) -> Calibration:
    """Remake examples unlocked and composited, and set risk 1 to a quantile of their variance at each noise level.

    Args:
        model: The model to calibrate for.
        examples: A few dozen clips with masks and their own prompts.
        policy: The policy that the thresholds are for: a name, a file, a Policy, or a Preset, whose estimator measures.
        quantile: Share of another clip's calm measurements below risk 1, in (0, 1), on average over calibrations; one
            calibration misses it by what `variance.thresholds.alarm_range` says.
        bands: Number of bands of noise levels.
        steps: Sampling steps, >= 1.
        sampler: A name from `samplers.names()`, or a callable.
        seed: Seed of the noise; clip i uses seed + i.
        on_clip: Called after each clip.

    Raises:
        SourceError: There are no examples.
        PolicyError: The policy does not read risk, or measures something that needs no calibration.
        EstimatorError: There are too few measurements.
    """
    if not examples:
        raise SourceError(_NONE)
    preset = load_preset(policy) if isinstance(policy, str | os.PathLike) else policy
    preset = preset if isinstance(preset, Preset) else Preset(preset)
    if not preset.policy.uses_risk:
        raise PolicyError(f'policy={policy!r} reads no risk; expected one that does, e.g. policy="sigmoid".')
    if (meter := preset.estimator or DEFAULT_ESTIMATOR).needs_source:
        raise PolicyError(
            f"policy={policy!r} measures {meter!r}, which is relative to edit and clip and needs no calibration.\n"
            '  Use the policy as it is, or calibrate one that reads risk, e.g. policy="sigmoid".'
        )
    check_number("quantile", quantile, EstimatorError, above=0.0, below=1.0)
    check_number("bands", bands, EstimatorError, at_least=1, whole=True)
    if len(examples) < (least := clips_needed(quantile)):
        warn(
            f"{len(examples)} clips cannot promise that {quantile:.0%} of other clips' measurements stay below risk 1; "
            f"it takes {least}. The largest measurement is the threshold now.",
        )
    points: list[tuple[int, float, float]] = []
    batch = 1 if getattr(model, "frames", None) is None else 8  # clips of a model of free size may differ
    for first in range(0, len(examples), batch):
        part = examples[first : first + batch]
        clips = torch.cat([as_clips(clip) for clip, *_ in part])
        masks = torch.cat([as_mask(mask, frames=clips.shape[2]) for _, mask, _ in part])
        options: dict[str, Any] = {"model": model, "steps": steps, "seed": check_seed(seed, SourceError, plus=first)}
        options |= {"sampler": sampler, "policy": Sigmoid(lock_range=(0.0, 0.0)), "estimator": meter, "composite": True}
        for step in edit_video(clips, masks, [prompt for *_, prompt in part], **options).trace:
            for clip, row in enumerate(step.variance):  # a number, or one per token, of which even ranks tell enough
                stride = -(-row.numel() // 256)
                some = row.flatten().sort().values[stride // 2 :: stride]
                points += [(first + clip, step.sigma, variance) for variance in some.tolist()]
        for _ in part:
            on_clip()
    found = reference_bands(points, quantile=quantile, bands=bands)
    rounded = [b._replace(sigma=float(f"{b.sigma:.4g}"), quantile=float(f"{b.quantile:.4g}")) for b in found]
    sigmas, values, *_ = zip(*rounded, strict=True)
    return Calibration(replace(preset, threshold=ThresholdCurve(sigmas, values), estimator=meter), found)


def scenes(count: int, *, first: int = 800_000) -> list[Example]:
    """Make `count` >= 1 examples for the embedded model from its procedural world; `first` is the first one's seed."""
    if count < 1:
        raise SourceError(_NONE)
    drawn = [sample_scene(first + i, empty=0.0) for i in range(count)]
    return list(map(Example, render(drawn), edit_mask(drawn, drawn), [s.prompt for s in drawn]))


def folder(path: str | Path, model: VideoModel) -> list[Example]:
    """Read examples from a folder: NAME.mp4, another film or gif; NAME.mask.png or a film; and NAME.txt, the prompt.

    The model decides the clips' length and size. Raises SourceError if a clip has not one mask and a prompt.
    """
    if not (path := Path(os.path.expanduser(path))).is_dir():
        raise SourceError(f"no folder {str(path)!r}; expected one of NAME.mp4, NAME.mask.png, NAME.txt; or a number.")
    examples, kinds = [], (".gif", *FILMS)
    named = sorted(p for p in path.iterdir() if p.suffix.lower() in (*FILMS, *IMAGES) and p.name[0] != ".")
    for clip in (p for p in named if p.suffix.lower() in kinds and ".mask" not in p.suffixes):
        masks = [p for p in named if p.name.startswith(f"{clip.stem}.mask.")]
        with decoding(text := clip.with_suffix(".txt")):
            prompt = text.read_text(encoding="utf-8-sig").strip() if text.is_file() else ""
        if len(masks) != 1 or not prompt:
            need = f"{clip.name} needs {clip.stem}.mask.png (white = edit) and {clip.stem}.txt, its prompt"
            raise SourceError(f"{need}; found {len(masks)} masks {[p.name for p in masks]} and the prompt {prompt!r}.")
        source, mask = read_pair(model, clip, masks[0], pad=False)
        examples.append(Example(source.pixels, mask, prompt))
    if not examples:
        raise SourceError(f"no clips in the folder {str(path)!r}; expected NAME with one of {', '.join(kinds)}.")
    return examples
