"""The KV cache in memory: when a level serves, what it returns, the budget, threads, plans and fingerprints."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
import threading

import pytest
import torch
from banks import LEVEL_BYTES, SHAPE, SITE_BYTES, SITES, contents, equal, key, run, store
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kvlock_sampling.kv_cache import (
    KVCache,
    KVCacheError,
    KVCacheKey,
    arguments_fingerprint,
    expected_levels,
    model_fingerprint,
    plan_for,
    tensor_fingerprint,
)
from kvlock_sampling.kv_cache.format import pack, unpack
from kvlock_sampling.kv_cache.sizes import parse_bytes, readable

FALLING = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]

# -- when a level serves ----------------------------------------------------------------------------------------------


def passes(sigmas, **settings):
    with KVCache(format=None, **settings).opened(key()) as shelf:
        return run(shelf, sigmas)


def test_every_alone_is_a_source_pass_every_n_noise_levels():
    assert passes(FALLING, every=3, ratio=None) == [8.0, 5.0, 2.0]
    assert passes(FALLING, every=1, ratio=None) == FALLING


def test_ratio_alone_is_a_source_pass_when_sigma_has_moved_enough():
    assert passes(FALLING, every=None, ratio=1.5) == [8.0, 5.0, 3.0, 1.0, 0.5]
    assert passes(FALLING, every=None, ratio=1.0) == FALLING


def test_both_refresh_at_whichever_comes_first():
    assert passes(FALLING, every=3, ratio=1.5) == [8.0, 5.0, 3.0, 1.0, 0.5]
    assert passes(FALLING, every=2, ratio=1.5) == [8.0, 6.0, 4.0, 2.0, 1.0, 0.5]


def test_heun_asking_twice_does_not_age_a_level():
    heun = [8.0, 7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0]
    assert passes(heun, every=3, ratio=None) == passes(sorted(set(heun), reverse=True), every=3, ratio=None)
    jitter = [8.0, 7.0, 7.0 * (1 + 3e-5), 6.0, 6.0 * (1 - 3e-5), 5.0]
    assert passes(jitter, every=3, ratio=None) == [8.0, 5.0]


def test_churn_goes_up_a_little_and_is_served_from_below():
    with KVCache(format=None, every=2, ratio=1.2, interpolate=False).opened(key()) as shelf:
        run(shelf, [8.0])
        assert shelf.lookup(8.4).sigma == 8.0
        run(shelf, [6.0])
        assert shelf.lookup(6.3).sigma == 6.0
        assert shelf.stats == (4, 2, 2)


def test_a_rejected_step_taken_back_finds_its_levels_as_they_were():
    with KVCache(format=None, every=3, ratio=1.5, interpolate=False).opened(key()) as shelf:
        assert run(shelf, [8.0, 7.0, 6.0, 5.0, 4.0]) == [8.0, 5.0]
        assert run(shelf, [8.0, 7.0, 6.0, 5.0, 4.0]) == []  # far more than `every` calls later
        assert shelf.lookup(7.0).sigma == 8.0
        assert shelf.lookup(10.0).sigma == 8.0
        assert shelf.lookup(12.5) is None


def test_the_nearest_level_in_log_sigma_serves():
    with KVCache(format=None, every=None, ratio=4.0, interpolate=False).opened(key()) as shelf:
        shelf.put(8.0, store(8.0))
        shelf.put(2.0, store(2.0))
        assert shelf.lookup(4.1).sigma == 8.0
        assert shelf.lookup(3.9).sigma == 2.0
        assert shelf.lookup(4.0).sigma == 8.0  # as far from both: the noisier, which came first


@given(
    st.lists(st.floats(0.01, 80), min_size=1, max_size=20),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.floats(1, 3)),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_run_repeated_needs_no_source_pass(sigmas, every, ratio, interpolate):
    if every is None and ratio is None:
        every = 1
    kv_cache = KVCache(format=None, every=every, ratio=ratio, budget=None, interpolate=interpolate)
    one = ("layer",)
    with kv_cache.opened(key(layers=one)) as shelf:
        first = run(shelf, sigmas, shape=(1, 1, 1, 1), layers=one)
        assert len(first) == shelf.stats.stored
        assert shelf.stats.served == len(sigmas) - len(first)
        if not interpolate or sigmas == sorted(sigmas, reverse=True):
            assert expected_levels(sigmas, every=every, ratio=ratio) == len(first)
    with kv_cache.opened(key(layers=one)) as shelf:
        assert run(shelf, sigmas, shape=(1, 1, 1, 1), layers=one) == []
    for sigma in sigmas:  # and within the ratio it promised
        assert ratio is None or min(abs(math.log(sigma / s)) for s in shelf.sigmas) <= math.log(ratio) + 1e-3


def test_an_earlier_runs_levels_are_held_to_the_ratio_alone():
    kv_cache = KVCache(format=None, every=2, ratio=1.5)
    with kv_cache.opened(key()) as shelf:
        run(shelf, [8.0])
        shelf.restart()
        assert run(shelf, [8.0, 7.5, 7.0, 6.5, 6.0]) == []
        assert run(shelf, [5.0]) == [5.0]
    with kv_cache.opened(key()) as shelf:
        assert run(shelf, [7.9, 7.5, 7.0, 6.5, 6.0, 5.0, 4.5, 4.0]) == []


def test_interpolation_is_exact_at_the_nodes_and_linear_in_log_sigma_between():
    kv_cache = KVCache(format=None, every=None, ratio=3.0, interpolate=True)
    with kv_cache.opened(key()) as shelf:
        for sigma in (8.0, 2.0):
            shelf.put(sigma, store(sigma))
        for sigma in (8.0, 2.0, 2.0 * (1 + 5e-5)):
            assert equal(contents(shelf.lookup(sigma)), [x for pair in store(round(sigma)).values() for x in pair])
        level = shelf.lookup(4.0)
        assert (level.sigma, level.sigmas) == (4.0, (2.0, 8.0))
        for layer in SITES:
            for got, low, high in zip(level.get(layer), store(2.0)[layer], store(8.0)[layer], strict=True):
                torch.testing.assert_close(got, (low + high) / 2)
        quarter = shelf.lookup(2.0 * 4**0.25).get(SITES[0])[0]
        torch.testing.assert_close(quarter, 0.75 * store(2.0)[SITES[0]][0] + 0.25 * store(8.0)[SITES[0]][0])


def straight(sigma):
    """K/V that are linear in log sigma."""
    return {
        layer: (torch.full(SHAPE, math.log(sigma) + i), torch.full(SHAPE, -math.log(sigma)))
        for i, layer in enumerate(SITES)
    }


def test_beyond_the_last_level_the_line_goes_on_but_not_far():
    kv_cache = KVCache(format=None, every=None, ratio=2.0, interpolate=True)
    with kv_cache.opened(key()) as shelf:
        shelf.put(8.0, straight(8.0))
        assert shelf.lookup(6.0).sigmas == (8.0,)  # one level is no line
        shelf.put(5.0, straight(5.0))
        for sigma, through in ((4.0, (8.0, 5.0)), (3.5, (8.0, 5.0)), (10.0, (5.0, 8.0))):
            level = shelf.lookup(sigma)
            assert level.sigmas == through
            for layer in SITES:
                for got, expected in zip(level.get(layer), straight(sigma)[layer], strict=True):
                    torch.testing.assert_close(got, expected)
        assert shelf.lookup(2.4) is None  # the last level does not serve
        shelf.put(4.8, straight(4.8))
        level = shelf.lookup(3.0)  # 4.8 and 5 are too close to say much of 3: as far beyond as they are apart
        assert level.sigmas == (5.0, 4.8)
        torch.testing.assert_close(level.get(SITES[0])[0], straight(4.8**2 / 5)[SITES[0]][0])
    with KVCache(format=None, every=None, ratio=1.5, interpolate=True).opened(key()) as shelf:
        shelf.put(8.0, straight(8.0))
        shelf.put(4.0, straight(4.0))
        assert shelf.lookup(3.0).sigmas == (4.0,)  # 8 is more than 1.5^2 away
        assert shelf.lookup(5.6).sigmas == (4.0, 8.0)  # both within 1.5
        assert shelf.lookup(5.0).sigmas == (4.0,)  # 8 is not


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "float32", "bf16", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["host", "device"])
def test_put_returns_what_every_later_lookup_returns(format, dtype, tier):
    kv = {layer: (k.to(dtype), v.to(dtype)) for layer, (k, v) in store(3.0).items()}
    kv_cache = KVCache(format=format, tier=tier)
    with kv_cache.opened(key()) as shelf:
        put = contents(shelf.put(3.0, kv))
        assert equal(contents(shelf.lookup(3.0)), put)
        assert shelf.put(3.0, store(5.0)).sigma == 3.0  # there already
        for layer in SITES:
            for got, given_ in zip(shelf.lookup(3.0).get(layer), kv[layer], strict=True):
                assert got.dtype == dtype
                assert torch.equal(got, unpack(pack(given_, format)))
        kv[SITES[0]][0].fill_(100)
        assert equal(contents(shelf.lookup(3.0)), put)
    with kv_cache.opened(key()) as shelf:
        assert equal(contents(shelf.lookup(3.0)), put)


@pytest.mark.parametrize("format", [None, "float32", "bf16", "int8", "fp8"])
def test_what_one_run_stores_in_inference_mode_serves_another_that_takes_gradients(tmp_path, format):
    for kv_cache in (KVCache(format=format), KVCache(tmp_path, format=format)):
        with torch.inference_mode(), kv_cache.opened(key()) as shelf:
            shelf.put(3.0, store(3.0))
        x = torch.ones(SHAPE, requires_grad=True)
        with kv_cache.opened(key()) as shelf:
            k, _ = shelf.lookup(3.0).get(SITES[0])
            (x * k).sum().backward()
        assert torch.equal(x.grad, k)


def test_keys_do_not_mix_and_sites_not_named_are_passed_over():
    kv_cache = KVCache(format=None)
    with kv_cache.opened(key("a")) as a, kv_cache.opened(key("b", SITES[1:2])) as b:
        a.put(4.0, store(4.0))
        assert b.lookup(4.0) is None
        level = b.put(4.0, store(4.0))
        assert level.layers == (SITES[1],)
        assert SITES[1] in level
        assert SITES[0] not in level
        assert kv_cache.used == LEVEL_BYTES + SITE_BYTES
        with pytest.raises(KVCacheError, match=r"blocks\.9.*keeps those of blocks\.1\.attn1"):
            level.get("blocks.9")


def test_mistakes_are_named():
    kv_cache = KVCache(format=None)
    with kv_cache.opened(key()) as shelf:
        with pytest.raises(KVCacheError, match=r"no K/V of blocks\.2\.attn1"):
            shelf.put(1.0, store(1.0, layers=SITES[:2]))
        shelf.put(1.0, store(1.0))
        with pytest.raises(KVCacheError, match=r"\(1, 2, 6, 8\).*other levels"):
            shelf.put(0.1, store(0.1, shape=(1, *SHAPE[1:])))
        for sigma in (0.0, -1.0, math.inf, math.nan):
            with pytest.raises(KVCacheError, match="finite noise levels > 0"):
                shelf.lookup(sigma)
    with pytest.raises(KVCacheError, match="closed"):
        shelf.lookup(1.0)
    with pytest.raises(KVCacheError, match=r"KVCacheKey\.of"), kv_cache.opened("clip"):
        pass
    assert kv_cache.used == LEVEL_BYTES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "whole number"),
        ({"ratio": 0.9}, "ratio=0.9"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"every": None, "ratio": None}, "at least one"),
        ({"budget": "4 bananas"}, "4 bananas"),
        ({"budget": -1}, "-1"),
        ({"budget": 0}, "directory"),
        ({"budget": True}, "budget=True; expected bytes"),
        ({"every": True}, "every=True; expected a whole number >= 1, e.g. 3"),
        ({"every": "3"}, "every='3'"),
        ({"ratio": True}, "ratio=True; expected a number >= 1, e.g. 1.5"),
        ({"ratio": "1.5"}, "ratio='1.5'"),
        ({"every": None, "ratio": math.inf}, "ratio=inf; expected a number >= 1, e.g. 1.5, or None"),
        ({"interpolate": 3}, "interpolate=3; expected True or False, e.g. interpolate=True"),
        ({"interpolate": None}, "interpolate=None"),
        ({"interpolate": "no"}, "interpolate='no'"),
        ({"layers": (x / 2 for x in range(2))}, r"layers=\(0\.0, 0\.5\); expected at least one index"),
        ({"layers": "all"}, "layers='all'; .*or None for all"),
        ({"layers": []}, r"layers=\[\]; expected at least one"),
        ({"layers": [True, False]}, r"layers=\(True, False\)"),
        ({"layers": 1.5}, "layers=1.5"),
        ({"layers": True}, "layers=True"),
        ({"layers": slice("a")}, "layers=slice"),
        ({"layers": slice(0, 4, 0)}, "layers=slice"),
        ({"directory": ""}, r"directory='' names no folder; .*KVCache\('kv-bank'\)[^$]*KVCache\('\.'\)"),
        ({"directory": " "}, "directory=' ' names no folder"),
        ({"directory": 3}, r"directory=3; expected a path"),
        ({"directory": b"kv-bank"}, "directory=b'kv-bank'; expected a path"),
        ({"disk": "4GB"}, r'limits a directory, and none was given; expected e\.g\. KVCache\("kv-bank", disk="50GB"\)'),
        ({"disk": "4 bananas"}, "disk='4 bananas'; expected bytes, e.g. disk=4_000_000_000"),
        ({"disk": -1, "directory": "made"}, "disk=-1"),
        ({"disk": True, "directory": "made"}, "disk=True"),
        ({"disk": 0, "directory": "made"}, "disk=0 leaves no room"),
        ({"format": "in8"}, 'Did you mean "int8"'),
        ({"tier": "devcie"}, "tier='device'"),
    ],
)
def test_settings_that_cannot_be_meant(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KVCacheError, match=message):
        KVCache(**arguments)
    assert not list(tmp_path.iterdir())


def test_layers_are_kept_as_they_were_meant(tmp_path):
    assert [
        KVCache(layers=layers).layers for layers in (None, 3, range(1, 3), (i for i in (0, -1)), slice(2, None))
    ] == [
        None,
        (3,),
        (1, 2),
        (0, -1),
        slice(2, None),
    ]
    kv_cache = KVCache(tmp_path, disk="2GB", layers=[1])
    assert (kv_cache.disk, kv_cache.disk_used) == (2 * 10**9, 0)
    assert repr(kv_cache).endswith("4 GB used, at most 2 GB on disk)")
    other = pickle.loads(pickle.dumps(kv_cache))
    assert (other.disk, other.layers, other.directory) == (kv_cache.disk, kv_cache.layers, kv_cache.directory)


# -- the budget -------------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 5),
    st.integers(0, LEVEL_BYTES),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([16.0, 8.0, 4.0, 2.0, 1.0, 0.5])), min_size=1, max_size=25),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_budget_is_never_exceeded_and_counted_to_the_byte(levels, extra, steps, disk):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        budget = levels * LEVEL_BYTES + extra
        kv_cache = KVCache(folder if disk else None, budget=budget, format=None, every=None, ratio=1.2)
        for clip, sigma in steps:
            with kv_cache.opened(key(str(clip))) as shelf:
                level = shelf.lookup(sigma) or shelf.put(sigma, store(sigma))
                assert equal(contents(level), [x for pair in store(sigma).values() for x in pair])
                held = [s for d in kv_cache._pool.drawers.values() for s in d.levels]
                tensors = [t for s in held for pair in s.held.values() for p in pair for t in p.parts.values()]
                assert kv_cache.used == sum(t.numel() * t.element_size() for t in tensors)
                assert kv_cache.used <= kv_cache.peak <= budget
        kv_cache.clear()
        assert kv_cache.used == 0


def test_what_is_farthest_from_now_goes_first_and_closed_keys_before_it():
    kv_cache = KVCache(budget=3 * LEVEL_BYTES, format=None, every=1, ratio=1.1)
    with kv_cache.opened(key("old")) as shelf:
        run(shelf, [5.0])
    with kv_cache.opened(key()) as shelf:
        run(shelf, [8.0, 4.0, 2.0])
        assert shelf.sigmas == (8.0, 4.0, 2.0)
        run(shelf, [1.0])
        assert shelf.sigmas == (4.0, 2.0, 1.0)
        run(shelf, [16.0])
        assert shelf.sigmas == (16.0, 4.0, 2.0)
    assert kv_cache.peak == kv_cache.used == 3 * LEVEL_BYTES
    with kv_cache.opened(key("old")) as shelf:
        assert shelf.sigmas == ()


def test_a_level_that_does_not_fit_is_refused_with_numbers():
    kv_cache = KVCache(budget=LEVEL_BYTES - 1, format=None)
    with kv_cache.opened(key()) as shelf:
        with pytest.raises(KVCacheError, match=r"one level needs 4\.61 kB \(3 layers.*budget is 4\.61 kB[^$]*int8"):
            shelf.put(1.0, store(1.0))
        assert kv_cache.used == kv_cache.peak == 0
    with KVCache(budget=LEVEL_BYTES - 1, format="int8").opened(key()) as shelf:
        shelf.put(1.0, store(1.0))


def test_a_level_in_use_is_not_taken_away_by_another_run():
    kv_cache = KVCache(budget=LEVEL_BYTES, format=None)
    with kv_cache.opened(key("a")) as a:
        level = a.put(1.0, store(1.0))
        before = contents(level)
        with kv_cache.opened(key("b")) as b:
            with pytest.raises(KVCacheError, match="are in use by other runs"):
                b.put(1.0, store(2.0))
            assert equal(contents(level), before)
            assert a.lookup(100.0) is None  # lets go of the level
            b.put(1.0, store(2.0))
        with pytest.raises(KVCacheError, match=r"ask with shelf\.lookup"):
            level.get(SITES[0])
    assert kv_cache.peak == LEVEL_BYTES


def test_a_failure_while_packing_gives_its_bytes_back(monkeypatch):
    from kvlock_sampling.kv_cache import shelf as module

    kv_cache, calls = KVCache(format=None), []

    def fail(x, format):
        calls.append(x)
        if len(calls) == 4:
            raise MemoryError
        return pack(x, format)

    with kv_cache.opened(key()) as shelf:
        monkeypatch.setattr(module, "pack", fail)
        with pytest.raises(MemoryError):
            shelf.put(1.0, store(1.0))
        assert kv_cache.used == 0
        assert shelf.sigmas == ()
        monkeypatch.undo()
        shelf.put(1.0, store(1.0))
        assert kv_cache.used == LEVEL_BYTES


def test_two_shelves_in_two_threads_agree_and_keep_the_budget(tmp_path):
    for kv_cache in (
        KVCache(budget=8 * LEVEL_BYTES, ratio=1.2),
        KVCache(tmp_path, budget=LEVEL_BYTES + 100, ratio=1.2),
    ):
        sigmas, failures, barrier = [8.0 * 0.7**i for i in range(12)], [], threading.Barrier(4)

        def work(clip, kv_cache=kv_cache, sigmas=sigmas, failures=failures, barrier=barrier):
            try:
                with kv_cache.opened(key(clip)) as shelf:
                    barrier.wait()
                    for sigma in sigmas:
                        level = shelf.lookup(sigma) or shelf.put(sigma, store(sigma))
                        expected = [unpack(pack(x, "int8")) for pair in store(sigma).values() for x in pair]
                        assert equal(contents(level), expected)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(clip,)) for clip in ("a", "a", "b", "c")]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert failures == []
        assert kv_cache.peak <= kv_cache.budget
        assert kv_cache.used == sum(s.nbytes for d in kv_cache._pool.drawers.values() for s in d.levels)


def test_sizes_are_read_as_people_write_them():
    assert parse_bytes("4GB") == 4 * 10**9
    assert parse_bytes("1.5 gib") == 3 * 2**29
    assert parse_bytes("512MiB") == 2**29
    assert parse_bytes("100") == parse_bytes(100) == 100
    assert parse_bytes(None) is None
    assert readable(2_147_000_000) == "2.15 GB"
    assert readable(999) == "999 bytes"


# -- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "float32", "bf16", "int8", "fp8"])
def test_a_plan_is_what_the_bank_then_uses(format):
    plan = plan_for(3, 2, 8, 10, 0.6, 4, format, 3 * LEVEL_BYTES, clips=2, dtype=torch.float32)
    assert plan.kept == 6
    kv_cache = KVCache(budget=None, format=format, every=1)
    with kv_cache.opened(key()) as shelf:
        run(shelf, [8.0, 4.0, 2.0, 1.0])
    assert kv_cache.used == plan.total == 4 * plan.per_level
    assert plan.in_memory == min(4, 3 * LEVEL_BYTES // plan.per_level)


def test_a_plan_is_printed_with_every_format_and_what_it_means():
    text = str(plan_for(30, 12, 128, 32760, 0.7, 17, "int8", "4GB"))
    assert "22932 of 32760 tokens" in text
    assert "> int8" in text
    assert "2.15 GB" in text
    assert "1 of 17 levels fit in memory" in text
    assert "Everything fits" in str(plan_for(6, 4, 32, 256, 0.7, 10))
    assert 'format="int8"' in str(plan_for(30, 12, 128, 32760, 0.7, 17, "bf16", "4GB"))
    assert "fewer layers" in str(plan_for(40, 40, 128, 32760, 0.7, 17, "int8", "1GB"))
    for wrong in ({"levels": 0}, {"heads": 1.5}, {"background_fraction": 1.2}, {"format": "int7"}):
        with pytest.raises(KVCacheError):
            plan_for(
                **{"sites_count": 1, "heads": 1, "dim": 1, "tokens": 1, "background_fraction": 1, "levels": 1} | wrong
            )


# -- fingerprints -----------------------------------------------------------------------------------------------------


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 300), nn.LayerNorm(300), nn.Linear(300, 5))


def test_a_models_fingerprint_changes_with_what_changes_its_keys():
    model = network()
    own = model_fingerprint(model)
    assert model_fingerprint(copy.deepcopy(model)) == own
    assert model_fingerprint(network(1)) != own
    assert model_fingerprint(network().double()) != own
    wrapped = lambda x, sigma: model(x)  # noqa: E731 - what users write around a network
    assert model_fingerprint(wrapped) != own  # another denoiser may prepare its input otherwise
    assert model_fingerprint(wrapped) == model_fingerprint(wrapped)
    with torch.no_grad():  # a fused LoRA: a small change of low rank everywhere in one matrix
        model[0].weight += 1e-3 * torch.randn(300, 1) @ torch.randn(1, 5)
    assert model_fingerprint(model) != own
    with pytest.raises(KVCacheError, match="no torch module"):
        model_fingerprint(lambda x, sigma: x)


def test_an_adapter_that_is_not_fused_counts_too():
    model = network()
    own = model_fingerprint(model)
    model[0].scaling = {"default": 1.0}
    adapted = model_fingerprint(model)
    model[0].scaling = {"default": 0.5}
    assert len({own, adapted, model_fingerprint(model)}) == 3


def test_weights_of_any_kind_have_a_fingerprint():
    empty = nn.Linear(3, 3, device="meta")
    assert model_fingerprint(empty) == model_fingerprint(nn.Linear(3, 3, device="meta"))
    odd = nn.Module()
    odd.register_buffer("steps", torch.arange(1000).view(50, 20).t())
    odd.register_buffer("nothing", torch.empty(0))
    odd.register_buffer("number", torch.tensor(3))
    own = model_fingerprint(odd)
    odd.register_buffer("cache", torch.randn(4), persistent=False)  # filled by a first call, say
    assert model_fingerprint(odd) == own
    odd.number += 1
    assert model_fingerprint(odd) != own


def test_arguments_are_told_apart_by_content():
    x = torch.randn(2, 3)
    given_ = {"cond": x, "scales": [1, 2.5], "names": ("a", None), "nested": {"flag": True, "dtype": torch.float16}}
    own = arguments_fingerprint(given_)
    assert arguments_fingerprint(dict(reversed(given_.items()))) == own
    assert arguments_fingerprint({**given_, "cond": x.clone()}) == own
    others = [
        {**given_, "cond": x + 1e-6},
        {**given_, "cond": x.view(3, 2)},
        {**given_, "cond": x.double()},
        {**given_, "scales": [1, 2]},
        {**given_, "scales": [12.5]},
        {**given_, "names": ("aN", "one")},
        {**given_, "nested": {"flag": 1, "dtype": torch.float16}},
        {**given_, "more": None},
    ]
    assert len({own, *map(arguments_fingerprint, others)}) == len(others) + 1
    with pytest.raises(KVCacheError, match=r"\['callback'\] is a function"):
        arguments_fingerprint({"callback": print and (lambda: 0)})


def test_each_part_of_a_key_matters():
    x, mask = torch.randn(1, 4, 2, 4, 4), torch.ones(1, 8, dtype=torch.bool)
    parts = {"model": network(), "clip": x, "noise": x + 1, "background": mask, "layers": SITES}
    own = KVCacheKey.of(**parts).fingerprint()
    other = mask.clone()
    other[0, 3] = False
    changes = [
        {"model": network(1)},
        {"clip": x + 1e-6},
        {"noise": x},
        {"background": other},
        {"layers": SITES[:2]},
        {"arguments": {"cond": x}},
        {"dtype": torch.bfloat16},
    ]
    assert len({own, *(KVCacheKey.of(**parts | change).fingerprint() for change in changes)}) == len(changes) + 1
    assert KVCacheKey.of(**parts).fingerprint("int8") != own
    with pytest.raises(KVCacheError, match="distinct names"):
        KVCacheKey.of(**parts | {"layers": ["a", "a"]})


def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import torch; from test_bank import *\n"
        "x = torch.arange(12.0).view(3, 4)\n"
        "print(model_fingerprint(network()), tensor_fingerprint(x.bfloat16()), "
        "arguments_fingerprint({'b': {3, 1}, 'a': x}), key().fingerprint())"
    )
    run_ = lambda seed: subprocess.run(  # noqa: E731
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'tests')\n{code}"],
        env={"PYTHONHASHSEED": str(seed), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    x = torch.arange(12.0).view(3, 4)
    here = [
        model_fingerprint(network()),
        tensor_fingerprint(x.bfloat16()),
        arguments_fingerprint({"a": x, "b": {1, 3}}),
        key().fingerprint(),
    ]
    assert run_(7).stdout.split() == here
