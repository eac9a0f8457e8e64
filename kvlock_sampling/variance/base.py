"""The contract of an estimator: `init() -> state`, `step(state, evaluation) -> (state, variance or None)`.

Settings are frozen, state is a value. `step` sees falling sigma: where a sampler goes up, the lock restores a state.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from ..utils.fields import as_patch, check_seed, number
from ..utils.host import HostReads, check_prediction
from ..utils.precision import working

Patch = tuple[int, int, int] | Literal["model"]
"""Latents per token along (time, height, width); "model" for those of the model's locked layers."""


class Estimator(ABC):
    """Base of every estimator. Subclass it as `@dataclass(frozen=True)` and define `step`.

    A variance may have any unit: divided by its threshold it is risk. Every estimator raises EstimatorError for a
    setting out of range. `kvlock_sampling.testing.check_estimator` tests a subclass.

    Attributes:
        cost: Extra evaluations of the model per clip and measurement. Defaults to 0.
        default_threshold: Variance at risk 1 if no threshold is given, > 0. Defaults to 1.
        needs_source: Whether it needs the source's x0-hat: a lock without a source raises EstimatorError. The source is
            then evaluated also where the route does not, for one function evaluation more. Defaults to False.
        needs_uncond: Whether it needs the unconditional x0-hat where the lock guides by 1, too. Defaults to False.
        patch: Latents per token along (time, height, width) if it measures every token. Defaults to None.
    """

    cost: float = 0.0
    default_threshold: float = 1.0
    needs_source: bool = False
    needs_uncond: bool = False
    patch: Patch | None = None
    _error = EstimatorError

    def init(self) -> Any:
        """Return the state before the first evaluation. Defaults to None: no memory."""
        return None

    @abstractmethod
    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        """Measure at one evaluation of the model.

        Args:
            state: What `init` returned, or the step at a higher sigma. Build a new one; never change it in place.
            evaluation: Input, prediction and mask, and a way to evaluate the model again.

        Returns:
            The next state, and the variance: >= 0, float32 or float64, (batch,) or (batch, tokens); None if unknown.
        """

    def due(self, state: Any, sigma: float) -> bool:
        """Return whether the step at this noise level measures: if not, nothing that it needs is evaluated for it."""
        return True

    def effect(self, state: Any) -> Tensor | None:
        """Return the mean change that the edit makes, squared, in units of the variance and expandable to its shape.

        `state` is what `step` returned with the variance. Defaults to None: not measured.
        """
        return None

    def on_tokens(self, patch: tuple[int, int, int]) -> "Estimator":
        """Return the estimator for a model of this patch: it takes the place of "model". The lock calls it once."""
        if self.patch != "model":
            return self
        found = copy.copy(self)
        object.__setattr__(found, "patch", patch)  # a class may name it without a field
        return found

    def bound(self, modules: Iterable[nn.Module]) -> "Estimator":
        """Return the estimator for a model with these modules, outermost first. The lock calls it once."""
        return self


def measure(estimator: Estimator, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None, Tensor | None]:
    """Measure once: the next state, the variance, and the effect if there is one. Raises EstimatorError if it breaks
    its contract, and RunError if the prediction is not finite; on a device, values are left to the next transfer.
    """
    with torch.no_grad():
        result = estimator.step(state, evaluation)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise EstimatorError(
            f"{type(estimator).__name__}.step returned {type(result).__name__}; expected (state, variance).\n"
            "  While nothing is known: return state, None."
        )
    state, variance = result
    effect = None if variance is None else estimator.effect(state)
    for name, value in (("variance", variance), ("effect", effect)):
        if value is None:
            continue
        check_shape(estimator, value, len(evaluation.x), name)
        if HostReads.free(value):
            check_prediction(reads := HostReads(), evaluation.sigma, evaluation.denoised)
            check_variance(estimator, reads, value, name)
    return state, variance, effect


def check_shape(estimator: Estimator, value: Any, batch: int, name: str = "variance") -> None:
    """Raise EstimatorError unless a variance or an effect is a floating tensor of one row per clip."""
    shape, most = tuple(getattr(value, "shape", ())), 2 if estimator.patch is None else 3
    if not (isinstance(value, Tensor) and value.is_floating_point() and shape[:1] == (batch,) and len(shape) < most):
        given = f"of {value.dtype} and shape {shape}" if isinstance(value, Tensor) else f"that is {value!r}"
        raise EstimatorError(
            f"{estimator!r} returned a {name} {given}; expected a floating tensor of shape (batch,) = ({batch},) or "
            "with patch= (batch, tokens), e.g. masked_mean(squares, evaluation.mask), or None while nothing is known."
        )


def check_variance(estimator: Estimator, reads: HostReads, value: Tensor, name: str = "variance") -> None:
    """Raise EstimatorError if a variance or an effect is negative, infinite or NaN."""
    low, high = reads.range(value)
    if not (low >= 0 and high < math.inf):
        raise EstimatorError(
            f"{estimator!r} returned a {name} from {low:.4g} to {high:.4g}; expected finite numbers >= 0.\n"
            "  While nothing is known: return state, None."
        )


def masked_mean(values: Float[Tensor, "batch *axes"], mask: Tensor | None) -> Float[Tensor, "batch"]:
    """Return the mean of each clip in float32 or better. `mask` holds weights; None weighs all alike."""
    values = working(values)
    if mask is None:
        return values.flatten(1).mean(1)
    weight = torch.broadcast_to(mask, values.shape).to(values.dtype).flatten(1)
    return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1e-12)


def pooled(values: Float[Tensor, "batch *axes"], mask: Tensor | None, patch: Patch | None) -> Tensor:
    """Average per clip over the mask, or per token, edited or not, in the order (t, h, w) if there is a patch."""
    if patch is None:
        return masked_mean(values, mask)
    values, (t, h, w) = on_grid(values, patch)
    return reduce(working(values), "b c (t p) (h q) (w r) -> b (t h w)", "mean", p=t, q=h, r=w)


def on_grid(values: Tensor, patch: Patch) -> tuple[Tensor, tuple[int, int, int]]:
    """Return latents as (batch, channels, time, height, width), and their patch, of which whole ones fit.

    An image, (batch, channels, height, width), has one frame, and packed latents, (batch, tokens, channels), one row.
    """
    if patch == "model":
        raise EstimatorError(
            'patch="model", and no locked layers to take it from.\n'
            "  Give the latents per token along (time, height, width), e.g. patch=(1, 2, 2)."
        )
    grid, size = values, patch
    if values.ndim == 3:
        grid, size = values.mT[:, :, None, None], (1, 1, 1)
    elif values.ndim == 4:
        grid, size = values.unsqueeze(2), (1, *patch[1:])
    if grid.ndim != 5 or any(axis % p for axis, p in zip(grid.shape[2:], size, strict=True)):
        raise EstimatorError(
            f"latents of shape {tuple(values.shape)} do not divide into whole patches of {patch}; expected (batch, "
            "channels, time, height, width) and the model's patch, e.g. patch=(1, 2, 2). None measures clips."
        )
    return grid, size


def check_patch(estimator: Any) -> None:
    if estimator.patch is not None and estimator.patch != "model":
        object.__setattr__(estimator, "patch", as_patch(estimator.patch, EstimatorError))


@dataclass(frozen=True)
class ProbingEstimator(Estimator):
    """Base of estimators that evaluate the model again. The state counts and seeds the draws: a rewound run repeats."""

    passes: int = 1
    seed: int = 0

    default_threshold = 0.01
    """What calm clips of the embedded model stay below from sigma 1.5 down, in latent units squared."""

    cost = property(lambda self: float(self.passes))

    def __post_init__(self) -> None:
        number(self, "passes", at_least=1, whole=True)
        object.__setattr__(self, "seed", check_seed(self.seed, EstimatorError))
        check_patch(self)

    def init(self) -> Any:
        return 0


def generator(seed: int, count: int, device: torch.device | str = "cpu") -> torch.Generator:
    # The salt makes a draw differ from manual_seed(0), manual_seed(1), ..., from which runs often start.
    return torch.Generator(device).manual_seed((seed * 1_000_003 + count + 0x70726F6265) % 2**63)


def draw(kind: Literal["normal", "signs"], passes: int, like: Tensor, seed: int, count: int) -> Tensor:
    """Draw unit noise or +1 and -1 for `passes` copies of `like`, the same for every clip, (passes * batch, ...)."""
    shape = (passes, 1, *like.shape[1:])
    values = torch.randn(shape, generator=generator(seed, count, like.device), device=like.device, dtype=torch.float32)
    values = values if kind == "normal" else torch.where(values < 0, -1.0, 1.0)
    return values.expand(passes, *like.shape).reshape(passes * len(like), *like.shape[1:])
