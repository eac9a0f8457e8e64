"""check_estimator: a made-up run that asks an estimator everything the contract of `Estimator` promises."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from ..variance import Estimator
from .policy import _same

STEPS = 12
"""Evaluations in a test run, from sigma 8 down to 0.05."""

SHAPE = (4, 2, 4, 4)
"""Channels, time, height, width of the test run's latents: patches of 1 or 2 fit."""

_MEMORY = "All memory must be in the state; random draws come from a generator seeded by settings and state."


class CheckModel(nn.Module):
    """A small smooth denoiser with numbered blocks, as estimators that change the model expect one."""

    def __init__(self, channels: int = SHAPE[0]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        blocks = []
        for _ in range(2):
            ffn = nn.Sequential(nn.Linear(channels, 16), nn.Tanh(), nn.Linear(16, channels))
            for parameter in ffn.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
            blocks.append(nn.ModuleDict({"ffn": ffn}))
        self.blocks = nn.ModuleList(blocks)
        self.requires_grad_(False)

    def forward(self, x: Tensor, sigma: Tensor | float, **extra: Any) -> Tensor:
        sigma = torch.as_tensor(sigma).to(x).reshape(-1, *[1] * (x.ndim - 1))
        hidden = (x / (1 + sigma.square()).sqrt()).movedim(1, -1)
        for block in self.blocks:
            hidden = hidden + block["ffn"](hidden)  # type: ignore[index]
        return (x + 0.5 * sigma.square() * hidden.movedim(-1, 1)) / (1 + sigma.square())


def check_estimator(estimator: Estimator, *, batch: int = 3, seed: int = 0, device: str | torch.device = "cpu") -> None:
    """Checks that an estimator keeps the contract of `Estimator`, on made-up runs of a small smooth denoiser.

    estimator: without per-clip `seeds`. batch: clips per run, >= 2 for the check of independence to mean anything.
    Checked: frozen settings, a readable repr, cost and default_threshold; shape, dtype, device and range of every
    variance, for float32, float64 and bfloat16 latents, with a mask and without (or, with `needs_background`, refused
    without); the same answer to the same call, nothing changed in place; a restored state replays; a clip gets the same
    alone as in a batch, to rounding; evaluations are as many as `cost` says.
    Raises EstimatorError naming the estimator, what was given, what was expected, and what to do.
    """
    _check_object(estimator)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = CheckModel().to(device, dtype)
        bound = estimator.bound(model.modules())
        if not isinstance(bound, Estimator):
            raise EstimatorError(f"{_name(estimator)}.bound returned {bound!r}; expected an estimator: return self.")
        for masked in (True, False):
            if not masked and bound.needs_background:
                _Run(bound, model, batch, seed, masked, dtype, device).check_refusal()
                continue
            run = _Run(bound, model, batch, seed, masked, dtype, device)
            states, variances = run.play(bound.init(), 0)
            run.check_cost(variances)
            run.check_rewind(states, variances)
            run.check_clips(variances)


class _Run:
    """One falling run of the small denoiser, and what the estimator says of it."""

    def __init__(
        self,
        estimator: Estimator,
        model: nn.Module,
        batch: int,
        seed: int,
        masked: bool,
        dtype: torch.dtype,
        device: str | torch.device,
    ) -> None:
        self.estimator, self.model, self.batch = estimator, model, batch
        generator = torch.Generator().manual_seed(seed)
        x0, noise = torch.randn(2, batch, *SHAPE, generator=generator)
        mask = (torch.rand(batch, 1, *SHAPE[1:], generator=generator) > 0.4).float()
        # Every clip has something edited and, in patches of up to 2, something kept.
        mask[..., 0, 0], mask[..., -2:, -2:] = 1, 0
        self.mask = mask.to(device, dtype) if masked else None
        self.sigmas = torch.linspace(math.log(8.0), math.log(0.05), STEPS).exp().tolist()
        self.points = [(x0 + s * noise).to(device, dtype) for s in self.sigmas]
        with torch.no_grad():
            self.predictions = [model(x, s) for x, s in zip(self.points, self.sigmas, strict=True)]
        self.counts = [0] * STEPS  # rows evaluated at each step of the last play

    def evaluation(self, index: int, clip: int | None = None) -> Evaluation:
        """The index-th evaluation of the run, of all clips or of one."""
        rows = slice(None) if clip is None else slice(clip, clip + 1)
        x, sigma, mask = self.points[index][rows], self.sigmas[index], self.mask
        if mask is not None:
            mask = mask[rows].clone()

        def probe(at: Tensor, level: float) -> Tensor:
            if len(at) % len(x) or at.shape[1:] != x.shape[1:]:
                raise EstimatorError(
                    f"{_name(self.estimator)}.step probed {tuple(at.shape)} for latents of shape {tuple(x.shape)}; "
                    "expected rows in a multiple of the batch, as x.repeat(k, 1, 1, 1, 1) makes them."
                )
            self.counts[index] += len(at)
            return self.model(at, level)

        denoised = self.predictions[index][rows].clone()
        return Evaluation(sigma, x.clone(), denoised, mask, probe, uncond=0.9 * denoised + 0.05)

    def play(self, state: Any, first: int, clip: int | None = None) -> tuple[list[Any], list[Tensor | None]]:
        """All states, the given one included, and all variances from step `first` on; every call is checked."""
        states, variances = [state], []
        for index in range(first, STEPS):
            state, variance = self._call(state, index, clip)
            states.append(state)
            variances.append(variance)
        return states, variances

    def check_refusal(self) -> None:
        """An estimator that needs a background says so where there is none."""
        try:
            self.estimator.step(self.estimator.init(), self.evaluation(0))
        except EstimatorError:
            return
        raise EstimatorError(
            f"{_name(self.estimator)}.needs_background is True, and step took an evaluation without a mask; expected "
            "an EstimatorError.\n  Let needs_background be False, or raise where evaluation.mask is None."
        )

    def check_cost(self, variances: list[Tensor | None]) -> None:
        """Declared evaluations per clip and measurement against those counted. `_call` asks everything twice."""
        name, counted = _name(self.estimator), [c / self.batch / 2 for c in self.counts]
        if all(v is None for v in variances):
            raise EstimatorError(
                f"{name}.step returned None at all {STEPS} evaluations of a run from sigma {self.sigmas[0]:.3g} down "
                f"to {self.sigmas[-1]:.3g}; expected a variance at some of them."
            )
        if max(counted) != self.estimator.cost:
            raise EstimatorError(
                f"{name} evaluated the model {max(counted):g} times per clip in one measurement, but its cost is "
                f"{self.estimator.cost:g}; expected the same.\n"
                "  Let cost return the most evaluations a step makes: users plan their time by it."
            )

    def check_rewind(self, states: list[Any], variances: list[Tensor | None]) -> None:
        """A state from before continues as it did."""
        for index in (1, STEPS // 2):
            if not _same(self.play(states[index], index)[1], variances[index:]):
                raise EstimatorError(
                    f"{_name(self.estimator)}.step answered otherwise when the state of sigma={self.sigmas[index]:.3g} "
                    f"was restored, expected the same.\n  Samplers reject steps and go back. {_MEMORY}"
                )

    def check_clips(self, variances: list[Tensor | None]) -> None:
        """Every clip alone as in the batch."""
        half = self.points[0].dtype == torch.bfloat16
        loose = 1e-5 if self.estimator.cost == 0 else 0.05 if half else 1e-3
        for clip in range(self.batch):
            for index, alone in enumerate(self.play(self.estimator.init(), 0, clip)[1]):
                together = variances[index]
                if together is None or alone is None:
                    agree = together is None and alone is None
                else:
                    agree = alone.shape == together[clip : clip + 1].shape
                    agree = agree and torch.allclose(alone, together[clip : clip + 1], rtol=loose, atol=loose / 10)
                if not agree:
                    shown = None if together is None else together[clip : clip + 1].flatten()[:4].tolist()
                    raise EstimatorError(
                        f"{_name(self.estimator)}.step gave clip {clip} "
                        f"{None if alone is None else alone.flatten()[:4].tolist()} alone and {shown} in a batch of "
                        f"{self.batch}, at sigma={self.sigmas[index]:.3g}; expected the same.\n"
                        "  Clips are independent: reduce over dimensions 1 and up only, and draw noise per clip or "
                        "once for all, never over the whole batch."
                    )

    def _call(self, state: Any, index: int, clip: int | None) -> tuple[Any, Tensor | None]:
        given = self.evaluation(index, clip)
        before = copy.deepcopy((state, _tensors(given)))
        answer = self._attempt(state, given)
        if not isinstance(answer, tuple) or len(answer) != 2:
            raise EstimatorError(
                f"{_name(self.estimator)}.step returned {type(answer).__name__}; expected (state, variance): "
                "return state, variance"
            )
        new, variance = answer
        self._check_variance(variance, given)
        kept = copy.deepcopy((new, variance))
        for what, was, now in (("state", before[0], state), ("evaluation", before[1], _tensors(given))):
            if not _same(was, now):
                raise EstimatorError(
                    f"{_name(self.estimator)}.step changed the {what} it was given; expected it untouched.\n"
                    "  Build new tensors (x + 1, torch.where) instead of x += 1, x.add_(1) or x[i] = 1."
                )
        if not _same(kept, self._attempt(state, given)):
            raise EstimatorError(
                f"{_name(self.estimator)}.step gave two answers to one question at sigma={given.sigma:.3g}, expected "
                f"one.\n  {_MEMORY}"
            )
        return new, variance

    def _attempt(self, state: Any, given: Evaluation) -> Any:
        try:
            with torch.no_grad():
                return self.estimator.step(state, given)
        except EstimatorError:
            raise
        except Exception as error:
            raise EstimatorError(
                f"{_name(self.estimator)}.step raised {type(error).__name__}: {error}\n  It was given latents of shape "
                f"{tuple(given.x.shape)}, {given.x.dtype}, and {'no mask' if given.mask is None else 'a mask'}."
            ) from error

    def _check_variance(self, variance: Any, given: Evaluation) -> None:
        if variance is None:
            return
        who, rows = f"{_name(self.estimator)}.step returned", len(given.x)
        if not isinstance(variance, Tensor):
            raise EstimatorError(f"{who} {variance!r}; expected a tensor of shape (batch,) = ({rows},), or None.")
        if variance.ndim not in (1, 2) or len(variance) != rows:
            raise EstimatorError(
                f"{who} a variance of shape {tuple(variance.shape)}; expected (batch,) = ({rows},) or (batch, "
                "tokens).\n  Reduce over everything but the clips: masked_mean(squares, evaluation.mask)."
            )
        if not variance.is_floating_point() or torch.finfo(variance.dtype).bits < 32:
            raise EstimatorError(
                f"{who} {variance.dtype} for latents in {given.x.dtype}; expected float32 or float64: sums of squares "
                "in less lose the small ones.\n  masked_mean does it right, or begin with values.float()."
            )
        if variance.device != given.x.device:
            raise EstimatorError(f"{who} a tensor on {variance.device} for latents on {given.x.device}.")
        if not variance.isfinite().all() or variance.min() < 0:
            raise EstimatorError(
                f"{who} {variance.flatten()[:4].tolist()} at sigma={given.sigma:.3g}; expected finite numbers >= 0.\n"
                "  Guard what divides (clamp_min(1e-12)), and return None while nothing is known."
            )


def _check_object(estimator: Any) -> None:
    kind = type(estimator).__name__
    if not isinstance(estimator, Estimator):
        raise EstimatorError(f"{estimator!r} is not an Estimator; expected an instance of a class X(Estimator).")
    params = getattr(type(estimator), "__dataclass_params__", None)
    if params is None or not params.frozen:
        raise EstimatorError(
            f"{kind} can be changed after it was made; expected frozen settings: it serves many runs.\n"
            f"  Write @dataclass(frozen=True) over class {kind}, and keep memory in the state that step returns."
        )
    if " object at 0x" in repr(estimator):
        raise EstimatorError(f"{estimator!r} does not show its settings; expected {kind}(...), as a dataclass prints.")
    if not (isinstance(estimator.cost, (int, float)) and 0 <= estimator.cost < math.inf):
        raise EstimatorError(f"{kind}.cost is {estimator.cost!r}; expected evaluations per clip and measurement, >= 0.")
    limit = estimator.default_threshold
    if not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise EstimatorError(f"{kind}.default_threshold is {limit!r}; expected the variance at risk 1, above 0.")


def _tensors(given: Evaluation) -> tuple[Any, ...]:
    return given.x, given.denoised, given.mask, given.uncond


def _name(estimator: Estimator) -> str:
    return type(estimator).__name__
