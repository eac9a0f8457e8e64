"""Search: several seeds of one edit under one lock, the weak ones stopped at chosen noise levels.

Starts are the rows of one run of the sampler, and each is evaluated alone, under a block of its own: memory is that of
one edit, and what finishes equals its run alone. A row that stopped keeps its last prediction and costs nothing. With a
filled KV cache and a fifth of the tokens edited, four seeds of which three stop half way cost 0.52 of one unlocked edit
in token-passes. Measured in benchmarks/seeds.py.
"""

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from math import isnan
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d

from . import samplers
from .lock import KVLock
from .schedules import check_sigmas
from .trace import Trace
from .types import SAME_SIGMA, RunError
from .utils.denoiser import DenoiserProxy
from .utils.fields import check_number
from .utils.precision import working

Judge = Callable[[Tensor, Trace], float]
"""(x0-hat (1, ...), the trace so far) -> a score, higher is better."""


class Searched(NamedTuple):
    """What a search found.

    Attributes:
        x: The finished edits, the best first, (keep, ...).
        chosen: Their rows in the starts.
        candidates: The last prediction of every row, finished or stopped, (starts, ...).
        scores: By noise level, the score of each row that was judged there; NaN for one that had stopped.
        traces: One per row.
        nfe: Function evaluations of all rows together.
    """

    x: Tensor
    chosen: list[int]
    candidates: Tensor
    scores: dict[float, Tensor]
    traces: list[Trace]

    @property
    def nfe(self) -> int:
        return sum(trace.nfe for trace in self.traces)


def calm(denoised: Tensor, trace: Trace) -> float:
    """The lock's own measurement, negated: the least uncertain prediction is the best.

    Raises:
        RunError: The lock measures nothing.
    """
    if not (measured := [step.variance for step in trace.steps if torch.isfinite(step.variance).all()]):
        raise RunError(
            "the lock measured nothing to judge seeds by. Give judge=, a function of (x0-hat, trace), or a policy that "
            "measures, e.g. KVLock(..., policy=kv.PID(kp=0.0, ki=0.0, bias=1.0)) for a full lock."
        )
    return -float(measured[-1].mean())


def seam(lock: KVLock) -> Judge:
    """Judge by the mask's border: how little the prediction differs from the source just inside it (mean square, < 0).

    Of four seeds that stop half way it finds one that is 0.47 ± 0.06 dB better than chance at full lock, 75% of what is
    possible, and 0.67 ± 0.04 dB under `release`, where 2.8 ± 0.7 more of 100 edits are right; variance, guidance gap
    and divergence find at most 0.14 dB (benchmarks/seeds.py). With a log-likelihood of your own, which finds more edits
    that are right: `lambda x0_hat, trace: mine(x0_hat) - log(-border(x0_hat, trace))`, where border = seam(lock).

    Args:
        lock: A lock with a source, whose latents have height and width.
    """
    source, mask = lock.settings.source, lock.settings.mask
    if source is None or mask is None:
        raise RunError("seam judges against a source; this lock has none. Give judge=, a function of (x0-hat, trace).")

    def judge(denoised: Tensor, trace: Trace) -> float:
        denoised = working(denoised)
        region = mask.latent(denoised).expand(-1, 1, *denoised.shape[2:])
        kept = max_pool2d((1 - region).reshape(-1, 1, *region.shape[-2:]), 3, 1, 1).reshape(region.shape)
        gap = (denoised - source.matching(denoised)).square().mean(1, keepdim=True)
        return -float((gap * kept * region).sum() / (kept * region).sum())

    if isnan(judge(source.latents, Trace())):
        raise RunError("this mask has no border to judge by. Give judge=, a function of (x0-hat, trace).")
    return judge


def search(
    lock: KVLock,
    sampler: Any,
    x: Tensor,
    sigmas: Tensor,
    *,
    judge: Judge | None = None,
    keep: int = 1,
    at: Mapping[float, int] | None = None,
    extra_args: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Searched:
    """Sample one edit from several starts, and finish the best.

    Args:
        lock: A lock on one clip. A `KVCache` with noise="fixed" lets one source pass serve every start.
        sampler: A sampler's name or function. Its steps must not depend on other rows.
        x: The starts, (starts, ...), two or more.
        sigmas: The schedule.
        judge: Scores a prediction; see `Judge`. Default: `seam`; `calm` without a source, or for packed latents.
        keep: How many finish, >= 1.
        at: How many go on from each noise level. Default: `keep` from half of the steps.
        extra_args: Of one clip; every start gets them.
        arguments: Other arguments of `samplers.run`, e.g. seed, one per start.

    Raises:
        RunError: The numbers do not fit each other, the lock is on several clips, or the sampler is dpm_adaptive.
    """
    if not isinstance(lock, KVLock):
        call = "search(KVLock(model, source=..., mask=...), 'euler', x, sigmas)"
        raise RunError(f"search got a {type(lock).__name__}; expected a lock: {call}")
    source, starts = lock.settings.source, len(x)
    if samplers.is_adaptive(sampler):
        raise RunError("dpm_adaptive chooses its steps for all seeds together; expected another: kvlock samplers.")
    check_number("keep", keep, RunError, at_least=1, at_most=starts, whole=True)
    if starts < 2 or (source is not None and len(source.latents) != 1):
        clips = 0 if source is None else len(source.latents)
        raise RunError(f"search got {starts} starts for {clips} clips; expected two or more starts of one clip.")
    if at is not None and not (isinstance(at, Mapping) and all(isinstance(level, Real | Tensor) for level in at)):
        raise RunError(f"at={at!r}; expected how many go on from each noise level, e.g. at={{2.0: 2, 0.5: 1}}.")
    levels = [float(level) for level in check_sigmas(sigmas) if level > 0]
    plan = {levels[len(levels) // 2]: keep} if at is None else {float(level): count for level, count in at.items()}
    for level, count in plan.items():
        check_number("at", count, RunError, f" {level:g} is where so many go on.", at_least=keep, whole=True)
        low, high = min(levels) * (1 - SAME_SIGMA), max(levels) * (1 + SAME_SIGMA)
        check_number("at", level, RunError, " A noise level of the schedule.", at_least=low, at_most=high)
    counts = [plan[level] for level in sorted(plan, reverse=True)]
    if counts != sorted(counts, reverse=True):
        raise RunError(f"at={at!r}; expected no more to go on from a lower level: at={{2.0: 2, 0.5: 1}}.")
    if not (judge is None or callable(judge)):
        raise RunError(f"judge={judge!r}; expected a function of (x0-hat, trace): lambda x0_hat, trace: ...")
    if judge is None:
        judge = calm if source is None or source.latents.ndim < 4 else seam(lock)
        if judge is calm and not lock.settings.policy.uses_risk:
            calm(x, Trace())  # raises
    with ExitStack() as blocks:
        rows = _Rows(lock, starts, judge, plan, blocks)
        out = samplers.run(sampler, rows, x, sigmas, extra_args=extra_args, **arguments)
        last = rows.select(0.0, keep)
    candidates = last.to(out.dtype).index_copy(0, torch.tensor(rows.going, device=last.device), out[rows.going])
    return Searched(out[rows.going], rows.going, candidates, rows.scores, [each.trace for each in rows.locks])


class _Rows(DenoiserProxy):
    """The denoiser of a search: every row under its own block of the lock, and those that go on."""

    def __init__(self, lock: KVLock, starts: int, judge: Judge, plan: Mapping[float, int], blocks: ExitStack) -> None:
        self.model, self.judge = lock.model, judge
        self.locks = [blocks.enter_context(copy.copy(lock)) for _ in range(starts)]
        self.going = list(range(starts))
        self.scores: dict[float, Tensor] = {}
        self._plan = dict(sorted(plan.items(), reverse=True))
        self._denoised: Tensor | None = None

    def on_schedule(self, sigmas: Tensor) -> None:
        for lock in self.locks:
            lock.on_schedule(sigmas)

    def __call__(self, x: Tensor, sigma: Tensor, **extra_args: Any) -> Tensor:
        if self._denoised is not None and self._plan:  # else the noise level need not be read
            level = float(torch.as_tensor(sigma).max())
            for at in [at for at in self._plan if level <= at * (1 + SAME_SIGMA)]:
                self.select(at, self._plan.pop(at))
        denoised = torch.zeros_like(x) if self._denoised is None else self._denoised.to(x.dtype, copy=True)
        sigma = torch.as_tensor(sigma, device=x.device).expand(len(x))
        for row in self.going:
            denoised[row] = self.locks[row](x[row : row + 1], sigma[row : row + 1], **extra_args)[0]
        self._denoised = denoised
        return denoised

    def select(self, level: float, count: int) -> Tensor:
        """Judge the rows that go on by their last predictions, which are returned; the best `count` of them go on."""
        assert self._denoised is not None
        found = torch.full((len(self.locks),), float("nan"))
        for row in self.going:
            score = self.judge(self._denoised[row : row + 1].clone(), self.locks[row].trace)
            found[row] = float("nan" if score is None else score)
            if not found[row].isfinite():
                raise RunError(f"the judge gave start {row} {score}; expected a finite number, more for better.")
        self.scores[level] = found
        self.going = sorted(self.going, key=lambda row: (-float(found[row]), row))[:count]
        return self._denoised
