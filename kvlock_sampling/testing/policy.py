"""check_policy: made-up runs that test a policy against the contract of `Policy`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..policy import Policy, as_policy
from ..policy.contract import check_control
from ..types import Control, Observation, PolicyError
from ._contract import check_settings, checked_step, name_of, same

STEPS = 12
"""Evaluations in a test run, from sigma 14.6 down to 0.03."""

_TENSORS = ("variance", "risk", "lock", "requested_cfg_scale")
_MEMORY = "All memory must be in the state, none in self, in globals or in a random generator."


def check_policy(
    policy: Any, *, batch: int = 3, seed: int = 0, tokens: int | None = None, device: str | torch.device = "cpu"
) -> None:
    """Check that a policy keeps the contract of `Policy`, on made-up runs with risks from 0 to 10,000.

    It checks frozen settings and a readable repr; type, shape, dtype, device and range of every control, in float32,
    float64 and bfloat16; `start` before the first measurement; that an answer repeats and nothing is changed in place;
    that a restored state replays; that a clip gets the same alone as in a batch, bit for bit; a repeated sigma; an
    unknown schedule (steps_left None); and that `uses_risk`, `may_lock` and a `cfg_range` are true.

    Args:
        policy: A policy, or a function of an Observation.
        batch: Clips per run, >= 1. Defaults to 3.
        seed: Seed of the risks. Defaults to 0.
        tokens: Also check with a local estimator, whose risk is (batch, tokens). Defaults to None, one risk per clip.
        device: Where the observations are. Defaults to the CPU.

    Raises:
        PolicyError: With the policy, the method, what was given, what was expected, and what to do.
    """
    policy = as_policy(policy)
    check_settings(policy, PolicyError)
    for shape in [(batch,)] + ([(batch, tokens)] if tokens else []):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            run = _observations(shape, dtype, device, seed, measured=policy.uses_risk)
            unknown = torch.full_like(run[0].risk, math.nan)
            _start(policy, run[0]._replace(risk=unknown, variance=unknown))
            states, controls = _play(policy, policy.init(), run)
            _check_rewind(policy, run, states, controls)
            _check_clips(policy, run, controls)
            _check_unknown_schedule(policy, run)
            _check_standstill(policy, states[-1], run[-1])


def _check_rewind(policy: Policy, run: list[Observation], states: list[Any], controls: list[Control]) -> None:
    for index in (0, len(run) // 2):
        if not same(_play(policy, states[index], run[index:])[1], controls[index:]):
            raise PolicyError(
                f"{name_of(policy)}.step answered otherwise when the state of sigma={run[index].sigma:.3g} was "
                f"restored, expected the same.\n  Samplers reject steps and go back. {_MEMORY}"
            )


def _check_clips(policy: Policy, run: list[Observation], controls: list[Control]) -> None:
    batch = len(run[0].requested_cfg_scale)
    for clip in range(batch):
        alone = [o._replace(**{f: getattr(o, f)[clip : clip + 1] for f in _TENSORS}) for o in run]
        for obs, single, together in zip(alone, _play(policy, policy.init(), alone)[1], controls, strict=True):
            for field, value, other in zip(Control._fields, single, together, strict=True):
                other = other[clip : clip + 1] if isinstance(other, Tensor) and other.ndim else other
                if not same(*(None if v is None else torch.as_tensor(v).flatten() for v in (value, other))):
                    raise PolicyError(
                        f"{name_of(policy)}.step gave clip {clip} {field}={value} alone and {other} in a batch of "
                        f"{batch}, at sigma={obs.sigma:.3g}; expected the same, bit for bit.\n  Clips are "
                        "independent: work elementwise, with no mean, max or sort over dimension 0, no branch on any()."
                    )


def _check_standstill(policy: Policy, state: Any, obs: Observation) -> None:
    try:
        _step(policy, state, obs)
    except PolicyError as error:
        raise PolicyError(
            f"{error}\n  This was a second evaluation at the same sigma, where no time has passed on a policy's clock, "
            "-log(sigma): guard what divides by it."
        ) from error


def _check_unknown_schedule(policy: Policy, run: list[Observation]) -> None:
    unknown = [obs._replace(steps_left=None) for obs in run]
    try:
        state = policy.init()
        policy.start(unknown[0])
        for obs in unknown:
            state, _ = policy.step(state, obs)
    except PolicyError:
        return  # a policy may need the schedule, and says so with an error of its own
    except Exception:  # reported below
        pass
    try:
        _start(policy, unknown[0])
        _play(policy, policy.init(), unknown)
    except PolicyError as error:
        raise PolicyError(
            f"{error}\n  Here obs.steps_left was None, as it is for an unknown schedule: test for None before you "
            "count, or use obs.sigma, which is always there."
        ) from error


def _play(policy: Policy, state: Any, run: list[Observation]) -> tuple[list[Any], list[Control]]:
    """All states, including the first, and all controls; every single call is checked."""
    states, controls = [state], []
    for obs in run:
        state, control = _step(policy, state, obs)
        states.append(state)
        controls.append(control)
    return states, controls


def _start(policy: Policy, obs: Observation) -> None:
    _check_values(policy, _attempt(policy, "start", obs), obs, "start")


def _step(policy: Policy, state: Any, obs: Observation) -> tuple[Any, Control]:
    return checked_step(
        lambda state, obs: _attempt(policy, "step", state, obs),
        state,
        obs,
        lambda control: _check_values(policy, control, obs, "step"),
        PolicyError,
        who=f"{name_of(policy)}.step",
        seen="observation",
        pair="(state, Control)",
        hint=_MEMORY,
    )


def _check_values(policy: Policy, control: Any, obs: Observation, method: str) -> None:
    who = f"{name_of(policy)}.{method}"
    seen = f"at sigma={obs.sigma:.3g} with risk={[f'{r:.3g}' for r in obs.risk.flatten()[:4].tolist()]}"
    tokens = obs.risk.shape[1] if obs.risk.ndim > 1 else None
    check_control(policy, control, len(obs.requested_cfg_scale), tokens, method)
    for field, value in zip(Control._fields, control, strict=True):
        if value is None:
            continue
        like = obs.risk if field == "lock" else obs.requested_cfg_scale
        kinds = (like.dtype, torch.float32)
        if isinstance(value, Tensor) and not (value.dtype in kinds and value.device == like.device):
            raise PolicyError(
                f"{who} returned {field} as {value.dtype} on {value.device} for an observation in {like.dtype} on "
                f"{like.device}; expected the same, or float32.\n  Write {field}.to(obs.risk), or use torch.full_like."
            )
        flat = torch.as_tensor(value)
        if not flat.isfinite().all():
            why = ""
            if method == "start" or not policy.uses_risk:
                why = "\n  Nothing is measured there, so obs.risk and obs.variance are NaN: "
                why += "do not read them in start." if method == "start" else "uses_risk must be True to read them."
            raise PolicyError(f"{who} returned {field}={value} {seen}; expected finite numbers.{why}")
        if field != "cfg_scale" and not (flat.min() >= 0 and flat.max() <= 1):
            raise PolicyError(
                f"{who} returned {field}={value} {seen}; expected values in [0, 1].\n"
                "  Return value.clamp(0, 1)"
                + (", or wrap the policy: Clamped(policy, lock=(0.0, 1.0))" if field == "lock" else "")
            )
        if field == "cfg_scale" and flat.min() < 0 and (claimed := _claimed(policy)):
            raise PolicyError(
                f"{who} returned cfg_scale={value} {seen}, but {claimed} has nothing below 0; expected values >= 0.\n"
                "  Clamp the multiple to the range before you multiply it by obs.requested_cfg_scale."
            )
        if field == "lock" and not policy.may_lock and flat.any():
            raise PolicyError(
                f"{who} returned lock={value} {seen}, but may_lock is False; expected lock 0 always.\n"
                "  Let may_lock return True wherever a setting allows a lock."
            )


def _claimed(policy: Policy) -> str | None:
    """The setting that limits guidance, named as in built-in policies; None if there is none."""
    for name in ("cfg_range", "cfg"):
        bounds = getattr(policy, name, None)
        if isinstance(bounds, tuple) and bounds and all(isinstance(b, int | float) and b >= 0 for b in bounds):
            return f"{name}={bounds}"
    return None


def _attempt(policy: Policy, method: str, *arguments: Any) -> Any:
    try:
        return getattr(policy, method)(*arguments)
    except PolicyError:
        raise
    except Exception as error:
        obs = arguments[-1]
        raise PolicyError(
            f"{name_of(policy)}.{method} raised {type(error).__name__}: {error}\n  It was given risk of shape "
            f"{tuple(obs.risk.shape)} and requested_cfg_scale of shape {tuple(obs.requested_cfg_scale.shape)}, both "
            f"{obs.risk.dtype}."
        ) from error


def _observations(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device, seed: int, *, measured: bool
) -> list[Observation]:
    """A falling run of log-normal risks, with one calm clip, and with a 0 and a 10,000 on the way."""
    generator = torch.Generator().manual_seed(seed)
    risks = torch.randn((STEPS, *shape), generator=generator).mul(1.2).exp()
    risks[STEPS // 3, 0] = 0.0
    risks[STEPS // 2] = 1e4
    risks[:, -1] = risks[:, -1].clamp(max=0.5)
    if not measured:
        risks = torch.full_like(risks, math.nan)
    sigmas = torch.linspace(math.log(14.6), math.log(0.03), STEPS).exp().tolist()
    cfg_scale = torch.linspace(3.0, 7.0, shape[0]).to(device, dtype)
    risks = risks.to(device, dtype)
    lock = torch.zeros_like(risks[0])
    return [
        Observation(sigma, 0.01 * risk, risk.clone(), lock.clone(), cfg_scale.clone(), STEPS - i)
        for i, (sigma, risk) in enumerate(zip(sigmas, risks, strict=True))
    ]
