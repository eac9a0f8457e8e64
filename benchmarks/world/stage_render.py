"""Render scenes of the stage to clips, with the object's exact alpha, the mask of an edit, and the regions to score.

Clips are (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]. Masks and alpha are (batch, 1, FRAMES, SIZE, SIZE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .stage import COLOURS, FLOWERS, FRAMES, MOTIONS, SIZE, SPEED, Post, Scene, Texture

MARGIN = 2  # pixels by which a mask is larger than the outlines
EFFECT = 0.03  # smallest difference, in clips in [-1, 1], that counts as an effect of the edit


def _column(values: Sequence[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(len(values), 1, 1, 1, -1).movedim(-1, 1)


def _grid() -> tuple[Tensor, Tensor, Tensor]:
    """Frame index, y and x of the pixels' centres; they broadcast to (1, 1, FRAMES, SIZE, SIZE)."""
    t, pixels = torch.arange(FRAMES).float(), torch.arange(SIZE) + 0.5
    return t.view(1, 1, -1, 1, 1), pixels.view(1, 1, 1, -1, 1), pixels.view(1, 1, 1, 1, -1)


def _object_centre(scenes: Sequence[Scene]) -> tuple[Tensor, Tensor]:
    time = _grid()[0] - (FRAMES - 1) / 2
    x = _column([s.x for s in scenes]) + _column([SPEED * MOTIONS[s.motion] for s in scenes]) * time
    return x + _column([s.pan for s in scenes]) * time, _column([s.foot for s in scenes]) - _column(
        [s.radius for s in scenes]
    )


def _distance(shape: str, dx: Tensor, dy: Tensor, r: Tensor) -> Tensor:
    """Signed distance in pixels to a shape's outline, negative inside; dx, dy count from its centre, y downward."""
    if shape == "ball":
        return (dx * dx + dy * dy + 1e-6).sqrt() - 0.95 * r
    if shape == "box":
        return torch.maximum(dx.abs(), dy.abs()) - 0.84 * r
    if shape == "cone":
        return torch.maximum((1.9 * dx.abs() - (dy + r)) / 2.147, dy - 0.95 * r)
    if shape == "cross":
        beam = torch.maximum(dx.abs() - 0.98 * r, dy.abs() - 0.34 * r)
        return torch.minimum(beam, torch.maximum(dx.abs() - 0.34 * r, dy.abs() - 0.98 * r))
    angle = torch.atan2(dy, dx) + math.pi / 2
    return 0.75 * ((dx * dx + dy * dy + 1e-6).sqrt() - r * (0.70 + 0.30 * torch.cos(FLOWERS[shape] * angle)))


def coverage(scenes: Sequence[Scene]) -> Tensor:
    """The object's alpha: (batch, 1, FRAMES, SIZE, SIZE) in [0, 1], zero on an empty stage."""
    _, y, x = _grid()
    cx, cy = _object_centre(scenes)
    alpha = torch.zeros(len(scenes), 1, FRAMES, SIZE, SIZE)
    for i, scene in enumerate(scenes):
        if scene.shape is not None:
            distance = _distance(scene.shape, x[0] - cx[i], y[0] - cy[i], torch.tensor(scene.radius))
            alpha[i] = (0.5 - distance).clamp(0, 1)
    return alpha


def _pattern(kind: str, x: Tensor, y: Tensor, texture: Texture, *, floor: bool) -> Tensor:
    f, phase = texture.frequency, texture.phase
    if kind == "plain":
        return torch.zeros_like(x + y)
    if kind == "stripes":
        return torch.sin(x * f + (0.6 * y if floor else 0 * y) + phase)
    checks = torch.sin(x * f + phase) * torch.sin(y * f * (1.6 if floor else 1.0))
    return torch.tanh(3 * checks) if floor else checks


def _surface(textures: Sequence[Texture], x: Tensor, y: Tensor, *, floor: bool) -> Tensor:
    patterns = [_pattern(t.pattern, x[i], y[0], t, floor=floor) for i, t in enumerate(textures)]
    return _column([t.colour for t in textures]) + _column([t.contrast for t in textures]) * torch.stack(patterns)


def _shadow(x: Tensor, y: Tensor, foot: Tensor, height: Tensor, width: Tensor, light: Tensor) -> Tensor:
    """An ellipse on the floor that leans away from the light; x counts from the centre of what casts the shadow."""
    across, along = (x + 0.55 * light * height) / (width + 0.45 * height), (y - foot - 1) / (0.16 * height + 1.2)
    return (1.25 - (across**2 + along**2).sqrt()).clamp(0, 0.5) * 2


def render(scenes: Sequence[Scene]) -> Tensor:
    """Render scenes to clips (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]."""
    t, y, x = _grid()
    light = _column([1.0 if s.light == "right" else -1.0 for s in scenes])
    side = light * (2 * x / SIZE - 1)
    lit = 1 + 2 * _column([s.gradient for s in scenes]) * side
    pan = _column([s.pan for s in scenes])
    room_x = x - pan * t
    on_floor = (y - _column([s.horizon for s in scenes]) + 0.5).clamp(0, 1)
    wall = _surface([s.wall for s in scenes], room_x, y, floor=False)
    floor = _surface([s.floor for s in scenes], room_x, y, floor=True)
    clip = (wall + (floor - wall) * on_floor) * lit

    posts = [s.post or Post(0.0, 0.0, 1.0, 1.0, 0.0) for s in scenes]
    has_post = _column([float(s.post is not None) for s in scenes])
    post_x = x - _column([p.x for p in posts]) - pan * (t - (FRAMES - 1) / 2)
    foot, width, height = (_column([getattr(p, name) for p in posts]) for name in ("foot", "width", "height"))
    cx, cy = _object_centre(scenes)
    radius = _column([s.radius for s in scenes])
    glowing = _column([float(s.glowing and s.shape is not None) for s in scenes])
    casts = _column([float(not s.glowing and s.shape is not None) for s in scenes])
    shadows = torch.maximum(
        has_post * _shadow(post_x, y, foot, 0.6 * height, width, light),
        casts * _shadow(x - cx, y, cy + radius, 2 * radius, 0.5 * radius, light),
    )
    clip = clip * (1 - 0.48 * shadows * on_floor)
    outside = torch.maximum(post_x.abs() - width, torch.maximum(foot - height - y, y - foot))
    clip = clip.lerp(_column([p.grey for p in posts]) * lit, (0.5 - outside).clamp(0, 1) * has_post)

    colour = _column([COLOURS[s.colour] for s in scenes])
    tint = 0.42 * glowing * torch.exp(-1.4 * ((x - cx) ** 2 + (y - cy) ** 2) / (2.1 * radius) ** 2)
    clip = clip + tint * colour * (0.35 + 0.9 * clip)
    clip = clip.lerp(colour * (1 + 0.10 * side * (1 - glowing)), coverage(scenes))
    return clip.clamp(0, 1) * 2 - 1


def edit_mask(sources: Sequence[Scene], targets: Sequence[Scene]) -> Tensor:
    """1 where either object is, grown by MARGIN pixels: what a user would draw, without the shadow or the glow."""
    hit = (torch.maximum(coverage(sources), coverage(targets)) > 0.02).float()
    return F.max_pool3d(hit, (1, 2 * MARGIN + 1, 2 * MARGIN + 1), 1, (0, MARGIN, MARGIN))


class Regions(NamedTuple):
    """The parts of a frame that are scored apart: (batch, 1, FRAMES, SIZE, SIZE), 0 or 1; they sum to 1.

    Attributes:
        mask: `edit_mask`.
        effect: outside the mask, where the true edit differs from the source by more than EFFECT in any channel.
        rest: everything else, which an edit must keep.
    """

    mask: Tensor
    effect: Tensor
    rest: Tensor


def regions(sources: Sequence[Scene], targets: Sequence[Scene]) -> Regions:
    """Split the frames of an edit into mask, effect and rest."""
    mask = edit_mask(sources, targets)
    differs = (render(targets) - render(sources)).abs().amax(dim=1, keepdim=True) > EFFECT
    effect = differs.float() * (1 - mask)
    return Regions(mask, effect, 1 - mask - effect)
