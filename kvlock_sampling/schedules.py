"""Noise schedules for k-diffusion's samplers: the check of every one, and that of rectified-flow models."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .types import SamplerError
from .utils.fields import check_number


def check_sigmas(sigmas: Any) -> Tensor:
    """A schedule as a tensor (levels,). Raises SamplerError unless its levels are finite, >= 0, and fall."""
    try:
        values = torch.as_tensor(np.require(sigmas, requirements="C") if isinstance(sigmas, np.ndarray) else sigmas)
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if not values.is_complex() and values.ndim == 1 and len(values) > 1:
        levels = values.cpu().double()
        if bool(levels.isfinite().all() and (levels >= 0).all() and (levels.diff() < 0).all()):
            return values
        shown = ", ".join(f"{level:.4g}" for level in levels[:6].tolist()) + ", ..." * (len(levels) > 6)
    else:
        shown = f"tensor of {tuple(values.shape)}" if isinstance(sigmas, Tensor) else repr(sigmas)
    raise SamplerError(
        f"sigmas={shown}: no schedule; expected (levels,), at least 2, finite, >= 0, each below the one before, e.g. "
        "samplers.flow_sigmas(30, shift=5.0). To invert a clip: samplers.euler(model, x, torch.as_tensor(sigmas))."
    )


def flow_sigmas(
    n: int, *, shift: float = 1.0, t_max: float = 0.999, dtype: torch.dtype = torch.float32
) -> Float[Tensor, " levels"]:
    """Make a rectified-flow schedule in variance-exploding form: (n + 1,) falling noise levels, the last exactly 0.

    Uniform in u, then  t = shift * u / (1 + (shift - 1) * u)  and  sigma = t / (1 - t).

    >>> flow_sigmas(4, t_max=0.8)
    tensor([4.0000, 1.5000, 0.6667, 0.2500, 0.0000])

    Args:
        n: Number of steps, >= 1.
        shift: Flow shift > 0; above 1 it spends more steps at high noise (Wan: 3 at 480p, 5 at 720p).
        t_max: Flow time of the first level, after the shift; below 1, because t = 1 is sigma = infinity.
        dtype: Dtype of the result.

    Raises:
        SamplerError: n, shift or a time is out of range.
    """
    n = check_number("n", n, SamplerError, at_least=1, whole=True)
    shift = check_number("shift", shift, SamplerError, above=0.0)
    t_max = check_number("t_max", t_max, SamplerError, above=0.0, below=1.0)
    u = torch.linspace(t_max / (shift - (shift - 1) * t_max), 0.0, n + 1, dtype=torch.float64)
    t = shift * u / (1 + (shift - 1) * u)
    return (t / (1 - t)).to(dtype)
