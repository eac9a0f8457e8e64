"""Relative: the edit's variance in units of the background's, against values that are known, and in whole edits."""

import pytest
import torch

import kvlock_sampling as kv
from kvlock_sampling.presets import ESTIMATORS
from kvlock_sampling.testing import GaussianDenoiser
from kvlock_sampling.types import EstimatorError, Evaluation, PolicyError
from kvlock_sampling.utils.tables import from_table
from kvlock_sampling.variance import (
    DropoutVariance,
    Estimator,
    Relative,
    Sparse,
    TrajectoryVariance,
)

PATCH = (1, 2, 2)
SHAPE = (2, 3, 2, 4, 4)  # eight tokens, 0 to 3 in the first frame
MOVES = TrajectoryVariance(window=None, normalise=True, patch=PATCH)


def refuse(x, sigma):
    raise AssertionError("a free estimator asked the model")


class PerClip(Estimator):
    """Breaks its contract: it has a patch, and measures clips."""

    patch = PATCH

    def step(self, state, evaluation):
        return state, evaluation.denoised.flatten(1).var(1)


def tokens(values):
    """Latents (1, 3, 2, 4, 4) that are constant on each of eight tokens."""
    grid = torch.tensor(values).reshape(1, 1, 2, 2, 2)
    return grid.repeat_interleave(2, 3).repeat_interleave(2, 4).expand(1, 3, 2, 4, 4).clone()


def after(estimator, first, second, mask, sigmas=(2.0, 1.0)):
    """The variance after two evaluations with these predictions."""
    state = estimator.init()
    for sigma, denoised in zip(sigmas, (first, second), strict=True):
        state, variance = estimator.step(state, Evaluation(sigma, denoised, denoised, mask, refuse))
    return variance


def test_the_ratio_is_that_of_known_moves():
    """Token i moves by a known amount: mean square over the edited ones, quantile of squares over the others."""
    moves = [4.0, 2.0, 1.0, 1.0, 2.0, 3.0, 1.0, 5.0]
    mask = tokens([1.0, 1.0] + [0.0] * 6)[:, :1]
    still = torch.zeros(1, *SHAPE[1:])
    for quantile, reference in ((0.0, 1.0), (0.5, 2.5), (1.0, 25.0)):  # of 1, 1, 1, 4, 9, 25
        got = after(Relative(MOVES, quantile=quantile), still, tokens(moves), mask)
        assert got.tolist() == pytest.approx([10.0 / reference])  # (16 + 4) / 2


def test_a_token_that_the_edge_crosses_counts_by_its_edited_share_and_is_no_reference():
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., 0, :2, :2] = 1  # token 0
    mask[..., 0, :2, 2] = 1  # half of token 1
    moves = tokens([1.0, 4.0] + [2.0] * 6)
    got = after(Relative(MOVES, quantile=1.0), torch.zeros_like(moves), moves, mask)
    assert got.tolist() == pytest.approx([(1.0 + 0.5 * 16.0) / 1.5 / 4.0])


def test_scale_steps_and_renewed_noise_cancel():
    """What multiplies every move alike leaves the ratio as it is: latents' scale, the step, the units of the sum."""
    g = torch.Generator().manual_seed(3)
    first, second = torch.randn(2, *SHAPE, generator=g)
    mask = tokens([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])[:, :1]
    base = after(Relative(MOVES, quantile=0.5), first, second, mask)
    assert base.shape == (2,)
    torch.testing.assert_close(after(Relative(MOVES, quantile=0.5), 7 * first, 7 * second, mask), base)
    torch.testing.assert_close(after(Relative(MOVES, quantile=0.5), first, second, mask, sigmas=(2.0, 1.7)), base)
    integral = TrajectoryVariance(window=None, normalise=True, integral=True, patch=PATCH)
    torch.testing.assert_close(after(Relative(integral, quantile=0.5), first, second, mask), base)
    plain = after(MOVES, first, second, mask)
    assert not torch.allclose(after(MOVES, 7 * first, 7 * second, mask), plain, rtol=0.5)


def test_a_still_background_does_not_divide_by_zero():
    moves = tokens([1.0] + [0.0] * 7)
    mask = tokens([1.0] + [0.0] * 7)[:, :1]
    got = after(Relative(MOVES, quantile=0.5), torch.zeros_like(moves), moves, mask)
    assert bool(got.isfinite().all())
    assert float(got) > 1e6


def test_no_background_is_an_error_that_names_the_clip():
    x = torch.zeros(SHAPE)
    whole = torch.zeros(2, 1, 2, 4, 4)
    whole[1] = 1
    whole[0, ..., 0, 0] = 1
    estimator = Relative(MOVES)
    with pytest.raises(EstimatorError, match="clip 1 touches every one of 8 tokens"):
        estimator.step(estimator.init(), Evaluation(1.0, x, x, whole, refuse))
    with pytest.raises(EstimatorError, match="there is no mask"):
        estimator.step(estimator.init(), Evaluation(1.0, x, x, None, refuse))
    assert estimator.needs_background
    assert Sparse(estimator, every=2).needs_background
    assert not Sparse(MOVES, every=2).needs_background


def test_wrong_settings_are_errors():
    with pytest.raises(EstimatorError, match=r"value for every token.*one value per clip"):
        Relative(TrajectoryVariance())
    with pytest.raises(EstimatorError, match=r"variance of shape \(1,\); Relative expected one per token, \(1, 8\)"):
        after(Relative(PerClip()), tokens([0.0] * 8), tokens([1.0] * 8), tokens([1.0] + [0.0] * 7)[:, :1])
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(EstimatorError, match="quantile"):
            Relative(MOVES, quantile=bad)
    with pytest.raises(EstimatorError, match="expected an estimator"):
        Relative("moves")
    assert Sparse(DropoutVariance(patch=PATCH), every=3, hold=True).patch == PATCH


def test_a_table_without_patch_is_an_error():
    with pytest.raises(PolicyError, match="estimator: Relative needs a value for every token"):
        from_table({"type": "Relative", "estimator": {"type": "TrajectoryVariance"}}, ESTIMATORS, "estimator")


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral", "heun"])
def test_in_a_run_the_uncertain_part_stands_out_whatever_the_units(sampler):
    """The exact denoiser of data that varies ten times as much inside the mask as outside: the ratio shows it under
    every sampler as long as the noise is above either spread, and is the same in other units."""
    mask = torch.zeros(1, 1, 2, 4, 4)
    mask[..., :2, :2] = 1
    sigmas = torch.cat([torch.logspace(0.5, -0.7, 9), torch.zeros(1)])
    seen = []
    for unit in (1.0, 3.0):
        model = GaussianDenoiser(mean=0.0, std=unit * torch.lerp(torch.tensor(0.1), torch.tensor(1.0), mask[0]))
        source = 0.1 * unit * torch.randn(1, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
        lock = kv.KVLock(
            model, source=source, mask=mask, policy=kv.Sigmoid(lock_range=(0.0, 0.0)), composite=True,
            estimator=Relative(TrajectoryVariance(window=None, span=8.0, normalise=True, patch=PATCH), quantile=0.5),
        )  # fmt: skip
        noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(2))
        lock.sample(sampler, noise * sigmas[0] * unit, sigmas * unit, seed=4)
        seen.append(torch.tensor([r["variance"] for r in lock.trace.rows()][1:]))
    assert float(seen[0].min()) > 3
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-3, atol=1e-4)
