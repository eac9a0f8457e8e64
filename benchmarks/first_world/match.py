"""Fit renders to a chroma picture: shape, radius, and one centre per frame. The geometry of `judge`.

For a template a (coverage in [0, 1]) of full strength C, a picture D and a mask w, the squared error splits as

    sum w |D - a C|^2 = sum w |D|^2 - gain,      gain = 2 C . (wD * a) - |C|^2 (w * a^2)        (* = correlation)

so two correlations give the gain of every template at every whole-pixel centre. `refine` adds sub-pixel precision.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .world import SHAPES, SIZE, shape_coverage

RADII = torch.linspace(4.5, 7.5, 8)  # pixels; the world draws 5 to 7
REACH = 9  # pixels from a template's centre to the edge of its window; the largest shape needs 8.4
LIMITS = (4.0, 8.0)  # pixels; refined radii stay inside


class Guess(NamedTuple):
    """Best whole-pixel match: `colour` (n,) indexes the palette; `radius` (n, shapes), `centre` (n, shapes, T, 2)."""

    colour: Tensor
    radius: Tensor
    centre: Tensor


class Fit(NamedTuple):
    """One shape fitted to n clips.

    cover: the render's coverage, (n, T, H, W) in [0, 1]. whole: what of its squared sum (n, T) would be seen if nothing
    were cut off by the frame or the mask. centre: (n, T, 2) as x, y in pixels. radius: (n,), pixels.
    softness: (n,) in [0, 1]; 0 = edges as the world renders them, 1 = after a 3x3 box blur.
    """

    cover: Tensor
    whole: Tensor
    centre: Tensor
    radius: Tensor
    softness: Tensor


def templates() -> Tensor:
    """Coverage of every shape at every radius around the middle pixel: (shapes * radii, 1, window, window)."""
    offset = torch.arange(-REACH, REACH + 1).float()
    dx, dy, radius = offset.view(1, 1, -1), offset.view(1, -1, 1), RADII.view(-1, 1, 1)
    return torch.stack([shape_coverage(name, dx, dy, radius) for name in SHAPES]).flatten(0, 1).unsqueeze(1)


def search(D: Tensor, mask: Tensor, colours: Tensor) -> Guess:
    """Best colour of each clip, then best radius and centres of each shape in that colour, at whole pixels.

    D: chroma minus background, (n, 2, T, H, W). mask: (n, T, H, W). colours: strengths (n, palette, 2).
    """
    n, _, frames = D.shape[:3]
    patterns = templates()
    overlap = F.conv2d((D * mask[:, None]).transpose(1, 2).reshape(-1, 1, SIZE, SIZE), patterns, padding=REACH)
    overlap = overlap.view(n, frames, 2, len(patterns), -1)
    if bool((mask == 1).all()):
        area = F.conv2d(torch.ones(1, 1, SIZE, SIZE), patterns.square(), padding=REACH).view(1, 1, len(patterns), -1)
    else:
        area = F.conv2d(mask.reshape(-1, 1, SIZE, SIZE), patterns.square(), padding=REACH).view(
            n, frames, len(patterns), -1
        )

    gains, places = [], []
    for C in colours.unbind(1):
        along = 2 * (C[:, 0].view(n, 1, 1, 1) * overlap[:, :, 0] + C[:, 1].view(n, 1, 1, 1) * overlap[:, :, 1])
        gain, place = (along - C.square().sum(1).view(n, 1, 1, 1) * area).max(dim=-1)
        gains.append(gain.sum(1).view(n, len(SHAPES), len(RADII)))  # one shape and radius for all frames
        places.append(place)
    gain = torch.stack(gains, 1)  # (n, palette, shapes, radii)
    place = torch.stack(places, 1)  # (n, palette, T, patterns)
    colour = gain.flatten(2).amax(2).argmax(1)
    rows = torch.arange(n)
    size = gain[rows, colour].argmax(-1)  # (n, shapes)
    which = size + len(RADII) * torch.arange(len(SHAPES))
    where = place[rows, colour].gather(2, which[:, None].expand(n, frames, len(SHAPES))).transpose(1, 2)
    return Guess(colour, RADII[size], torch.stack([where % SIZE, where // SIZE], -1) + 0.5)


def refine(shape: str, alpha: Tensor, mask: Tensor, radius: Tensor, centre: Tensor, *, rounds: int = 6) -> Fit:
    """Gauss-Newton on each frame's centre, then on the clip's radius and softness; no step makes the error larger.

    alpha: coverage seen, (n, T, H, W). mask: the same shape. radius: (n,). centre: (n, T, 2).
    """
    h = 0.2  # pixels: half the difference step; coverage ramps over one pixel, so a tiny step would see only kinks
    ex, ey = torch.tensor([h, 0.0]), torch.tensor([0.0, h])
    soft = torch.zeros_like(radius)
    now = _cover(shape, centre, radius, soft)

    def error(cover: Tensor) -> Tensor:
        return (mask * (alpha - cover).square()).sum((-1, -2))

    for _ in range(rounds):
        jx = (_cover(shape, centre + ex, radius, soft) - _cover(shape, centre - ex, radius, soft)) / (2 * h)
        jy = (_cover(shape, centre + ey, radius, soft) - _cover(shape, centre - ey, radius, soft)) / (2 * h)
        J = torch.stack([jx, jy], -1).flatten(2, 3)
        weight = mask.flatten(2)[..., None]
        rest = weight * (alpha - now).flatten(2)[..., None]
        step = torch.linalg.solve(J.mT @ (weight * J) + 1e-3 * torch.eye(2), J.mT @ rest).squeeze(-1).clamp(-1, 1)
        moved = (centre + step).clamp(0, SIZE)
        trial = _cover(shape, moved, radius, soft)
        better = (error(trial) < error(now))[..., None]
        centre, now = torch.where(better, moved, centre), torch.where(better[..., None], trial, now)

        jr = (_cover(shape, centre, radius + h, soft) - _cover(shape, centre, radius - h, soft)) / (2 * h)
        step = _ratio(mask * jr * (alpha - now), mask * jr * jr).clamp(-0.5, 0.5)
        grown = (radius + step).clamp(*LIMITS)
        trial = _cover(shape, centre, grown, soft)
        better = error(trial).sum(1) < error(now).sum(1)
        radius, now = torch.where(better, grown, radius), torch.where(better.view(-1, 1, 1, 1), trial, now)

        sharp = _cover(shape, centre, radius, torch.zeros_like(soft))
        js = _box(sharp) - sharp
        soft = _ratio(mask * js * (alpha - sharp), mask * js * js).clamp(0, 1)  # linear, so this is the optimum
        now = sharp + soft.view(-1, 1, 1, 1) * js
    home = centre % 1 + SIZE // 2  # the same place within a pixel, in the middle of the frame
    return Fit(now, _cover(shape, home, radius, soft).square().sum((-1, -2)), centre, radius, soft)


def _cover(shape: str, centre: Tensor, radius: Tensor, soft: Tensor) -> Tensor:
    """Coverage (n, T, H, W) of `shape` at centre (n, T, 2), radius (n,), softened by `soft` (n,)."""
    pixels = torch.arange(SIZE) + 0.5
    dx = (pixels - centre[..., 0, None])[..., None, :]
    dy = (pixels - centre[..., 1, None])[..., :, None]
    sharp = shape_coverage(shape, dx, dy, radius.view(-1, 1, 1, 1))
    return sharp + soft.view(-1, 1, 1, 1) * (_box(sharp) - sharp)


def _box(x: Tensor) -> Tensor:
    """3x3 box blur of (..., H, W), zero outside. Twice as fast here as avg_pool2d, which took half of all the time."""
    x = x + F.pad(x[..., 1:], (0, 1)) + F.pad(x[..., :-1], (1, 0))
    return (x + F.pad(x[..., 1:, :], (0, 0, 0, 1)) + F.pad(x[..., :-1, :], (0, 0, 1, 0))) / 9


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """Sums over all but the first axis, divided; a Gauss-Newton step of one parameter."""
    return over.flatten(1).sum(1) / (under.flatten(1).sum(1) + 1e-3)
