"""From an evaluation to a decision: measure the conditional x0-hat, judge the risk, ask the policy, check it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .control import check_control, check_finite, floored, steps_left
from .masks.fitted import FittedMask
from .policy import Policy
from .run import State
from .types import Control, EstimatorError, Evaluation, Observation, PolicyError, RunError, Scalar
from .variance import Estimator


class Measured(Protocol):
    """What a decision needs of an evaluation: its input, its other branch, and a way to ask the model again."""

    x: Tensor
    uncond: Tensor | None

    def probe(self, x: Tensor, sigma: float) -> Tensor: ...


class Controller:
    """What decides in a lock: settings alone; what changes is in `State`.

    threshold: the variance at risk 1, a number or a function of sigma.  cfg_floor: least scheduled guidance scale.
    tokens: how many a per-token lock must have, None where nothing can be locked.
    """

    def __init__(
        self,
        policy: Policy,
        estimator: Estimator,
        threshold: Any,
        cfg_floor: float,
        region: FittedMask | None,
        tokens: int | None,
    ) -> None:
        self.policy, self.estimator, self.threshold = policy, estimator, threshold
        self.cfg_floor, self.region, self.tokens = cfg_floor, region, tokens

    def watch(self, x: Tensor, level: float, requested: Scalar, schedule: Sequence[float] | None) -> Observation:
        """An observation with nothing measured yet."""
        base = torch.as_tensor(requested, dtype=torch.float32, device=x.device).reshape(-1)
        if len(base) not in (1, len(x)):
            raise RunError(
                f"the guidance scale has {len(base)} entries for {len(x)} clips; pass a float, or one per clip."
            )
        base = base.expand(len(x))
        unknown = torch.full_like(base, float("nan"))
        return Observation(level, unknown, unknown, torch.zeros_like(base), base, steps_left(schedule, level))

    def first(self, seen: Observation, expert: Any = None) -> State:
        """The state before anything is measured."""
        control = self._checked(self.policy.start(seen), seen, "start")
        return State(self.estimator.init(), self.policy.init(), False, control.lock, self._scale(control, seen), expert)

    def decide(
        self, state: State, call: Measured, cond: Tensor, seen: Observation
    ) -> tuple[State, Observation, Control]:
        """Measure the conditional x0-hat, judge the risk, and ask the policy."""
        inner, variance = state.estimator, None
        if self.policy.uses_risk:
            mask = None if self.region is None else self.region.latent(cond)
            with torch.no_grad():
                evaluation = Evaluation(seen.sigma, call.x, cond, mask, call.probe, call.uncond)
                inner, variance = self.estimator.step(inner, evaluation)
        if variance is not None:
            limit = self.threshold(seen.sigma) if callable(self.threshold) else self.threshold
            seen = seen._replace(variance=variance, risk=variance / limit)
        if variance is None and self.policy.uses_risk and state.measured:
            # An estimator that pauses: its last word holds.
            held = Control(state.lock, seen.cfg_scale if state.cfg_scale is None else state.cfg_scale)
            return state._replace(estimator=inner), seen, held
        if variance is None and self.policy.uses_risk:
            policy_state, control = state.policy, self._checked(self.policy.start(seen), seen, "start")
        else:
            policy_state, control = self._ask(state.policy, seen)
        scale = self._scale(control, seen)
        known = state.measured or variance is not None
        return State(inner, policy_state, known, control.lock, scale, state.expert), seen, control

    def _ask(self, policy_state: Any, seen: Observation) -> tuple[Any, Control]:
        answer = self.policy.step(policy_state, seen)
        if not (isinstance(answer, tuple) and len(answer) == 2) or isinstance(answer, Control):
            raise PolicyError(
                f"{type(self.policy).__name__}.step returned {type(answer).__name__}; expected (state, Control).\n"
                "  Return state, Control(lock=..., cfg_scale=obs.cfg_scale); without memory use @stateless."
            )
        return answer[0], self._checked(answer[1], seen, "step")

    def _scale(self, control: Control, seen: Observation) -> Scalar | None:
        """The scheduled guidance scale; None where the policy passed on what was asked, which is then left alone."""
        return None if control.cfg_scale is seen.cfg_scale else floored(control.cfg_scale, self.cfg_floor)

    def _checked(self, control: Any, seen: Observation, method: str) -> Control:
        lock: Any = getattr(control, "lock", None)
        per_token = isinstance(lock, Tensor) and lock.ndim == 2 and lock.shape == seen.risk.shape
        # A lock made elementwise of the risk has the risk's fault, not the policy's.
        if per_token and self.tokens not in (None, lock.shape[1]):
            raise EstimatorError(
                f"{self.estimator!r} measures {lock.shape[1]} tokens per clip, the model has {self.tokens}; expected "
                "the same where the policy locks token by token.\n"
                "  Give the estimator the model's own patch (time, height, width), e.g. patch=(1, 2, 2)."
            )
        checked = check_control(self.policy, control, len(seen.cfg_scale), self.tokens, method)
        check_finite(self.policy, checked, method)
        return checked
