"""A diffusers scheduler as k-diffusion noise levels:  sigma of x = x0 + sigma * noise, falling, the last exactly 0.

Flow schedulers keep t in (0, 1]:             z = (1 - t) x0 + t noise,                  sigma = t / (1 - t).
DDPM schedulers keep a table alphas_cumprod:  z = sqrt(a) x0 + sqrt(1 - a) noise,        sigma = sqrt((1 - a) / a).
Both maps are exact. Their ends are not reachable: t = 1, or a = 0 ("zero terminal SNR", Lin et al. 2305.08891), is pure
noise, sigma = infinity. A schedule that begins there begins at `t_max` here, or at `DiscreteClock.top`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import PipelineError

FINE = 1000
"""Steps of the schedule that is read between the lines for a start part-way: as many as models were trained on."""


def is_flow(scheduler: Any) -> bool:
    """Whether this scheduler steps along a rectified flow."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    config = scheduler.config
    return config.get("prediction_type") == "flow_prediction" and bool(config.get("use_flow_sigmas"))


def check_flow(scheduler: Any, family: str) -> None:
    """Raises PipelineError for a scheduler that is none of a flow model."""
    if not is_flow(scheduler):
        raise PipelineError(
            f"{type(scheduler).__name__} (prediction_type={scheduler.config.get('prediction_type')!r}) is no flow "
            f"scheduler, and {family} is a flow model.\n"
            "  pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0), or pass the schedule's shift: "
            "kv.from_pipeline(pipe, shift=3.0)."
        )


def flow_times(scheduler: Any, **arguments: Any) -> Tensor:
    """The times t of `scheduler.set_timesteps(**arguments)`, (steps,), float64, falling, without the final 0.

    The scheduler itself is left as it is. Raises PipelineError for times outside (0, 1].
    """
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(**arguments)
    except (TypeError, ValueError) as error:
        raise PipelineError(
            f"{type(scheduler).__name__}.set_timesteps({', '.join(arguments)}) failed: {error}\n"
            "  Give the shift yourself: kv.from_pipeline(pipe, shift=3.0)."
        ) from error
    times = torch.as_tensor(own.sigmas[: len(own.timesteps)], dtype=torch.float64).cpu()
    if scheduler.config.get("invert_sigmas"):  # Mochi's counts what is signal
        times = 1 - times
    # Schedulers of second order repeat every time; the levels themselves are what a k-diffusion sampler wants.
    times = times[times > 0].unique().flip(0)
    if not len(times) or times[0] > 1 + 1e-5:  # shifting in float32 ends up that near to 1
        raise PipelineError(f"{type(scheduler).__name__} gave times {times[:3].tolist()}...; expected 0 < t <= 1.")
    return times.clamp(max=1.0)


def levels(times_of: Callable[[int], Tensor], steps: int, strength: float, t_max: float) -> Tensor:
    """(steps + 1,) noise levels, float32, falling to exactly 0, from flow times.

    times_of: number of steps -> falling flow times in (0, 1].  strength: the time to start at; 1 = where the schedule
        does. Then the levels are the schedule's own; otherwise `steps` levels with the schedule's spacing below that
        time.  t_max: no level lies above this time.
    """
    if steps < 1 or not 0 < strength <= 1:
        raise PipelineError(f"sigmas(steps={steps}, strength={strength}): expected steps >= 1 and 0 < strength <= 1.")
    times = times_of(steps)
    if strength < float(times[0]):
        times = _from(times_of(FINE), steps, strength)
    # Several times may lie above t_max: only the first moves, and stays above the second.
    second = float(times[1]) if len(times) > 1 else 0.0
    times = torch.cat([times[:1].clamp(max=max(t_max, (1 + second) / 2)), times[1:]])
    return torch.cat([times / (1 - times), times.new_zeros(1)]).float()


def _from(fine: Tensor, steps: int, start: float) -> Tensor:
    """`steps` times from `start` down, spaced as the schedule is: its curve over [0, 1], read at even places."""
    curve = torch.cat([fine, fine.new_zeros(1)])
    after = int((curve > start).sum())  # curve[after - 1] > start >= curve[after]
    if after == 0:
        first = 0.0
    else:
        above, below = float(curve[after - 1]), float(curve[after])
        first = after - 1 + (above - start) / (above - below)
    places = torch.linspace(first, len(curve) - 1, steps + 1, dtype=torch.float64)[:-1]
    low = places.floor().long()
    return torch.lerp(curve[low], curve[(low + 1).clamp(max=len(curve) - 1)], places - low)


class DiscreteClock:
    """Noise level <-> training step of a DDPM model, log-linear between the steps, as in k-diffusion's wrappers.

    alphas_cumprod: (train_steps,), falling, of the scheduler.  top: the noise level that stands for the last step
    where that one is pure noise (infinite); at least twice that of the step before.
    """

    def __init__(self, alphas_cumprod: Tensor, top: float = 0.0) -> None:
        alphas = alphas_cumprod.detach().double().cpu()
        sigmas = ((1 - alphas) / alphas).sqrt()
        if not torch.isfinite(sigmas[-1]):
            sigmas[-1] = max(2 * float(sigmas[-2]), top)
        self.top = float(sigmas[-1])
        self._sigmas = sigmas
        self._logs = sigmas.log()

    def time(self, sigma: Tensor) -> Tensor:
        """The training step, fractional, of noise levels of any shape; clamped to the table's ends."""
        logs = self._logs.to(sigma.device)
        wanted = sigma.double().clamp(min=1e-12).log().clamp(logs[0], logs[-1])
        high = torch.searchsorted(logs, wanted.contiguous()).clamp(1, len(logs) - 1)
        low_log, high_log = logs[high - 1], logs[high]
        return (high - 1 + (wanted - low_log) / (high_log - low_log)).to(sigma.dtype)

    def sigma(self, steps: Tensor) -> Tensor:
        """Noise levels of whole training steps, float64."""
        return self._sigmas[steps.long().cpu()]
