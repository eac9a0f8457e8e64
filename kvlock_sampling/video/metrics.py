"""The metric of clips (batch, 3, T, H, W) in [-1, 1] inside a region: PSNR, (batch,)."""

import torch
from torch import Tensor

from ..types import MaskError
from ..variance import masked_mean


def masked_psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Peak signal-to-noise ratio inside the region, 10 log10(2^2 / mean squared difference), (batch,) in dB, up to 100.

    Args:
        a: Clips (batch, 3, T, H, W) in [-1, 1].
        b: Clips of the same shape.
        mask: The region, (batch or 1, 1, T, H, W) in [0, 1], e.g. 1 - mask of an edit; None: everywhere.

    Raises:
        MaskError: The shapes do not fit, clips are in another range, or a mask is empty or outside [0, 1].

    >>> masked_psnr(torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.2))
    tensor([20.])
    """
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    if a.ndim != 5 or a.shape != b.shape:
        raise MaskError(
            f"got clips of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected one shape (batch, 3, T, H, W), "
            "for single clips a[None], b[None]."
        )
    most = max((float(clip.detach().abs().max()) for clip in (a, b) if clip.numel()), default=0.0)
    if most > 16:  # A prediction overshoots by less.
        raise MaskError(f"got clips up to {most:.3g}; expected [-1, 1]: clip / 127.5 - 1 for bytes.")
    mask = torch.ones(1, 1, *a.shape[2:]) if mask is None else torch.as_tensor(mask)
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
    mse = masked_mean((a.float() - b.float()).square(), mask)
    return (10 * torch.log10(2**2 / mse.clamp(min=1e-30))).clamp(max=100.0)  # so that averages stay finite
