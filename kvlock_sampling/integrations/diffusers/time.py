"""The time of a step in diffusers, as flow time t and as the noise level sigma = t / (1 - t) of the policies' clock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...types import RunError
from .schedule import check_flow

FARTHEST = 1 - 1e-6
"""Flow time 1 is sigma = infinity. The clock reads a million there; the model itself is asked at 1."""


def sigma_of(time: float) -> float:
    """The variance-exploding noise level at flow time t in [0, 1]."""
    t = min(time, FARTHEST)
    return t / (1 - t)


def levels_of(times: Tensor) -> Tensor:
    """Noise levels of flow times, float64 on the host: a schedule for policies that count steps."""
    t = times.detach().to("cpu", torch.float64).clamp(max=FARTHEST)
    return t / (1 - t)


def is_new_run(scheduler: Any) -> bool:
    """Whether the scheduler was set up and has not stepped yet."""
    return hasattr(scheduler, "step_index") and scheduler.step_index is None


def time_of(scheduler: Any, timestep: Tensor) -> float:
    """Flow time of the scheduler's present step. The timestep alone does not say: some schedulers cut it to an integer.

    timestep: what the pipeline gives the transformer, one number or one per clip or token, all equal.

    Raises:
        RunError: another scheduler's timestep.
    """
    check_flow(scheduler, "this pipeline's transformer")
    step = timestep.flatten()[0]
    index = getattr(scheduler, "step_index", None)
    if index is None:
        index = getattr(scheduler, "begin_index", None)
    try:
        t = float(scheduler.sigmas[scheduler.index_for_timestep(step) if index is None else index])
    except IndexError:  # no such timestep
        t = -1.0
    train_steps = scheduler.config.get("num_train_timesteps", 1000)
    if abs(t * train_steps - float(step)) > 1.5:
        raise RunError(
            f"the transformer was called at timestep {float(step):g}, where its scheduler does not stand: it is not "
            "the scheduler of this run.\n  Pass the pipeline's own: scheduler=pipe.scheduler."
        )
    return t


def time_without_scheduler(timestep: Tensor, train_steps: float = 1000.0) -> float:
    """Flow time of a timestep that was not rounded.

    Raises:
        RunError: an integer, from which the noise level cannot be had exactly.
    """
    if not timestep.is_floating_point():
        raise RunError(
            f"timestep {timestep.flatten()[0].item()} is an integer, so the exact noise level is unknown.\n"
            "  Give the guider its scheduler: KVLockGuider(..., scheduler=pipe.scheduler)."
        )
    return float(timestep.flatten()[0]) / train_steps
