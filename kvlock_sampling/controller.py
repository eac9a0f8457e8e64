"""From a clean prediction to a decision: estimator -> variance -> risk -> policy -> checked control."""

from typing import Any, NamedTuple

from torch import Tensor

from .policy.base import check_control, stepped
from .settings import LockSettings
from .types import Control, EstimatorError, Evaluation, Observation, Scalar
from .variance.base import measure
from .variance.thresholds import threshold_at


class State(NamedTuple):
    """What one evaluation leaves for the next: the states of estimator and policy, and whether anything was measured so
    far; the lock for the next evaluation, in [0, 1], and the last scheduled guidance scale and weight of the source in
    the background, None where the policy left them alone; which of several networks evaluated; and what was measured.
    """

    estimator: Any
    policy: Any
    measured: bool
    lock: Scalar
    cfg_scale: Scalar | None
    composite: Scalar | None
    expert: Any = None
    variance: Tensor | None = None


def start(settings: LockSettings, observation: Observation, expert: Any = None) -> State:
    """The state of a new run, before anything was measured."""
    control = _checked(settings, settings.policy.start(observation), observation, "start")
    return State(settings.estimator.init(), settings.policy.init(), False, *_completed(settings, control, 0.0), expert)


def decide(
    settings: LockSettings, state: State, evaluation: Evaluation, observation: Observation
) -> tuple[State, Observation]:
    """Measure the conditional x0-hat, judge the risk, and ask the policy, from what the evaluation before left and what
    is known before the measurement. Returns the next state, which says what acts from now on, and the observation that
    the policy saw. Raises EstimatorError or PolicyError if one breaks its contract.
    """
    policy, inner, variance, effect = settings.policy, state.estimator, None, None
    if policy.uses_risk:
        inner, variance, effect = measure(settings.estimator, inner, evaluation)
    if variance is not None:
        limit = threshold_at(settings.threshold, observation.sigma)
        effect = observation.effect if effect is None else effect / limit
        effect = effect if effect.shape == variance.shape else effect.view(-1, *[1] * (variance.ndim - 1))
        observation = observation._replace(variance=variance, risk=variance / limit, effect=effect.expand_as(variance))
    if variance is None and policy.uses_risk:
        if state.measured:  # the estimator pauses: the last control holds
            return state._replace(estimator=inner, variance=None), observation
        policy_state, answer, method = state.policy, policy.start(observation), "start"
    else:
        seen = observation._replace(lock=observation.lock.to(observation.risk.dtype))
        if seen.lock.ndim < seen.risk.ndim:  # so that a policy can combine them elementwise
            seen = seen._replace(lock=seen.lock.unsqueeze(1).expand_as(seen.risk))
        (policy_state, answer), method = stepped(policy, state.policy, seen), "step"
    control = _completed(settings, _checked(settings, answer, observation, method), state.lock)
    measured = state.measured or variance is not None
    return State(inner, policy_state, measured, *control, state.expert, variance), observation


def _completed(settings: LockSettings, control: Control, lock: Scalar) -> tuple[Scalar, Scalar | None, Scalar | None]:
    """Lock, cfg_scale and composite, with the lock in force where the policy left it alone, and a scheduled guidance
    not below its floor: under 1 guidance turns towards the unconditional prediction.
    """
    scale, floor = control.cfg_scale, settings.cfg_floor
    if scale is not None:
        scale = scale.clamp_min(floor) if isinstance(scale, Tensor) else max(float(scale), floor)
    return (lock if control.lock is None else control.lock), scale, control.composite


def _checked(settings: LockSettings, answer: Any, observation: Observation, method: str) -> Control:
    shape = observation.risk.shape
    tokens = shape[1] if settings.tokens is None and len(shape) > 1 else settings.tokens  # unknown without a source
    decided = (getattr(answer, name, None) for name in ("lock", "composite"))
    local = any(isinstance(value, Tensor) and value.ndim == 2 and value.shape == shape for value in decided)
    if local and tokens not in (None, shape[1]):
        # What is made elementwise of a per-token risk has the estimator's fault, not the policy's.
        raise EstimatorError(
            f"{settings.estimator!r} measures {shape[1]} tokens per clip, the model has {tokens}; expected the same "
            "where the policy decides token by token.\n"
            "  Give the estimator the model's own patch (time, height, width), e.g. patch=(1, 2, 2)."
        )
    return check_control(settings.policy, answer, len(observation.requested_cfg_scale), tokens, method)
