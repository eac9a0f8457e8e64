"""Dropout variance: how much the prediction depends on units of the network that could have been otherwise.

    var = 1 / (K - 1) * sum_k |D_k(x, sigma) - mean|^2,   D_k the k-th thinned network (see `dropout_hooks.py`)
averaged over masked elements: Monte Carlo dropout, an estimate of epistemic uncertainty.
Range >= 0, latent units squared. Cost: `passes` evaluations. Source: Gal & Ghahramani, arXiv 1506.02142.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from ..utils.precision import working
from .base import Estimator, Patch, check_patch, pooled
from .dropout_hooks import dropout_hooks, droppable


@dataclass(frozen=True)
class DropoutVariance(Estimator):
    """Sample variance between thinned networks at the same point. Costs `passes` evaluations, one after another.

    passes: thinned networks per measurement, at least 2. rate: share of units dropped, in (0, 1).
    seed: of the networks, which are the same for every clip of a batch and new at every measurement.
    select: a regular expression on names of linear layers; None: those that end attention and feed-forward.
    patch: latents per token along (time, height, width): measure every token, (batch, tokens). None: one per clip.
    model: the network behind the denoiser; None: the lock fills in the one it wraps.

    Raises:
        EstimatorError: settings out of range; no model; or a model without a layer that fits.
    """

    passes: int = 4
    rate: float = 0.1
    seed: int = 0
    select: str | None = None
    patch: Patch | None = None
    model: nn.Module | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "patch", check_patch(self.patch))
        if self.passes < 2:
            raise EstimatorError(f"passes={self.passes}; a spread needs 2 passes or more. Try passes=4.")
        if not 0 < self.rate < 1:
            raise EstimatorError(f"rate={self.rate}; expected a share of units between 0 and 1. Try rate=0.1.")
        if self.model is not None:
            droppable(self.model, self.select)

    @property
    def cost(self) -> float:  # type: ignore[override]
        """Extra evaluations per clip and measurement."""
        return float(self.passes)

    @property
    def default_threshold(self) -> float:  # type: ignore[override]
        """What calm clips of the embedded model stay below from sigma 1.5 down."""
        return 0.01

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        """The same with the first module whose layers fit as its model, unless it has one."""
        if self.model is not None:
            return self
        error: EstimatorError | None = None
        for module in modules:
            try:
                return dataclasses.replace(self, model=module)
            except EstimatorError as first:
                error = error or first
        raise error or EstimatorError("no torch module inside the denoiser. Pass DropoutVariance(model=transformer).")

    def init(self) -> int:
        """State: how many measurements were made. It seeds the next networks, so that a rewound run repeats itself."""
        return 0

    def step(self, state: int, evaluation: Evaluation) -> tuple[int, Tensor | None]:
        """Evaluate the thinned networks and compare them. Variance: (batch,) or (batch, tokens)."""
        if self.model is None:
            raise EstimatorError(
                "DropoutVariance knows no model to drop units of.\n"
                "  Give it to KVLock(estimator=...), or name one: DropoutVariance(model=transformer)."
            )
        passes = []
        for k in range(self.passes):
            with dropout_hooks(self.model, self.rate, (self.seed * 1_000_003 + state) * self.passes + k, self.select):
                passes.append(working(evaluation.probe(evaluation.x.detach(), evaluation.sigma)))
        return state + 1, pooled(torch.stack(passes).var(dim=0, correction=1), evaluation.mask, self.patch)
