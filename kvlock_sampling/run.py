"""What lives within one run, and what a lock asks of the objects it was given."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention import Hooks
from .attention.compat.step_caches import StepCaches
from .kv_cache import CacheSession
from .presets import Preset
from .timeline import Timeline
from .trace import Trace
from .types import EstimatorError, Scalar
from .variance import Estimator, TrajectoryVariance, make_estimator
from .variance.thresholds import ThresholdCurve


class State(NamedTuple):
    """What one evaluation leaves for the next. `cfg_scale` is None where the policy passed on what was asked; `expert`
    is which network evaluated, for a denoiser of several.
    """

    estimator: Any
    policy: Any
    measured: bool
    lock: Scalar
    cfg_scale: Scalar | None
    expert: Any = None


class Run:
    """Everything that lives within one `with` block."""

    def __init__(self, hooks: Hooks | None, stack: ExitStack, schedule: Sequence[float] | None) -> None:
        self.hooks, self.stack, self.schedule = hooks, stack, schedule
        self.timeline: Timeline[State] = Timeline()
        self.trace = Trace()
        self.noise: Tensor | None = None
        self.top = 0.0
        self.keeper: CacheSession | None = None
        self.caches: StepCaches | None = None
        self._evaluations, self._measured, self._waited = 0, False, 0

    @property
    def waited(self) -> int:
        """Evaluations of the longest run in this block in which nothing was ever measured; 0 without such a run."""
        return max(self._waited, 0 if self._measured else self._evaluations)

    def advance(self, level: float, state: State) -> None:
        """An evaluation at `level` is done, and leaves `state` for the next."""
        self.timeline.append(level, state)
        self._evaluations += 1
        self._measured |= state.measured

    def begin(self, level: float, x: Tensor) -> None:
        """Called where nothing is remembered above `level`. From the top, or with other clips, a run begins anew and
        has its own noise; a sampler that only went far back up goes on with the noise it had.
        """
        if (
            level >= self.top * (1 - 1e-4)
            or (self.noise is not None and self.noise.shape[1:] != x.shape[1:])
            or (self.noise is not None and len(self.noise) not in (1, len(x)))
        ):
            self._anew()
        self.top = max(self.top, level)

    def restart(self, schedule: Sequence[float]) -> None:
        """A sampler told its schedule: whatever came before in this block was another run."""
        self.schedule, self.timeline, self.top = schedule, Timeline(), 0.0
        self._anew()

    def _anew(self) -> None:
        self._waited, self._evaluations, self._measured = self.waited, 0, False
        self.noise = self.caches = None
        if self.keeper is not None:
            self.keeper.restart()


DEFAULT_ESTIMATOR = TrajectoryVariance(window=None, span=8.0, normalise=True, integral=True)
"""Free, and its scale does not depend on the number of steps of a deterministic sampler."""

DEFAULT_THRESHOLD = ThresholdCurve(
    sigmas=(25.9, 15.0, 9.23, 5.83, 3.67, 2.21, 1.37, 0.84, 0.491, 0.312, 0.201, 0.0973),
    values=(2.35e-5, 1.48e-4, 6.22e-4, 0.00174, 0.0033, 0.00498, 0.00751, 0.011, 0.0168, 0.0208, 0.03, 0.0715),
)
"""What 95% of calm runs of the embedded model stay below, by `kvlock calibrate`: another model deserves its own."""


def default_threshold(estimator: Estimator) -> float | ThresholdCurve:
    """The threshold where neither the user nor a preset names one."""
    return DEFAULT_THRESHOLD if estimator == DEFAULT_ESTIMATOR else estimator.default_threshold


def first_given(*values: Any) -> Any:
    """The first that is not None."""
    return next(v for v in values if v is not None)


def as_schedule(sigmas: Any, model: Any = None) -> tuple[float, ...]:
    """Noise levels on the host and on the policies' clock, once: they are looked at in every evaluation."""
    levels = torch.as_tensor(sigmas).tolist()
    to_ve = method_of(model, "to_ve")
    return tuple(levels if to_ve is None else (float(to_ve(s)) for s in levels))


def as_rows(value: Scalar, like: Tensor) -> Tensor:
    """A float or tensor as one float32 row per clip, on `like`'s device."""
    rows = torch.as_tensor(value, dtype=torch.float32, device=like.device)
    return rows if rows.ndim > 1 else rows.reshape(-1).expand(len(like))


def check_threshold(threshold: Any) -> None:
    """A threshold is a number > 0, or a function of sigma."""
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not callable(threshold) and not (number and 0 < threshold < float("inf")):
        raise EstimatorError(f"threshold={threshold!r}; expected a variance > 0, e.g. 0.01, or a function of sigma.")


def default_of(model: Any, name: str) -> Any:
    """The default of a parameter in the denoiser's own signature; 1.0 where there is none."""
    try:
        parameter = inspect.signature(getattr(model, "forward", model)).parameters.get(name)
    except (TypeError, ValueError):
        return 1.0
    return 1.0 if parameter is None or parameter.default is parameter.empty else parameter.default


def method_of(model: Any, name: str) -> Any:
    """A method the denoiser may define to replace a rule of the variance-exploding form."""
    found = getattr(model, name, None)
    return found if callable(found) else None


def names_parameter(model: Any, name: str) -> bool:
    """Whether the denoiser's own signature has a parameter of this name."""
    try:
        return name in inspect.signature(getattr(model, "forward", model)).parameters
    except (TypeError, ValueError):
        return False


def advised_estimator(preset: Preset | None) -> Estimator:
    """The estimator a preset names, or the default one."""
    if preset is None or not preset.estimator:
        return DEFAULT_ESTIMATOR
    return make_estimator(dict(preset.estimator))
