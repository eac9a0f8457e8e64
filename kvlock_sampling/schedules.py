"""Noise schedules of rectified-flow models for k-diffusion's samplers."""

import torch
from jaxtyping import Float
from torch import Tensor

from .types import SamplerError


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
