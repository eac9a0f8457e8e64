"""The 2D Gaussian grid of Aithal et al. (NeurIPS 2024, arXiv 2406.09358): data, network, training, labels.

25 modes at (2i, 2j), i, j = -2..2, standard deviation 0.05, everything divided by 2.8289. A sample further than 5
standard deviations from every mode is a hallucination. The exact score makes none; a trained network does.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

CACHE = Path(__file__).resolve().parent.parent / "runs" / "grid"
STEPS = 1000  # of the training schedule


class Grid(NamedTuple):
    """One variant of the data set, and how long its networks train. `std` is before the division by `scale`.

    training: steps of batch 2,048. With 12,000 the wide schedule's networks are not done: one of three seeds put 32% of
        its samples between the modes, and 2% after 40,000.
    """

    std: float = 0.05
    beta_start: float = 1e-3
    beta_end: float = 0.2
    training: int = 40_000

    @property
    def scale(self) -> float:
        return math.sqrt(self.std**2 + 8)

    @property
    def mode_std(self) -> float:
        return self.std / self.scale

    @property
    def modes(self) -> Tensor:
        axis = torch.arange(-2, 3) * 2.0
        return torch.cartesian_prod(axis, axis) / self.scale

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Samples (count, 2) of the data distribution."""
        which = torch.randint(25, (count,), generator=generator)
        return self.modes[which] + self.mode_std * torch.randn(count, 2, generator=generator)

    def alpha_bars(self) -> Tensor:
        """Cumulative signal power of the training schedule, (STEPS,), float64."""
        betas = torch.linspace(self.beta_start, self.beta_end, STEPS, dtype=torch.float64)
        return (1 - betas).cumprod(0)


SHARP = Grid(std=0.02, beta_start=1e-4, beta_end=0.02, training=12_000)
"""The variant of arXiv 2605.06831: modes two and a half times as narrow, and a schedule that dwells on low noise."""


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first, self.second, self.time = (nn.Linear(width, width) for _ in range(3))

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        inner = self.first(nn.functional.leaky_relu(self.norm(h), 0.02)) + self.time(time)
        return h + self.second(nn.functional.leaky_relu(inner, 0.02))


class EpsNet(nn.Module):
    """Noise prediction by a residual MLP with a sin/cos embedding of the step index, about 40 thousand parameters."""

    def __init__(self, width: int = 64, blocks: int = 3) -> None:
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(2, width), nn.Linear(width, 2)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, z: Tensor, step: Tensor) -> Tensor:
        rates = torch.exp(torch.linspace(0, -math.log(10_000), self.width // 2, device=z.device))
        angle = step.float().unsqueeze(1) * rates
        time, h = torch.cat([angle.sin(), angle.cos()], 1), self.enter(z)
        for block in self.blocks:
            h = block(h, time)
        return self.leave(h)


class GridDenoiser(nn.Module):
    """D(x, sigma) = x - sigma * eps(x / sqrt(1 + sigma^2), t(sigma)), t interpolated in log sigma. Counts its rows."""

    def __init__(self, net: EpsNet, grid: Grid) -> None:
        super().__init__()
        self.net, self.rows = net, 0
        bars = grid.alpha_bars()
        # The last steps hold no signal at all in float32; sampling starts far below them.
        sigmas = ((1 - bars) / bars).sqrt()
        usable = sigmas < 1e3
        self.register_buffer("log_sigmas", sigmas[usable].log().float())

    def step_of(self, sigma: Tensor) -> Tensor:
        """Fractional index of the training step at this noise level."""
        value, table = sigma.log(), self.log_sigmas
        upper = torch.searchsorted(table, value.contiguous()).clamp(1, len(table) - 1)
        low, high = table[upper - 1], table[upper]
        return (upper - 1) + ((value - low) / (high - low)).clamp(0, 1)

    def forward(self, x: Tensor, sigma: Tensor, **extra_args: object) -> Tensor:
        self.rows += len(x)
        s = sigma.expand(len(x))
        eps = self.net(x / (1 + s.square()).sqrt().unsqueeze(1), self.step_of(s))
        return x - s.unsqueeze(1) * eps


def train(grid: Grid, seed: int, *, steps: int | None = None, batch: int = 2048) -> EpsNet:
    """Train a network, or load it from runs/grid where an earlier call left it. steps: other than the grid's own."""
    steps = steps or grid.training
    path = CACHE / f"std{grid.std}_beta{grid.beta_end}_steps{steps}_seed{seed}.pt"
    torch.manual_seed(seed)
    net = EpsNet()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    data = grid.draw(100_000, generator)
    bars = grid.alpha_bars().float()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=1e-5)
    for _ in range(steps):
        x0 = data[torch.randint(len(data), (batch,), generator=generator)]
        t = torch.randint(STEPS, (batch,), generator=generator)
        noise = torch.randn(batch, 2, generator=generator)
        bar = bars[t].unsqueeze(1)
        loss = (net(bar.sqrt() * x0 + (1 - bar).sqrt() * noise, t) - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    CACHE.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(net.state_dict(), temporary)
    temporary.rename(path)
    return net.eval().requires_grad_(False)


class Label(NamedTuple):
    """Per sample: distance to the nearest mode in mode standard deviations, and which mode that is."""

    distance: Tensor
    mode: Tensor

    @property
    def hallucinated(self) -> Tensor:
        return self.distance > 5


def label(grid: Grid, samples: Tensor) -> Label:
    """Judge final samples (count, 2)."""
    distance, mode = torch.cdist(samples, grid.modes).min(1)
    return Label(distance / grid.mode_std, mode)
