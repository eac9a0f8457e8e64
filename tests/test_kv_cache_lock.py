"""A lock with a KV cache: fewer passes of the source, and K/V serve again only where nothing has changed."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.kv_cache import KVCacheWarning, disk, model_fingerprint
from kvlock_sampling.types import AttentionError, RunError, SourceError

FULL = kv.Constant(lock=1.0)


def run(setup, kv_cache, **options):
    """One run with a KV cache: result, passes of the source, trace."""
    options = {"policy": FULL, "noise": "fixed", **options}
    x, sampler = options.pop("x", setup.x), options.pop("sampler", "euler")
    lock = setup.lock(kv_cache=kv_cache, **options)
    out = lock.sample(sampler, x, setup.sigmas, extra_args=setup.cfg)
    return out, sum(s.nfe - 2 for s in lock.trace), lock.trace


@pytest.mark.parametrize("policy", [FULL, kv.Constant(lock=0.6)])
@pytest.mark.parametrize("foreground", [None, False])
def test_an_exact_cache_that_is_refreshed_every_time_changes_nothing(setup, policy, foreground):
    kv_cache = kv.KVCache(format=None, every=1)
    plain = setup.lock(policy=policy, noise="fixed", foreground=False)
    expected = plain.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    out, passes, trace = run(setup, kv_cache, policy=policy, foreground=foreground)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    assert passes == len(trace)
    again, passes, _ = run(setup, kv_cache, policy=policy, foreground=foreground)
    assert passes == 0
    torch.testing.assert_close(again, out)


def test_every_third_evaluation_runs_the_source(setup):
    _, passes, trace = run(setup, kv.KVCache(every=3, ratio=None))
    assert [s.nfe for s in trace] == [3, 2, 2, 3, 2, 2]
    assert passes == 2


def test_a_directory_serves_another_process_and_another_seed(setup, tmp_path):
    first, passes, _ = run(setup, kv.KVCache(tmp_path, every=1))
    assert passes == 6
    again, passes, _ = run(setup, kv.KVCache(tmp_path, every=1))
    assert passes == 0
    torch.testing.assert_close(again, first)
    _, passes, _ = run(setup, kv.KVCache(tmp_path, every=1), x=setup.x.flip(-1))
    assert passes == 0  # the source's noise is fixed, whatever the edit starts from


def test_what_changes_the_source_is_another_entry(setup, tmp_path):
    run(setup, kv.KVCache(tmp_path, every=2, ratio=None))
    for change in (
        {"source": setup.source + 0.1},
        {"mask": setup.mask.flip(-1)},
        {"source_args": {"cond": setup.cond + 1}},
        {"noise": torch.randn_like(setup.source)},
    ):
        assert run(setup, kv.KVCache(tmp_path, every=2, ratio=None), **change)[1] == 3, change
    with torch.no_grad():
        next(setup.model.parameters()).add_(0.1)
    assert run(setup, kv.KVCache(tmp_path, every=2, ratio=None))[1] == 3


def test_several_runs_in_one_block_share_what_they_can(setup):
    with setup.lock(policy=FULL, noise="fixed", kv_cache=kv.KVCache(every=1)) as lock:
        first = kv.samplers.run("euler", lock, setup.x, setup.sigmas, extra_args=setup.cfg)
        count = len(lock.trace)
        again = kv.samplers.run("euler", lock, setup.x, setup.sigmas, extra_args=setup.cfg)
    torch.testing.assert_close(again, first)
    assert [s.nfe for s in lock.trace][count:] == [2] * count


def test_a_guided_model_keeps_its_source_under_any_scale(setup):
    kv_cache = kv.KVCache(every=1)
    policy = kv.stateless(lambda obs: kv.Control(lock=1.0, cfg_scale=obs.requested_cfg_scale * (1 + obs.sigma / 1e4)))
    passes = []
    for _ in range(2):
        lock = kv.KVLock(
            kv.CFGDenoiser(setup.model),
            source=setup.source,
            mask=setup.mask,
            policy=policy,
            noise="fixed",
            kv_cache=kv_cache,
        )
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        passes.append([s.nfe for s in lock.trace])
    assert passes == [[2, 2, 4, 4, 4, 4], [2] * 6]  # nothing is locked before a risk is known


def test_heun_stores_every_noise_level_once(setup):
    _, passes, trace = run(setup, kv.KVCache(every=1), sampler="heun")
    assert passes == len({round(s.sigma, 6) for s in trace if s.lock.max() > 0})


def test_anything_but_a_cache_raises_even_where_nothing_is_locked(setup):
    for policy in ("full", "off"):
        with pytest.raises(AttentionError, match=r"kv_cache='kv-cache'; expected a KVCache"):
            setup.lock(policy=policy, kv_cache="kv-cache")


def test_a_budget_below_one_level_warns_and_the_lock_goes_on_without_a_cache(setup):
    kv_cache = kv.KVCache(budget=100, format=None)
    lock = setup.lock(policy=FULL, noise="fixed", kv_cache=kv_cache)
    assert "nothing is kept" in str(lock.plan(setup.sigmas))
    with pytest.warns(KVCacheWarning, match="one level needs"):
        out = lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert [s.nfe for s in lock.trace] == [3] * 6
    expected = setup.lock(policy=FULL, noise="fixed", foreground=False)
    expected = expected.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


class Two(nn.Module):
    """Two experts, the first for high noise."""

    def __init__(self, setup) -> None:
        super().__init__()
        self.transformer = setup.model.inner_model
        self.transformer_2 = copy.deepcopy(setup.model.inner_model)
        with torch.no_grad():
            for p in self.transformer_2.parameters():
                p.mul_(1.05)

    def expert(self, time):
        return int(float(time.max()) < 0.5)

    def forward(self, z, t, cond):
        return (self.transformer, self.transformer_2)[self.expert(t)](z, t, cond)


def test_two_experts_have_entries_of_their_own(setup):
    setup.model = kv.FlowDenoiser(Two(setup)).eval()
    kv_cache = kv.KVCache(every=1)
    out, passes, trace = run(setup, kv_cache)
    assert passes == len(trace)
    again, passes, _ = run(setup, kv_cache)
    assert passes == 0
    torch.testing.assert_close(again, out)
    plain = setup.lock(policy=FULL, noise="fixed", foreground=False)
    expected = plain.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    torch.testing.assert_close(run(setup, kv.KVCache(format=None, every=1))[0], expected, rtol=1e-3, atol=1e-3)


def test_layers_that_cannot_be_kept_raise(setup):
    with pytest.raises(AttentionError, match="expected a KVCache"):
        setup.lock(kv_cache="kv-cache")
    with pytest.raises(AttentionError, match="declare it"):
        setup.lock(kv_cache=kv.KVCache(), layers=kv.sdpa_layers(setup.model, patch=(1, 2, 2)))
    with pytest.raises(SourceError, match="noise='fix'; expected a tensor like source, \"fixed\""):
        setup.lock(noise="fix")


def test_a_plan_is_what_the_run_then_holds(setup):
    kv_cache = kv.KVCache(every=3, ratio=None, format="int8")
    lock = setup.lock(policy=FULL, noise="fixed", kv_cache=kv_cache)
    plan = lock.plan(setup.sigmas)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert plan.levels == 2
    assert kv_cache.used == plan.total
    assert str(plan).startswith("2 levels of ")
    with pytest.raises(RunError, match=r"kv_cache=kv.KVCache"):
        setup.lock().plan(setup.sigmas)


def test_the_second_edit_of_a_clip_runs_no_source_pass(tmp_path):
    """With edit_video: another prompt, another seed, another KVCache object on the same directory."""
    before, after = tiny.sample_edit(6, "reshape")
    clip, mask = tiny.render([before]), tiny.edit_mask([before], [after])
    plans, nfe = [], []
    for seed, prompt in enumerate(("a red ball moving left", "a blue box moving right")):
        edit = kv.edit_video(
            clip,
            mask,
            prompt,
            policy="full",
            steps=4,
            seed=seed,
            kv_cache=kv.KVCache(tmp_path, every=2, ratio=None),
            on_plan=plans.append,
        )
        nfe.append(edit.trace.nfe)
    assert nfe == [4 * 2 + 2, 4 * 2]
    assert [p.levels for p in plans] == [2, 2]


def test_a_lock_and_its_cache_can_be_copied_and_pickled(setup, tmp_path):
    lock = setup.lock(policy=FULL, noise="fixed", kv_cache=kv.KVCache(tmp_path, every=1))
    first = lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    for other in (copy.deepcopy(lock), pickle.loads(pickle.dumps(lock))):
        again = other.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        torch.testing.assert_close(again, first)
        assert [s.nfe for s in other.trace] == [2] * 6
    kv_cache = kv.KVCache()
    assert copy.deepcopy(kv_cache) is kv_cache


def test_conditioning_made_anew_at_every_call_is_the_same_entry(setup):
    kv_cache = kv.KVCache(every=1, format=None)
    lock = setup.lock(policy=FULL, kv_cache=kv_cache)
    with lock:
        lock.on_schedule(setup.sigmas)
        for sigma in setup.sigmas[:-1]:
            lock(setup.x, sigma[None], **{**setup.cfg, "cond": setup.cond.clone()})
    assert [s.nfe for s in lock.trace] == [3] * 6
    assert len({name for name, _ in kv_cache.memory._levels}) == 1


def test_a_small_budget_serves_any_number_of_runs_in_one_block(setup):
    kv_cache = kv.KVCache(budget="40kB")
    with setup.lock(policy=FULL, kv_cache=kv_cache) as lock:
        for seed in range(6):
            x = torch.randn(setup.x.shape, generator=torch.Generator().manual_seed(seed)) * setup.sigmas[0]
            kv.samplers.run("euler", lock, x, setup.sigmas, extra_args=setup.cfg)
            assert 0 < kv_cache.used <= 40_000


def test_changes_in_place_are_noticed_within_a_block(setup):
    cond, kv_cache = setup.cond.clone(), kv.KVCache(every=1)
    linear = next(m for m in setup.model.modules() if isinstance(m, nn.Linear))
    passes = []
    with setup.lock(policy=FULL, noise="fixed", kv_cache=kv_cache) as lock:
        for change in (lambda: None, lambda: cond.add_(1), lambda: linear.weight.data[1].mul_(1.5), lambda: None):
            change()
            kv.samplers.run("euler", lock, setup.x, setup.sigmas, extra_args={**setup.cfg, "cond": cond})
            passes.append(sum(s.nfe for s in lock.trace) - sum(passes))
    assert passes == [18, 18, 18, 12]


def test_what_the_denoiser_holds_beside_weights_counts(setup):
    kv_cache, passes = kv.KVCache(every=1), []
    for strength in (1.0, 0.5, 1.0):
        inner = setup.model.inner_model
        model = kv.FlowDenoiser(inner, call=lambda m, z, t, cond, s=strength: m(z, t, cond=cond * s))
        lock = kv.KVLock(model, source=setup.source, mask=setup.mask, policy=FULL, noise="fixed", kv_cache=kv_cache)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        passes.append(lock.trace.nfe)
    assert passes == [18, 18, 12]
    setup.model.extra = 2.0
    assert model_fingerprint(setup.model) != (setattr(setup.model, "extra", 3.0) or model_fingerprint(setup.model))


def test_the_denoiser_inside_a_guided_model_counts(setup):
    """The source's pass runs `branch`, so that is what stored keys and values are of."""
    kv_cache, passes = kv.KVCache(every=1, format=None), []
    model, options = kv.CFGDenoiser(setup.model), {"source": setup.source, "mask": setup.mask, "policy": FULL}
    for strength in (1.0, -3.0, 1.0):
        out = []
        for cache in (kv_cache, None):
            branch = lambda x, sigma, cond, s=strength: setup.model(x, sigma, cond=cond * s)  # noqa: E731
            lock = kv.KVLock(model, branch=branch, noise="fixed", kv_cache=cache, **options)
            out.append(lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg))
            passes += [lock.trace.nfe] if cache else []
        torch.testing.assert_close(*out, rtol=1e-4, atol=1e-4)
    assert passes[0] == passes[1] > passes[2]


@pytest.mark.parametrize("change", ["key", "array", "kind"])
def test_other_arguments_of_the_same_tensors_are_told_apart_within_a_block(setup, change):
    array = np.ones(1)
    given = {
        "key": [{"a": setup.cond}, {"b": setup.cond}],
        "array": [{"a": setup.cond, "c": array}] * 2,
        "kind": [{"a": setup.cond, "c": 1}, {"a": setup.cond, "c": 1.0}],
    }[change]
    inner, kv_cache = setup.model, kv.KVCache(every=1, format=None)

    def model(x, sigma, cond):
        factor = float(np.sum(cond.get("c", 1.0))) * (1 if "a" in cond else 2)
        return inner(x, sigma, cond=cond.get("a", cond.get("b")) * factor)

    model.inner_model = inner
    options = {"source": setup.source, "mask": setup.mask, "policy": FULL, "noise": "fixed", "kv_cache": kv_cache}
    with kv.KVLock(model, **options, layers=kv.find_layers(inner)) as lock:
        for i, cond in enumerate(given):
            lock(setup.x, setup.sigmas[i : i + 1], cond=cond)
            array[0] = 2.0
    assert len({name for name, _ in kv_cache.memory._levels}) == 2


def test_a_level_that_cannot_be_stored_leaves_the_lock_closed(setup, tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("out of memory")

    lock = setup.lock(policy=FULL, noise="fixed", kv_cache=kv.KVCache(tmp_path, every=1))
    monkeypatch.setattr(disk, "write", broken)
    with pytest.raises(RuntimeError, match="out of memory"), lock:
        lock(setup.x, setup.sigmas[:1], **setup.cfg)
    with pytest.raises(RunError):
        lock(setup.x, setup.sigmas[:1], **setup.cfg)


def test_a_folder_stays_where_it_was_made(setup, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kv_cache = kv.KVCache("kept", every=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    run(setup, kv_cache)
    assert [path.name for path in tmp_path.iterdir() if any(path.iterdir())] == ["kept"]


def test_the_plan_counts_levels_on_the_clock_of_the_cache():
    """A ratio of noise levels is one of sigma, also for a model whose own levels are flow times."""
    network = tiny.TinyWan()
    inner = kv.FlowDenoiser(network)

    def model(x, t, **given):
        sigma = t / (1 - t)
        return inner(x * (1 + sigma.view(-1, 1, 1, 1, 1)), sigma, **given)

    model.to_ve = lambda t: t / (1 - t)
    model.add_noise = lambda x0, noise, t: (1 - t) * x0 + t * noise
    times = torch.tensor([0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.0])
    clip, mask = torch.randn(1, 3, 8, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 1, 8, 64, 64)
    mask[..., 16:40, 16:40] = 1
    kv_cache = kv.KVCache(every=None, ratio=1.5, format=None)
    lock = kv.KVLock(
        model, source=clip, mask=mask, policy=FULL, noise="fixed", kv_cache=kv_cache, layers=kv.find_layers(network)
    )
    plan = lock.plan(times, "euler")
    with torch.no_grad():
        lock.sample("euler", clip, times, extra_args={"cond": tiny.tokenize(["a red ball moving left"])})
    assert kv_cache.used == plan.total


def test_autocast_has_an_entry_of_its_own(setup):
    kv_cache = kv.KVCache(every=1, format=None)
    with torch.autocast("cpu", torch.bfloat16):
        run(setup, kv_cache)
    out, passes, trace = run(setup, kv_cache)
    assert passes == len(trace)
    torch.testing.assert_close(out, run(setup, kv.KVCache(every=1, format=None))[0])


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_sde", "dpmpp_2m", "lms"])
def test_the_plan_counts_what_the_sampler_evaluates(setup, sampler):
    kv_cache = kv.KVCache(every=2, format="int8")
    lock = setup.lock(policy=FULL, noise="fixed", kv_cache=kv_cache)
    plan = lock.plan(setup.sigmas, sampler)
    lock.sample(sampler, setup.x, setup.sigmas, extra_args=setup.cfg)
    assert kv_cache.used == plan.total


def test_a_run_of_another_precision_has_levels_of_its_own(setup):
    kv_cache = kv.KVCache(format=None, every=1, ratio=1.0)
    passes = []
    for dtype in (torch.bfloat16, torch.float32, torch.float32):
        lock = setup.lock(policy="full", noise="fixed", kv_cache=kv_cache)
        with lock, torch.no_grad():
            lock(setup.x.to(dtype), setup.sigmas[:1], cond=setup.cond)
        passes.append(lock.trace.nfe)
    assert passes == [2, 2, 1]
