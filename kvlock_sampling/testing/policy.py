"""check_policy: made-up runs that test a policy against the contract of `Policy`."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..policy import Policy, as_policy
from ..policy.base import check_control, check_ratio, policy_name
from ..types import Control, Observation, PolicyError
from ..utils.fields import check_number
from ..utils.host import HostReads
from ._contract import Contract, one_clip, rows, same

STEPS = 12


@torch.no_grad()
def check_policy(policy: Any, *, batch: int = 3, tokens: int | None = None, device: str | torch.device = "cpu") -> None:
    """Check that a policy keeps the contract of `Policy`, on made-up runs with risks from 0 to 10,000.

    It checks the settings and `may_lock`; type, shape, dtype, device and range of every control, in float32, float64
    and bfloat16, also before the first measurement, at a repeated sigma, and in an unknown schedule (steps_left None);
    that a step repeats, changes nothing in place and replays from a restored state, also after another run; and that a
    clip gets the same alone as in a batch, up to rounding.

    Args:
        policy: A policy, or a function of an Observation.
        batch: Clips per run, >= 1. Defaults to 3.
        tokens: Also check with a local estimator, whose risk is (batch, tokens). Defaults to None, one risk per clip.
        device: Where the observations are. Defaults to the CPU.

    Raises:
        PolicyError: With the policy, the method, what was given, what was expected, and what to do.
    """
    policy, batch = as_policy(policy), check_number("batch", batch, PolicyError, at_least=1, whole=True)
    contract = Contract(
        policy, PolicyError, "observation", "Control", lambda control, obs: _check_values(policy, control, obs, "step")
    )
    contract.check_settings()
    for shape in [(batch,)] + ([(batch, tokens)] if tokens else []):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            run = _observations(shape, dtype, device, measured=policy.uses_risk)
            _check_start(contract, run[0])
            states, controls = contract.play(policy.init(), run)
            contract.check_rewind(run, states, controls)
            contract.play(policy.init(), [obs._replace(sigma=2.5 * obs.sigma) for obs in run])
            if not same(contract.play(policy.init(), run)[1], controls):
                told = "answered otherwise after a run of another schedule; expected the same"
                raise PolicyError(f"{contract.name} {told}: all memory must be in the state, none in self or globals.")
            if not policy.uses_risk:
                measured = _observations(shape, dtype, device, measured=True)
                if not same(contract.play(policy.init(), measured)[1], controls):
                    raise PolicyError(
                        f"{contract.name} reads risk, variance or effect, which are NaN as uses_risk is False; "
                        "expected one of sigma and steps alone.\n  Let uses_risk be True, as it is by default: then "
                        "the estimator measures."
                    )
            _check_clips(contract, run, controls)
            _check_unknown_schedule(contract, [obs._replace(steps_left=None) for obs in run])
            why = "This was a second evaluation at the same sigma: guard what divides by time."
            _explained(why, lambda last=states[-1], obs=run[-1]: contract.step(last, obs))  # type: ignore[misc]


def _check_start(contract: Contract, obs: Observation) -> None:
    unknown = torch.full_like(obs.risk, math.nan)
    obs = obs._replace(risk=unknown, variance=unknown, effect=unknown)
    _check_values(contract.checked, contract.attempt("start", obs), obs, "start")


def _check_clips(contract: Contract, run: list[Observation], controls: list[Control]) -> None:
    """A clip gets the same bits beside others, and alone up to rounding: torch's exp depends on places in memory."""
    near = 4 * torch.finfo(run[0].risk.dtype).eps
    for clip in range(len(run[0].requested_cfg_scale)):
        row = slice(clip, clip + 1)
        for where, observed, place, tolerance in (
            ("beside other clips", [_beside_others(obs, clip) for obs in run], row, 0.0),
            ("alone", [one_clip(obs, clip) for obs in run], slice(None), near),
        ):
            found = contract.play(contract.checked.init(), observed)[1]
            for obs, one, together in zip(run, found, controls, strict=True):
                for field, value, other in zip(Control._fields, one, together, strict=True):
                    mine, its = (rows(v, at) for v, at in ((value, place), (other, row)))
                    if mine.shape != its.shape or not torch.allclose(mine, its, rtol=tolerance, atol=tolerance):
                        raise PolicyError(
                            f"{contract.name}.step gave clip {clip} {field}={mine.tolist()} {where} and {its.tolist()} "
                            f"in a batch of {len(obs.requested_cfg_scale)}, at sigma={obs.sigma:.3g}; expected the "
                            "same, bit for bit: work elementwise."
                        )


def _beside_others(obs: Any, clip: int) -> Any:
    return obs._make(v.roll(1, 0).select_scatter(v[clip], 0, clip) if isinstance(v, Tensor) else v for v in obs)


def _check_unknown_schedule(contract: Contract, run: list[Observation]) -> None:
    try:
        state = contract.checked.init()
        contract.checked.start(run[0])
        for obs in run:
            state, _ = contract.checked.step(state, obs)
    except PolicyError:
        return  # a policy may need the schedule, and says so with an error of its own
    except Exception:  # reported below
        pass
    why = "Here obs.steps_left was None: the schedule is unknown. Test for None before you count, or use obs.sigma."
    _explained(why, lambda: _check_start(contract, run[0]))
    _explained(why, lambda: contract.play(contract.checked.init(), run))


def _explained(explanation: str, check: Callable[[], Any]) -> None:
    try:
        check()
    except PolicyError as error:
        raise PolicyError(f"{error}\n  {explanation}") from error


def _check_values(policy: Policy, control: Any, obs: Observation, method: str) -> None:
    who = f"{policy_name(policy)}.{method}"
    seen = f"at sigma={obs.sigma:.3g} with risk={[f'{r:.3g}' for r in obs.risk.flatten()[:4].tolist()]}"
    tokens = obs.risk.shape[1] if obs.risk.ndim > 1 else None
    clips, told = len(obs.requested_cfg_scale), f"This was {who} {seen}."
    _explained(told, lambda: check_control(policy, control, clips, tokens, method))
    for field, value in control._asdict().items():
        like = obs.requested_cfg_scale if field == "cfg_scale" else obs.risk
        kinds = (like.dtype, torch.float32)
        if isinstance(value, Tensor) and not (value.dtype in kinds and value.device == like.device):
            raise PolicyError(
                f"{who} returned {field} as {value.dtype} on {value.device} for an observation in {like.dtype} on "
                f"{like.device}; expected the same, or float32.\n  Write {field}.to(obs.risk), or use torch.full_like."
            )
    on_host = Control(*(v.cpu() if isinstance(v, Tensor) else v for v in control))
    _explained(told, lambda: check_control(policy, on_host, clips, tokens, method))
    low, high = HostReads().range(0.0 if on_host.lock is None else on_host.lock)
    _explained(told, lambda: check_ratio(policy, "lock", low, high))
    if high > 0 and not policy.may_lock:
        raise PolicyError(
            f"{who} returned lock={on_host.lock} {seen}, but may_lock is False; expected lock 0.\n"
            "  Let may_lock be True where a setting allows a lock."
        )


def _observations(
    shape: tuple[int, ...], dtype: torch.dtype, device: str | torch.device, *, measured: bool
) -> list[Observation]:
    """A falling run of log-normal risks and effects, with one calm clip, and with a 0 and a 10,000 on the way."""
    risks = torch.randn((STEPS, *shape), generator=torch.Generator().manual_seed(0), device="cpu").mul(1.2).exp()
    risks[STEPS // 3, 0] = 0.0
    risks[STEPS // 2] = 1e4
    risks[:, 1:][:, -1:].clamp_(max=0.5)
    locks = (risks / (1 + risks)).to(device, dtype)
    risks = (risks if measured else torch.full_like(risks, math.nan)).to(device, dtype)
    sigmas = torch.linspace(math.log(14.6), math.log(0.03), STEPS).exp().tolist()
    cfg_scale = torch.linspace(3.0, 7.0, shape[0]).to(device, dtype)
    return [
        Observation(sigma, 0.01 * risk, risk.clone(), lock.clone(), cfg_scale.clone(), STEPS - i, risk.flip(0))
        for i, (sigma, risk, lock) in enumerate(zip(sigmas, risks, locks, strict=True))
    ]
