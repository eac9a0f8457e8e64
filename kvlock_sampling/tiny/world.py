"""The stage: a procedural world whose objects act beyond their own outline.

A wall and a floor, seen by a panning camera and lit from one side; often a grey post; one object on the floor. A matte
object casts a shadow, a glowing one tints what is near it. A mask covers the object and not its shadow or glow, so an
edit also changes what lies outside the mask. A clip is a function of a `Scene`, so the true result of an edit is known:
change the scene and render it again.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

FRAMES, SIZE = 8, 64
SPEED = 1.6  # pixels per frame of a moving object

COLOURS: dict[str, tuple[float, float, float]] = {
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


@dataclass(frozen=True)
class Texture:
    """A wall or a floor: a colour plus a pattern."""

    colour: tuple[float, float, float]  # red, green and blue in [0, 1]
    pattern: str  # one of PATTERNS
    frequency: float  # of the pattern, in radians per pixel
    phase: float  # in radians
    contrast: float  # amplitude of the pattern, added to the colour


@dataclass(frozen=True)
class Post:
    """A grey post on the floor. Lengths are in pixels."""

    x: float  # centre, half way through the clip
    foot: float  # lower end, from the top of the frame
    width: float  # half the width
    height: float
    grey: float  # brightness in [0, 1]


@dataclass(frozen=True)
class Scene:
    """Everything that decides a clip. Lengths are in pixels; an unknown colour, shape or motion raises ValueError."""

    colour: str  # of the object; one of COLOURS
    shape: str | None  # of the object; one of SHAPES, or None for an empty stage
    motion: str  # of the object in the room; one of MOTIONS
    glowing: bool  # a glowing object tints what is near it, a matte one casts a shadow
    x: float  # centre of the object, half way through the clip
    foot: float  # lower end of the object, from the top of the frame
    radius: float  # size of the object
    wall: Texture  # above the horizon
    floor: Texture  # below the horizon
    horizon: float  # from the top of the frame
    pan: float  # speed of the room in the frame, in pixels per frame; positive is to the right
    light: str  # "left" or "right": the side that light comes from; shadows fall to the other side
    gradient: float  # brightness difference between the middle and a side, as a fraction of the half
    post: Post | None

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
        glowing, post = ", glowing" * self.glowing, ", beside a post" * bool(self.post)
        return f"a {self.colour} {self.shape} {self.motion}{glowing}{post}"


def sample_scene(seed: int, *, empty: float = 0.1) -> Scene:
    """Draw the scene of a seed. `empty` is the probability of a stage without an object."""
    rng = random.Random(f"kvlock-stage-1:{seed}")

    def texture(low: float, saturation: float, frequency: float, spread: float) -> Texture:
        base = [low + 0.30 * rng.random() for _ in range(3)]
        grey = sum(base) / 3
        r, g, b = (grey + saturation * (c - grey) for c in base)  # dull, so that saturated objects stand out
        period = rng.uniform(frequency, frequency + spread)
        return Texture((r, g, b), rng.choice(PATTERNS), period, rng.uniform(0, 2 * math.pi), rng.uniform(0.05, 0.13))

    wall, floor = texture(0.34, 0.45, 0.35, 0.35), texture(0.30, 0.60, 0.35, 0.30)
    post = Post(
        x=rng.uniform(8, 56),
        foot=rng.uniform(47, 53),
        width=rng.uniform(2.0, 3.5),
        height=rng.uniform(14, 22),
        grey=rng.uniform(0.60, 0.85),
    )
    return Scene(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES) if rng.random() >= empty else None,
        motion=rng.choice(list(MOTIONS)),
        glowing=rng.random() < 0.35,
        x=rng.uniform(20, 44),
        foot=rng.uniform(48, 56),
        radius=rng.uniform(8.5, 11.0),
        wall=wall,
        floor=floor,
        horizon=rng.uniform(34, 42),
        pan=rng.uniform(-1.5, 1.5),
        light=rng.choice(("left", "right")),
        gradient=rng.uniform(0.06, 0.16),
        post=post if rng.random() < 0.6 else None,
    )


def sample_edit(seed: int, kind: str) -> tuple[Scene, Scene]:
    """Draw the (source, target) scenes of a seed for one kind of edit; reshape and glow also change the colour.

    Raises:
        ValueError: The kind is not in `EDITS`.
    """
    if kind not in EDITS:
        raise ValueError(f"sample_edit(kind={kind!r}); expected one of {', '.join(EDITS)}")
    rng = random.Random(f"kvlock-stage-edit-1:{seed}")
    scene = sample_scene(seed, empty=0.0)
    colour = rng.choice([c for c in COLOURS if c != scene.colour])
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    if kind == "insert":
        return replace(scene, shape=None), scene
    targets = {
        "recolour": replace(scene, colour=colour),
        "reshape": replace(scene, colour=colour, shape=shape),
        "glow": replace(scene, colour=colour, glowing=not scene.glowing),
        "remove": replace(scene, shape=None),
    }
    return scene, targets[kind]
