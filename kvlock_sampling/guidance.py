"""Guidance and compositing arithmetic, per clip. Guidance works in eps = (x - D) / sigma.

    eps = (1 - w) s eps_u + w eps_c,   s = 1 (plain)  or  s* = <eps_c, eps_u> / (|eps_u|^2 + small)
Source: CFG-Zero* (arXiv 2503.18886) as used by KV-Lock (arXiv 2603.09657). The projection s* must be taken on eps
(or velocity), never on D: projections do not commute with the change of variables.
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from .utils.precision import working
from .utils.warn import warn

Latents: TypeAlias = Float[Tensor, "batch *axes"]


def guide(uncond: Latents, cond: Latents, scale: float | Float[Tensor, "batch"]) -> Latents:
    """Plain guidance on clean predictions: uncond + (cond - uncond) * scale, the expression of k-diffusion scripts.

    With s = 1 it is the same in eps and in D. A float scale gives the very bits those scripts give.
    """
    if isinstance(scale, Tensor):
        weight = working(scale).to(cond.device).view(-1, *[1] * (cond.ndim - 1))
        return (working(uncond) + (working(cond) - working(uncond)) * weight).to(cond.dtype)
    return uncond + (cond - uncond) * scale


def guide_rescaled(uncond: Latents, cond: Latents, scale: float | Float[Tensor, "batch"], x: Latents) -> Latents:
    """s*-rescaled guidance: the unconditional eps is first scaled onto the conditional one, by one s* per clip.

    In clean predictions, with e = x - D:  D = x - ((1 - w) s* e_u + w e_c).  w = 1 gives `cond`; sigma cancels in s*.
    """
    axes, wide = [1] * (cond.ndim - 1), working(x)
    eps_c, eps_u = wide - working(cond), wide - working(uncond)
    star = (eps_c * eps_u).flatten(1).sum(1) / (eps_u.square().flatten(1).sum(1) + 1e-8)
    weight = working(scale).to(x.device).view(-1, *axes) if isinstance(scale, Tensor) else scale
    return (wide - ((1 - weight) * star.view(-1, *axes) * eps_u + weight * eps_c)).to(cond.dtype)


def composite(denoised: Latents, source: Latents, mask: Tensor, weight: float | Tensor) -> Latents:
    """Put the source into the background of a prediction, by a weight. Weight 1 takes the source's bits where the mask
    is 0, weight 0 the prediction's everywhere. Mask, 1 = edit, and weight are broadcastable to both.
    """
    # In this order of operations both ends are exact.
    return torch.lerp(source, denoised, mask + (1 - weight) * (1 - mask))


def warn_unguided(extra_args: Mapping[str, Any], scale: Tensor) -> None:
    """Warn of an unconditional prompt that a guidance of 1 leaves unused, because no scale was given."""
    if "uncond" in extra_args and "cond_scale" not in extra_args and bool((scale == 1).all()):
        warn(
            "uncond was given without cond_scale: guidance is 1 then, the conditional prediction alone, and uncond is "
            'not used. Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": 5.0}.',
        )
