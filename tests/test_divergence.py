"""Divergence against known answers: Gaussian pairs, sums by hand, and plain calls of the model on every route."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FAMILIES, random_network

import kvlock_sampling as kv
from kvlock_sampling.testing import GaussianDenoiser
from kvlock_sampling.types import Control, EstimatorError, Evaluation, KVLockError
from kvlock_sampling.variance import Divergence, Estimator, Sparse, TrajectoryVariance

SHAPE = (2, 3, 2, 4, 4)
MASK = torch.zeros(2, 1, 2, 4, 4)
MASK[0, ..., :2], MASK[1, :, 1:] = 1, 1


def evaluation(sigma: float, edit: torch.Tensor, source: torch.Tensor | None, mask: torch.Tensor | None = MASK) -> Any:
    return Evaluation(sigma, edit, edit, mask, lambda x, s: x, None, source)


def play(estimator: Estimator, run: list[Any]) -> tuple[Any, torch.Tensor | None]:
    state, variance = estimator.init(), None
    for given_ in run:
        state, variance = estimator.step(state, given_)
    return state, variance


def by_hand(deltas: list[torch.Tensor], sigmas: list[float], memory: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance of each element, weighted by the distance in log sigma from the last."""
    weights = torch.tensor([math.exp(-math.log(s / sigmas[-1]) / memory) for s in sigmas], dtype=torch.float64)
    values = torch.stack(deltas).double()
    total = weights.sum()
    mean = torch.tensordot(weights, values, 1) / total
    variance = torch.tensordot(weights, (values - mean).square(), 1) / (total - weights.square().sum() / total)
    return mean, variance


def inside(values: torch.Tensor, mask: torch.Tensor = MASK) -> torch.Tensor:
    weight = mask.expand_as(values).double()
    return (values.double() * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)


def unit(edit: torch.Tensor, source: torch.Tensor, mask: torch.Tensor = MASK) -> torch.Tensor:
    """The size of the edit and of the clip, per clip, from the last pair of predictions."""
    return inside((edit.double() - source.double()).square(), mask) + source.double().flatten(1).var(1, correction=0)


def draws(count: int, seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    values = torch.randn(2, count, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return list(values[0]), list(values[1])


def test_gaussian_pairs_at_the_same_x():
    """D = (s^2 x + sigma^2 mu) / (s^2 + sigma^2), so delta = sigma^2 (mu_edit - mu_source) / (s^2 + sigma^2)."""
    std, low, high = 0.7, -0.5, 1.5
    edit, source = GaussianDenoiser(high, std), GaussianDenoiser(low, std)
    x, sigmas, estimator = torch.randn(SHAPE), [6.0, 2.0, 0.5], Divergence(memory=2.0)
    run = [evaluation(s, edit(x, s), source(x, s)) for s in sigmas]
    deltas = [torch.full(SHAPE, s**2 * (high - low) / (std**2 + s**2), dtype=torch.float64) for s in sigmas]
    for count in (1, 2, 3):
        state, variance = play(estimator, run[:count])
        mean, spread = by_hand(deltas[:count], sigmas[:count], 2.0)
        size = unit(run[count - 1].denoised, run[count - 1].source)
        torch.testing.assert_close(estimator.effect(state).double(), inside(mean.square()) / size, rtol=1e-5, atol=1e-7)
        if count == 1:
            assert variance is None
        else:
            torch.testing.assert_close(variance.double(), inside(spread) / size, rtol=1e-4, atol=1e-7)


@given(
    st.lists(st.floats(0.01, 90.0), min_size=2, max_size=7, unique_by=lambda s: round(math.log(s), 2)),
    st.floats(0.8, 50.0) | st.just(math.inf),
    st.integers(0, 2**31),
)
@settings(max_examples=40, deadline=None)
def test_any_run_gives_the_weighted_mean_and_variance(sigmas, memory, seed):
    sigmas = sorted(sigmas, reverse=True)
    edits, sources = draws(len(sigmas), seed)
    estimator = Divergence(memory=memory)
    state, variance = play(estimator, [evaluation(*e) for e in zip(sigmas, edits, sources, strict=True)])
    mean, spread = by_hand([e - s for e, s in zip(edits, sources, strict=True)], sigmas, memory)
    size = unit(edits[-1], sources[-1])
    torch.testing.assert_close(estimator.effect(state).double(), inside(mean.square()) / size, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(variance.double(), inside(spread) / size, rtol=1e-4, atol=1e-6)


def test_two_predictions_have_half_their_squared_distance_as_variance_whatever_their_weights():
    edits, sources = draws(2)
    for low in (4.0, 1e-3, 1e-30):
        variance = play(
            Divergence(memory=0.1), [evaluation(5.0, edits[0], sources[0]), evaluation(low, edits[1], sources[1])]
        )[1]
        change = (edits[0] - sources[0]) - (edits[1] - sources[1])
        wanted = inside(change.square()) / 2 / unit(edits[1], sources[1])
        torch.testing.assert_close(variance.double(), wanted, rtol=1e-5, atol=1e-7)


def test_a_repeated_sigma_replaces_and_a_higher_one_drops_what_is_below():
    edits, sources = draws(4)
    at = lambda s, i: evaluation(s, edits[i], sources[i])  # noqa: E731
    for run, equal in (
        ([at(5.0, 0), at(2.0, 1), at(2.0 * (1 + 1e-6), 2)], [at(5.0, 0), at(2.0 * (1 + 1e-6), 2)]),
        ([at(5.0, 0), at(2.0, 1), at(3.0, 2), at(1.0, 3)], [at(5.0, 0), at(3.0, 2), at(1.0, 3)]),
        ([at(5.0, 0), at(2.0, 1), at(8.0, 2)], [at(8.0, 2)]),
    ):
        (state, variance), (wanted, expected) = play(Divergence(), run), play(Divergence(), equal)
        assert variance is expected is None or torch.equal(variance, expected)
        assert torch.equal(Divergence().effect(state), Divergence().effect(wanted))


def around(values, token, patch):
    """The mean over the background of a token and its neighbours, or over all of them if there is none."""
    (t, y, x), (p, q, r) = token, patch
    rows, columns = slice(max(0, y - 1) * q, (y + 2) * q), slice(max(0, x - 1) * r, (x + 2) * r)
    near = (..., slice(t * p, (t + 1) * p), rows, columns)
    kept = (1 - MASK)[near].double()
    kept = torch.where(kept.sum((2, 3, 4), keepdim=True) > 0, kept, 1.0)
    return (values[near] * kept).sum((2, 3, 4)) / kept.sum((2, 3, 4))


@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 1, 1), (2, 4, 1)])
def test_every_token_is_measured_with_a_patch(patch):
    edits, sources = draws(3)
    sigmas, estimator = [5.0, 2.0, 1.0], Divergence(patch=patch)
    state, variance = play(estimator, [evaluation(*e) for e in zip(sigmas, edits, sources, strict=True)])
    grid = [size // p for size, p in zip(SHAPE[2:], patch, strict=True)]
    for i, token in enumerate(product(*map(range, grid))):
        deltas = [around(e - s, token, patch) for e, s in zip(edits, sources, strict=True)]
        mean, spread = by_hand(deltas, sigmas, 1.0)
        for found, wanted in ((variance, spread), (estimator.effect(state), mean.square())):
            size = unit(edits[-1], sources[-1])
            torch.testing.assert_close(found[:, i].double(), wanted.mean(1) / size, rtol=1e-4, atol=1e-6)


def test_what_is_edited_does_not_spread_to_the_tokens_around_it():
    source = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    edit = torch.where(MASK > 0, source + 100.0, source)
    state, _ = play(Divergence(patch=(1, 1, 1)), [evaluation(1.0, edit, source)])
    effect = Divergence(patch=(1, 1, 1)).effect(state).view(len(edit), *SHAPE[2:])
    kept = (MASK == 0)[:, 0].expand_as(effect)
    assert (effect[kept] < 1e-10).all()
    assert effect.max() == pytest.approx(1.0, rel=1e-3)  # as large as the edit


@given(st.floats(1e-4, 1e4), st.floats(-50.0, 50.0), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
@pytest.mark.parametrize("patch", [None, (1, 2, 2)])
def test_neither_scale_nor_offset_of_the_latents_matters(patch, scale, offset, seed):
    edits, sources = draws(3, seed)
    found = []
    for scaled in (lambda v: v, lambda v: scale * v.double() + scale * offset):
        estimator, sigmas = Divergence(patch=patch), [5.0, 2.0, 1.0]
        run = [evaluation(s, scaled(e), scaled(z)) for s, e, z in zip(sigmas, edits, sources, strict=True)]
        state, variance = play(estimator, run)
        found.append((variance.double(), estimator.effect(state).double()))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)


def test_an_edit_that_changes_nothing_has_no_effect_whatever_the_rounding():
    source = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    estimator = Divergence(patch=(1, 2, 2))
    state, variance = play(estimator, [evaluation(s, source * (1 + 1e-6), source) for s in (2.0, 1.0)])
    assert (estimator.effect(state) < estimator.default_threshold).all()
    assert (variance < estimator.default_threshold).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sums_are_float32(dtype):
    """A constant difference of a half-precision pair has no variance, and its effect is its square."""
    source = torch.full(SHAPE, 100.0, dtype=dtype)
    state, variance = play(Divergence(), [evaluation(s, source + 8, source) for s in (5.0, 3.0, 2.0, 1.0)])
    assert variance.dtype == torch.float32
    assert torch.equal(variance, torch.zeros(2))
    assert torch.equal(Divergence().effect(state), torch.ones(2))  # of a flat clip only the edit counts


def test_settings():
    for memory in (0.0, -1.0, math.nan):
        with pytest.raises(EstimatorError, match=r"a finite number > 0\. This works: Divergence\(memory=1.0\)"):
            Divergence(memory=memory)
    assert kv.presets.load_preset(
        '[policy]\ntype = "Sigmoid"\n[estimator]\ntype = "Divergence"\nmemory = 2.0\n'
    ).estimator == (Divergence(memory=2.0))


def test_wrappers_forward_the_effect():
    edits, sources = draws(3)
    run = [evaluation(*e) for e in zip((5.0, 2.0, 1.0), edits, sources, strict=True)]
    bare = Divergence()
    wanted = bare.effect(play(bare, run)[0])
    wrapper = Sparse(bare, every=1)
    assert wrapper.needs_source
    torch.testing.assert_close(wrapper.effect(play(wrapper, run)[0]), wanted)
    assert TrajectoryVariance().effect(()) is None


# -- in a run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hold(kv.Policy):
    """Measures, and holds one lock from the first evaluation on."""

    lock: float
    may_lock = property(lambda self: self.lock > 0)

    def start(self, obs):
        return Control(lock=self.lock)

    def step(self, state, obs):
        return state, Control(lock=self.lock)


LEVELS = [8.0, 4.0, 2.5, 1.0]
TINY = 1e-6
OWN = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(7))  # the source's own prompt


def run_of(setup, levels=LEVELS, guided=False, **options):
    """The trace of a lock that is called at these levels, x being the clip at the run's noise, moved a little."""
    model = kv.CFGDenoiser(setup.model) if guided else setup.model
    given_ = {"source": setup.source, "mask": setup.mask, "source_args": {"cond": OWN}, "threshold": 1.0, **options}
    lock = kv.KVLock(model, **given_)
    with lock, torch.no_grad():
        for sigma in levels:
            lock(points(setup, sigma)[0], torch.tensor([sigma]), **setup.cfg)
    return lock.trace


def points(setup, sigma):
    """The edit's x at a noise level, and the source's."""
    noise = torch.randn(setup.source.shape, generator=torch.Generator().manual_seed(3))
    top = setup.source + LEVELS[0] * noise
    return top * (sigma / LEVELS[0]) + 0.3 * (LEVELS[0] - sigma), setup.source + sigma * noise


def expected(setup, levels=LEVELS, scale=1.0):
    """Variance and effect at the last level from plain calls of the model."""
    deltas = []
    for sigma in levels:
        x, z = points(setup, sigma)
        level = torch.tensor([sigma])
        with torch.no_grad():
            edit, source = setup.model(x, level, cond=setup.cond), setup.model(z, level, cond=OWN)
            if scale != 1:
                uncond = setup.model(x, level, cond=setup.uncond)
                edit = uncond + (edit - uncond) * scale
        deltas.append(edit - source)
    mean, variance = by_hand(deltas, levels, 1.0)
    size = unit(edit, source, setup.mask)
    return inside(variance, setup.mask) / size, inside(mean.square(), setup.mask) / size


def check(trace, wanted, rtol=2e-3):
    last = trace.steps[-1]
    torch.testing.assert_close(last.variance.double(), wanted[0], rtol=rtol, atol=1e-6)
    torch.testing.assert_close(last.effect.double(), wanted[1], rtol=rtol, atol=1e-6)
    assert torch.isnan(trace.steps[0].effect).all()


@pytest.mark.parametrize(
    ("route", "passes", "options"),
    [
        ("unlocked", 3, {"policy": Hold(0.0)}),
        ("unlocked", 3, {"policy": Hold(0.0), "batched": False}),
        ("lockstep", 3, {"policy": Hold(TINY)}),
        ("source pass", 3, {"policy": Hold(TINY), "batched": False}),
        ("cached", 3, {"policy": Hold(TINY), "kv_cache": "new"}),
        # Keys and values of another noise than the run's tell nothing of the source under the run's own.
        ("unlocked", 3, {"policy": Hold(0.0), "noise": "fixed"}),
        ("lockstep", 4, {"policy": Hold(TINY), "noise": "fixed"}),
        ("lockstep", 4, {"policy": Hold(TINY), "noise": "fixed", "erase": True}),
        ("source pass", 4, {"policy": Hold(TINY), "batched": False, "noise": "fixed"}),
        ("cached", 4, {"policy": Hold(TINY), "kv_cache": "new", "noise": "fixed"}),
    ],
)
def test_every_route_measures_what_two_plain_calls_give(setup, route, passes, options):
    options = {k: kv.KVCache(every=1, format=None) if v == "new" else v for k, v in options.items()}
    trace = run_of(setup, estimator=Divergence(), **options)
    assert {step.route for step in trace} == {route}
    assert [step.nfe for step in trace] == [passes] * len(LEVELS)
    check(trace, expected(setup))


def test_a_filled_cache_makes_a_pass_for_the_source(setup):
    noise = points(setup, 1.0)[1] - setup.source
    options = {"policy": Hold(TINY), "kv_cache": kv.KVCache(every=1, format=None), "noise": noise}
    assert [s.nfe for s in run_of(setup, **options)] == [3] * len(LEVELS)
    assert [s.nfe for s in run_of(setup, **options)] == [2] * len(LEVELS)
    trace = run_of(setup, estimator=Divergence(), **options)
    assert [s.nfe for s in trace] == [3] * len(LEVELS)
    check(trace, expected(setup))


def test_interleaved_has_it_for_free(setup):
    """At lock 1 a clip's divergence is that of the dense computation, and every token's needs the dense computation."""
    dense = run_of(setup, estimator=Divergence(), policy=Hold(1.0), foreground=False)
    narrow = run_of(setup, estimator=Divergence(), policy=Hold(1.0))
    assert {s.route for s in narrow} == {"interleaved"}
    assert [s.nfe for s in narrow] == [3] * len(LEVELS)
    check(narrow, (dense.steps[-1].variance.double(), dense.steps[-1].effect.double()))
    local = run_of(setup, estimator=Divergence(patch=(1, 2, 2)), policy=Hold(1.0))
    assert {s.route for s in local} == {"lockstep"}


def test_a_model_that_guides_itself_is_compared_as_it_is(setup):
    """Its guided x0-hat, and the source under its own prompt: each call evaluates both prompts."""
    for policy, passes in ((Hold(0.0), 4), (Hold(TINY), 4)):
        trace = run_of(setup, estimator=Divergence(), policy=policy, guided=True)
        assert [s.nfe for s in trace] == [passes] * len(LEVELS)
        check(trace, expected(setup, scale=3.0))


def test_a_run_that_goes_back_up_measures_as_if_it_had_not(setup):
    levels = [8.0, 4.0, 1.0, 2.5, 2.5, 1.0]
    check(run_of(setup, levels, estimator=Divergence(), policy=Hold(0.0)), expected(setup))


def test_policies_see_effect_over_the_threshold(setup):
    seen = []

    @kv.stateless
    def watch(obs):
        seen.append(obs)
        return Control(lock=0.0)

    trace = run_of(setup, estimator=Divergence(), policy=watch, threshold=0.5)
    wanted = expected(setup)
    torch.testing.assert_close(seen[-1].effect.double(), wanted[1] / 0.5, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close((seen[-1].effect / seen[-1].risk).double(), wanted[1] / wanted[0], rtol=4e-3, atol=1e-6)
    assert trace.rows()[-1]["effect"] == pytest.approx(float(seen[-1].effect))


def test_without_a_source_the_lock_says_what_to_pass(setup):
    for estimator in (Divergence(), Sparse(Divergence(), every=1)):
        with pytest.raises(EstimatorError, match=r"there is none.*\n.*source=latents"):
            kv.KVLock(setup.model, policy=Hold(0.0), estimator=estimator)
    with pytest.raises(EstimatorError, match=r"there is none.*\n.*source=latents"):
        kv.KVLock(setup.model, policy="release")
    with pytest.warns(UserWarning, match="estimator= without effect"):
        kv.KVLock(setup.model, policy="off", estimator=Divergence())


def test_a_policy_that_measures_nothing_pays_nothing(setup):
    with pytest.warns(UserWarning, match="estimator=, threshold= without effect"):
        trace = run_of(setup, estimator=Divergence(), policy="off")
    assert trace.nfe == 2 * len(LEVELS)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_packed_latents_and_videos_are_released_token_by_token(name):
    """Where the threshold is nothing, all of the background is let go, whatever the shape of the latents."""
    try:
        made = random_network(name)
    except KVLockError as error:
        pytest.skip(str(error).splitlines()[0])
    mask = torch.zeros_like(made.x[:, :1] if made.x.ndim > 3 else made.x[..., :1])
    axis = mask if made.x.ndim > 3 else mask.movedim(1, -1)
    axis[..., : max(1, axis.shape[-1] // 4)] = 1
    lock = kv.KVLock(
        made.denoiser,
        source=torch.randn_like(made.x),
        mask=mask,
        layers=made.layers,
        policy=kv.policy.Release(below=9.0, snr=0.0, early=False),
        estimator=Divergence(patch="model"),
        threshold=1e-12,
    )
    with torch.no_grad():
        out = lock.sample("euler", 9 * made.x, torch.tensor([9.0, 3.0, 1.0, 0.0]), extra_args=made.extra_args)
    last = lock.trace.steps[-1]
    assert out.isfinite().all()
    assert last.composite.shape == (len(made.x), lock.settings.tokens)
    assert not last.composite.any()
    assert (last.lock > 0).all()
