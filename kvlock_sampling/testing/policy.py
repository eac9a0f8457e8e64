"""check_policy: made-up runs that ask a policy everything the contract of `Policy` promises."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..control import check_control
from ..policy import Policy, as_policy
from ..types import Control, Observation, PolicyError

STEPS = 12
"""Evaluations in a test run, from sigma 14.6 down to 0.03."""

_TENSORS = ("variance", "risk", "lock", "cfg_scale")
_MEMORY = "All memory must be in the state, none in self, in globals or in a random generator."


def check_policy(
    policy: Any, *, batch: int = 3, seed: int = 0, tokens: int | None = None, device: str | torch.device = "cpu"
) -> None:
    """Checks that a policy keeps the contract of `Policy`, on made-up runs with risks from 0 to 10,000.

    policy: a policy, or a function as under @stateless.
    batch: clips per run, >= 1. tokens: also check with a local estimator, whose risk is (batch, tokens).
    Checked: frozen settings and a readable repr; form (shape, dtype, device) and range of every control, for float32,
    float64 and bfloat16; the first evaluation, before anything is measured; the same answer to the same call, nothing
    changed in place; a restored state replays; a clip gets bit for bit the same alone as in a batch; sigma that does
    not fall does no harm, nor a schedule that is not known, where steps_left is None; `uses_risk`, `never_locks` and a
    `cfg_range` tell the truth.
    Raises PolicyError naming the policy, the method, what was given, what was expected, and what to do.
    """
    policy = as_policy(policy)
    _check_object(policy)
    for shape in [(batch,)] + ([(batch, tokens)] if tokens else []):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            run = _observations(shape, dtype, device, seed, measured=policy.uses_risk)
            _check_start(policy, run[0])
            states, controls = _play(policy, policy.init(), run)
            _check_rewind(policy, run, states, controls)
            _check_clips(policy, run, controls)
            _check_unknown_schedule(policy, run)
            _check_standstill(policy, states[-1], run[-1])


def _check_object(policy: Policy) -> None:
    kind = type(policy)
    params = getattr(kind, "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise PolicyError(
            f"{kind.__name__} can be changed after it was made; expected frozen settings: it serves many runs.\n"
            f"  Write @dataclass(frozen=True) over class {kind.__name__}, and keep memory in the state that init and "
            "step return."
        )
    if " object at 0x" in repr(policy):
        raise PolicyError(
            f"{policy!r} does not show its settings; expected {kind.__name__}(...), as a dataclass prints."
        )


def _check_start(policy: Policy, obs: Observation) -> None:
    unknown = obs._replace(risk=torch.full_like(obs.risk, math.nan), variance=torch.full_like(obs.risk, math.nan))
    _check_values(policy, _attempt(policy, "start", unknown), unknown, "start")


def _check_rewind(policy: Policy, run: list[Observation], states: list[Any], controls: list[Control]) -> None:
    for index in (0, len(run) // 2):
        replayed = _play(policy, states[index], run[index:])[1]
        if not _same(replayed, controls[index:]):
            raise PolicyError(
                f"{_name(policy)}.step answered otherwise when the state of sigma={run[index].sigma:.3g} was restored, "
                f"expected the same.\n  Samplers reject steps and go back. {_MEMORY}"
            )


def _check_clips(policy: Policy, run: list[Observation], controls: list[Control]) -> None:
    batch = len(run[0].cfg_scale)
    for clip in range(batch):
        alone = [o._replace(**{f: getattr(o, f)[clip : clip + 1] for f in _TENSORS}) for o in run]
        for obs, single, together in zip(alone, _play(policy, policy.init(), alone)[1], controls, strict=True):
            for field in Control._fields:
                value, other = torch.as_tensor(getattr(single, field)), torch.as_tensor(getattr(together, field))
                other = other[clip : clip + 1] if other.ndim else other
                if not _same(value.flatten(), other.flatten()):
                    raise PolicyError(
                        f"{_name(policy)}.step gave clip {clip} {field}={value.tolist()} alone and {other.tolist()} in "
                        f"a batch of {batch}, at sigma={obs.sigma:.3g}; expected the same, bit for bit.\n  Clips are "
                        "independent: work elementwise, with no mean, max or sort over dimension 0, no branch on any()."
                    )


def _check_standstill(policy: Policy, state: Any, obs: Observation) -> None:
    try:
        _call(policy, state, obs)
    except PolicyError as error:
        raise PolicyError(
            f"{error}\n  This was a second evaluation at the same sigma, where no time has passed on a policy's clock, "
            "-log(sigma): guard what divides by it."
        ) from error


def _check_unknown_schedule(policy: Policy, run: list[Observation]) -> None:
    unknown = [obs._replace(steps_left=None) for obs in run]
    if _refuses(policy, unknown):
        return  # a PolicyError of its own, which tells the user what is missing
    try:
        _check_values(policy, _attempt(policy, "start", unknown[0]), unknown[0], "start")
        _play(policy, policy.init(), unknown)
    except PolicyError as error:
        raise PolicyError(
            f"{error}\n  Here obs.steps_left was None, as it is where nobody told the schedule: ask for None before "
            "you count, or go by obs.sigma, which is always there."
        ) from error


def _refuses(policy: Policy, run: list[Observation]) -> bool:
    state = policy.init()
    try:
        policy.start(run[0])
        for obs in run:
            state, _ = policy.step(state, obs)
    except PolicyError:
        return True
    except Exception:
        return False
    return False


def _play(policy: Policy, state: Any, run: list[Observation]) -> tuple[list[Any], list[Control]]:
    """All states, the first included, and all controls; every single call is checked."""
    states, controls = [state], []
    for obs in run:
        state, control = _call(policy, state, obs)
        states.append(state)
        controls.append(control)
    return states, controls


def _call(policy: Policy, state: Any, obs: Observation) -> tuple[Any, Control]:
    before = copy.deepcopy((state, obs))
    answer = _attempt(policy, "step", state, obs)
    if not isinstance(answer, tuple) or isinstance(answer, Control) or len(answer) != 2:
        given = answer if isinstance(answer, Control) else type(answer).__name__
        raise PolicyError(
            f"{_name(policy)}.step returned {given}; expected (state, Control): return state, Control(...)"
        )
    new, control = answer
    _check_values(policy, control, obs, "step")
    kept = copy.deepcopy((new, control))
    for what, was, now in (("state", before[0], state), ("observation", before[1], obs)):
        if not _same(was, now):
            raise PolicyError(
                f"{_name(policy)}.step changed the {what} it was given; expected it untouched, to go back to.\n"
                "  Build new tensors (x + 1, torch.where, state._replace) instead of x += 1, x.add_(1) or x[i] = 1."
            )
    if not _same(kept, _attempt(policy, "step", state, obs)):
        raise PolicyError(
            f"{_name(policy)}.step gave two answers to one question at sigma={obs.sigma:.3g}, expected one.\n"
            f"  {_MEMORY}"
        )
    return new, control


def _check_values(policy: Policy, control: Any, obs: Observation, method: str) -> None:
    who = f"{_name(policy)}.{method}"
    seen = f"at sigma={obs.sigma:.3g} with risk={[f'{r:.3g}' for r in obs.risk.flatten()[:4].tolist()]}"
    tokens = obs.risk.shape[1] if obs.risk.ndim > 1 else None
    check_control(policy, control, len(obs.cfg_scale), tokens, method)
    for field, like in (("lock", obs.risk), ("cfg_scale", obs.cfg_scale)):
        value = getattr(control, field)
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
        if field == "lock" and not (flat.min() >= 0 and flat.max() <= 1):
            raise PolicyError(
                f"{who} returned lock={value} {seen}; expected values in [0, 1].\n"
                "  Return value.clamp(0, 1), or wrap the policy: Clamped(policy, lock=(0.0, 1.0))"
            )
        if field == "cfg_scale" and flat.min() < 0 and (claimed := _claimed(policy)):
            raise PolicyError(
                f"{who} returned cfg_scale={value} {seen}, but {claimed} has nothing below 0; expected values >= 0.\n"
                "  Clamp the share of guidance to the range before it is multiplied by obs.cfg_scale."
            )
        if field == "lock" and policy.never_locks and flat.any():
            raise PolicyError(
                f"{who} returned lock={value} {seen}, but never_locks is True; expected lock 0 always.\n"
                "  Let never_locks return False wherever a setting allows a lock."
            )


def _claimed(policy: Policy) -> str | None:
    """A setting that says which guidance is in range, as built-in policies name it; None: anything may be meant."""
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
            f"{_name(policy)}.{method} raised {type(error).__name__}: {error}\n  It was given risk of shape "
            f"{tuple(obs.risk.shape)} and cfg_scale of shape {tuple(obs.cfg_scale.shape)}, both {obs.risk.dtype}."
        ) from error


def _observations(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device, seed: int, *, measured: bool
) -> list[Observation]:
    """A falling run of log-normal risks, one clip calm to the end, with a 0 and a 10,000 on the way."""
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


def _same(a: Any, b: Any) -> bool:
    """Equal bit for bit, NaN to NaN, through tuples, lists, dicts and dataclasses."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and _same_values(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        return all(_same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    return bool(a == b) or (a != a and b != b)


def _same_values(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _name(policy: Policy) -> str:
    return getattr(policy, "__name__", type(policy).__name__)
