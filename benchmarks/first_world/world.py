"""A procedural world of short clips: one flat-coloured object that moves over a smooth, panning texture.

A clip is a function of a `Scene`, so the true result of an edit is known: change the scene and render it again.
Clips are tensors (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]. Masks are (batch, 1, FRAMES, SIZE, SIZE), 1 = edit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import conv2d

FRAMES, SIZE = 8, 32

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.92, 0.12, 0.14),
    "green": (0.12, 0.78, 0.22),
    "blue": (0.14, 0.26, 0.95),
    "yellow": (0.98, 0.88, 0.12),
    "magenta": (0.92, 0.16, 0.86),
    "cyan": (0.12, 0.86, 0.92),
}
SHAPES = ("circle", "square", "triangle", "cross")
MOTIONS: dict[str, tuple[str, tuple[float, float]]] = {
    "still": ("standing still", (0.0, 0.0)),
    "left": ("moving left", (-1.0, 0.0)),
    "right": ("moving right", (1.0, 0.0)),
    "up": ("moving up", (0.0, -1.0)),
    "down": ("moving down", (0.0, 1.0)),
}
SPEED = 1.4  # pixels per frame of every moving object
EMPTY_PROMPT = "an empty scene"


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip. Colours are RGB in [0, 1], lengths are pixels, velocities pixels per frame."""

    colour: str  # a key of COLOURS
    shape: str | None  # from SHAPES; None for a scene without an object
    motion: str  # a key of MOTIONS
    x: float  # the object's centre half way through the clip
    y: float
    radius: float
    dark: tuple[float, float, float]  # the darkest colour of the background
    light: tuple[float, float, float]
    waves: tuple[tuple[float, float, float, float], ...]  # wave vector (x, y), phase in radians, weight
    pan: tuple[float, float]  # velocity of the background

    @property
    def prompt(self) -> str:
        """The prompt that describes this scene, e.g. "a red circle moving left"."""
        if self.shape is None:
            return EMPTY_PROMPT
        return f"a {self.colour} {self.shape} {MOTIONS[self.motion][0]}"

    def recolour(self, colour: str) -> Scene:
        return replace(self, colour=colour)

    def reshape(self, shape: str) -> Scene:
        return replace(self, shape=shape)

    def remove(self) -> Scene:
        return replace(self, shape=None)


def sample_scene(seed: int, *, empty: float = 0.1) -> Scene:
    """Draw the scene of a seed. `empty` is the probability of a scene without an object."""
    rng = random.Random(f"kvlock-world-1:{seed}")
    base = [rng.uniform(0.22, 0.5) for _ in range(3)]
    grey = sum(base) / 3
    muted = [grey + 0.5 * (c - grey) for c in base]  # Dull backgrounds make saturated objects stand out.
    contrast = rng.uniform(0.10, 0.24)
    waves = []
    for _ in range(3):
        angle, wavelength = rng.uniform(0, 2 * math.pi), rng.uniform(14, 44)
        k = 2 * math.pi / wavelength
        waves.append((k * math.cos(angle), k * math.sin(angle), rng.uniform(0, 2 * math.pi), rng.uniform(0.5, 1.0)))
    motion = rng.choice(list(MOTIONS))
    radius = rng.uniform(5.0, 7.0)
    dx, dy = MOTIONS[motion][1]
    travel = SPEED * (FRAMES - 1) / 2
    low_x, low_y = radius + 0.5 + travel * abs(dx), radius + 0.5 + travel * abs(dy)
    return Scene(
        colour=rng.choice(list(COLOURS)),
        shape=None if rng.random() < empty else rng.choice(SHAPES),
        motion=motion,
        x=rng.uniform(low_x, SIZE - low_x),
        y=rng.uniform(low_y, SIZE - low_y),
        radius=radius,
        dark=(muted[0] - contrast / 2, muted[1] - contrast / 2, muted[2] - contrast / 2),
        light=(muted[0] + contrast, muted[1] + contrast, muted[2] + contrast),
        waves=tuple(waves),
        pan=(rng.uniform(-1.2, 1.2), rng.uniform(-1.2, 1.2)),
    )


EDITS = ("recolour", "reshape", "replace", "remove", "insert")


def sample_edit(seed: int, kind: str) -> tuple[Scene, Scene]:
    """Draw the (source, target) scenes of a seed for one kind of edit; raise ValueError if it is not in `EDITS`."""
    if kind not in EDITS:
        raise ValueError(f"unknown kind of edit {kind!r}; expected one of {', '.join(EDITS)}")
    scene = sample_scene(seed, empty=0.0)
    rng = random.Random(f"kvlock-edit-1:{seed}")
    colour = rng.choice([c for c in COLOURS if c != scene.colour])
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    if kind == "recolour":
        return scene, scene.recolour(colour)
    if kind == "reshape":
        return scene, scene.reshape(shape)
    if kind == "replace":
        return scene, scene.recolour(colour).reshape(shape)
    return (scene, scene.remove()) if kind == "remove" else (scene.remove(), scene)


def shape_coverage(shape: str, dx: Tensor, dy: Tensor, radius: Tensor) -> Tensor:
    """Anti-aliased coverage in [0, 1] of a shape at offsets (dx, dy) in pixels from its centre (y grows downward)."""
    if shape == "circle":
        distance = torch.hypot(dx, dy) - radius
    elif shape == "square":
        distance = torch.maximum(dx.abs(), dy.abs()) - 0.86 * radius
    elif shape == "triangle":
        side = (2 * dx.abs() - (dy + 1.05 * radius)) / math.hypot(2.0, 1.0)
        distance = torch.maximum(side, dy - 0.85 * radius)
    elif shape == "cross":
        arm, length = 0.36 * radius, 1.05 * radius
        bar = torch.maximum(dx.abs() - length, dy.abs() - arm)
        distance = torch.minimum(bar, torch.maximum(dx.abs() - arm, dy.abs() - length))
    else:
        raise ValueError(f"unknown shape {shape!r}; expected one of {', '.join(SHAPES)}")
    return (0.5 - distance).clamp(0, 1)


def _grid() -> tuple[Tensor, Tensor, Tensor]:
    """Frame index (FRAMES, 1, 1) and pixel-centre coordinates y (1, SIZE, 1), x (1, 1, SIZE)."""
    pixels = torch.arange(SIZE) + 0.5
    return torch.arange(FRAMES).float().view(-1, 1, 1), pixels.view(1, -1, 1), pixels.view(1, 1, -1)


def centre(scene: Scene) -> Tensor:
    """The object's centre (FRAMES, 2) as x, y in pixels."""
    dx, dy = MOTIONS[scene.motion][1]
    steps = SPEED * (torch.arange(FRAMES).float() - (FRAMES - 1) / 2)
    return torch.stack([scene.x + dx * steps, scene.y + dy * steps], dim=-1)


def coverage(scene: Scene) -> Tensor:
    """Coverage of the object, (FRAMES, SIZE, SIZE) in [0, 1]; all zero for an empty scene."""
    if scene.shape is None:
        return torch.zeros(FRAMES, SIZE, SIZE)
    _, y, x = _grid()
    where = centre(scene)
    cx, cy = where[:, 0].view(-1, 1, 1), where[:, 1].view(-1, 1, 1)
    return shape_coverage(scene.shape, x - cx, y - cy, torch.tensor(scene.radius))


def background(scene: Scene) -> Tensor:
    """The panning texture without the object, (3, FRAMES, SIZE, SIZE) in [0, 1]."""
    t, y, x = _grid()
    x, y = x - scene.pan[0] * t, y - scene.pan[1] * t
    total = sum(weight for *_, weight in scene.waves)
    level = torch.zeros(FRAMES, SIZE, SIZE)
    for kx, ky, phase, weight in scene.waves:
        level = level + weight / total * torch.sin(kx * x + ky * y + phase)
    level = (0.5 + 0.5 * level).unsqueeze(0)
    dark, light = torch.tensor(scene.dark).view(3, 1, 1, 1), torch.tensor(scene.light).view(3, 1, 1, 1)
    return dark + (light - dark) * level


def render(scenes: Sequence[Scene]) -> Tensor:
    """Render scenes to clips (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]."""
    clips = []
    for scene in scenes:
        picture = background(scene)
        if scene.shape is not None:
            alpha = coverage(scene).unsqueeze(0)
            colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1)
            picture = picture * (1 - alpha) + colour * alpha
        clips.append(picture)
    return torch.stack(clips) * 2 - 1


def edit_mask(source: Scene, target: Scene, *, margin: float = 2.0) -> Tensor:
    """Mask (1, FRAMES, SIZE, SIZE) of an edit: 1 wherever either object is, grown by `margin` pixels."""
    hit = torch.maximum(coverage(source), coverage(target)) > 0
    reach = torch.arange(-math.ceil(margin), math.ceil(margin) + 1).float()
    disk = (torch.hypot(reach[:, None], reach) <= margin).float()
    grown = conv2d(hit.float()[:, None], disk[None, None], padding=math.ceil(margin))[:, 0] > 0.5
    return grown.float().unsqueeze(0)
