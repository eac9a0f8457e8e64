"""Fill a masked region from what is around it, by push-pull (Gortler et al. 1996, The Lumigraph, section 3.4).

Known values are averaged down to coarser and coarser levels, each average over the known values alone; going back up,
what is unknown at a level takes the interpolated coarser one. The result is smooth and exact where nothing is masked.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..utils.precision import working


def fill(values: Tensor, mask: Tensor) -> Tensor:
    """Replace the part of latents where a broadcastable mask is 1 by a smooth continuation of its frame's surroundings;
    where it is 0 they stay bit for bit. A frame without known values takes the clip's mean, and packed latents (batch,
    tokens, channels), which have no neighbours, that of their known tokens.
    """
    space = (1,) if values.ndim == 3 else tuple(range(2, values.ndim))
    known = torch.broadcast_to(1 - working(mask).to(values.device), values.shape)
    mean = (working(values) * known).sum(space, keepdim=True) / known.sum(space, keepdim=True).clamp_min(1e-6)
    filled = mean.expand_as(values)
    if values.ndim > 3:
        pages = [v.movedim(1, -3).flatten(0, -4) for v in (working(values) * known, known, filled)]
        filled = _push_pull(*pages).view(values.movedim(1, -3).shape).movedim(-3, 1)
    return torch.lerp(values, filled.to(values), mask.to(values))


def _push_pull(total: Tensor, weight: Tensor, otherwise: Tensor) -> Tensor:
    """The weighted mean of each level where its weight is positive, else the coarser level: (pages, channels, h, w)."""
    if max(total.shape[-2:]) == 1:
        coarse = otherwise[..., :1, :1]
    else:
        halved = [F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False) for x in (total, weight, otherwise)]
        coarse = F.interpolate(_push_pull(*halved), size=total.shape[-2:], mode="bilinear", align_corners=False)
    return torch.where(weight > 0, total / weight.clamp_min(1e-6), coarse)
