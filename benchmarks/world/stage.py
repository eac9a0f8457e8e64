"""The stage: a procedural world whose objects act beyond their own outline.

A wall and a floor, seen by a panning camera and lit from one side; often a grey post; one object on the floor. A matte
object casts a shadow, a glowing one tints what is near it. A mask covers the object and not its shadow or glow, so an
edit also changes what lies outside the mask. A clip is a function of a `Scene`: the true result of an edit is a second
render, by `stage_render`.
"""

from __future__ import annotations

import difflib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kvlock_sampling.types import KVLockError

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
FLOWERS = {f"flower with {word} petals": n for word, n in (("four", 4), ("five", 5), ("six", 6))}
SHAPES = ("ball", "box", "cone", "cross", *FLOWERS)
MOTIONS = {"standing still": 0.0, "moving left": -1.0, "moving right": 1.0}
SURFACES = ("matte", "glowing")
POSTS = ("with a post", "without a post")
EMPTY_PROMPT = "an empty stage"
PATTERNS = ("plain", "stripes", "checks")

# A prompt is five words: colour, shape, motion, surface, post. The position here is the word's row in the embedding;
# row 0 says nothing. An empty stage says EMPTY_PROMPT four times, then its post.
WORDS = ("", *COLOURS, *SHAPES, *MOTIONS, *SURFACES, EMPTY_PROMPT, *POSTS)
PROMPT_LENGTH = 5
UNSAID = {tuple(MOTIONS): "standing still", SURFACES: "matte", POSTS: "without a post"}
EXAMPLE = '  Try "a red ball moving left, glowing, beside a post" or "an empty stage".'
EDITS = ("recolour", "reshape", "glow", "remove", "insert")


@dataclass(frozen=True)
class Texture:
    """A wall or a floor.

    Attributes:
        colour: red, green and blue in [0, 1].
        pattern: one of `PATTERNS`.
        frequency: of the pattern, in radians per pixel.
        phase: of the pattern, in radians.
        contrast: amplitude of the pattern, added to the colour.
    """

    colour: tuple[float, float, float]
    pattern: str
    frequency: float
    phase: float
    contrast: float


@dataclass(frozen=True)
class Post:
    """A grey post on the floor.

    Attributes:
        x: centre in pixels, half way through the clip.
        foot: lower end in pixels from the top of the frame.
        width: half the width in pixels.
        height: in pixels.
        grey: brightness in [0, 1].
    """

    x: float
    foot: float
    width: float
    height: float
    grey: float


@dataclass(frozen=True)
class Scene:
    """Everything that decides a clip.

    Attributes:
        colour: of the object; one of `COLOURS`.
        shape: of the object; one of `SHAPES`, or None for an empty stage.
        motion: of the object in the room; one of `MOTIONS`.
        glowing: a glowing object tints what is near it, a matte one casts a shadow.
        x: centre of the object in pixels, half way through the clip.
        foot: lower end of the object in pixels from the top of the frame.
        radius: size of the object in pixels.
        wall: texture above the horizon.
        floor: texture below the horizon.
        horizon: in pixels from the top of the frame.
        pan: speed of the room in the frame, in pixels per frame; positive is to the right.
        light: the side that light comes from; shadows fall to the other side.
        gradient: brightness difference between the middle and a side, as a fraction of the half.
        post: None for a stage without a post.

    Raises:
        ValueError: an unknown colour, shape or motion.
    """

    colour: str
    shape: str | None
    motion: str
    glowing: bool
    x: float
    foot: float
    radius: float
    wall: Texture
    floor: Texture
    horizon: float
    pan: float
    light: Literal["left", "right"]
    gradient: float
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
        return (
            f"a {self.colour} {self.shape} {self.motion}"
            + ", glowing" * self.glowing
            + ", beside a post" * bool(self.post)
        )

    def recolour(self, colour: str) -> Scene:
        """The same scene with the object in another colour."""
        return replace(self, colour=colour)

    def reshape(self, shape: str, colour: str | None = None) -> Scene:
        """The same scene with an object of another shape, and of another colour if one is given."""
        return replace(self, shape=shape, colour=colour or self.colour)

    def glow(self, glowing: bool = True, colour: str | None = None) -> Scene:
        """The same scene with a glowing object, or a matte one, in another colour if one is given."""
        return replace(self, glowing=glowing, colour=colour or self.colour)

    def remove(self) -> Scene:
        """The same scene without its object, and so without the object's shadow and glow."""
        return replace(self, shape=None)

    def insert(self, shape: str, colour: str | None = None) -> Scene:
        """The same scene with an object on its floor."""
        return self.reshape(shape, colour)


def sample_scene(seed: int, *, empty: float = 0.1) -> Scene:
    """Draw a scene.

    Args:
        seed: the same seed always gives the same scene.
        empty: fraction of scenes without an object.
    """
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
    """Draw the source and the target of an edit; reshape and glow also change the colour.

    Args:
        seed: the same seed always gives the same pair.
        kind: one of `EDITS`.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in EDITS:
        raise ValueError(f"sample_edit(kind={kind!r}); expected one of {', '.join(EDITS)}")
    rng = random.Random(f"kvlock-stage-edit-1:{seed}")
    scene = sample_scene(seed, empty=0.0)
    colour = rng.choice([c for c in COLOURS if c != scene.colour])
    shape = rng.choice([s for s in SHAPES if s != scene.shape])
    targets = {
        "recolour": scene.recolour(colour),
        "reshape": scene.reshape(shape, colour),
        "glow": scene.glow(not scene.glowing, colour),
        "remove": scene.remove(),
        "insert": scene,
    }
    return scene.remove() if kind == "insert" else scene, targets[kind]


def tokenize(prompts: str | Sequence[str]) -> Tensor:
    """Turn prompts into rows of `WORDS`, (batch, PROMPT_LENGTH).

    A prompt names a colour and a shape, or an empty stage. An object stands still, is matte, and has no post beside it
    unless the prompt says otherwise. The empty prompt "" is the unconditional one: it says nothing.

    Args:
        prompts: one prompt or several.

    Raises:
        KVLockError: an unknown word, or a prompt without a colour or a shape.
    """
    return torch.tensor([_rows(p) for p in ([prompts] if isinstance(prompts, str) else prompts)])


def _rows(prompt: str) -> list[int]:
    text = re.sub(r"[\s,.]+", " ", f" {prompt.lower()} ").replace(" beside a ", " with a ")
    if not text.strip():
        return [0] * PROMPT_LENGTH
    said, slots = [], [tuple(COLOURS), SHAPES, tuple(MOTIONS), SURFACES, POSTS]
    if text.startswith(f" {EMPTY_PROMPT} "):
        text, said, slots = text.removeprefix(f" {EMPTY_PROMPT}"), [EMPTY_PROMPT] * 4, [POSTS]
    for phrases in slots:
        named = next((phrase for phrase in phrases if f" {phrase} " in text), UNSAID.get(phrases))
        if named is None:
            raise KVLockError(f"prompt {prompt!r} names none of {', '.join(phrases)}.\n{EXAMPLE}")
        text = text.replace(f" {named} ", " ", 1)
        said.append(named)
    unread = [word for word in text.split() if word != "a"]
    if unread:
        near = difflib.get_close_matches(unread[0], " ".join(WORDS).split(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near and near[0] != unread[0] else ""
        raise KVLockError(f"the embedded model cannot read {unread[0]!r} in prompt {prompt!r}.{hint}\n{EXAMPLE}")
    return [WORDS.index(phrase) for phrase in said]
