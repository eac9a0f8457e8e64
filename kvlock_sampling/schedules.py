"""Noise schedules for k-diffusion's samplers: the check of every one, and that of rectified-flow models."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from .types import SamplerError


def check_sigmas(sigmas: Any) -> Tensor:
    """A schedule as a tensor (levels,). Raises SamplerError unless its levels are finite, >= 0, and fall."""
    values = torch.as_tensor(sigmas)
    if values.ndim == 1 and len(values) > 1:
        levels = values.double().cpu() if values.device.type != "mps" else values.cpu().double()
        if bool(levels.isfinite().all() and (levels >= 0).all() and (levels.diff() < 0).all()):
            return values
        shown = ", ".join(f"{level:.4g}" for level in levels[:6].tolist()) + ", ..." * (len(levels) > 6)
    else:
        shown = f"a tensor of shape {tuple(values.shape)}"
    raise SamplerError(
        f"sigmas={shown}: no schedule; expected (levels,), at least 2, finite, >= 0, each below the one before, e.g. "
        "samplers.flow_sigmas(30, shift=5.0). To invert a clip, run the bare model, without a lock."
    )


def flow_sigmas(
    n: int,
    *,
    shift: float = 1.0,
    t_max: float = 0.999,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " levels"]:
    """Make a rectified-flow schedule in variance-exploding form.

    Uniform in u, then  t = shift * u / (1 + (shift - 1) * u)  and  sigma = t / (1 - t).

    >>> flow_sigmas(4, t_max=0.8)
    tensor([4.0000, 1.5000, 0.6667, 0.2500, 0.0000])

    Args:
        n: Number of steps, >= 1.
        shift: Flow shift > 0; above 1 it spends more steps at high noise (Wan: 3 at 480p, 5 at 720p).
        t_max: Flow time of the first level, after the shift; below 1, because t = 1 is sigma = infinity.
        dtype: Dtype of the result.

    Returns:
        (n + 1,) falling noise levels; the last is exactly 0.

    Raises:
        SamplerError: n, shift or a time is out of range.
    """
    if n < 1 or not shift > 0 or not 0 < t_max < 1:
        given = f"flow_sigmas(n={n}, shift={shift}, t_max={t_max})"
        raise SamplerError(f"{given}: expected n >= 1, shift > 0, 0 < t_max < 1, e.g. n=30, shift=5.0, t_max=0.999")
    u = torch.linspace(t_max / (shift - (shift - 1) * t_max), 0.0, n + 1, dtype=torch.float64)
    t = shift * u / (1 + (shift - 1) * u)
    return (t / (1 - t)).to(dtype)
