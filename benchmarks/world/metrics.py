"""Metrics of clips (batch, 3, T, H, W) in [-1, 1]: structural similarity, and change along a known motion."""

from __future__ import annotations

import numpy as np
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

from kvlock_sampling.types import MaskError
from kvlock_sampling.video.metrics import PEAK, check_region


def masked_ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity inside the region, (batch,) in [-1, 1], 1 = identical.

    This averages skimage's map of 7x7 windows, which see `a` outside the region. Arguments and errors are those of
    `kvlock_sampling.video.metrics.masked_mse`; frames smaller than 3 x 3 raise MaskError too.
    """
    weight = check_region(a, b, mask)
    size = min(7, (min(a.shape[-2:]) - 1) // 2 * 2 + 1)
    if size < 3:
        raise MaskError(f"masked_ssim got frames of {tuple(a.shape[-2:])} pixels; expected 3 x 3 or more.")
    first, second = (x.detach().float().cpu().movedim(1, -1).numpy() for x in (a, torch.where(weight > 0, b, a)))
    maps = torch.empty(a.shape[0], *a.shape[2:])
    options = {"win_size": size, "data_range": PEAK, "channel_axis": -1, "full": True}
    for i, t in np.ndindex(*maps.shape[:2]):
        maps[i, t] = torch.from_numpy(structural_similarity(first[i, t], second[i, t], **options)[1]).mean(-1)
    inside = weight[:, 0].cpu()
    return ((maps * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)).to(a.device)


def temporal_error(clip: Tensor, motion: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much an object changes as it moves: the mean squared difference between frame t + 1 and frame t moved along.

    The motion is given, not estimated. Sub-pixel motion is bilinear, so edges between pixels leave a small error.

    Args:
        clip: Clips (batch, 3, T, H, W) in [-1, 1], T >= 2.
        motion: Pixels per frame as (x, y), x to the right and y downward: (2,), (batch, 2) or (batch, T - 1, 2).
        mask: The object. A pixel counts if it is in the mask of frame t + 1 and, moved back, in the mask of frame t and
            inside the picture.

    Returns:
        (batch,), in units of [-1, 1] squared; nan if no pixel counts.

    Raises:
        MaskError: The shapes do not fit, or a mask is empty or outside [0, 1].
    """
    weight = check_region(clip, clip, mask)
    batch, channels, frames, height, width = clip.shape
    if frames < 2:
        raise MaskError(f"temporal_error got a clip of {frames} frame; expected 2 or more.")
    if motion.shape not in ((2,), (batch, 2), (batch, frames - 1, 2)):
        raise MaskError(
            f"temporal_error got motion of shape {tuple(motion.shape)}; expected (2,), ({batch}, 2) or "
            f"({batch}, {frames - 1}, 2) as x, y in pixels per frame, such as torch.tensor([1.4, 0.0])."
        )
    steps = motion.to(clip.device, torch.float32)
    steps = (steps[:, None] if steps.ndim == 2 else steps).expand(batch, frames - 1, 2).reshape(-1, 1, 1, 2)
    y, x = torch.meshgrid(
        torch.arange(height, device=clip.device), torch.arange(width, device=clip.device), indexing="ij"
    )
    came_from = torch.stack([x, y], -1) - steps
    scale = torch.tensor([width, height], device=clip.device)
    grid = (2 * came_from + 1) / scale - 1

    def moved(video: Tensor) -> Tensor:
        still = video[:, :, :-1].float().transpose(1, 2).flatten(0, 1)
        there = F.grid_sample(still, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        return there.view(batch, frames - 1, video.shape[1], height, width).transpose(1, 2)

    counted = weight[:, :, 1:] * (moved(weight) > 0.999)
    difference = (clip[:, :, 1:].float() - moved(clip)).square() * counted
    return difference.flatten(1).sum(1) / (counted.flatten(1).sum(1) * channels)
