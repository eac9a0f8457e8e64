"""How much of a clip an edit changed, and how steady it is.

Clips are (batch, 3, T, H, W) in [-1, 1], masks (batch, 1, T, H, W) or one for all, (1, 1, T, H, W).
Every metric gives one number per clip, (batch,), over the region where `mask` is 1 (None = everywhere). For the
background of an edit pass `1 - mask`, as `background_report` does. Fractional masks weigh.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torch.nn import functional as F

from ..types import MaskError

PEAK = 2.0  # clips span [-1, 1]
MAX_PSNR = 100.0  # decibels; what identical clips get, so that averages stay finite


class BackgroundReport(NamedTuple):
    """What an edit left alone, per clip: each (batch,). `psnr` in dB up to 100, `ssim` up to 1, `mse`, and the worst
    single pixel's `max_error`, both in units of [-1, 1]."""

    psnr: Tensor
    ssim: Tensor
    mse: Tensor
    max_error: Tensor


def masked_mse(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared difference inside the region, (batch,), in units of [-1, 1] squared: 0 to 4.

    >>> masked_mse(torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.5))
    tensor([0.2500])
    """
    weight = _check(a, b, mask)
    return ((a - b).float().square() * weight).flatten(1).sum(1) / (weight.flatten(1).sum(1) * a.shape[1])


def masked_psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio inside the region, (batch,), in decibels: 10 log10(2^2 / mse), at most 100.

    >>> masked_psnr(torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.2))
    tensor([20.])
    """
    mse = masked_mse(a, b, mask)
    return (10 * torch.log10(PEAK**2 / mse.clamp(min=1e-30))).clamp(max=MAX_PSNR)


def masked_ssim(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Structural similarity inside the region, (batch,), in [-1, 1]; 1 = identical.

    The map of skimage's `structural_similarity` (7x7 windows, less on tiny frames) per frame, averaged over the region
    and the colours. Windows at the border look outside the region; there both clips are taken to show `a`, so that only
    what differs inside the region counts.
    """
    weight = _check(a, b, mask)
    size = min(7, (min(a.shape[-2:]) - 1) // 2 * 2 + 1)
    if size < 3:
        raise MaskError(f"masked_ssim got frames of {tuple(a.shape[-2:])} pixels; expected 3 x 3 or more.")
    first, second = (x.detach().float().cpu().movedim(1, -1).numpy() for x in (a, torch.where(weight > 0, b, a)))
    maps = torch.empty(a.shape[0], *a.shape[2:])
    for i in range(a.shape[0]):
        for t in range(a.shape[2]):
            full = structural_similarity(
                first[i, t], second[i, t], win_size=size, data_range=PEAK, channel_axis=-1, full=True
            )[1]
            maps[i, t] = torch.from_numpy(full).mean(-1)
    inside = weight[:, 0].cpu()
    return ((maps * inside).flatten(1).sum(1) / inside.flatten(1).sum(1)).to(a.device)


def temporal_error(clip: Tensor, motion: Tensor, mask: Tensor | None = None) -> Tensor:
    """How much the object changes as it moves, (batch,): mean squared difference between frame t + 1 and frame t moved
    along by the known motion, in units of [-1, 1] squared. No optical flow: the motion is given.

    motion: pixels per frame as (x, y), x to the right, y downward; shape (2,), (batch, 2), or (batch, T - 1, 2).
    mask: the object, (batch, 1, T, H, W). A pixel counts if it is in the mask of frame t + 1 and, moved back, in that
        of frame t and inside the picture. Sub-pixel motion is bilinear: edges that land between pixels leave a little.
    A mask whose object is never seen twice gives nan.
    """
    weight = _check(clip, clip, mask)
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


def background_report(edited: Tensor, source: Tensor, mask: Tensor) -> BackgroundReport:
    """How well an edit kept what it should not touch: every metric over the region where `mask` is 0."""
    keep = 1 - _check(edited, source, mask)
    worst = ((edited - source).float().abs() * (keep > 0)).flatten(1).amax(1)
    args = (edited, source, keep)
    return BackgroundReport(masked_psnr(*args), masked_ssim(*args), masked_mse(*args), worst)


def _check(a: Tensor, b: Tensor, mask: Tensor | None) -> Tensor:
    """The mask as float (batch, 1, T, H, W), or an error that says what does not fit."""
    if a.ndim != 5 or a.shape != b.shape:
        raise MaskError(
            f"got clips of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected one shape (batch, 3, T, H, W). "
            "For single clips pass a[None], b[None]."
        )
    if mask is None:
        return torch.ones(a.shape[0], 1, *a.shape[2:], device=a.device)
    if mask.ndim != 5 or mask.shape[0] not in (1, a.shape[0]) or mask.shape[1] != 1 or mask.shape[2:] != a.shape[2:]:
        raise MaskError(
            f"got a mask of shape {tuple(mask.shape)} for clips {tuple(a.shape)}; expected "
            f"{(a.shape[0], 1, *a.shape[2:])}. One mask for all clips: mask[None], of batch 1."
        )
    mask = mask.to(a.device, torch.float32)
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise MaskError(f"got a mask from {float(mask.min())} to {float(mask.max())}; expected values in [0, 1].")
    if not bool(mask.flatten(1).any(1).all()):
        raise MaskError("got a mask that is 0 everywhere for some clip; expected a region. Everywhere is mask=None.")
    return mask.expand(a.shape[0], 1, *a.shape[2:])
