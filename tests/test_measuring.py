"""What a run measures does not depend on routes, on other clips, on churn, or on whose default it is."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.app import calibrate, scenes
from kvlock_sampling.presets import Preset
from kvlock_sampling.restart import restart
from kvlock_sampling.testing import GaussianDenoiser, MixtureDenoiser, check_estimator, check_policy
from kvlock_sampling.types import EstimatorError, PolicyError
from kvlock_sampling.variance import Divergence, DropoutVariance, Estimator, PosteriorVariance, Sparse, masked_mean
from kvlock_sampling.variance.thresholds import DEFAULT_ESTIMATOR, DEFAULT_THRESHOLD, reference_bands

HOLD = {"kp": 0.0, "ki": 0.0}  # of a PID: measures, and holds a lock


@dataclass(frozen=True)
class Gap(Estimator):
    needs_uncond = True

    def step(self, state, e):
        return state, None if e.uncond is None else masked_mean((e.denoised - e.uncond).square(), e.mask)


@dataclass(frozen=True)
class SilentGap(Gap):
    needs_uncond = False


def test_a_measure_of_guidance_goes_on_where_guidance_is_one(pair):
    policy = kv.stateless(lambda obs: kv.Control(lock=(obs.risk * 100).clamp(0, 1), cfg_scale=1.0))

    def run(**options):
        given = {**pair.cfg, **options.pop("cfg", {})}
        lock = pair.lock(policy=policy, estimator=Gap(), **options)
        x = pair.x[: len(lock.settings.source.latents)]
        return lock.sample("euler", x, pair.sigmas, extra_args=given), lock.trace

    both, trace = run()
    cut = {"cond": pair.cond[:1], "uncond": pair.uncond[:1]}
    one, alone = run(source=pair.source[:1], mask=pair.mask[:1], cfg=cut)
    assert all(step.variance.isfinite().all() for step in (*trace, *alone))
    torch.testing.assert_close(one, both[:1], atol=1e-4, rtol=1e-4)


def test_an_estimator_that_would_fall_silent_for_ever_is_told():
    check_estimator(Gap())
    with pytest.raises(EstimatorError, match="needs_uncond = True"):
        check_estimator(SilentGap())


@dataclass(frozen=True)
class Keeping(Estimator):
    def step(self, state, e):
        return e.denoised, None if state is None else masked_mean((e.denoised - state).square(), e.mask)


@pytest.mark.parametrize("estimator", [Keeping(), kv.TrajectoryVariance()], ids=["own", "built in"])
def test_what_an_estimator_keeps_is_not_changed_by_the_sampler(setup, estimator):
    def euler(clamp):
        def sampler(model, x, sigmas, extra_args=None, callback=None, disable=None):
            for high, low in pairwise(sigmas):
                denoised = clamp(model(x, high * x.new_ones(len(x)), **extra_args))
                x = x + (x - denoised) / high * (low - high)
            return x

        lock = kv.KVLock(setup.model, policy=kv.Sigmoid(lock_range=(0.0, 0.0)), estimator=estimator)
        lock.sample(sampler, setup.x, setup.sigmas, extra_args={"cond": setup.cond})
        return [row["variance"] for row in lock.trace.rows()]

    kept, clamped = euler(lambda d: d.clamp(-0.5, 0.5)), euler(lambda d: d.clamp_(-0.5, 0.5))
    assert kept == pytest.approx(clamped, nan_ok=True)


@pytest.mark.parametrize("options", [{}, {"batched": False}, {"foreground": False}], ids=str)
@pytest.mark.parametrize("bias", [0.5, 1.0])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
def test_a_probe_reads_the_source_at_its_own_level(setup, factor, bias, options):
    """A clip that is locked to itself, at the same noise and prompt, is not changed by any lock."""
    noise, apart = torch.randn(setup.source.shape), []

    @dataclass(frozen=True)
    class Probe(Estimator):
        cost = 1.0

        def step(self, state, e):
            sigma = e.sigma * factor
            x = setup.source + sigma * noise
            bare = setup.model(x, torch.tensor([sigma]), cond=setup.cond)
            apart.append(float(((e.probe(x, sigma) - bare) * e.mask).abs().max()))  # the rest may not be computed
            return state, torch.ones(1)

    lock = setup.lock(noise=noise, policy=kv.PID(bias=bias, **HOLD), estimator=Probe(), **options)
    x = setup.source + noise * setup.sigmas[0]
    lock.sample("euler", x, setup.sigmas, extra_args={"cond": setup.cond})
    assert len(apart) == len(setup.sigmas) - 1
    assert max(apart) < 1e-4


def test_points_that_are_no_whole_batches_are_told(pair):
    @dataclass(frozen=True)
    class Probe(Estimator):
        cost = 1.0

        def step(self, state, e):
            return state, e.probe(e.x[:1], e.sigma).flatten(1).var(1)

    with pytest.raises(EstimatorError, match=r"probed \(1, .*multiple of the batch"):
        pair.lock(policy="sigmoid", estimator=Probe()).sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)


@pytest.mark.parametrize("bias", [0.5, 1.0])
def test_thinned_networks_read_the_same_source_by_every_route(setup, bias):
    found = []
    for options in ({}, {"batched": False}, {"foreground": False}, {"kv_cache": kv.KVCache(format=None, every=1)}):
        lock = setup.lock(policy=kv.PID(bias=bias, **HOLD), estimator=DropoutVariance(), noise="fixed", **options)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        found.append([row["variance"] for row in lock.trace.rows()])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2"])
@pytest.mark.parametrize(("churn", "most"), [(0.0, 1e9), (0.08, 1e9), (5.0, 1e9), (0.08, 2.0), (5.0, 2.0)])
def test_churn_does_not_change_how_many_steps_are_left(setup, sampler, churn, most):
    left = []

    @kv.stateless(uses_risk=False)
    def note(obs):
        left.append(obs.steps_left)
        return kv.Control(lock=0.0)

    setup.lock(policy=note, composite=0.0).sample(
        sampler, setup.x, setup.sigmas, extra_args=setup.cfg, s_churn=churn, s_tmax=most
    )
    steps = len(setup.sigmas) - 1
    assert left == sorted(left, reverse=True)
    assert (left[0], left[-1]) == (steps, 1)
    if most > 10:  # else one level may rise above the one before
        assert sorted(set(left), reverse=True) == list(range(steps, 0, -1))


def test_a_presets_threshold_stays_with_its_estimator(setup):
    preset = Preset(kv.Sigmoid(), DEFAULT_ESTIMATOR, DEFAULT_THRESHOLD)
    other = PosteriorVariance()
    assert setup.lock(policy=preset).settings.threshold == DEFAULT_THRESHOLD
    assert setup.lock(policy=preset, estimator=DEFAULT_ESTIMATOR).settings.threshold == DEFAULT_THRESHOLD
    assert (
        setup.lock(policy=preset, estimator=Sparse(DEFAULT_ESTIMATOR, every=2)).settings.threshold == DEFAULT_THRESHOLD
    )
    twice = Sparse(Sparse(DEFAULT_ESTIMATOR, every=2), every=2)
    assert setup.lock(policy=preset, estimator=twice).settings.threshold == DEFAULT_THRESHOLD
    assert setup.lock(policy=kv.Sigmoid(), estimator=twice).settings.threshold == DEFAULT_THRESHOLD
    assert setup.lock(policy=preset, estimator=other).settings.threshold == other.default_threshold
    assert setup.lock(policy=preset, estimator=other, threshold=0.5).settings.threshold == 0.5


def test_variances_of_zero_count_and_a_threshold_is_above_zero():
    bands = reference_bands([(c, 1.0, 0.0 if c % 4 else 5.0 + c) for c in range(80)], quantile=0.5, bands=1)
    assert [(band.quantile, band.clips) for band in bands] == [(5.0, 80)]
    with pytest.raises(EstimatorError, match="usable"):
        reference_bands([(c, 1.0, 0.0) for c in range(80)])


def test_exact_denoisers_are_exact_in_every_precision():
    half = GaussianDenoiser(0.0, 1.0)(torch.ones(1, 2).half(), torch.tensor([300.0]))
    assert half.dtype == torch.float16
    assert float(half[0, 0]) == pytest.approx(1 / (1 + 300**2), abs=1e-5)
    means = torch.randn(3, 4)
    assert MixtureDenoiser(means)(torch.randn(2, 4).half(), torch.tensor(300.0)).isfinite().all()
    fine = GaussianDenoiser(torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.7, dtype=torch.float64))
    found = fine(torch.ones(1, 1).double(), torch.tensor(2.0).double())
    assert float(found) == pytest.approx((0.7**2 + 4 * 0.1) / (0.7**2 + 4), rel=1e-14)
    for wrong in (lambda: GaussianDenoiser(0.0, 0.0), lambda: MixtureDenoiser(means, weights=[2.0])):
        with pytest.raises(kv.KVLockError, match="expected"):
            wrong()


@pytest.mark.parametrize("own", [kv.Sigmoid(width=0.25), kv.Constant(lock=0.5)], ids=str)
def test_a_default_of_ones_own_holds_without_a_source_too(setup, tmp_path, monkeypatch, own):
    (tmp_path / "default.toml").write_text(kv.to_toml(own))
    monkeypatch.setenv("KVLOCK_POLICIES", str(tmp_path))
    lock = kv.KVLock(setup.model)
    assert lock.settings.policy.policy == own
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert {float(step.next_lock) for step in lock.trace} == {0.0}


def test_memory_of_another_schedule_is_found():
    top = [0.0]

    @kv.stateless(uses_risk=False)
    def ramp(obs):
        top[0] = max(top[0], obs.sigma)
        return kv.Control(lock=obs.sigma / top[0])

    with pytest.raises(PolicyError, match="another schedule"):
        check_policy(ramp)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(1.0))

    def forward(self, risk):
        return (self.a * risk).clamp(0, 1)


@dataclass(frozen=True)
class ByNetwork(kv.Policy):
    net: nn.Module

    def step(self, state, obs):
        return state, kv.Control(lock=self.net(obs.risk))


class Value:
    def __init__(self, value):
        self.value = value


@dataclass(frozen=True)
class Peak(kv.Policy):
    def step(self, state, obs):
        value = obs.risk if state is None else torch.maximum(obs.risk, state.value)
        return Value(value), kv.Control(lock=value.clamp(0, 1))


@pytest.mark.parametrize(
    "policy",
    [
        ByNetwork(Learned()),
        Peak(),
        kv.stateless(lambda obs: kv.Control(lock=torch.sigmoid(obs.risk.log()))),
        kv.stateless(lambda obs: kv.Control(lock=(obs.risk**0.37).clamp(0, 1))),
    ],
    ids=["network", "state of a plain class", "sigmoid", "power"],
)
def test_right_policies_are_not_refused(policy):
    check_policy(policy, tokens=17)


def test_a_preset_to_calibrate_may_be_a_path(tmp_path):
    Path(tmp_path / "mine.toml").write_text(kv.to_toml(kv.Sigmoid()))
    video = tiny.load()
    with pytest.warns(UserWarning, match="2 clips cannot promise"):
        found = calibrate(video, scenes(2), policy=tmp_path / "mine.toml", quantile=0.8, steps=12, bands=2)
    assert found.preset.policy == kv.Sigmoid()


def test_a_churned_run_is_restarted_as_it_was(setup):
    lock = setup.lock(policy="sigmoid", threshold=1e-9)
    given = {"extra_args": setup.cfg, "s_churn": 2.0}
    x = lock.sample("euler", setup.x, setup.sigmas, **given)
    again = restart(lock, "euler", x, setup.sigmas, back_to=float(setup.sigmas[1]), limit=-1.0, **given)
    assert again.sent_back.all()


def test_release_without_a_lock_knows_the_models_patch(setup):
    policy = kv.policy.Clamped(kv.load_policy("release"), lock=(0.0, 0.0))
    lock = setup.lock(policy=policy, estimator=kv.variance.Divergence(patch="model"), composite=1.0)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert lock.settings.patch == lock.settings.estimator.patch == (1, 2, 2)


def test_probes_take_the_sources_keys_and_values_once_an_evaluation(setup):
    def passes(estimator, **options):
        lock = setup.lock(policy=kv.PID(bias=0.5, **HOLD), estimator=estimator, **options)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        return [step.nfe for step in lock.trace], set(lock.trace.routes)

    steps = len(setup.sigmas) - 1
    sparse = Sparse(DropoutVariance(passes=3), every=2)
    assert passes(sparse) == ([3 + 3 * (i % 2 == 0) for i in range(steps)], {"source pass", "lockstep"})
    assert passes(DropoutVariance(passes=3), batched=False) == ([3 + 3] * steps, {"source pass"})


@pytest.mark.parametrize("sparse", [Sparse(Divergence(), sigmas=(3.0, 1.0)), Sparse(Divergence(), every=3)], ids=str)
def test_a_sparse_comparison_with_the_source_costs_its_pass_where_it_measures(setup, sparse):
    lock = setup.lock(policy=kv.Sigmoid(lock_range=(0.0, 0.0)), estimator=sparse)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert [step.nfe for step in lock.trace].count(3) == 2
    assert {step.nfe for step in lock.trace} == {2, 3}


class Host:
    """What a host such as ComfyUI tells of its model, which guides and can take the source along."""

    def __init__(self, model, cfg):
        self.model, self.cfg, self.calls = model, cfg, []
        self.predictions = None

    def joins(self, x, sigma, arguments):
        return True

    def __call__(self, x, sigma, cond, uncond, cond_scale=1.0, beside=None):
        self.calls.append(beside is not None)
        rows, texts, count = [x, x], [uncond, cond], 2 + (beside is not None)
        if beside is not None:
            rows.append(beside[0])
            texts.append(beside[1]["cond"])
        texts = torch.cat([text.expand(len(x), *text.shape[1:]) for text in texts])
        out = self.model(torch.cat(rows), sigma.expand(len(x)).repeat(count), cond=texts).chunk(count)
        self.predictions = out[1], out[0], out[2] if count == 3 else None
        return out[0] + (out[1] - out[0]) * cond_scale


@pytest.mark.parametrize("estimator", [None, kv.variance.RenoiseVariance(passes=1)], ids=["alone", "probed"])
@pytest.mark.parametrize("bias", [0.5, 1.0])
def test_a_host_takes_the_source_along_as_the_trace_says(setup, bias, estimator):
    host = Host(setup.model, setup.cfg)

    def model(x, sigma, cond, uncond, cond_scale=1.0, beside=None):
        return host(x, sigma, cond, uncond, cond_scale, beside)

    model.kvlock_host = host
    layers = kv.find_layers(setup.model)
    policy = kv.PID(bias=bias, **HOLD) if estimator else kv.Constant(lock=bias)
    options = {} if estimator is None else {"estimator": estimator}
    options |= {"source": setup.source, "mask": setup.mask, "policy": policy, "layers": layers}
    lock = kv.KVLock(model, branch=setup.model, **options)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    steps = len(setup.sigmas) - 1
    if set(lock.trace.routes) == {"source pass"}:  # a probe at lock 1
        assert (bias, estimator is not None) == (1.0, True)
        return
    assert set(lock.trace.routes) == {"interleaved" if bias == 1 else "lockstep"}
    assert host.calls == [True] * steps * (1 if estimator is None else 2)
