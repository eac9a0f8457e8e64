"""check_estimator: made-up runs that test an estimator against the contract of `Estimator`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from ..variance import Estimator
from ._contract import check_settings, checked_step, name_of, same

STEPS = 12
"""Evaluations in a test run, from sigma 8 down to 0.05."""

SHAPE = (4, 2, 4, 4)
"""Channels, time, height, width of the test run's latents: patches of 1 or 2 fit."""

_MEMORY = "All memory must be in the state; random draws come from a generator seeded by settings and state."


class CheckModel(nn.Module):
    """A small smooth denoiser with numbered blocks, for estimators that change the model."""

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
    """Check that an estimator keeps the contract of `Estimator`, on made-up runs of a small smooth denoiser.

    It checks frozen settings, a readable repr, `cost` and `default_threshold`; shape, dtype, device and range of every
    variance, for float32, float64 and bfloat16 latents, with and without a mask (with `needs_background`, that it
    raises without); that an answer repeats and nothing is changed in place; that a restored state replays; that a clip
    gets the same alone as in a batch, up to rounding; and that evaluations are as many as `cost`.

    Args:
        estimator: The estimator.
        batch: Clips per run; at least 2, or clips are not compared. Defaults to 3.
        seed: Seed of latents and noise. Defaults to 0.
        device: Where the latents are. Defaults to the CPU.

    Raises:
        EstimatorError: With the estimator, what was given, what was expected, and what to do.
    """
    _check_object(estimator)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = CheckModel().to(device, dtype)
        bound = estimator.bound(model.modules())
        if not isinstance(bound, Estimator):
            raise EstimatorError(f"{name_of(estimator)}.bound returned {bound!r}; expected an estimator: return self.")
        for masked in (True, False):
            run = _Run(bound, model, batch, seed, masked, dtype, device)
            if not masked and bound.needs_background:
                run.check_refusal()
                continue
            states, variances = run.play(bound.init(), 0)
            run.check_cost(variances)
            run.check_rewind(states, variances)
            run.check_clips(variances)


class _Run:
    """One falling run of the small denoiser, measured by the estimator."""

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
        self.estimator, self.model, self.batch, self.name = estimator, model, batch, name_of(estimator)
        generator = torch.Generator().manual_seed(seed)
        x0, noise = torch.randn(2, batch, *SHAPE, generator=generator)
        mask = (torch.rand(batch, 1, *SHAPE[1:], generator=generator) > 0.4).float()
        # Every clip has an edited part and, in patches of up to 2, background.
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
                    f"{self.name}.step probed {tuple(at.shape)} for latents of shape {tuple(x.shape)}; "
                    "expected rows in a multiple of the batch, as x.repeat(k, 1, 1, 1, 1) makes them."
                )
            self.counts[index] += len(at)
            return self.model(at, level)

        denoised = self.predictions[index][rows].clone()
        return Evaluation(sigma, x.clone(), denoised, mask, probe, uncond=0.9 * denoised + 0.05, source=0.8 * denoised)

    def play(self, state: Any, first: int, clip: int | None = None) -> tuple[list[Any], list[Tensor | None]]:
        """All states, including the given one, and all variances from step `first` on; every call is checked."""
        states, variances = [state], []
        for index in range(first, STEPS):
            given = self.evaluation(index, clip)
            state, variance = checked_step(
                self._attempt,
                state,
                given,
                lambda variance, given=given: self._check_variance(variance, given),  # type: ignore[misc]
                EstimatorError,
                who=f"{self.name}.step",
                seen="evaluation",
                pair="(state, variance)",
                hint=_MEMORY,
            )
            states.append(state)
            variances.append(variance)
        return states, variances

    def check_refusal(self) -> None:
        """An estimator that needs a background must raise without a mask."""
        try:
            self.estimator.step(self.estimator.init(), self.evaluation(0))
        except EstimatorError:
            return
        raise EstimatorError(
            f"{self.name}.needs_background is True, and step accepted an evaluation without a mask; expected "
            "an EstimatorError.\n  Let needs_background be False, or raise where evaluation.mask is None."
        )

    def check_cost(self, variances: list[Tensor | None]) -> None:
        """Compare the declared evaluations per clip and measurement with those counted; every step was called twice."""
        name, counted = self.name, [c / self.batch / 2 for c in self.counts]
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
        """A restored state must continue as before."""
        for index in (1, STEPS // 2):
            if not same(self.play(states[index], index)[1], variances[index:]):
                raise EstimatorError(
                    f"{self.name}.step answered otherwise when the state of sigma={self.sigmas[index]:.3g} "
                    f"was restored, expected the same.\n  Samplers reject steps and go back. {_MEMORY}"
                )

    def check_clips(self, variances: list[Tensor | None]) -> None:
        """Every clip must get the same alone as in the batch."""
        half = self.points[0].dtype == torch.bfloat16
        loose = 1e-5 if self.estimator.cost == 0 else 0.05 if half else 1e-3
        for clip in range(self.batch):
            for index, alone in enumerate(self.play(self.estimator.init(), 0, clip)[1]):
                batched = variances[index]
                together = None if batched is None else batched[clip : clip + 1]
                if together is None or alone is None:
                    agree = together is None and alone is None
                else:
                    agree = alone.shape == together.shape
                    agree = agree and torch.allclose(alone, together, rtol=loose, atol=loose / 10)
                if not agree:
                    shown = [None if v is None else v.flatten()[:4].tolist() for v in (alone, together)]
                    raise EstimatorError(
                        f"{self.name}.step gave clip {clip} {shown[0]} alone and {shown[1]} in a batch of "
                        f"{self.batch}, at sigma={self.sigmas[index]:.3g}; expected the same.\n"
                        "  Clips are independent: reduce over dimensions 1 and up only, and draw noise per clip or "
                        "once for all, never over the whole batch."
                    )

    def _attempt(self, state: Any, given: Evaluation) -> Any:
        try:
            with torch.no_grad():
                return self.estimator.step(state, given)
        except EstimatorError:
            raise
        except Exception as error:
            raise EstimatorError(
                f"{self.name}.step raised {type(error).__name__}: {error}\n  It was given latents of shape "
                f"{tuple(given.x.shape)}, {given.x.dtype}, and {'no mask' if given.mask is None else 'a mask'}."
            ) from error

    def _check_variance(self, variance: Any, given: Evaluation) -> None:
        if variance is None:
            return
        who, rows = f"{self.name}.step returned", len(given.x)
        if not isinstance(variance, Tensor):
            raise EstimatorError(f"{who} {variance!r}; expected a tensor of shape (batch,) = ({rows},), or None.")
        if variance.ndim not in (1, 2) or len(variance) != rows:
            raise EstimatorError(
                f"{who} a variance of shape {tuple(variance.shape)}; expected (batch,) = ({rows},) or (batch, "
                "tokens).\n  Reduce over everything but the clips: masked_mean(squares, evaluation.mask)."
            )
        if not variance.is_floating_point() or torch.finfo(variance.dtype).bits < 32:
            raise EstimatorError(
                f"{who} {variance.dtype} for latents in {given.x.dtype}; expected float32 or float64, because sums of "
                "squares in less precision lose small ones.\n  Use masked_mean, or begin with values.float()."
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
    check_settings(estimator, EstimatorError)
    if not (isinstance(estimator.cost, (int, float)) and 0 <= estimator.cost < math.inf):
        raise EstimatorError(f"{kind}.cost is {estimator.cost!r}; expected evaluations per clip and measurement, >= 0.")
    limit = estimator.default_threshold
    if not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise EstimatorError(f"{kind}.default_threshold is {limit!r}; expected the variance at risk 1, above 0.")
