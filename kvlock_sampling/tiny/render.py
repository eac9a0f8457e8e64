"""Render scenes of the stage to clips, with the object's exact alpha, the mask of an edit, and the regions to score.

Clips are (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]. Masks and alpha are (batch, 1, FRAMES, SIZE, SIZE).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .world import COLOURS, FLOWERS, FRAMES, MOTIONS, SIZE, SPEED, Scene, Texture

MARGIN = 2  # pixels by which a mask is larger than the outlines
EFFECT = 0.03  # smallest difference, in clips in [-1, 1], that counts as an effect of the edit


def _grid() -> tuple[Tensor, Tensor, Tensor]:
    """Frame index, y and x of the pixels' centres; they broadcast to (FRAMES, SIZE, SIZE)."""
    pixels = torch.arange(SIZE) + 0.5
    return torch.arange(FRAMES).float().view(-1, 1, 1), pixels.view(1, -1, 1), pixels.view(1, 1, -1)


def _offsets(scene: Scene) -> tuple[Tensor, Tensor]:
    """Pixels to the right of the object's centre (FRAMES, 1, SIZE) and below it (1, SIZE, 1)."""
    t, y, x = _grid()
    centre = scene.x + (SPEED * MOTIONS[scene.motion] + scene.pan) * (t - (FRAMES - 1) / 2)
    return x - centre, y - (scene.foot - scene.radius)


def _coverage(scene: Scene) -> Tensor:
    dx, dy = _offsets(scene)
    r, middle = scene.radius, (dx * dx + dy * dy + 1e-6).sqrt()
    # The signed distance to the outline in pixels, negative inside.
    if scene.shape == "ball":
        distance = middle - 0.95 * r
    elif scene.shape == "box":
        distance = torch.maximum(dx.abs(), dy.abs()) - 0.84 * r
    elif scene.shape == "cone":
        distance = torch.maximum((1.9 * dx.abs() - (dy + r)) / 2.147, dy - 0.95 * r)
    elif scene.shape == "cross":
        beam = torch.maximum(dx.abs() - 0.98 * r, dy.abs() - 0.34 * r)
        distance = torch.minimum(beam, torch.maximum(dx.abs() - 0.34 * r, dy.abs() - 0.98 * r))
    elif scene.shape is not None:
        petals = torch.cos(FLOWERS[scene.shape] * (torch.atan2(dy, dx) + math.pi / 2))
        distance = 0.75 * (middle - r * (0.70 + 0.30 * petals))
    else:
        return torch.zeros(FRAMES, SIZE, SIZE)
    return (0.5 - distance).clamp(0, 1)


def coverage(scenes: Sequence[Scene]) -> Tensor:
    """The object's alpha: (batch, 1, FRAMES, SIZE, SIZE) in [0, 1], zero on an empty stage."""
    return torch.stack([_coverage(scene) for scene in scenes]).unsqueeze(1)


def _surface(texture: Texture, x: Tensor, y: Tensor, *, floor: bool) -> Tensor:
    f = texture.frequency
    pattern = torch.zeros_like(x + y)
    if texture.pattern == "stripes":
        pattern = torch.sin(x * f + 0.6 * floor * y + texture.phase)
    elif texture.pattern == "checks":
        pattern = torch.sin(x * f + texture.phase) * torch.sin(y * f * (1.6 if floor else 1.0))
        pattern = torch.tanh(3 * pattern) if floor else pattern
    return torch.tensor(texture.colour).view(3, 1, 1, 1) + texture.contrast * pattern


def _shadow(x: Tensor, y: Tensor, foot: float, height: float, width: float, light: float) -> Tensor:
    """An ellipse on the floor that leans away from the light; x counts from the centre of what casts the shadow."""
    across, along = (x + 0.55 * light * height) / (width + 0.45 * height), (y - foot - 1) / (0.16 * height + 1.2)
    return (1.25 - (across**2 + along**2).sqrt()).clamp(0, 0.5) * 2


def _render(scene: Scene) -> Tensor:
    t, y, x = _grid()
    light = 1.0 if scene.light == "right" else -1.0
    side = light * (2 * x / SIZE - 1)
    lit = 1 + 2 * scene.gradient * side
    on_floor = (y - scene.horizon + 0.5).clamp(0, 1)
    room_x = x - scene.pan * t
    wall, floor = _surface(scene.wall, room_x, y, floor=False), _surface(scene.floor, room_x, y, floor=True)
    clip = wall.lerp(floor, on_floor) * lit

    dx, dy = _offsets(scene)
    post, radius = scene.post, scene.radius
    post_x = x - (post.x if post else 0.0) - scene.pan * (t - (FRAMES - 1) / 2)
    shadow = torch.zeros(1, 1, 1)
    if post is not None:
        shadow = _shadow(post_x, y, post.foot, 0.6 * post.height, post.width, light)
    if scene.shape is not None and not scene.glowing:
        shadow = torch.maximum(shadow, _shadow(dx, y, scene.foot, 2 * radius, 0.5 * radius, light))
    clip = clip * (1 - 0.48 * shadow * on_floor)
    if post is not None:
        outside = torch.maximum(post_x.abs() - post.width, torch.maximum(post.foot - post.height - y, y - post.foot))
        clip = clip.lerp(post.grey * lit, (0.5 - outside).clamp(0, 1))
    if scene.shape is not None:
        colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1)
        if scene.glowing:
            tint = 0.42 * torch.exp(-1.4 * (dx**2 + dy**2) / (2.1 * radius) ** 2)
            clip = clip + tint * colour * (0.35 + 0.9 * clip)
        clip = clip.lerp(colour if scene.glowing else colour * (1 + 0.10 * side), _coverage(scene))
    return clip.clamp(0, 1) * 2 - 1


def render(scenes: Sequence[Scene]) -> Tensor:
    """Render scenes to clips (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]."""
    return torch.stack([_render(scene) for scene in scenes])


def edit_mask(sources: Sequence[Scene], targets: Sequence[Scene]) -> Tensor:
    """1 where either object is, grown by MARGIN pixels: what a user would draw, without the shadow or the glow."""
    hit = (torch.maximum(coverage(sources), coverage(targets)) > 0.02).float()
    return F.max_pool3d(hit, (1, 2 * MARGIN + 1, 2 * MARGIN + 1), 1, (0, MARGIN, MARGIN))


class Regions(NamedTuple):
    """The parts of a frame that are scored apart: (batch, 1, FRAMES, SIZE, SIZE), 0 or 1; they sum to 1.

    Attributes:
        mask: `edit_mask`.
        effect: Outside the mask, where the true edit differs from the source by more than EFFECT in any channel.
        rest: Everything else, which an edit must keep.
    """

    mask: Tensor
    effect: Tensor
    rest: Tensor


def regions(sources: Sequence[Scene], targets: Sequence[Scene]) -> Regions:
    """Split the frames of edits into mask, effect and rest."""
    mask = edit_mask(sources, targets)
    differs = (render(targets) - render(sources)).abs().amax(dim=1, keepdim=True) > EFFECT
    effect = differs.float() * (1 - mask)
    return Regions(mask, effect, 1 - mask - effect)
