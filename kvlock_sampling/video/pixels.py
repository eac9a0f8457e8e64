"""Clips at the door: what is a clip, and which numbers it may hold."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..types import SourceError

_EXPECTED = "expected pixels in [-1, 1], (3, frames, height, width) or (batch, 3, frames, height, width)"


def as_clips(clip: Any) -> Tensor:
    """A clip or clips, tensor or array, as a tensor of (batch, channels, frames, height, width).

    An array of float64, numpy's own default, becomes float32. A tensor that is neither a clip nor a batch of them comes
    back as it is: whoever knows the model says which shape it takes.

    Raises:
        SourceError: a path, or anything else that holds no pixels.
    """
    if isinstance(clip, str | os.PathLike):
        name = os.fspath(clip)
        raise SourceError(
            f"clip is the path {name!r}; {_EXPECTED}. Read it first:\n"
            f"  from kvlock_sampling.video import read_clip\n  clip = read_clip({name!r}).pixels"
        )
    if isinstance(clip, np.ndarray) and clip.dtype.kind in "fiub":
        # Torch takes no array that is read-only or has negative strides: those are copied.
        clip = torch.from_numpy(np.require(clip, requirements=["C", "W"]))
        clip = clip.float() if clip.dtype == torch.float64 else clip
    if not isinstance(clip, Tensor):
        hint = "\n  clip = read_clip(path).pixels" if hasattr(clip, "pixels") else ""
        raise SourceError(f"clip is a {type(clip).__name__}; {_EXPECTED}, as a tensor or an array.{hint}")
    return clip.unsqueeze(0) if clip.ndim == 4 else clip


def check_floats(clips: Tensor) -> None:
    """Raises SourceError for bytes and other integers."""
    if not clips.is_floating_point():
        raise SourceError(f"clip is of {clips.dtype}; expected floats in [-1, 1]: clip.float() / 127.5 - 1.")


def check_pixels(clips: Tensor) -> None:
    """Raises SourceError for pixels that are not finite, or not in [-1, 1]; a little more is rounding."""
    if not torch.isfinite(clips).all():
        raise SourceError("clip holds NaN or inf; expected pixels in [-1, 1].")
    if clips.abs().max() > 1.01:
        raise SourceError(
            f"clip runs from {float(clips.min()):.3g} to {float(clips.max()):.3g}; expected pixels in [-1, 1]: "
            "clip / 127.5 - 1 for bytes, clip * 2 - 1 for [0, 1]."
        )
