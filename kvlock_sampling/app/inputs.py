"""A clip and its mask from files, at a size that a model can edit."""

from __future__ import annotations

import math
import os

from torch import Tensor

from ..types import SourceError
from ..video.files import Clip, read_clip, read_mask
from .edit import VideoModel, editable

PathLike = str | os.PathLike[str]


def read_pair(
    model: VideoModel,
    clip: PathLike,
    mask: PathLike,
    *,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    pad: bool = True,
) -> tuple[Clip, Tensor]:
    """A clip (3, frames, height, width) in [-1, 1] with its rate, and its mask (1, frames, height, width).

    A model of one size gets that: frames evenly from first to last (a short clip repeats its last, if `pad`), the
    centre cropped.
    Others get the clip as it is, as far as they can: its first frames and its size, rounded down to what the model
    takes, and no more of either than it usually makes. frames, size: ask for others; frames are then picked evenly.

    Raises:
        SourceError: frames or size that this model cannot edit.  VideoError: files that cannot be read.
    """
    if model.frames is not None and model.size is not None:
        requested = (frames or model.frames, size or tuple(model.size))
        if requested != (model.frames, tuple(model.size)):
            raise SourceError(
                f"frames={frames}, size={size}: this model edits {model.frames} frames of {model.size[0]} x "
                f"{model.size[1]} alone. Leave both away."
            )
        read = read_clip(clip, frames=model.frames, size=model.size, pad=pad)
        return read, read_mask(mask, frames=model.frames, size=model.size)
    whole = read_clip(clip, frames=frames, pad=pad)
    _, have, height, width = whole.pixels.shape
    count, sides = _free(model, have, (height, width), frames, size)
    read = whole if sides == (height, width) else read_clip(clip, frames=frames, size=sides, pad=pad)
    region = read_mask(mask, frames=have, size=sides)
    return Clip(read.pixels[:, :count], read.fps), region[:, :count]


def _free(
    model: VideoModel, have: int, own: tuple[int, int], frames: int | None, size: tuple[int, int] | None
) -> tuple[int, tuple[int, int]]:
    usual = getattr(model, "usual", None)
    most = have if frames is not None or usual is None else min(have, usual[0])
    if size is not None:
        height, width = size
    else:
        shrink = 1.0 if usual is None else min(1.0, math.sqrt(usual[1] * usual[2] / math.prod(own)))
        height, width = (round(side * shrink) for side in own)
    count, sides = editable(model, most, height, width)
    if (frames is not None and count != frames) or (size is not None and sides != tuple(size)):
        raise SourceError(
            f"frames={frames}, size={size}: this model edits e.g. frames={count}, size={sides}, the next it takes."
        )
    return count, sides
