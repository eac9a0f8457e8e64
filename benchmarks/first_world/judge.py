"""Judge exactly what a clip of the procedural world shows, by matching renders. No network is involved.

A background of this world varies in brightness only: its chroma (RGB without the grey axis, a plane) is one constant m.
An object of palette colour C with coverage a in [0, 1] therefore shows up as

    D(p) = chroma(p) - m = a(p - centre) * (chroma(C) - m)          (p = pixel; background 0, object full strength)

so the best render minimises  sum |D - a (chroma(C) - m)|^2;  `match` finds it. A clip has one colour, shape and radius,
and one centre per frame. Inside the object its brightness is checked too.

Grey objects in the background are invisible to this judge; `kvlock_sampling.video.metrics` compares backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kvlock_sampling.types import KVLockError

from .match import Fit, refine, search
from .world import COLOURS, MOTIONS, SHAPES, SIZE, SPEED, Scene

CLEAN = 0.97
"""A verdict whose `quality` reaches this is a clean object, or a clean empty scene.

Measured on 500 scenes: renders with noise of std 0.1 keep 0.989 or more, with a 3x3 blur 0.993, with both 0.976. The
most object-like corruptions reach 0.967 (half circle, half square) and 0.965 (half square, half triangle).
"""

PRESENT = 0.25  # the least gain over "no object", as a fraction of the best render's own energy; a perfect object has 1
SMALL = 35.0  # pixels: the squared coverage of the smallest object, a triangle of radius 4.5
AXES = F.normalize(torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]), dim=1)
"""Orthonormal axes of RGB: grey first, then the two of the chroma plane."""


class JudgeError(KVLockError, ValueError):
    """Clips, a region or scenes of the wrong shape."""


class Verdict(NamedTuple):
    """What one clip shows.

    colour: a name of `world.COLOURS`; "" where there is no object.
    shape: a name of `world.SHAPES`; None where there is no object.
    error: mean squared chroma difference between the clip and the best render, per pixel, in RGB units of [0, 1].
    margin: how much worse the second-best shape explains the object, as a fraction of its energy; small = undecided.
    quality: fraction of the object's energy that the best render explains, in [0, 1], with white noise discounted;
        1 = perfect, below `CLEAN` = broken. Without an object: 1 minus the stray colour, in units of a small object.
    frame_quality: the same per frame, (T,); its minimum finds an object that is broken, or gone, in one frame only.
    centre: the object's centre per frame, (T, 2) as x, y in pixels; nan where there is no object.
    radius: in pixels; 0 where there is no object.
    softness: 0 = edges as the world renders them, 1 = as after a 3x3 box blur; blur up to there costs no quality.
    """

    colour: str
    shape: str | None
    error: float
    margin: float
    quality: float
    frame_quality: Tensor
    centre: Tensor
    radius: float
    softness: float

    @property
    def clean(self) -> bool:
        """Whether this is a whole object, or a truly empty scene."""
        return self.quality >= CLEAN

    @property
    def motion(self) -> str | None:
        """The nearest of `world.MOTIONS` to the centres' straight-line velocity; None where there is no object."""
        if self.shape is None:
            return None
        t = torch.arange(len(self.centre)) - (len(self.centre) - 1) / 2
        velocity = (t[:, None] * self.centre).sum(0) / (t * t).sum()
        return min(MOTIONS, key=lambda name: math.dist([SPEED * v for v in MOTIONS[name][1]], velocity.tolist()))


def judge(clips: Tensor, region: Tensor | None = None, *, chunk: int = 16) -> list[Verdict]:
    """Find the object in each clip, the confidence, and whether the object is whole.

    clips: (batch, 3, T, SIZE, SIZE) in [-1, 1]; values outside are clamped.
    region: (batch or 1, 1, T, SIZE, SIZE) in [0, 1]; only what is inside is matched and counted. None = everywhere.
    chunk: clips per pass; bounds the memory (about 5 MiB each).

    >>> from first_world.world import render, sample_scene
    >>> scene = sample_scene(3)
    >>> verdict = judge(render([scene]))[0]
    >>> (verdict.colour, verdict.shape, verdict.motion) == (scene.colour, scene.shape, scene.motion)
    True
    """
    if clips.ndim != 5 or clips.shape[1] != 3 or clips.shape[-2:] != (SIZE, SIZE):
        raise JudgeError(
            f"judge got clips of shape {tuple(clips.shape)}; expected (batch, 3, T, {SIZE}, {SIZE}). "
            "For one clip call judge(clip[None])."
        )
    if not torch.isfinite(clips).all():
        raise JudgeError("judge got clips with nan or inf; expected values in [-1, 1]. See torch.isfinite(clips).")
    if region is not None and (
        region.ndim != 5 or region.shape[0] not in (1, len(clips)) or region.shape[1:] != (1, *clips.shape[2:])
    ):
        raise JudgeError(
            f"judge got a region of shape {tuple(region.shape)} for clips {tuple(clips.shape)}; "
            f"expected ({len(clips)}, 1, {clips.shape[2]}, {SIZE}, {SIZE}). "
            "For one mask of `world.edit_mask` call judge(clips, mask[None])."
        )
    verdicts: list[Verdict] = []
    with torch.no_grad():
        for start in range(0, len(clips), chunk):
            part = clips[start : start + chunk].detach().float().cpu().clamp(-1, 1)
            mask = torch.ones(len(part), *part.shape[2:])
            if region is not None:
                mask = mask * (region if len(region) == 1 else region[start : start + chunk])[:, 0].float().cpu()
            verdicts += _judge(part, mask)
    return verdicts


def attribute_accuracy(clips: Tensor, scenes: Sequence[Scene], region: Tensor | None = None) -> dict[str, float]:
    """Rates in [0, 1] at which clips show what their scenes describe.

    `colour` and `motion` are over the scenes that have an object (nan where there is none); `shape`, `both` (colour
    and shape) and `clean` (both, and a quality of at least `CLEAN`) are over all scenes: an empty scene counts as right
    when the judge finds no object. Takes the arguments of `judge`, plus one scene per clip.
    """
    if len(scenes) != len(clips):
        raise JudgeError(f"attribute_accuracy got {len(clips)} clips and {len(scenes)} scenes; expected one per clip.")
    pairs = list(zip(judge(clips, region), scenes, strict=True))
    right_shape = [v.shape == s.shape for v, s in pairs]
    right_colour = [v.colour == s.colour or s.shape is None for v, s in pairs]
    both = [a and b for a, b in zip(right_shape, right_colour, strict=True)]
    objects = [(v, s) for v, s in pairs if s.shape is not None]
    return {
        "colour": _rate([v.colour == s.colour for v, s in objects]),
        "shape": _rate(right_shape),
        "both": _rate(both),
        "motion": _rate([v.motion == s.motion for v, s in objects]),
        "clean": _rate([ok and v.clean for ok, (v, _) in zip(both, pairs, strict=True)]),
    }


def _rate(hits: list[bool]) -> float:
    return sum(hits) / len(hits) if hits else math.nan


def _judge(clips: Tensor, mask: Tensor) -> list[Verdict]:
    """One chunk: clips (n, 3, T, H, W) in [-1, 1], mask (n, T, H, W)."""
    n = len(clips)
    grey, chroma = torch.einsum("kc,ncthw->nkthw", AXES, clips * 0.5 + 0.5).split([1, 2], dim=1)
    palette = torch.tensor(list(COLOURS.values())) @ AXES.T  # (6, 3): grey, chroma
    still = chroma.flatten(2).median(dim=2).values  # an object covers less than half a frame, so this is the background
    D = chroma - still.view(n, 2, 1, 1, 1)
    strengths = palette[:, 1:] - still[:, None]  # (n, 6, 2)
    guess = search(D, mask, strengths)

    C = strengths[torch.arange(n), guess.colour]
    unit = C.square().sum(1)
    alpha = torch.einsum("nk,nkthw->nthw", C, D) / unit.view(n, 1, 1, 1)
    fits = [refine(name, alpha, mask, guess.radius[:, i], guess.centre[:, i]) for i, name in enumerate(SHAPES)]
    errors = torch.stack([(mask * (alpha - fit.cover).square()).sum((1, 2, 3)) for fit in fits], 1)  # (n, shapes)
    gains = (mask * alpha.square()).sum((1, 2, 3)) - errors.amin(1)
    bright = grey[:, 0] - palette[guess.colour, 0].view(n, 1, 1, 1)

    verdicts = []
    for i in range(n):
        first, second = errors[i].argsort()[:2].tolist()
        fit = Fit(*(value[i] for value in fits[first]))
        present = bool(gains[i] > PRESENT * fit.whole.clamp(min=SMALL).sum())
        cover = fit.cover if present else torch.zeros_like(fit.cover)
        rest = (D[i] - C[i].view(2, 1, 1, 1) * cover).square().sum(0)
        # White noise of variance s^2 per axis leaves |rest|^2 ~ s^2 chi2(2): mean 2 s^2, median 2 ln 2 s^2.
        noise = rest.median() / math.log(2)
        inside = mask[i] * (cover > 0.999)
        unexplained = (mask[i] * (rest - noise) + inside * (bright[i].square() - noise / 2)).sum((1, 2))
        energy = unit[i] * (fit.whole if present else torch.full_like(fit.whole, SMALL))
        if present:
            unexplained = unexplained + energy - unit[i] * (mask[i] * cover.square()).sum((1, 2))  # what is cut off
            energy = energy.maximum((mask[i] * (D[i].square().sum(0) - noise)).sum((1, 2)))
        verdicts.append(
            Verdict(
                colour=list(COLOURS)[int(guess.colour[i])] if present else "",
                shape=SHAPES[first] if present else None,
                error=float((mask[i] * rest).sum() / mask[i].sum().clamp(min=1)),
                margin=float(unit[i] * (errors[i, second] - errors[i, first]) / energy.sum()) if present else 1.0,
                quality=float((1 - unexplained.sum() / energy.sum()).clamp(0, 1)),
                frame_quality=(1 - unexplained / energy).clamp(0, 1),
                centre=fit.centre if present else torch.full_like(fit.centre, math.nan),
                radius=float(fit.radius) if present else 0.0,
                softness=float(fit.softness) if present else 0.0,
            )
        )
    return verdicts
