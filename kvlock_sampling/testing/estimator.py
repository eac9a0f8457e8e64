"""check_estimator: made-up runs that test an estimator against the contract of `Estimator`."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import check_points, per_row
from ..types import EstimatorError, Evaluation
from ..utils.host import HostReads
from ..variance import Estimator
from ..variance.base import check_shape, check_variance
from ._contract import Contract, one_clip, rows

STEPS = 12
SHAPE = (4, 2, 4, 4)  # channels, time, height, width: patches of 1 or 2 fit


class CheckModel(nn.Module):
    """A small smooth denoiser with numbered blocks, for estimators that change the model."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        layers = [nn.Sequential(nn.Linear(SHAPE[0], 16), nn.Tanh(), nn.Linear(16, SHAPE[0])) for _ in range(2)]
        self.blocks = nn.ModuleList(nn.ModuleDict({"ffn": layer}) for layer in layers).requires_grad_(False)
        for parameter in self.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cpu") * 0.3)

    def forward(self, x: Tensor, sigma: Tensor | float, clips: Sequence[int] = (0,)) -> Tensor:
        """Predict for rows of these clips, in turn, each of which has a condition of its own."""
        own = per_row(torch.tensor(clips).repeat(len(x) // len(clips)).to(x), x)
        sigma = per_row(torch.as_tensor(sigma).to(x), x)
        hidden = (x / (1 + sigma.square()).sqrt()).movedim(1, -1)
        for block in self.blocks:
            hidden = hidden + block["ffn"](hidden)  # type: ignore[index]
        return (x + 0.5 * sigma.square() * (hidden.movedim(-1, 1) + own)) / (1 + sigma.square())


def check_estimator(estimator: Estimator, *, batch: int = 3, device: str | torch.device = "cpu") -> None:
    """Check that an estimator keeps the contract of `Estimator`, on made-up runs of a small smooth denoiser.

    It checks the settings, `cost`, `default_threshold`; shape, dtype, device and range of every variance and effect,
    for float32, float64 and bfloat16 latents, with and without a mask; that a step repeats, changes nothing in place
    and replays from a restored state; and that a clip gets the same alone as in a batch, up to rounding.

    Args:
        estimator: The estimator.
        batch: Clips per run; at least 2, or clips are not compared. Defaults to 3.
        device: Where the latents are. Defaults to the CPU.

    Raises:
        EstimatorError: With the estimator, what was given, what was expected, and what to do.
    """
    if not isinstance(estimator, Estimator):
        raise EstimatorError(f"{estimator!r} is not an Estimator; expected an instance of a class X(Estimator).")
    contract = _contract(estimator)
    contract.check_settings()
    for field, least in (("cost", "evaluations per clip and measurement, >= 0"), ("default_threshold", "a number > 0")):
        value = getattr(estimator, field)
        if not (isinstance(value, (int, float)) and 0 <= value < math.inf and (value or field == "cost")):
            raise EstimatorError(f"{contract.name}.{field} is {value!r}; expected {least}.")
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        model = CheckModel().to(device, dtype)
        if not isinstance(bound := estimator.bound(model.modules()), Estimator):
            raise EstimatorError(f"{type(estimator).__name__}.bound returned {bound!r}; expected an estimator.")
        contract = _contract(bound := bound.on_tokens((1, 2, 2)))
        for masked in (True, False):
            counts: Counter[float] = Counter()
            with torch.no_grad():
                run = _evaluations(contract.checked, model, counts, batch, masked)
                states, variances = contract.play(bound.init(), run)
                effects = _effects(contract, run, states, variances)
                _check_cost(contract, variances, max(counts.values(), default=0) / batch / 2)  # every step runs twice
                contract.check_rewind(run, states, variances)
                _check_silence(contract, run, states, variances)
                _check_clips(contract, run, [*variances, *effects], model)


def _contract(estimator: Estimator) -> Contract:
    return Contract(estimator, EstimatorError, "evaluation", "variance", lambda v, e: _check_variance(estimator, v, e))


def _evaluations(estimator: Estimator, model: nn.Module, rows: Counter[float], batch: int, masked: bool) -> list[Any]:
    """A falling run of the model; `rows` counts the rows that are probed at each noise level."""
    generator, like = torch.Generator().manual_seed(0), next(model.parameters())
    x0, noise = torch.randn(2, batch, *SHAPE, generator=generator, device="cpu")
    mask = (torch.rand(batch, 1, *SHAPE[1:], generator=generator, device="cpu") > 0.4).to(like)
    # Every clip has an edited part and, in patches of up to 2, background.
    mask[..., 0, 0], mask[..., -2:, -2:] = 1, 0
    run = list[Evaluation]()
    for sigma in torch.linspace(math.log(8.0), math.log(0.05), STEPS).exp().tolist():

        def probe(at: Tensor, level: float, at_step: float = sigma) -> Tensor:
            check_points(at, x0)
            rows[at_step] += len(at)
            return model(at, level, range(batch))

        denoised = model(x := (x0 + sigma * noise).to(like), sigma, range(batch))
        # At a guidance of 1 it is not evaluated unless it is needed.
        uncond = 0.9 * denoised + 0.05 if len(run) % 4 < 3 or estimator.needs_uncond else None
        source = 0.8 * denoised if estimator.needs_source else None
        run.append(Evaluation(sigma, x, denoised, mask.clone() if masked else None, probe, uncond, source))
    return run


def _effects(contract: Contract, run: list[Any], states: list[Any], variances: list[Any]) -> list[Tensor | None]:
    """The effect beside each variance."""
    found = []
    for variance, state, given in zip(variances, states[1:], run, strict=True):
        found.append(effect := None if variance is None else contract.checked.effect(state))
        _check_variance(contract.checked, effect, given, "effect")
        if effect is not None and effect.shape not in (variance.shape, (len(variance), 1)):
            shapes = f"shape {tuple(effect.shape)}; expected that of the variance, {tuple(variance.shape)}"
            raise EstimatorError(f"{contract.name}.effect returned {shapes}.")
    return found


def _check_cost(contract: Contract, variances: list[Tensor | None], counted: float) -> None:
    if all(v is None for v in variances):
        raise EstimatorError(f"{contract.name}.step returned None at all {STEPS} evaluations; expected a variance.")
    if counted != contract.checked.cost:
        raise EstimatorError(
            f"{contract.name} evaluated the model {counted:g} times per clip in one measurement, but its cost is "
            f"{contract.checked.cost:g}; expected the most evaluations that a step makes."
        )


def _check_silence(contract: Contract, run: list[Any], states: list[Any], variances: list[Tensor | None]) -> None:
    """An estimator that falls silent at a guidance of 1 never speaks again: the control that asked for it holds."""
    spoken = [i for i, variance in enumerate(variances) if variance is not None and run[i].uncond is not None]
    answers = [contract.step(states[i], run[i]._replace(uncond=None))[1] for i in spoken[-1:]]
    if any(answer is None for answer in answers) and not contract.checked.needs_uncond:
        raise EstimatorError(
            f"{contract.name}.step returned None without evaluation.uncond, as it is at a guidance of 1; the last "
            "control then holds for ever.\n  Write needs_uncond = True in the class."
        )


def _check_clips(contract: Contract, run: list[Evaluation], answers: list[Tensor | None], model: nn.Module) -> None:
    """Every clip must get the same alone as in the batch, up to the rounding of the model."""
    loose = 1e-5 if contract.checked.cost == 0 else 0.05 if run[0].x.dtype == torch.bfloat16 else 1e-3
    for clip in range(batch := len(run[0].x)):
        alone = [one_clip(e, clip)._replace(probe=lambda at, level, clip=clip: model(at, level, [clip])) for e in run]
        states, singles = contract.play(contract.checked.init(), alone)
        singles = [*singles, *_effects(contract, alone, states, singles)]
        for e, single, together in zip([*run, *run], singles, answers, strict=True):
            mine, its = rows(single, slice(None)), rows(together, slice(clip, clip + 1))
            if mine.shape != its.shape or not torch.allclose(mine, its, rtol=loose, atol=loose / 10):
                raise EstimatorError(
                    f"{contract.name}.step gave clip {clip} {mine[:4].tolist()} alone and {its[:4].tolist()} in a "
                    f"batch of {batch}, at sigma={e.sigma:.3g}; expected the same.\n  Reduce over dimensions 1 and up "
                    "only, and draw noise per clip or once for all."
                )


def _check_variance(estimator: Estimator, value: Any, given: Evaluation, name: str = "variance") -> None:
    if value is None:
        return
    check_shape(estimator, value, len(given.x), name)
    if torch.finfo(value.dtype).bits < 32 or value.device != given.x.device:
        raise EstimatorError(
            f"{estimator!r} returned a {name} in {value.dtype} on {value.device} for latents in {given.x.dtype}; "
            f"expected float32 or float64 on {given.x.device}. Use masked_mean, or begin with values.float()."
        )
    check_variance(estimator, HostReads(), value, f"{name} at sigma={given.sigma:.3g}")
