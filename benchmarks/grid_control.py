"""Control on the 2D grid: samples that an estimator flags go back up to a higher noise level and come down again."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from grid import Grid, GridDenoiser, label, train
from grid_runs import PROBES, karras, read, run
from scipy import stats
from torch import Tensor

from kvlock_sampling import samplers

FLAGS = ("trajectory, sigma window", "renoise x1 at 0.1", "renoise x2 at 0.06", "posterior x1 at 0.06")
REDONE = ((0.01, 0.5), (0.02, 0.5), (0.04, 0.5), (0.06, 0.5), (0.08, 0.3), (0.12, 0.3))
"""Share of the samples that is sampled again, and the noise level it goes back to."""


def spread(grid: Grid, samples: Tensor) -> float:
    """Within-mode standard deviation over the true one, of samples within 5 standard deviations of a mode."""
    judged = label(grid, samples)
    kept = ~judged.hallucinated
    offset = samples[kept] - grid.modes[judged.mode[kept]]
    return float(offset.std() / grid.mode_std)


def skew(grid: Grid, samples: Tensor) -> tuple[float, float]:
    """Chi-square of the mode counts against equal ones over its 24 degrees of freedom, and its p value."""
    counts = torch.bincount(label(grid, samples).mode, minlength=25).numpy()
    test = stats.chisquare(counts)
    return float(test.statistic) / 24, float(test.pvalue)


def moved(grid: Grid, before: Tensor, after: Tensor) -> float:
    """p value that control moved no net share of samples between modes (Stuart and Maxwell's test of paired counts).

    A network's own counts are not equal to begin with; what control may be blamed for is the change.
    """
    table = np.zeros((25, 25))
    np.add.at(table, (label(grid, before).mode.numpy(), label(grid, after).mode.numpy()), 1)
    net = table.sum(1) - table.sum(0)
    covariance = np.diag(table.sum(1) + table.sum(0)) - table - table.T
    freedom = int(np.linalg.matrix_rank(covariance))
    return 1.0 if freedom == 0 else float(stats.chi2.sf(net @ np.linalg.pinv(covariance) @ net, freedom))


@torch.inference_mode()
def control(grid: Grid, seeds: int, count: int, say: Callable[[str], None]) -> list[dict]:
    """One row per network, sampler, estimator and share, after one row without control. 50 Karras steps."""
    rows = []
    steps, sigmas = 50, karras(50, grid)
    for seed in range(seeds):
        model = GridDenoiser(train(grid, seed), grid)
        for sampler in ("euler", "dpmpp_2m"):
            model.rows = 0
            samples, record = run(model, sampler, sigmas, count, seed)
            base = model.rows

            def row(title: str, result: Tensor, extra: float) -> dict:
                ratio, p = skew(grid, result)
                return {
                    "seed": seed,  # noqa: B023 - called within this turn of the loop
                    "sampler": sampler,  # noqa: B023
                    "steps": steps,
                    "control": title,
                    "rate": float(label(grid, result).hallucinated.float().mean()),
                    "spread": spread(grid, result),
                    "chi2_ratio": ratio,
                    "chi2_p": p,
                    "moved_p": moved(grid, samples, result),  # noqa: B023
                    "extra": extra,
                }

            rows.append(row("none", samples, 0.0))
            say(f"seed {seed} {sampler}: {rows[-1]['rate']:.2%} before")
            for title in FLAGS:
                model.rows = base
                score, _ = read(PROBES[title], record.calls, model)
                measured = model.rows
                for share, back in REDONE:
                    model.rows = measured
                    flagged = score.topk(int(share * count)).indices
                    again = sigmas[sigmas <= back]
                    noise = torch.randn(len(flagged), 2, generator=torch.Generator().manual_seed(seed + 5))
                    result = samples.clone()
                    result[flagged] = samplers.run(sampler, model, samples[flagged] + again[0] * noise, again)
                    rows.append(row(f"{title}; {share:.0%} back to {back}", result, (model.rows - base) / base))
    return rows
