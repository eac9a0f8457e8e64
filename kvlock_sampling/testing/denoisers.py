"""Denoisers with posterior mean and variance in closed form, for tests with exact answers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import per_row
from ..types import KVLockError
from ..utils.precision import working


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data x0 ~ N(mean, std^2), elementwise:  D = (std^2 x + sigma^2 mean) / (std^2 + sigma^2).

    >>> denoiser = GaussianDenoiser(mean=1.0, std=2.0)
    >>> denoiser(torch.zeros(1, 4), torch.tensor([2.0]))
    tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    >>> float(denoiser.variance(2.0))
    2.0

    Args:
        mean: Mean of the data, a float or a tensor broadcastable to x's trailing axes. Defaults to 0.
        std: Standard deviation of the data, > 0, a float or a tensor likewise. Defaults to 1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: float | Tensor = 0.0, std: float | Tensor = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean) * 1.0)
        self.register_buffer("std", torch.as_tensor(std) * 1.0)
        if not (self.std > 0).all():
            raise KVLockError(f"GaussianDenoiser(std={std}); expected > 0.")

    def forward(self, x: Tensor, sigma: Tensor | float, **extra: Any) -> Tensor:
        wide = working(x)
        noise = per_row(torch.as_tensor(sigma).to(wide), x).square()
        signal = self.std.to(wide).square()
        return ((signal * wide + noise * self.mean.to(wide)) / (signal + noise)).to(x)

    def variance(self, sigma: Tensor | float) -> Tensor:
        """Return Var[x0 | x] = std^2 sigma^2 / (std^2 + sigma^2) of every element, the same for every x."""
        noise = torch.as_tensor(sigma).to(self.std).square()
        return self.std.square() * noise / (self.std.square() + noise)


class MixtureDenoiser(nn.Module):
    """The exact denoiser of a mixture of isotropic Gaussians over whole clips, x0 ~ sum_k weights_k N(means_k, std^2).

    Args:
        means: Centres of the modes, (modes, ...), with the trailing axes of x.
        std: Standard deviation of every mode, > 0. Defaults to 0.1.
        weights: One weight > 0 per mode, of any sum. Defaults to None, equal weights.
    """

    means: Tensor
    std: Tensor
    log_weights: Tensor

    def __init__(self, means: Tensor, std: float = 0.1, weights: Sequence[float] | Tensor | None = None) -> None:
        super().__init__()
        means = torch.as_tensor(means) * 1.0
        weights = torch.ones(len(means)) if weights is None else torch.as_tensor(weights, dtype=means.dtype)
        if not (std > 0 and weights.shape == (len(means),) and (weights > 0).all()):
            given = f"std={std}, weights={weights.tolist()} for {len(means)} modes"
            raise KVLockError(f"MixtureDenoiser: {given}; expected numbers > 0, a weight per mode.")
        self.register_buffer("means", means)
        self.register_buffer("std", torch.as_tensor(std, dtype=means.dtype))
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def forward(self, x: Tensor, sigma: Tensor | float, **extra: Any) -> Tensor:
        weights, centres, _ = self._posterior(x, sigma)
        return torch.einsum("bk,bkd->bd", weights, centres).reshape(x.shape).to(x)

    def variance(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Return Var[x0 | x] of every element, the diagonal of the posterior covariance, as a tensor like x."""
        weights, centres, spread = self._posterior(x, sigma)
        away = centres - torch.einsum("bk,bkd->bd", weights, centres)[:, None]
        return (torch.einsum("bk,bkd->bd", weights, away.square()) + spread).reshape(x.shape).to(x)

    def _posterior(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
        """Weight of each mode (batch, modes), its posterior centre (batch, modes, d) and variance (batch, 1)."""
        flat = working(x).flatten(1)
        means = self.means.to(flat).flatten(1)
        noise, signal = per_row(torch.as_tensor(sigma).to(flat), flat).square(), self.std.to(flat).square()
        distances = (flat[:, None] - means).square().sum(2)
        weights = (self.log_weights.to(flat) - distances / (2 * (signal + noise))).softmax(1)
        total = (signal + noise)[..., None]
        return weights, (signal * flat[:, None] + noise[..., None] * means) / total, signal * noise / (signal + noise)
