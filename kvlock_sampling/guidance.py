"""Guidance and compositing arithmetic, per clip. Guidance works in eps = (x - D) / sigma.

    eps = (1 - w) s eps_u + w eps_c,   s = 1 (plain)  or  s* = <eps_c, eps_u> / (|eps_u|^2 + small)
Source: CFG-Zero* (arXiv 2503.18886) as used by KV-Lock (arXiv 2603.09657). The projection s* must be taken on eps
(or velocity), never on D: projections do not commute with the change of variables.
"""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .utils.precision import working


def guide(
    uncond: Float[Tensor, "batch *axes"], cond: Float[Tensor, "batch *axes"], scale: float | Float[Tensor, "batch"]
) -> Float[Tensor, "batch *axes"]:
    """Plain guidance on clean predictions: uncond + (cond - uncond) * scale, the expression of k-diffusion scripts.

    With s = 1 it is the same in eps and in D. A float scale gives the very bits those scripts give.
    """
    if isinstance(scale, Tensor):
        weight = working(scale).view(-1, *[1] * (cond.ndim - 1))
        return (working(uncond) + (working(cond) - working(uncond)) * weight).to(cond.dtype)
    return uncond + (cond - uncond) * scale


def projection_scale(
    uncond: Float[Tensor, "batch *axes"], cond: Float[Tensor, "batch *axes"], x: Float[Tensor, "batch *axes"]
) -> Float[Tensor, "batch"]:
    """s* = <eps_c, eps_u> / |eps_u|^2 per sample. The 1 / sigma of both eps cancels."""
    eps_c, eps_u = (working(x) - working(cond)).flatten(1), (working(x) - working(uncond)).flatten(1)
    return (eps_c * eps_u).sum(1) / (eps_u.square().sum(1) + 1e-8)


def guide_rescaled(
    uncond: Float[Tensor, "batch *axes"],
    cond: Float[Tensor, "batch *axes"],
    scale: float | Float[Tensor, "batch"],
    x: Float[Tensor, "batch *axes"],
) -> Float[Tensor, "batch *axes"]:
    """s*-rescaled guidance: the unconditional eps is first scaled onto the conditional one.

    In clean predictions, with e = x - D:  D = x - ((1 - w) s* e_u + w e_c).  scale = 1 gives `cond`.
    """
    axes = [1] * (cond.ndim - 1)
    star = projection_scale(uncond, cond, x).view(-1, *axes)
    weight = working(scale).view(-1, *axes) if isinstance(scale, Tensor) else scale
    wide = working(x)
    return (wide - ((1 - weight) * star * (wide - working(uncond)) + weight * (wide - working(cond)))).to(cond.dtype)


def composite(
    denoised: Float[Tensor, "batch *axes"], source: Float[Tensor, "batch *axes"], mask: Tensor, weight: float | Tensor
) -> Float[Tensor, "batch *axes"]:
    """Put the source into the background of a prediction, by a weight. Weight 1 takes the source's bits where the mask
    is 0, weight 0 the prediction's everywhere. Mask, 1 = edit, and weight are broadcastable to both.
    """
    # In this order of operations both ends are exact.
    return torch.lerp(source, denoised, mask + (1 - weight) * (1 - mask))


def warn_unguided(extra_args: Mapping[str, Any], scale: Tensor) -> None:
    """Warn of an unconditional prompt that a guidance of 1 leaves unused, because no scale was given."""
    if "uncond" in extra_args and "cond_scale" not in extra_args and bool((scale == 1).all()):
        warnings.warn(
            "uncond was given without cond_scale: guidance is 1 then, the conditional prediction alone, and uncond is "
            'not used. Pass extra_args={"cond": ..., "uncond": ..., "cond_scale": 5.0}.',
            stacklevel=3,
        )
