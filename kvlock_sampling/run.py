"""One sampling run: its state over sigma, and what is known at the start of each evaluation.

The clock is sigma, not the number of calls: samplers evaluate a model one to three times per step, at intermediate
noise levels, adaptively with rejections, with churn, or backwards.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Hooks
from .attention.compat.step_caches import StepCaches
from .batching import check_rows
from .controller import State, start
from .kv_cache import CacheSession
from .policy.base import check_ratio, nothing_to_lock_to
from .settings import LockSettings
from .trace import Trace, rows_of
from .types import SAME_SIGMA, Denoiser, Observation, PolicyError, RunError, Scalar
from .utils.denoiser import method_of, to_sigma
from .utils.fields import check_number
from .utils.host import HostReads, check_prediction
from .utils.modules import reachable_modules
from .utils.threads import here
from .utils.warn import warn
from .variance.base import check_variance

_CHURN = 1.5  # A sampler's churn raises a level by up to sqrt(2).


class Timeline:
    """States at falling sigmas. An evaluation at (nearly) the sigma of the last entry replaces it, a lower one appends,
    and a higher one first drops every entry below it. Rewinding is therefore restoring a value. The newest `depth`
    states are kept: samplers step back by a step or two, not by a run.
    """

    def __init__(self, *, depth: int = 16) -> None:
        self.depth = depth
        self._entries: list[tuple[float, State]] = []

    def rewind(self, sigma: float) -> State | None:
        """Drop what an evaluation at `sigma` replaces or undoes. Returns the state that it continues from, if any."""
        self._entries = [entry for entry in self._entries if entry[0] > sigma * (1 + SAME_SIGMA)]
        return self.last

    @property
    def last(self) -> State | None:
        """The newest state."""
        return self._entries[-1][1] if self._entries else None

    @property
    def sigma(self) -> float:
        """The noise level of the newest state; 0 without one."""
        return self._entries[-1][0] if self._entries else 0.0

    def append(self, sigma: float, state: State) -> None:
        """Add the state reached at `sigma`, which must be below all kept ones: call `rewind` first."""
        self._entries = [*self._entries, (sigma, state)][-self.depth :]


@dataclass(frozen=True)
class Step:
    """What is known at the start of one evaluation: the sampler's input and extra_args; the noise level as the sampler
    passed it, in the model's own form, and on the clock, where 0 means that x is clean; the guidance scale that the
    caller requested; what the evaluation before left; the weight of the source in the background until this one
    decides; what a policy sees before the measurement, with the lock that acts now; and ranges of tensors on the host.
    """

    x: Tensor
    sigma_arg: Tensor
    model_sigma: float
    sigma: float
    extra_args: Mapping[str, Any]
    requested: Scalar
    state: State
    composite: Scalar
    observation: Observation
    reads: HostReads

    @property
    def expected_cfg_scale(self) -> Scalar:
        """The guidance scale that this evaluation will most likely use."""
        return self.requested if self.state.cfg_scale is None else self.state.cfg_scale


class Tools:
    """What acts on one model during a run: hooks, its step caches' memories, and entries of the KV cache."""

    def __init__(self, settings: LockSettings) -> None:
        layers = settings.layers
        self.hooks = None if layers is None else Hooks(layers)
        self.step_caches = StepCaches([*reachable_modules(settings.model), *(layers.networks if layers else ())])
        kv_cache, model = settings.kv_cache, settings.model if settings.branch is None else settings.branch
        self.cached = None if kv_cache is None or layers is None else CacheSession(kv_cache, model, layers)


class Run:
    """Everything that lives within one `with` block. Locks of several experts may share it. `schedule` holds noise
    levels on the policies' clock; None if it is unknown.
    """

    def __init__(self, schedule: Sequence[float] | None = None) -> None:
        self.schedule, self.is_here = schedule, here()
        self._tools: dict[int, Tools] = {}
        self.timeline = Timeline()
        self.trace = Trace()
        self.noise: Tensor | None = None
        self._top, self._called, self.open = 0.0, False, True
        self._evaluations, self._measured, self._unmeasured = 0, False, 0
        self._unread: tuple[float, Tensor, Tensor | None] | None = None
        self._shape: torch.Size | None = None
        self._resumed = False

    def tools(self, settings: LockSettings) -> Tools:
        """The tools for this model, made when it is first seen."""
        if id(settings.model) not in self._tools:
            self._tools[id(settings.model)] = Tools(settings)
        return self._tools[id(settings.model)]

    def enter(self, settings: LockSettings, x: Tensor, sigma: Any, extra_args: Mapping[str, Any]) -> Step:
        """Read noise level, requested guidance and state of one evaluation, with one transfer from a device."""
        self._called = True
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.numel()):
            given = f"{tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else repr(x)
            raise RunError(f"x is {given}; expected floats (batch, ...), e.g. torch.randn_like(source) * sigma.")
        check_rows(extra_args, len(x), "extra_args")
        check_rows(settings.source_args, len(x), "source_args")
        try:
            # Python's numbers in x's precision, as a model would take them, but not in half.
            dtype = None if hasattr(sigma, "dtype") else torch.promote_types(x.dtype, torch.float32)
            sigma_arg = torch.as_tensor(sigma, dtype=dtype)
        except (TypeError, ValueError, RuntimeError):
            raise RunError(f"sigma={sigma!r}; expected a noise level, or one per clip, e.g. sigmas[0].") from None
        sigma_arg = sigma_arg.to(x.device)
        name = settings.scale_arg or "cond_scale"
        if sigma_arg.ndim > 1 or sigma_arg.numel() not in (1, len(x)):
            raise RunError(f"sigma has shape {tuple(sigma_arg.shape)}; expected () or (batch,): sigma.flatten().")
        requested = extra_args.get(name, settings.default_scale)
        # A callback may change the tensor in place.
        requested = requested.clone() if isinstance(requested, Tensor) else check_number(name, requested, RunError)
        reads, last = HostReads(), self.timeline.last
        decided = () if last is None else (last.lock, last.cfg_scale, last.composite)
        reads.together(x, sigma_arg, requested, *decided, *(self._unread or ())[1:])
        self._check_unread(settings, reads)
        if not math.isfinite(sum(reads.range(x))):
            raise RunError(f"x holds NaN or inf, in shape {tuple(x.shape)}; expected what the sampler made, finite.")
        model_sigma = _one_level(reads.range(sigma_arg))
        sigma = _unrounded(self.schedule, settings.model, model_sigma, sigma_arg.dtype)
        observation = self._observation(x, sigma, requested)
        if sigma == 0:  # x is clean already: nothing is measured, decided or locked
            state = State(None, None, False, 0.0, None, None if last is None else last.composite)
        else:
            _check_range(self.schedule, sigma)
            # Of several networks. Its argument is on the host: a noise level on the device would cost another transfer.
            expert = (method_of(settings.model, "expert") or (lambda level: None))(torch.tensor(model_sigma))
            # Clips of another shape, above the level that was reached: another run. Below, a sampler takes them apart.
            if self._shape not in (None, x.shape) and (self._resumed or sigma > self.timeline.sigma * (1 + SAME_SIGMA)):
                self.restart(self.schedule)
            self._resumed = False
            if (found := self.timeline.rewind(sigma)) is None:
                self._begin(sigma)
            elif self._shape not in (None, x.shape):
                self._check_apart(settings, x, found)
            self._shape = self._shape or x.shape
            state = found or start(settings, observation, expert)
            if state.expert != expert:
                # The new expert's prediction is not comparable with the old one's.
                state = state._replace(estimator=settings.estimator.init(), expert=expert)
            own = settings.policy.uses_risk and settings.estimator.needs_source
            if self.noise is None and settings.source is not None and (settings.layers or own):
                self.noise = settings.source.noise_of_run(x, model_sigma, own or hasattr(settings.model, "kvlock_host"))
        weight = _ratios(settings, state, reads)
        observation = observation._replace(lock=rows_of(state.lock, observation.lock))
        return Step(x, sigma_arg, model_sigma, sigma, extra_args, requested, state, weight, observation, reads)

    def _check_apart(self, settings: LockSettings, x: Tensor, state: State) -> None:
        """Refuse x of another shape where the run measures, or knows something of each clip."""
        rows = {len(value) for value in (self.noise, *state) if isinstance(value, Tensor) and value.ndim}
        if settings.policy.uses_risk or rows - {1, len(x)}:
            raise RunError(
                f"x has shape {tuple(x.shape)}, and the run began with {tuple(self._shape or ())}; expected the same.\n"
                "  A block for each clip; or another run: lock.on_schedule(sigmas) with the noise levels that are left."
            )

    def leave(self, settings: LockSettings, sigma: float, state: State, denoised: Tensor) -> None:
        """Keep what an evaluation at `sigma` left. What lies on a device is checked with the next transfer."""
        self._unread = sigma, denoised, state.variance
        if HostReads.free(denoised):
            self._check_unread(settings, HostReads())
        self.timeline.append(sigma, state)
        self._evaluations += 1
        self._measured |= state.measured

    @property
    def unmeasured(self) -> int:
        """Evaluations of the longest run in this block in which nothing was measured; 0 without such a run."""
        return max(self._unmeasured, 0 if self._measured else self._evaluations)

    def _check_unread(self, settings: LockSettings, reads: HostReads) -> None:
        """Check the last evaluation's prediction and variance."""
        if self._unread is not None:
            sigma, denoised, variance = self._unread
            self._unread = None
            check_prediction(reads, sigma, denoised)
            if variance is not None:
                check_variance(settings.estimator, reads, variance)

    def settle(self, settings: LockSettings) -> None:
        """Check what a block left: any call at all, finite numbers, and measurements in a run of more than two."""
        if not self._called:
            warn("the lock was not called in its block: pass it to the sampler, as the model.")
        self._check_unread(settings, HostReads())
        if settings.policy.uses_risk and self.unmeasured > 2:
            warn(
                f"nothing was measured in a run of {self.unmeasured} evaluations, so {settings.policy!r} never took a "
                f"step in it: {settings.estimator!r} did not report. Noise levels must fall: an inversion is not "
                "measured. A guidance gap needs uncond; Sparse needs levels of the schedule.",
            )

    def tell(self, schedule: tuple[float, ...]) -> None:
        """A sampler told its schedule. It goes on from the level that was reached, or begins another run."""
        first, rest = schedule[0], tuple(level for level in self.schedule or () if level <= schedule[0])
        schedule = rest if rest[: len(schedule)] == schedule else schedule  # step by step it tells pieces of it
        self._resumed = first <= self.timeline.sigma * _CHURN and first < self._top * (1 - SAME_SIGMA)
        if not self._resumed:
            return self.restart(schedule)
        self.schedule = (*(level for level in self.schedule or () if level > first * (1 + SAME_SIGMA)), *schedule)

    def restart(self, schedule: Sequence[float] | None) -> None:
        """What came before in this block was another run."""
        self.schedule, self._top = schedule, 0.0
        self._anew()

    def close(self) -> None:
        """Free what the run holds."""
        used, self.timeline, self.noise, self._tools = self._tools, Timeline(), None, {}
        for tools in used.values():
            if tools.cached is not None:
                tools.cached.close()

    def _begin(self, sigma: float) -> None:
        """Begin anew from the top, with noise of its own; a sampler that only went far back up keeps its noise."""
        if sigma >= self._top * (1 - SAME_SIGMA):
            # A level above the run's first: an inversion rises step by step, and is one run for the warning.
            count = self._evaluations if sigma > self._top * (1 + SAME_SIGMA) and not self._measured else 0
            self._anew()
            self._evaluations = count
        self._top = max(self._top, sigma)

    def _anew(self) -> None:
        self._shape = None
        self._unmeasured, self._evaluations, self._measured = self.unmeasured, 0, False
        self.close()

    def _observation(self, x: Tensor, sigma: float, requested: Scalar) -> Observation:
        scale = torch.as_tensor(requested, dtype=torch.float32, device=x.device).reshape(-1)
        if len(scale) not in (1, len(x)):
            raise RunError(f"cond_scale has {len(scale)} entries for {len(x)} clips; pass one, or one each.")
        scale = scale.expand(len(x))
        unknown = torch.full_like(scale, float("nan"))
        left = steps_left(self.schedule, sigma)
        return Observation(sigma, unknown, unknown, torch.zeros_like(scale), scale, left, unknown)


def steps_left(schedule: Sequence[float] | None, sigma: float) -> int | None:
    """Steps of the schedule that remain at this noise level, counting the present one; None without a schedule.

    A noise level between two of the schedule belongs to the step that began at the higher one.
    """
    if schedule is None:
        return None
    levels = [s for s in schedule if s > 0]
    return len(levels) - max(1, sum(s >= sigma * (1 - SAME_SIGMA) for s in levels)) + 1


def _unrounded(schedule: Sequence[float] | None, model: Denoiser, level: float, dtype: torch.dtype) -> float:
    """A noise level on the clock: the schedule's own where a sampler of half precision rounded it."""
    sigma = to_sigma(model, level)
    if schedule is None or dtype not in (torch.float16, torch.bfloat16):
        return sigma
    low, high = (to_sigma(model, level * (1 + off * torch.finfo(dtype).eps)) for off in (-1, 1))
    return min((s for s in schedule if low < s < high), key=lambda s: abs(s - sigma), default=sigma)


def _check_range(schedule: Sequence[float] | None, sigma: float) -> None:
    """Raise RunError for a noise level far above the schedule. Below its last one eta > 1 may lead."""
    if schedule and sigma > _CHURN * max(schedule):  # a pipeline's may rise
        raise RunError(
            f"the model was asked at sigma={sigma:.4g}; expected a level of the run's schedule, {schedule[0]:.4g} to "
            f"{schedule[-1]:.4g}.\n  sigmas= is the schedule that the sampler gets: leave it out with this library's "
            "samplers, which tell their own."
        )


def _one_level(sigma: tuple[float, float]) -> float:
    low, high = sigma
    if not (low >= 0 and math.isfinite(high)):
        raise RunError(f"sigma is {low if low == high else (low, high)}; expected a noise level >= 0, finite.")
    if high - low > SAME_SIGMA * high:
        raise RunError(f"sigma runs from {low} to {high} within one call; a lock needs one noise level per call.")
    return high


def _ratios(settings: LockSettings, state: State, reads: HostReads) -> Scalar:
    """Check the lock and the composite weight that the policy decided before; return the weight in force."""
    policy, weight = settings.policy, settings.composite if state.composite is None else state.composite
    reads.together(state.lock, weight)
    unlockable = settings.source is None or not policy.may_lock
    for name, value, barred in (("lock", state.lock, unlockable), ("composite", weight, settings.source is None)):
        low, high = reads.range(value)
        check_ratio(policy, name, low, high)
        if high > 0 and barred and name == "lock" and settings.source is not None:
            raise PolicyError(f"{policy!r} returned lock {high:.3g}, but its may_lock is False; let it be True.")
        if high > 0 and barred:
            raise nothing_to_lock_to(policy, name, high)
    return weight
