"""Clips at risk are sent back, alone, and everything else stays as it was."""

from __future__ import annotations

import pytest
import torch

import kvlock_sampling as kv
from kvlock_sampling.batching import take
from kvlock_sampling.restart import last_risk, restart
from kvlock_sampling.testing import GaussianDenoiser
from kvlock_sampling.types import RunError


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def measured_lock(pair, **arguments):
    return pair.lock(policy=kv.policy.Clamped(kv.Linear(), lock=(0.2, 1.0)), threshold=1.0, **arguments)


def test_only_flagged_clips_change(pair):
    lock = measured_lock(pair)
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    risk = last_risk(lock.trace)
    first = lock.trace
    limit = float(risk.mean())  # between the two clips
    arguments = {"back_to": 3.0, "extra_args": pair.cfg, "seed": 1}
    result = restart(lock, "euler", x, pair.sigmas, limit=limit, **arguments)
    assert torch.equal(result.sent_back, risk > limit)
    assert result.sent_back.sum() == 1
    kept, sent = int((~result.sent_back).nonzero()), int(result.sent_back.nonzero())
    assert torch.equal(result.x[kept], x[kept])
    assert not torch.equal(result.x[sent], x[sent])
    background = (pair.mask[sent] == 0).expand_as(x[sent])
    torch.testing.assert_close(result.x[sent][background], pair.source[sent][background], rtol=0, atol=1e-3)
    assert len(result.trace) == int(((pair.sigmas <= 3.0) & (pair.sigmas > 0)).sum())
    assert lock.trace is first
    again = restart(lock, "euler", x, pair.sigmas, limit=limit, **arguments)
    assert torch.equal(again.x, result.x)


def test_a_seed_reaches_whatever_takes_noise(pair):
    """A wrapper's **kwargs take the noise as a parameter of that name does."""

    def wrapped(model, x, sigmas, **options):
        return kv.samplers.euler_ancestral(model, x, sigmas, **options)

    lock = measured_lock(pair)
    x = lock.sample(wrapped, pair.x, pair.sigmas, extra_args=pair.cfg, seed=1)
    options = {"back_to": 3.0, "extra_args": pair.cfg, "seed": 1, "limit": -1.0}
    found = [restart(lock, sampler, x, pair.sigmas, **options).x for sampler in (wrapped, wrapped, "euler_ancestral")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    heun = lambda *given, **named: kv.samplers.heun(*given, **named)  # noqa: E731
    assert torch.equal(*(restart(lock, sampler, x, pair.sigmas, **options).x for sampler in (heun, "heun")))


def test_a_sampler_that_reads_its_arguments_is_seeded_and_planned(pair):
    def reads(model, x, sigmas, extra_args=None, **options):
        assert len(x.shape) == 5
        given = {**extra_args, "cond_scale": extra_args["cond_scale"]}
        return kv.samplers.euler_ancestral(model, x, sigmas, extra_args=given, **options)

    lock = measured_lock(pair, kv_cache=kv.KVCache())
    x = lock.sample(reads, pair.x, pair.sigmas, extra_args=pair.cfg, seed=1)
    options = {"back_to": 3.0, "extra_args": pair.cfg, "seed": 1, "limit": -1.0}
    found = [restart(lock, sampler, x, pair.sigmas, **options).x for sampler in (reads, reads, "euler_ancestral")]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert repr(lock.plan(pair.sigmas, reads)) == repr(lock.plan(pair.sigmas, "euler_ancestral"))


def test_noise_of_ones_own_is_cut_to_the_clips_sent_back(pair):
    lock, seen = measured_lock(pair), []

    def noise(high, low):
        return torch.randn(pair.x.shape, generator=torch.Generator().manual_seed(len(seen)))

    def sampler(model, x, sigmas, noise_sampler=None, **options):
        seen.append(noise_sampler(sigmas[0], sigmas[1]))
        return kv.samplers.euler(model, x, sigmas, **options)

    x = lock.sample(sampler, pair.x, pair.sigmas, extra_args=pair.cfg, noise_sampler=noise)
    limit = float(last_risk(lock.trace).mean())
    options = {"back_to": 3.0, "extra_args": pair.cfg, "noise_sampler": noise}
    sent = restart(lock, sampler, x, pair.sigmas, limit=limit, **options).sent_back
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(seen[1], torch.randn(pair.x.shape, generator=generator)[sent])
    options["noise_sampler"] = lambda high, low: torch.zeros(1, 1, 1, 1, 1)  # the same for all
    restart(lock, sampler, x, pair.sigmas, limit=limit, **options)
    assert seen[2].shape == (1, 1, 1, 1, 1)


def test_nothing_at_risk_costs_nothing(pair):
    lock = measured_lock(pair)
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    result = restart(lock, "euler", x, pair.sigmas, back_to=3.0, limit=1e9, extra_args=pair.cfg)
    assert torch.equal(result.x, x)
    assert result.trace is None


def test_a_subset_of_a_lock_is_the_lock_of_the_subset(pair):
    index = torch.tensor([1])
    cfg = take(pair.cfg, index, 2)
    part = measured_lock(pair, source_args={"cond": pair.cond}).subset(index, 2)
    alone = kv.KVLock(
        pair.model,
        source=pair.source[1:],
        mask=pair.mask[1:],
        policy=kv.policy.Clamped(kv.Linear(), lock=(0.2, 1.0)),
        threshold=1.0,
        source_args={"cond": pair.cond[1:]},
    )
    outs = [lock.sample("heun", pair.x[1:], pair.sigmas, extra_args=cfg) for lock in (part, alone)]
    assert torch.equal(*outs)


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_the_sampler_does_not_draw_the_noise_that_sent_a_clip_back(sampler):
    lock = kv.KVLock(GaussianDenoiser(std=1.0), policy=kv.Sigmoid(lock_range=(0.0, 0.0)), threshold=1e-12)
    sigmas, made = torch.tensor([10.0, 5.0, 3.5, 2.0, 1.0, 0.0]), torch.randn(2, 4, 4, 32, 32, generator=seeded(0))
    x, seen = lock.sample(sampler, made * 10, sigmas, seed=[1, 2]), {}
    restart(lock, sampler, x, sigmas, back_to=3.5, callback=lambda step: seen.setdefault(float(step["sigma"]), step))
    assert float(seen[2.0]["x"].std()) == pytest.approx(5**0.5, rel=0.1)  # of x0 and of the noise at 2


def test_a_mask_for_all_pictures_stays_one_where_they_are_as_many_as_its_rows():
    pictures, mask = torch.randn(8, 4, 8, 8, generator=seeded(0)), torch.zeros(8, 8)
    mask[2:5, 2:5] = 1
    options = {"mask": mask, "policy": "off", "composite": True}
    sigmas, denoiser = torch.tensor([10.0, 3.0, 0.0]), GaussianDenoiser(std=1.0)
    x = torch.randn(8, 4, 8, 8, generator=seeded(1)) * 10
    whole = kv.KVLock(denoiser, source=pictures, **options)
    part = whole.subset(torch.tensor([1, 3]), 8).sample("euler", x[[1, 3]], sigmas)
    assert torch.equal(part, whole.sample("euler", x, sigmas)[[1, 3]])


def test_clips_may_be_an_array(pair):
    lock = measured_lock(pair)
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    options = {"back_to": 3.0, "limit": -1.0, "extra_args": pair.cfg}
    found = [restart(lock, "euler", clips, pair.sigmas, **options).x for clips in (x, x.numpy())]
    assert torch.equal(*found)


def test_noise_that_passed_for_all_clips_passes_for_each(pair):
    noise = torch.randn(pair.source.shape, generator=torch.Generator().manual_seed(0))
    noise[0] *= 0.2
    part = pair.lock(policy="half", noise=noise).subset(torch.tensor([0]), 2)
    assert torch.equal(part.settings.source.noise, noise[:1])


def test_what_cannot_be_resampled_says_why(pair):
    lock = pair.lock(policy=kv.Constant(0.5))
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    with pytest.raises(RunError, match="nothing was measured"):
        restart(lock, "euler", x, pair.sigmas, back_to=3.0, extra_args=pair.cfg)
    with pytest.raises(RunError, match="leaves no step of the schedule"):
        restart(lock, "euler", x, pair.sigmas, back_to=1e-6, extra_args=pair.cfg)


def test_a_mask_of_as_many_frames_as_clips_is_cut_by_clips(pair):
    three = [torch.cat([t, 0.7 * t[:1]]) for t in (pair.x, pair.source, pair.cond, pair.uncond)]
    cfg = {"cond": three[2], "uncond": three[3], "cond_scale": 3.0}
    mask = pair.mask[0, 0]  # (3 frames, height, width), for 3 clips
    lock = kv.KVLock(pair.model, source=three[1], mask=mask, policy=kv.policy.Clamped(kv.Linear(), lock=(0.2, 1.0)))
    x = lock.sample("euler", three[0], pair.sigmas, extra_args=cfg)
    limit = float(last_risk(lock.trace).median())
    result = restart(lock, "euler", x, pair.sigmas, back_to=3.0, limit=limit, extra_args=cfg)
    assert 0 < result.sent_back.sum() < 3


@pytest.mark.parametrize("slip", [{"seed": -1}, {"limit": float("nan")}])
def test_a_restart_by_no_number_is_refused(pair, slip):
    lock = measured_lock(pair)
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    with pytest.raises(RunError, match=r"=(nan|-1); expected a (finite|whole) number"):
        restart(lock, "euler", x, pair.sigmas, back_to=2.0, extra_args=pair.cfg, **{"limit": 0.0} | slip)


def test_one_step_is_enough_for_one_round(pair):
    lock = measured_lock(pair)
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    back = float(pair.sigmas[-2])
    assert restart(lock, "euler", x, pair.sigmas, back_to=back, limit=0.0, extra_args=pair.cfg).sent_back.all()


def test_take_cuts_whatever_has_a_row_per_clip():
    table = torch.zeros(5, 2)
    tree = {"a": torch.tensor([1, 2]), "b": [torch.tensor([[3], [4]])], "c": ["p", "q"], "d": table, "e": 7}
    cut = take(tree, torch.tensor([1]), 2)
    assert cut["a"].tolist() == [2]
    assert cut["b"][0].tolist() == [[4]]
    assert cut["c"] == ["q"]
    assert cut["d"] is table
    assert cut["e"] == 7


def test_clips_in_half_precision_stay_in_it(pair):
    lock = measured_lock(pair)
    x = lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg).bfloat16()
    found = restart(lock, "euler", x, pair.sigmas, back_to=3.0, extra_args=pair.cfg, limit=-1.0)
    assert found.x.dtype == torch.bfloat16
    assert found.sent_back.all()


def test_the_source_of_a_restart_has_the_noise_that_is_added_and_not_the_edit(pair):
    """What leads from the source to the noised edit would carry the edit, and measure no change."""
    lock, seen = measured_lock(pair), []
    finished = pair.x * 0 + 5.0  # an edit far from the source
    lock.sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)

    def sampler(model, x, sigmas, noise_sampler=None, **options):
        run = model._run()
        out = kv.samplers.euler(model, x, sigmas, **options)
        seen.append((x, sigmas[0], run.noise))
        return out

    restart(lock, sampler, finished, pair.sigmas, back_to=3.0, limit=-1.0, extra_args=pair.cfg, seed=1)
    ((x, sigma, noise),) = seen
    torch.testing.assert_close(noise, (x - finished) / sigma, rtol=0, atol=1e-5)
