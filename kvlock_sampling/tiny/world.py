"""The stage: a procedural world whose objects act beyond their own outline.

A wall and a floor, seen by a panning camera and lit from one side; often a grey post; one object on the floor. A matte
object casts a shadow, a glowing one tints what is near it. A mask covers the object and not its shadow or glow, so an
edit also changes what lies outside the mask. A clip is a function of a `Scene`, so the true result of an edit is known:
change the scene and render it again. Clips are (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1], masks have one channel.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FRAMES, SIZE = 8, 64
SPEED = 1.6  # pixels per frame of a moving object

RGB = tuple[float, float, float]
COLOURS: dict[str, RGB] = {
    "red": (0.92, 0.14, 0.14),
    "green": (0.14, 0.76, 0.22),
    "blue": (0.16, 0.30, 0.95),
    "yellow": (0.97, 0.86, 0.14),
    "magenta": (0.90, 0.20, 0.86),
    "cyan": (0.14, 0.84, 0.90),
}
FLOWERS = {"flower with four petals": 4, "flower with five petals": 5, "flower with six petals": 6}
SHAPES = ("ball", "box", "cone", "cross", *FLOWERS)
MOTIONS = {"standing still": 0.0, "moving left": -1.0, "moving right": 1.0}
PATTERNS = ("plain", "stripes", "checks")
EDITS = ("recolour", "reshape", "glow", "remove", "insert")
EMPTY_PROMPT = "an empty stage"
MARGIN = 2  # pixels by which a mask is larger than the outlines
EFFECT = 0.03  # smallest difference, in clips in [-1, 1], that counts as an effect of an edit


@dataclass(frozen=True)
class Scene:
    """Everything that decides a clip. Lengths are in pixels; an unknown colour, shape or motion raises ValueError.

    Pairs belong to the wall and to the floor. Each has a colour plus a pattern.
    """

    colour: str  # of the object; one of COLOURS
    shape: str | None  # of the object; one of SHAPES, or None for an empty stage
    motion: str  # of the object in the room; one of MOTIONS
    glowing: bool  # a glowing object tints what is near it, a matte one casts a shadow
    x: float  # centre of the object, half way through the clip
    foot: float  # lower end of the object, from the top of the frame
    radius: float  # size of the object
    colours: tuple[RGB, RGB]  # in [0, 1]
    patterns: tuple[str, str]  # from PATTERNS
    frequencies: tuple[float, float]  # of the patterns, in radians per pixel
    phases: tuple[float, float]  # in radians
    contrasts: tuple[float, float]  # amplitudes of the patterns, added to the colours
    horizon: float  # where the wall ends, from the top of the frame
    pan: float  # speed of the room in the frame, in pixels per frame; positive is to the right
    light: str  # "left" or "right": the side that light comes from; shadows fall to the other side
    gradient: float  # brightness difference between the middle and a side, as a fraction of the half
    post: bool  # whether a grey post stands on the floor
    post_x: float  # its centre, half way through the clip
    post_foot: float  # its lower end, from the top of the frame
    post_width: float  # half its width
    post_height: float
    post_grey: float  # its brightness in [0, 1]

    def __post_init__(self) -> None:
        for field, known in (("colour", COLOURS), ("shape", (None, *SHAPES)), ("motion", MOTIONS)):
            value = getattr(self, field)
            if value not in known:
                raise ValueError(f"Scene({field}={value!r}); expected one of {', '.join(map(repr, known))}")

    @property
    def prompt(self) -> str:
        """The sentence that describes this scene, e.g. "a red ball moving left, glowing, beside a post"."""
        if self.shape is None:
            return f"{EMPTY_PROMPT} with a post" if self.post else EMPTY_PROMPT
        glowing, post = ", glowing" * self.glowing, ", beside a post" * self.post
        return f"a {self.colour} {self.shape} {self.motion}{glowing}{post}"


def sample_scene(seed: int, *, empty: float = 0.1) -> Scene:
    """Draw the scene of a seed. `empty` is the probability of a stage without an object."""
    rng = random.Random(f"kvlock-stage-1:{seed}")

    def texture(low: float, saturation: float, slowest: float, spread: float) -> tuple[Any, ...]:
        base = [low + 0.30 * rng.random() for _ in range(3)]
        grey = sum(base) / 3
        r, g, b = (grey + saturation * (c - grey) for c in base)  # dull, so that saturated objects stand out
        frequency = rng.uniform(slowest, slowest + spread)
        return (r, g, b), rng.choice(PATTERNS), frequency, rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.13)

    surfaces = zip(texture(0.34, 0.45, 0.35, 0.35), texture(0.30, 0.60, 0.35, 0.30), strict=True)
    fields = ("colours", "patterns", "frequencies", "phases", "contrasts")
    drawn: dict[str, Any] = dict(zip(fields, surfaces, strict=True))
    bounds = {"x": (8, 56), "foot": (47, 53), "width": (2.0, 3.5), "height": (14, 22), "grey": (0.60, 0.85)}
    drawn |= {f"post_{name}": rng.uniform(*between) for name, between in bounds.items()}
    return Scene(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES) if rng.random() >= empty else None,
        motion=rng.choice(list(MOTIONS)),
        glowing=rng.random() < 0.35,
        x=rng.uniform(20, 44),
        foot=rng.uniform(48, 56),
        radius=rng.uniform(8.5, 11.0),
        horizon=rng.uniform(34, 42),
        pan=rng.uniform(-1.5, 1.5),
        light=rng.choice(("left", "right")),
        gradient=rng.uniform(0.06, 0.16),
        post=rng.random() < 0.6,
        **drawn,
    )


def sample_edit(seed: int, kind: str) -> tuple[Scene, Scene]:
    """Draw (source, target) of a seed for a kind of `EDITS`, else ValueError; reshape, glow change the colour too."""
    if kind not in EDITS:
        raise ValueError(f"sample_edit(kind={kind!r}); expected one of {', '.join(EDITS)}")
    rng = random.Random(f"kvlock-stage-edit-1:{seed}")
    scene = sample_scene(seed, empty=0.0)
    colour = rng.choice([c for c in COLOURS if c != scene.colour])
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    changes: dict[str, dict[str, Any]] = {
        "recolour": {"colour": colour},
        "reshape": {"colour": colour, "shape": shape},
        "glow": {"colour": colour, "glowing": not scene.glowing},
    }
    other = replace(scene, **changes.get(kind, {"shape": None}))
    return (other, scene) if kind == "insert" else (scene, other)


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


def _surface(scene: Scene, which: int, x: Tensor, y: Tensor) -> Tensor:
    """The wall (0) or the floor (1), whose patterns are slanted and squeezed, (3, FRAMES, SIZE, SIZE) in [0, 1]."""
    f, phase, pattern = scene.frequencies[which], scene.phases[which], torch.zeros_like(x + y)
    if scene.patterns[which] == "stripes":
        pattern = torch.sin(x * f + 0.6 * which * y + phase)
    elif scene.patterns[which] == "checks":
        pattern = torch.sin(x * f + phase) * torch.sin(y * f * (1.6 if which else 1.0))
        pattern = torch.tanh(3 * pattern) if which else pattern
    return torch.tensor(scene.colours[which]).view(3, 1, 1, 1) + scene.contrasts[which] * pattern


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
    clip = _surface(scene, 0, room_x, y).lerp(_surface(scene, 1, room_x, y), on_floor) * lit

    (dx, dy), radius, shadow = _offsets(scene), scene.radius, torch.zeros(1, 1, 1)
    post_x = x - scene.post_x - scene.pan * (t - (FRAMES - 1) / 2)
    if scene.post:
        shadow = _shadow(post_x, y, scene.post_foot, 0.6 * scene.post_height, scene.post_width, light)
    if scene.shape is not None and not scene.glowing:
        shadow = torch.maximum(shadow, _shadow(dx, y, scene.foot, 2 * radius, 0.5 * radius, light))
    clip = clip * (1 - 0.48 * shadow * on_floor)
    if scene.post:
        above_or_below = torch.maximum(scene.post_foot - scene.post_height - y, y - scene.post_foot)
        outside = torch.maximum(post_x.abs() - scene.post_width, above_or_below)
        clip = clip.lerp(scene.post_grey * lit, (0.5 - outside).clamp(0, 1))
    if scene.shape is not None:
        colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1)
        if scene.glowing:
            clip = clip + 0.42 * torch.exp(-1.4 * (dx**2 + dy**2) / (2.1 * radius) ** 2) * colour * (0.35 + 0.9 * clip)
        clip = clip.lerp(colour if scene.glowing else colour * (1 + 0.10 * side), _coverage(scene))
    return clip.clamp(0, 1) * 2 - 1


def render(scenes: Sequence[Scene]) -> Tensor:
    """Render scenes to clips (batch, 3, FRAMES, SIZE, SIZE) in [-1, 1]."""
    return torch.stack([_render(scene) for scene in scenes])


def edit_mask(sources: Sequence[Scene], targets: Sequence[Scene]) -> Tensor:
    """1 where either object is, grown by MARGIN pixels: what a user would draw, without the shadow or the glow."""
    hit = (torch.maximum(coverage(sources), coverage(targets)) > 0.02).float()
    return F.max_pool3d(hit, (1, 2 * MARGIN + 1, 2 * MARGIN + 1), 1, (0, MARGIN, MARGIN))


def regions(sources: Sequence[Scene], targets: Sequence[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Split the frames of edits into (mask, effect, rest), each (batch, 1, FRAMES, SIZE, SIZE), 0 or 1; they sum to 1.

    The mask is `edit_mask`. The effect region is where the true edit differs from the source outside the mask, by more
    than EFFECT in any channel. The rest is what an edit must keep.
    """
    mask = edit_mask(sources, targets)
    effect = ((render(targets) - render(sources)).abs().amax(dim=1, keepdim=True) > EFFECT).float() * (1 - mask)
    return mask, effect, 1 - mask - effect
