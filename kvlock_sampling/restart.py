"""Restart clips at risk: finished clips go back to a higher noise level and are sampled again from there.

    x = x0 + sigma_back * fresh noise   for clips whose last risk exceeds a limit, then the sampler runs from sigma_back
Stochasticity frees a sample that deterministic sampling has left between two modes (arXiv 2605.06831), and only the
clips at risk pay for it: their fraction * the fraction of steps below sigma_back.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batching import take
from .lock import KVLock
from .samplers import gaussian_noise, seeding
from .schedules import check_sigmas
from .source import variance_exploding
from .trace import Trace
from .types import RunError
from .utils.denoiser import method_of
from .utils.fields import check_number, check_seed


class Restarted(NamedTuple):
    """All clips, those at risk made anew; which of them were sent back, (batch,); the trace of their run, or None."""

    x: Tensor
    sent_back: Tensor
    trace: Trace | None


def last_risk(trace: Trace) -> Tensor:
    """The risk of each clip at its last measurement, (batch,); of tokens the largest. Raises RunError without one."""
    for step in reversed(trace.steps):
        if torch.isfinite(step.risk).all():
            return step.risk if step.risk.ndim == 1 else step.risk.flatten(1).amax(1)
    raise RunError(
        "nothing was measured in this run: its policy reads no risk, or its estimator never reported.\n"
        "  Use a policy that measures, e.g. KVLock(model, source=..., mask=..., policy='sigmoid'), and enough steps."
    )


def restart(
    lock: KVLock,
    sampler: Any,
    x: Tensor,
    sigmas: Tensor,
    *,
    back_to: float,
    limit: float = 1.0,
    extra_args: Mapping[str, Any] | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Restarted:
    """Sample clips again whose risk exceeded `limit` at the end of the run that `lock.trace` holds.

    Args:
        lock: The lock that made `x`; its last trace says which clips are at risk.
        sampler: A sampler's name or function.
        x: Finished clips, (batch, ...).
        sigmas: The schedule. Its part at or below `back_to` runs again.
        back_to: The noise level to return to: high enough to leave a wrong place, low enough to keep the rest.
        limit: A clip whose risk exceeds this, dimensionless, is sent back; 1 = at the threshold.
        extra_args: As for the first run.
        seed: Of the fresh noise, each clip's own, and of a sampler that takes `noise_sampler`; others draw from torch.
        arguments: Other arguments of `samplers.run`, as for the first run.

    Raises:
        RunError: Nothing was measured, `back_to` leaves no step, or `back_to`, `limit` or `seed` is no number.
        SamplerError: The schedule is none.
    """
    check_number("limit", limit, RunError, " Clips of a larger risk are sent back.")
    sigmas = check_sigmas(sigmas)
    levels = sigmas[sigmas <= check_number("back_to", back_to, RunError, above=0.0)]
    if len(levels) < 2:
        raise RunError(
            f"back_to={back_to} leaves no step of the schedule, which runs from {float(sigmas[0]):.3g} to "
            f"{float(sigmas[sigmas > 0].min()):.3g}; give a level in between."
        )
    batch, out, risk = len(x), torch.as_tensor(x).clone(), last_risk(lock.trace)
    if len(risk) != batch:
        raise RunError(f"x has {batch} clips, the lock's last run had {len(risk)}; pass the clips of that run.")
    at_risk = risk > limit
    if not len(index := torch.nonzero(at_risk).flatten()):
        return Restarted(out, at_risk, None)
    part, clips = lock.subset(index, batch), out[index]
    # A clip's seed does not depend on which others are sent back. The noise added needs another in its low 32 bits.
    seeds = [check_seed(seed, RunError, plus=i + 7919) for i in index.tolist()]
    noise = gaussian_noise(clips, [(each + 2**31) % 2**64 for each in seeds])(levels[0], levels[0])
    if (source := part.settings.source) is not None:  # else it would be what leads from the source to the edited clip
        source.of_run, source.noise = noise, noise if source.noise is None else source.noise
    cut = take(dict(extra_args or {}), index, batch)
    arguments |= seeding(sampler, seeds)
    if (drawn := arguments.get("noise_sampler")) is not None:
        arguments["noise_sampler"] = lambda *levels: take(drawn(*levels), index, batch)
    add_noise = method_of(lock.model, "add_noise") or variance_exploding
    again = part.sample(sampler, add_noise(clips, noise, levels[0]), levels, extra_args=cut, **arguments)
    return Restarted(out.index_copy(0, index, again.to(out)), at_risk, part.trace)
