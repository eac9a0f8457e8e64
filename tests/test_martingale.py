"""What trajectory variance is: along a reverse SDE, information that arrived; along an ODE, less than that.

For an exact denoiser on a reverse SDE path D = E[x0 | x_sigma] is a martingale in falling sigma, so for s1 > s2
    E |D(x_s2) - D(x_s1)|^2 = E Var(x0 | x_s1) - E Var(x0 | x_s2).
Paths have the law of the reverse SDE without any discretisation if x0 is drawn first and noise is added to it.
"""

from itertools import pairwise

import pytest
import torch

from kvlock_sampling.testing import MixtureDenoiser
from kvlock_sampling.types import Evaluation
from kvlock_sampling.variance import PosteriorVariance, TrajectoryVariance

COUNT, LEVELS = 200_000, (3.0, 1.7, 0.8)
MODES = torch.tensor([[-2.0], [0.0], [2.5]])
DENOISER = MixtureDenoiser(MODES, std=0.1, weights=[0.3, 0.5, 0.2])


def paths() -> list[torch.Tensor]:
    """One point of every path at each of the levels, from high noise to low: (paths, 1)."""
    generator = torch.Generator().manual_seed(0)
    mode = torch.multinomial(DENOISER.log_weights.exp(), COUNT, replacement=True, generator=generator)
    x, below, points = MODES[mode] + 0.1 * torch.randn(COUNT, 1, generator=generator), 0.0, []
    for sigma in reversed(LEVELS):
        x = x + (sigma**2 - below**2) ** 0.5 * torch.randn(COUNT, 1, generator=generator)
        below = sigma
        points.insert(0, x)
    return points


def evaluation(x: torch.Tensor, sigma: float) -> Evaluation:
    return Evaluation(sigma, x, DENOISER(x, sigma), None, lambda rows, level: DENOISER(rows, level))


def posterior(x: torch.Tensor, sigma: float) -> float:
    estimator = PosteriorVariance(step_size=1e-3)
    _, variance = estimator.step(estimator.init(), evaluation(x, sigma))
    return float(variance.mean())


def moved(points: list[torch.Tensor], levels: tuple[float, ...]) -> float:
    """The mean over paths of the sum of squared moves. The variance of two predictions is half a squared move."""
    estimator, total = TrajectoryVariance(window=2), 0.0
    state = estimator.init()
    for x, sigma in zip(points, levels, strict=True):
        state, variance = estimator.step(state, evaluation(x, sigma))
        total += 0.0 if variance is None else 2 * float(variance.mean())
    return total


def test_on_a_stochastic_path_it_is_the_drop_of_posterior_variance() -> None:
    points = paths()
    drop = posterior(points[0], LEVELS[0]) - posterior(points[-1], LEVELS[-1])
    assert drop > 1
    assert moved(points, LEVELS) == pytest.approx(drop, rel=0.01)
    one_step = moved([points[0], points[-1]], (LEVELS[0], LEVELS[-1]))
    assert one_step == pytest.approx(drop, rel=0.01)


def test_on_a_deterministic_path_it_is_less_and_falls_with_the_number_of_steps() -> None:
    x = paths()[0]
    drop = posterior(x, LEVELS[0]) - posterior(paths()[-1], LEVELS[-1])

    def along_the_ode(steps: int) -> float:
        levels = torch.logspace(*torch.tensor([LEVELS[0], LEVELS[-1]]).log10().tolist(), steps + 1).tolist()
        points = [x]
        for above, sigma in pairwise(levels):
            slope = (points[-1] - DENOISER(points[-1], above)) / above
            points.append(points[-1] + slope * (sigma - above))
        return moved(points, tuple(levels))

    few, many = along_the_ode(8), along_the_ode(64)
    assert many < few < drop / 2
    assert many == pytest.approx(few / 8, rel=0.3)


def test_posterior_variance_is_that_of_the_mixture() -> None:
    for x, sigma in zip(paths(), LEVELS, strict=True):
        assert posterior(x, sigma) == pytest.approx(float(DENOISER.variance(x, sigma).mean()), rel=1e-4)
