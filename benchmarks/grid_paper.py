"""The setting in which Aithal et al. (arXiv 2406.09358) make their claim: recall above 95% at 96% retention.

1,000 ancestral steps over the training levels with the "fixed-large" variance (the noise added at step t has variance
beta_t), nothing clipped, no noise at the last step; the score is the population variance of the last predictions of x0,
averaged over dimensions. Their code reads the last 10 (`start_timestep_var`); other windows are read beside it.
"""

from __future__ import annotations

import torch
from grid import STEPS, EpsNet, Grid, label, train
from grid_runs import detection
from torch import Tensor

WINDOWS = {
    "last 5": slice(-5, None),
    "last 10 (paper)": slice(-10, None),
    "last 20": slice(-20, None),
    "last 50": slice(-50, None),
    "last 100": slice(-100, None),
    "levels 50 to 20": slice(-50, -20),
    "levels 100 to 50": slice(-100, -50),
}
KEPT = 100


def ddpm(net: EpsNet, grid: Grid, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Samples (count, 2) and the last predictions of x0, (KEPT, count, 2), in the order they were made."""
    generator = torch.Generator().manual_seed(seed)
    bars = grid.alpha_bars()
    betas = 1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
    z, kept = torch.randn(count, 2, generator=generator), []
    for t in reversed(range(STEPS)):
        bar, beta = float(bars[t]), float(betas[t])
        eps = net(z, torch.full((count,), t))
        if t < KEPT:
            kept.append((z - (1 - bar) ** 0.5 * eps) / bar**0.5)
        z = (z - beta / (1 - bar) ** 0.5 * eps) / (1 - beta) ** 0.5
        if t:
            z = z + beta**0.5 * torch.randn(count, 2, generator=generator)
    return z, torch.stack(kept)


@torch.inference_mode()
def paper_setting(grid: Grid, seeds: int, count: int) -> list[dict]:
    """One row per network and window; `sigmas` are the noise levels that the window spans."""
    levels = ((1 - grid.alpha_bars()) / grid.alpha_bars()).sqrt().flip(0)
    rows = []
    for seed in range(seeds):
        samples, predictions = ddpm(train(grid, seed), grid, count, 20_000 + seed)
        bad = label(grid, samples).hallucinated
        for title, window in WINDOWS.items():
            score = predictions[window].var(0, correction=0).mean(1)
            span = levels[window]
            rows.append(
                {
                    "seed": seed,
                    "window": title,
                    "sigmas": [float(span[-1]), float(span[0])],
                    "samples": count,
                    "rate": float(bad.float().mean()),
                    **detection(score, bad),
                }
            )
    return rows
