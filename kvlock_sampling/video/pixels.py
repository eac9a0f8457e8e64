"""Validate clips that are tensors or arrays."""

import os
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..types import KVLockError, SourceError

_EXPECTED = "expected pixels in [-1, 1], (3, frames, height, width) or (batch, 3, frames, height, width)"


class VideoError(KVLockError, ValueError):
    """A file that cannot be read or written as a clip, or pixels that cannot be written."""


def as_clips(clip: Any) -> Tensor:
    """Floats, a tensor or array, as clips (batch, channels, frames, height, width); other numbers of axes stay."""
    if isinstance(clip, str | os.PathLike):
        name = os.fspath(clip)
        raise SourceError(
            f"clip is the path {name!r}; {_EXPECTED}. Read it first:\n"
            f"  from kvlock_sampling.video import read_clip\n  clip = read_clip({name!r}).pixels"
        )
    if isinstance(clip, np.ndarray) and clip.dtype.kind in "fiub":
        # Torch does not accept read-only arrays or negative strides; `require` copies those.
        clip = torch.from_numpy(np.require(clip, requirements=["C", "W"]))
        clip = clip.float() if clip.dtype == torch.float64 else clip
    if not isinstance(clip, Tensor):
        hint = "\n  clip = read_clip(path).pixels" if hasattr(clip, "pixels") else ""
        raise SourceError(f"clip is a {type(clip).__name__}; {_EXPECTED}, as a tensor or an array.{hint}")
    if not clip.is_floating_point():
        raise SourceError(f"clip is of {clip.dtype}; expected floats in [-1, 1]: clip.float() / 127.5 - 1.")
    return clip.unsqueeze(0) if clip.ndim == 4 else clip


def check_pixels(clips: Tensor) -> None:
    """Raise SourceError for pixels that are not finite or outside [-1, 1]; 1% more is accepted as rounding.

    Warns of a clip without a pixel darker than mid-grey, which is most often one in [0, 1].
    """
    if not torch.isfinite(clips).all():
        raise SourceError("clip holds NaN or inf; expected pixels in [-1, 1].")
    if clips.abs().max() > 1.01:
        raise SourceError(
            f"clip runs from {float(clips.min()):.3g} to {float(clips.max()):.3g}; expected pixels in [-1, 1]: "
            "clip / 127.5 - 1 for bytes, clip * 2 - 1 for [0, 1]."
        )
    if clips.min() >= 0 and clips.max() > 0.5:
        warnings.warn(
            "no pixel of the clip is darker than mid-grey, 0; if it is in [0, 1], pass clip * 2 - 1.", stacklevel=4
        )
