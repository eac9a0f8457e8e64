"""Write contact sheets for the docs: one captioned tile per clip with some of its frames in a row."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor

from kvlock_sampling.video import VideoError, side_by_side, write_clip


def sample_sheet(
    clips: Tensor | Sequence[Tensor],
    captions: Sequence[str],
    path: str | PathLike[str],
    frames: Sequence[int] = (0, 2, 5, 7),
    columns: int = 4,
    *,
    scale: int = 2,
) -> None:
    """Write a labelled PNG of clips (batch, 3, T, H, W), or of single clips (3, T, H, W), in [-1, 1].

    captions: one per clip. path: ends in .png. frames: which frames each tile shows, from left to right; negative ones
    count from the end. columns: tiles per row. scale: whole-number enlargement.
    Raises VideoError: a number of captions that does not fit, a frame the clips lack, another suffix.
    """
    clips = list(clips)
    if not str(path).lower().endswith(".png"):
        raise VideoError(f"sample_sheet got the path {str(path)!r}; expected one that ends in .png.")
    length = min((clip.shape[1] for clip in clips if clip.ndim == 4), default=0)
    if not len(frames) or not all(-length <= t < length for t in frames):
        raise VideoError(
            f"sample_sheet got frames={tuple(frames)} for clips {[tuple(clip.shape) for clip in clips[:2]]}; "
            "expected clips (3, T, H, W) and frames from 0 to T - 1, such as frames=(0, -1)."
        )
    rows = [torch.cat([clip[:, [t]] for t in frames], dim=3) for clip in clips]
    write_clip(path, side_by_side(rows, captions, scale=scale, columns=columns))
