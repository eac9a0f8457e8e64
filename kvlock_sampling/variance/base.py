"""The contract of an estimator: `init() -> state`, `step(state, evaluation) -> (state, variance or None)`.

Settings are frozen, state is a value: rewinding a run is restoring an old state. `step` is given evaluations at
falling sigma; whoever drives it (the lock does) restores an earlier state when a sampler goes back up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor, nn

from ..types import EstimatorError, Evaluation
from ..utils.precision import working

Patch = tuple[int, int, int]
"""Latents per token along (time, height, width)."""


class Estimator(ABC):
    """Base of all estimators. Subclasses are frozen dataclasses; the least they define is `step(state, evaluation)`,
    which returns the next state and the variance, (batch,), >= 0, or None while that is unknown. In what units is its
    own affair: divided by its threshold it is risk. `kv.testing.check_estimator` tries the rest.

    Raises:
        EstimatorError: in a run, by a lock, for what breaks the contract.
    """

    cost: float = 0.0
    """Extra evaluations of the model per clip and measurement."""

    default_threshold: float = 1.0
    """The variance that counts as risk 1 when the user names no threshold."""

    needs_background: bool = False
    """Whether it raises an EstimatorError where there is no mask, or one that leaves nothing outside."""

    @property
    def reads_background(self) -> bool:
        """Whether what it measures depends on the prediction outside the mask: it then needs every token computed.

        A local estimator, one with a `patch`, measures every token.
        """
        return self.needs_background or getattr(self, "patch", None) is not None

    def init(self) -> Any:
        """The state before the first evaluation."""
        return None

    @abstractmethod
    def step(self, state: Any, evaluation: Evaluation) -> tuple[Any, Tensor | None]:
        """Take in one evaluation. Returns the new state and the variance, (batch,), or None while it is unknown.

        The variance is >= 0 and float32 or better; a local estimator gives (batch, tokens).
        """

    def bound(self, modules: Iterable[nn.Module]) -> Estimator:
        """This estimator for one model, given its modules, outermost first. The lock calls it once, at construction.

        Only an estimator that changes the model for its passes has use for it; all others return themselves.
        """
        return self


def masked_mean(values: Float[Tensor, "batch *axes"], mask: Tensor | None) -> Float[Tensor, "batch"]:
    """Mean per clip, in float32 or better, weighted by a mask broadcastable to `values` (None: all)."""
    values = working(values)
    if mask is None:
        return values.flatten(1).mean(1)
    weight = torch.broadcast_to(mask, values.shape).to(values.dtype).flatten(1)
    return (values.flatten(1) * weight).sum(1) / weight.sum(1).clamp_min(1e-12)


def pooled(values: Float[Tensor, "batch *axes"], mask: Tensor | None, patch: Patch | None) -> Tensor:
    """`masked_mean` without a patch; with one the mean of every token, (batch, tokens), in the order t, h, w.

    Tokens are measured everywhere, edited or not: it is the background's that a lock acts on.

    Raises:
        EstimatorError: the values are not (batch, channels, time, height, width) in whole patches.
    """
    if patch is None:
        return masked_mean(values, mask)
    if values.ndim != 5 or any(size % p for size, p in zip(values.shape[2:], patch, strict=True)):
        raise EstimatorError(
            f"latents of shape {tuple(values.shape)} do not divide into patches of {patch}; "
            "expected (batch, channels, time, height, width) in whole patches.\n"
            "  Give the model's own patch size, e.g. patch=(1, 2, 2), or None for one value per clip."
        )
    t, h, w = patch
    return reduce(working(values), "b c (t p) (h q) (w r) -> b (t h w)", "mean", p=t, q=h, r=w)


def check_patch(patch: Any) -> Patch | None:
    """A patch as a tuple of three sizes >= 1, or None.

    Raises:
        EstimatorError: anything else.
    """
    if patch is None:
        return None
    sizes = tuple(patch) if isinstance(patch, (list, tuple)) else ()
    if len(sizes) != 3 or not all(isinstance(p, int) and p >= 1 for p in sizes):
        raise EstimatorError(f"patch={patch!r}; expected latents per token along (time, height, width): (1, 2, 2).")
    return sizes[0], sizes[1], sizes[2]
