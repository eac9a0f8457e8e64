"""Noise levels of diffusers' schedulers, as sigma of  x = x0 + sigma * noise.

Flow schedulers keep a time t in (0, 1]:      z = (1 - t) x0 + t noise,             sigma = t / (1 - t).
DDPM schedulers keep a table alphas_cumprod:  z = sqrt(a) x0 + sqrt(1 - a) noise,   sigma = sqrt((1 - a) / a).
Both maps are exact. Pure noise, t = 1 or a = 0 ("zero terminal SNR", Lin et al. 2305.08891), is sigma = infinity:
a schedule that begins there begins at `t_max` instead, or at the `top` of `ddpm_sigmas`.
"""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...denoisers import FlowDenoiser
from ...types import PipelineError, RunError

FINE = 1000  # steps of the schedule that is interpolated for a start part-way
LATEST = 1 - 1e-6  # policies see sigma = 1e6 instead of infinity; the transformer is still called at time 1


def check_flow(scheduler: Any, family: str) -> None:
    """Raise PipelineError for a scheduler that does not step along a rectified flow."""
    config = scheduler.config
    unipc = config.get("prediction_type") == "flow_prediction" and config.get("use_flow_sigmas")
    if not (unipc or any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__)):
        raise PipelineError(
            f"{type(scheduler).__name__} (prediction_type={config.get('prediction_type')!r}) is no flow scheduler, and "
            f"{family} is a flow model.\n  pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0), or "
            "kv.from_pipeline(pipe, shift=3.0)."
        )


def train_steps(scheduler: Any) -> float:
    """The transformer's own time at flow time 1."""
    return float(scheduler.config.get("num_train_timesteps", 1000))


def sigmas_of(times: Tensor) -> Tensor:
    """Noise levels of flow times in [0, 1], float64 on the host, at most 1e6."""
    return FlowDenoiser.sigma_from_t(times.detach().cpu().double().clamp(max=LATEST))


def time_of(scheduler: Any, timestep: Tensor) -> float:
    """Return the flow time of a pipeline's current step, from the timestep that its transformer gets.

    Many schedulers round the timestep, so without a scheduler (None) an integer raises RunError, as does another's.
    """
    step = timestep.flatten()[0]
    if scheduler is None:
        if not timestep.is_floating_point():
            raise RunError(
                f"timestep {step.item()} is an integer, so the exact noise level is unknown.\n"
                "  Pass the pipeline's scheduler: KVLockGuider(..., scheduler=pipe.scheduler)."
            )
        return float(step) / 1000.0
    check_flow(scheduler, "this pipeline's transformer")
    indices = (getattr(scheduler, name, None) for name in ("step_index", "begin_index"))
    index = next((index for index in indices if index is not None), None)
    try:
        t = float(scheduler.sigmas[scheduler.index_for_timestep(step) if index is None else index])
    except IndexError:  # no such timestep
        t = -1.0
    if abs(t * train_steps(scheduler) - float(step)) > 1.5:
        raise RunError(
            f"timestep {float(step):g} is not the current step of the scheduler: it is not the scheduler of this run.\n"
            "  Pass the pipeline's own: scheduler=pipe.scheduler."
        )
    return t


def flow_times(scheduler: Any, **arguments: Any) -> Tensor:
    """Return the falling times of `scheduler.set_timesteps(**arguments)`, (steps,), float64, in (0, 1].
    Raises PipelineError if the scheduler refuses the arguments, or gives other times.
    """
    own = copy.deepcopy(scheduler)
    try:
        own.set_timesteps(**arguments)
    except (TypeError, ValueError) as error:
        raise PipelineError(
            f"{type(scheduler).__name__}.set_timesteps({', '.join(arguments)}) failed: {error}\n"
            "  Pass the shift yourself: kv.from_pipeline(pipe, shift=3.0)."
        ) from error
    times = torch.as_tensor(own.sigmas[: len(own.timesteps)], dtype=torch.float64).cpu()
    if scheduler.config.get("invert_sigmas"):  # Mochi counts signal, not noise.
        times = 1 - times
    # Second-order schedulers list every time twice; a k-diffusion sampler takes each level once.
    times = times[times > 0].unique().flip(0)
    if not len(times) or times[0] > 1 + 1e-5:  # Shifting in float32 gives 1 only to this precision.
        raise PipelineError(f"{type(scheduler).__name__} gave times {times[:3].tolist()}...; expected 0 < t <= 1.")
    return times.clamp(max=1.0)


def schedule_sigmas(times_of: Callable[[int], Tensor], steps: int, strength: float, t_max: float) -> Tensor:
    """Return `steps` falling noise levels and a final 0, float32; see `PipelineVideo.sigmas`. `times_of` maps a number
    of steps to falling flow times in (0, 1]; no level lies above the flow time `t_max`.
    """
    times = times_of(steps)
    if strength < float(times[0]):
        # `steps` times from `strength` down, spaced as the fine schedule is: its curve, read at even places.
        curve = np.append(times_of(FINE).numpy(), 0.0)
        index = np.arange(len(curve))
        first = np.interp(strength, curve[::-1], index[::-1])
        times = torch.from_numpy(np.interp(np.linspace(first, index[-1], steps + 1)[:-1], index, curve))
    # Several times may lie above t_max: only the first moves, and it stays above the second.
    second = float(times[1]) if len(times) > 1 else 0.0
    times = torch.cat([times[:1].clamp(max=max(t_max, (1 + second) / 2)), times[1:]])
    return torch.cat([FlowDenoiser.sigma_from_t(times), times.new_zeros(1)]).float()


def ddpm_sigmas(alphas_cumprod: Tensor, top: float = 0.0) -> Tensor:
    """Return the noise levels of all training steps of a DDPM model, rising, float64.

    `top` stands for the last step if that step is pure noise; it is at least twice the level before it.
    """
    alphas = alphas_cumprod.detach().cpu().double()
    sigmas = ((1 - alphas) / alphas).sqrt()
    if not torch.isfinite(sigmas[-1]):
        sigmas[-1] = max(2 * float(sigmas[-2]), top)
    return sigmas


def ddpm_time(table: Tensor, sigma: Tensor) -> Tensor:
    """Return the fractional training step of noise levels of any shape, log-linear between the steps of the table."""
    given = sigma if sigma.device.type in ("cpu", "cuda") else sigma.cpu()  # not every device has float64
    logs = table.log().to(given.device)
    wanted = given.double().clamp(min=1e-12).log().clamp(logs[0], logs[-1])
    high = torch.searchsorted(logs, wanted.contiguous()).clamp(1, len(logs) - 1)
    low_log, high_log = logs[high - 1], logs[high]
    return (high - 1 + (wanted - low_log) / (high_log - low_log)).to(sigma)
