"""Estimators: exact on worlds with known posteriors, keyed by sigma, per clip, replayable."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.types import Evaluation
from kvlock_sampling.variance import masked_mean


def evaluation(sigma, denoised, mask=None, probe=None):
    def refuse(x, level):
        raise AssertionError("this estimator must not evaluate the model")

    return Evaluation(sigma, denoised, denoised, mask, probe or refuse)


def feed(estimator, sigmas, predictions, mask=None):
    state, out = estimator.init(), []
    for sigma, prediction in zip(sigmas, predictions, strict=True):
        state, variance = estimator.step(state, evaluation(sigma, prediction, mask))
        out.append(variance)
    return state, out


@given(st.integers(2, 12), st.integers(2, 6), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_the_papers_window_is_torch_var(count, window, seed):
    g = torch.Generator().manual_seed(seed)
    predictions = torch.randn(count, 3, 2, 4, 4, generator=g, dtype=torch.float64)
    mask = (torch.rand(3, 1, 4, 4, generator=g) > 0.4).double()
    mask[..., 0, 0] = 1
    _, out = feed(kv.TrajectoryVariance(window=window), [2.0**-i for i in range(count)], predictions, mask)
    assert out[0] is None
    for i in range(1, count):
        inside = predictions[max(0, i + 1 - window) : i + 1].var(dim=0, correction=1)
        torch.testing.assert_close(out[i], masked_mean(inside, mask))


def test_the_normalised_form_sums_moves_over_sigma_squared():
    predictions = [torch.full((1, 2), v) for v in (0.0, 1.0, 1.5, 1.5)]
    _, out = feed(kv.TrajectoryVariance(window=None, span=None, normalise=True), [8.0, 4.0, 2.0, 1.0], predictions)
    assert [None if o is None else float(o) for o in out] == [None, 1 / 16, 1 / 16 + 0.25 / 4, 1 / 16 + 0.25 / 4]


def test_a_span_forgets_high_noise_but_never_the_step_before():
    predictions = [torch.full((1, 2), float(v)) for v in range(5)]
    estimator = kv.TrajectoryVariance(window=None, span=4.0)
    state, out = feed(estimator, [64.0, 2.0, 1.0, 0.5, 0.25], predictions)
    assert float(out[1]) == pytest.approx(0.5)
    assert [e.sigma for e in state] == [1.0, 0.5, 0.25]


def test_entries_are_keyed_by_sigma():
    estimator = kv.TrajectoryVariance(window=10)
    one = torch.ones(1, 2)
    state, _ = feed(estimator, [4.0, 2.0, 1.0], [one * 0, one * 1, one * 2])
    again, variance = estimator.step(state, evaluation(1.0 + 1e-6, one * 3))  # nearly the same: replaces
    assert [e.sigma for e in again][:2] == [4.0, 2.0]
    assert len(again) == 3
    assert float(variance) == pytest.approx(torch.tensor([0.0, 1.0, 3.0]).var().item())
    up, variance = estimator.step(again, evaluation(3.0, one * 5))  # higher: drops what is below
    assert [e.sigma for e in up] == [4.0, 3.0]
    assert float(variance) == pytest.approx(12.5)


class Recorder(torch.nn.Module):
    """A smooth analytic denoiser that notes the sigmas it is asked at."""

    def __init__(self) -> None:
        super().__init__()
        self.sigmas: list[float] = []

    def forward(self, x, sigma):
        s = float(sigma.reshape(-1)[0])
        self.sigmas.append(s)
        return (x + s**2 * torch.linspace(-1, 1, x[0].numel()).view_as(x[0])) / (1 + s**2)


def expected_timeline(sigmas):
    kept: list[float] = []
    for s in sigmas:
        kept = [k for k in kept if k > s * (1 + 1e-4)] + [s]
    return kept


@pytest.mark.parametrize("case", ["heun", "dpm_2", "dpm_adaptive", "churn", "backwards"])
def test_the_trajectory_follows_sigma_not_calls(case):
    """Through the lock, the window holds exactly the falling record of noise levels, whatever the sampler does."""
    model, x = Recorder(), torch.randn(1, 6, generator=torch.Generator().manual_seed(0)) * 10
    sigmas = samplers.get_sigmas_karras(8, 0.05, 10.0)
    estimator = kv.TrajectoryVariance(window=1000)
    records = []
    original = kv.TrajectoryVariance.step

    def watched(self, state, e):
        new, variance = original(self, state, e)
        records.append((e.sigma, [k.sigma for k in new]))
        return new, variance

    lock = kv.KVLock(model, policy=kv.policy.Clamped(kv.Linear(), lock=(0.0, 0.0)), estimator=estimator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv.TrajectoryVariance, "step", watched)
        if case == "churn":
            torch.manual_seed(0)
            lock.sample("euler", x, sigmas, s_churn=4.0)
        elif case == "backwards":
            with pytest.warns(UserWarning, match="nothing was measured in a run of 7 evaluations.*inversion"), lock:
                samplers.euler.__wrapped__(lock, x / 100, sigmas[:-1].flip(0), disable=True)
        elif case == "dpm_adaptive":
            lock.sample(case, x, sigmas, rtol=1e-3, atol=1e-4, h_init=2.0)  # a first step far too long is rejected
        else:
            lock.sample(case, x, sigmas)
    calls = model.sigmas
    rises = sum(b > a * (1 + 1e-4) for a, b in itertools.pairwise(calls))
    assert (rises > 0) == (case in ("dpm_adaptive", "backwards"))
    if case == "heun":
        assert len(calls) == 15
        assert len(records[-1][1]) == 8  # each corrector is replaced by the next predictor at the same sigma
    for i, (sigma, kept) in enumerate(records):
        assert sigma == pytest.approx(calls[i], rel=1e-6)
        full = expected_timeline(calls[: i + 1])
        # The lock's own record is 16 deep: after a longer fall back it starts afresh, it never mixes.
        assert kept == pytest.approx(full[-len(kept) :], rel=1e-6)
        assert len(kept) == len(full) or rises
    if case == "backwards":
        assert all(len(kept) == 1 for _, kept in records)


def gaussian(std):
    def probe(x, sigma):
        return x * std**2 / (std**2 + sigma**2)

    return probe


@pytest.mark.parametrize("sigma", [0.1, 0.5, 2.0])
def test_renoise_has_the_exact_mean_on_a_gaussian(sigma):
    """D(x0hat + sigma e) - x0hat = k sigma e - (1 - k) x0hat with k = s^2 / (s^2 + sigma^2): both moments are known."""
    std, n = 0.7, 60_000
    k = std**2 / (std**2 + sigma**2)
    denoised = torch.full((1, n), 0.3)
    estimator = kv.variance.RenoiseVariance(passes=4)
    _, variance = estimator.step(estimator.init(), evaluation(sigma, denoised, probe=gaussian(std)))
    expected = (k * sigma) ** 2 + ((1 - k) * 0.3) ** 2
    assert float(variance) == pytest.approx(expected, rel=4 * math.sqrt(2 / (3 * n)) + 1e-3)


def test_renoise_evaluates_once_in_a_batch_and_replays():
    calls = []

    def probe(x, sigma):
        calls.append(x.clone())
        return x * 0.5

    estimator = kv.variance.RenoiseVariance(passes=3)
    denoised = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    first, a = estimator.step(estimator.init(), evaluation(1.0, denoised, probe=probe))
    _, again = estimator.step(estimator.init(), evaluation(1.0, denoised, probe=probe))
    _, b = estimator.step(first, evaluation(1.0, denoised, probe=probe))
    assert [len(c) for c in calls] == [6, 6, 6]
    assert torch.equal(a, again)
    assert not torch.equal(a, b)  # fresh noise at the next measurement
    _, alone = estimator.step(estimator.init(), evaluation(1.0, denoised[1:], probe=probe))
    assert torch.equal(alone, a[1:])  # a clip alone is the clip in a batch
    _, other = kv.variance.RenoiseVariance(passes=3, seed=6).step(0, evaluation(1.0, denoised, probe=probe))
    assert not torch.equal(a, other)


def test_settings_are_checked():
    for bad in (
        lambda: kv.TrajectoryVariance(window=1),
        lambda: kv.TrajectoryVariance(span=0.5),
        lambda: kv.TrajectoryVariance(window=None),
        lambda: kv.variance.RenoiseVariance(passes=0),
    ):
        with pytest.raises(ValueError, match=r"(?s)."):
            bad()


def test_low_precision_is_measured_in_float32():
    big = torch.full((1, 4096), 1.0, dtype=torch.bfloat16)
    _, out = feed(kv.TrajectoryVariance(), [2.0, 1.0], [big, big + 0.0078125])
    assert out[1].dtype == torch.float32
    assert float(out[1]) == pytest.approx(0.0078125**2 / 2)
