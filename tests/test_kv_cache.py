"""The KV cache in memory: when a level serves, what it returns, the budget, threads, settings and plans."""

from __future__ import annotations

import math
import pickle
import threading
import warnings
from collections import OrderedDict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kv_entries import LAYERS, LEVEL_BYTES, SHAPE, contents, entry, equal, run, served, source_pass

from kvlock_sampling.kv_cache import KVCache, KVCacheError, KVCacheWarning, Plan
from kvlock_sampling.kv_cache.memory import MemoryTier, parse_bytes, readable
from kvlock_sampling.kv_cache.quantize import pack, unpack
from kvlock_sampling.kv_cache.refresh import Refresh
from kvlock_sampling.utils.host import HostReads

FALLING = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0, 0.5]


@pytest.fixture(autouse=True)
def no_unexpected_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVCacheWarning)
        yield


# -- when a level serves ----------------------------------------------------------------------------------------------


def passes(sigmas, **settings):
    return run(entry(KVCache(format=None, **settings)), sigmas)


def test_every_alone_is_a_source_pass_every_n_noise_levels():
    assert passes(FALLING, every=3, ratio=None) == [8.0, 5.0, 2.0]
    assert passes(FALLING, every=1, ratio=None) == FALLING


def test_ratio_alone_is_a_source_pass_when_sigma_has_moved_enough():
    assert passes(FALLING, every=None, ratio=1.5) == [8.0, 5.0, 3.0, 1.0, 0.5]
    assert passes(FALLING, every=None, ratio=1.0) == FALLING


def test_both_refresh_at_whichever_comes_first():
    assert passes(FALLING, every=3, ratio=1.5) == [8.0, 5.0, 3.0, 1.0, 0.5]
    assert passes(FALLING, every=2, ratio=1.5) == [8.0, 6.0, 4.0, 2.0, 1.0, 0.5]


def test_a_level_that_heun_requests_twice_does_not_age():
    heun = [8.0, 7.0, 7.0, 6.0, 6.0, 5.0, 5.0, 4.0]
    assert passes(heun, every=3, ratio=None) == passes(sorted(set(heun), reverse=True), every=3, ratio=None)
    jitter = [8.0, 7.0, 7.0 * (1 + 3e-5), 6.0, 6.0 * (1 - 3e-5), 5.0]
    assert passes(jitter, every=3, ratio=None) == [8.0, 5.0]


def test_churn_goes_up_a_little_and_is_served_from_below():
    one = entry(KVCache(format=None, every=2, ratio=1.2))
    run(one, [8.0])
    assert served(one, 8.4) == (8.0,)
    run(one, [6.0])
    assert served(one, 6.3) == (6.0,)


def test_a_rejected_step_finds_its_levels_as_they_were():
    one = entry(KVCache(format=None, every=3, ratio=1.5))
    assert run(one, [8.0, 7.0, 6.0, 5.0, 4.0]) == [8.0, 5.0]
    assert run(one, [8.0, 7.0, 6.0, 5.0, 4.0]) == []  # far more than `every` calls later
    assert served(one, 7.0) == (5.0, 8.0)
    assert served(one, 10.0) == (5.0, 8.0)
    assert one.lookup(12.5) is None


def test_the_level_within_the_ratio_serves():
    one = entry(KVCache(format=None, every=None, ratio=1.9))
    one.put(8.0, source_pass(8.0))
    one.put(2.0, source_pass(2.0))
    assert served(one, 4.3) == (8.0,)
    assert served(one, 3.7) == (2.0,)
    assert served(one, 4.0) == ()  # at one distance from both, and too far from each


@given(
    st.lists(st.floats(0.01, 80), min_size=1, max_size=20),
    st.one_of(st.none(), st.integers(1, 5)),
    st.one_of(st.none(), st.floats(1, 3)),
)
@settings(max_examples=80, deadline=None)
def test_a_repeated_run_needs_no_source_pass_and_the_plan_counts_the_first(sigmas, every, ratio):
    if every is None and ratio is None:
        every = 1
    kv_cache = KVCache(format=None, every=every, ratio=ratio, budget=None)
    small = {"shape": (1, 1, 1, 1), "layers": ("layer",)}
    first = run(entry(kv_cache, layers=("layer",)), sigmas, **small)
    assert kv_cache.refresh.expected_levels(sigmas) == len(first)
    again = entry(kv_cache, layers=("layer",))
    assert run(again, sigmas, **small) == []
    for sigma in sigmas:
        assert ratio is None or min(abs(math.log(sigma / s)) for s in again.sigmas) <= math.log(ratio) + 1e-3


def test_levels_of_an_earlier_run_are_held_to_the_ratio_alone():
    kv_cache = KVCache(format=None, every=2, ratio=1.5)
    run(entry(kv_cache), [8.0])
    later = entry(kv_cache)
    assert run(later, [8.0, 7.5, 7.0, 6.5, 6.0]) == []
    assert run(later, [5.0]) == [5.0]
    assert run(entry(kv_cache), [7.9, 7.5, 7.0, 6.5, 6.0, 5.0, 4.5, 4.0]) == []


@pytest.mark.parametrize("every", [1, 3])
def test_a_run_that_was_interrupted_leaves_no_level_that_serves_all_others(every):
    kv_cache = KVCache(format=None, every=every, ratio=None)
    run(entry(kv_cache), FALLING[:3])
    assert run(entry(kv_cache), FALLING) == [sigma for sigma in FALLING[::every] if sigma not in FALLING[:3]]
    assert run(entry(kv_cache), FALLING) == []


def test_interpolation_is_exact_at_stored_levels_and_linear_in_log_sigma_between():
    one = entry(KVCache(format=None, every=None, ratio=3.0))
    for sigma in (8.0, 2.0):
        one.put(sigma, source_pass(sigma))
    for sigma in (8.0, 2.0, 2.0 * (1 + 5e-5)):
        assert equal(one.lookup(sigma), source_pass(round(sigma)))
    assert served(one, 4.0) == (2.0, 8.0)
    level = one.lookup(4.0)
    for layer in LAYERS:
        for got, low, high in zip(level[layer], source_pass(2.0)[layer], source_pass(8.0)[layer], strict=True):
            torch.testing.assert_close(got, (low + high) / 2)
    quarter = one.lookup(2.0 * 4**0.25)[LAYERS[0]][0]
    torch.testing.assert_close(quarter, 0.75 * source_pass(2.0)[LAYERS[0]][0] + 0.25 * source_pass(8.0)[LAYERS[0]][0])


def straight(sigma):
    """K/V that are linear in log sigma."""
    return {
        layer: (torch.full(SHAPE, math.log(sigma) + i), torch.full(SHAPE, -math.log(sigma)))
        for i, layer in enumerate(LAYERS)
    }


def test_beyond_the_last_level_the_line_goes_on_but_not_far():
    one = entry(KVCache(format=None, every=None, ratio=2.0))
    one.put(8.0, straight(8.0))
    assert served(one, 6.0) == (8.0,)  # one level is no line
    one.put(5.0, straight(5.0))
    for sigma, through in ((4.0, (8.0, 5.0)), (3.5, (8.0, 5.0)), (10.0, (5.0, 8.0))):
        assert served(one, sigma) == through
        level = one.lookup(sigma)
        for layer in LAYERS:
            for got, expected in zip(level[layer], straight(sigma)[layer], strict=True):
                torch.testing.assert_close(got, expected)
    assert one.lookup(2.4) is None  # the last level does not serve
    one.put(4.8, straight(4.8))
    level = one.lookup(3.0)  # 4.8 and 5 are close and say little about 3: as far beyond as they are apart
    assert served(one, 3.0) == (5.0, 4.8)
    torch.testing.assert_close(level[LAYERS[0]][0], straight(4.8**2 / 5)[LAYERS[0]][0])
    one = entry(KVCache(format=None, every=None, ratio=1.5))
    one.put(8.0, straight(8.0))
    one.put(4.0, straight(4.0))
    assert served(one, 3.0) == (4.0,)  # 8 is more than 1.5^2 away
    assert served(one, 5.6) == (4.0, 8.0)  # both are within 1.5
    assert served(one, 5.0) == (4.0,)  # 8 is not


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [None, "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_put_returns_what_every_later_lookup_returns(format, dtype):
    keys = {layer: (k.to(dtype), v.to(dtype)) for layer, (k, v) in source_pass(3.0).items()}
    kv_cache = KVCache(format=format)
    one = entry(kv_cache)
    put = one.put(3.0, keys)
    before = contents(put)
    assert list(put) == list(LAYERS)
    for layer in LAYERS:
        for got, given_ in zip(one.lookup(3.0)[layer], keys[layer], strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, unpack(pack(given_, format)))
    keys[LAYERS[0]][0].fill_(100)
    for level in (put, one.lookup(3.0), entry(kv_cache).lookup(3.0)):
        assert all(torch.equal(a, b) for a, b in zip(contents(level), before, strict=True))


@pytest.mark.parametrize("format", [None, "int8"])
def test_levels_stored_in_inference_mode_serve_a_run_that_takes_gradients(tmp_path, format):
    for kv_cache in (KVCache(format=format), KVCache(tmp_path, format=format), KVCache(tmp_path, format=format)):
        with torch.inference_mode():
            run(entry(kv_cache), [3.0])
        x = torch.ones(SHAPE, requires_grad=True)
        key, _ = entry(kv_cache).lookup(3.0)[LAYERS[0]]
        (x * key).sum().backward()
        assert torch.equal(x.grad, key)


def test_entries_do_not_mix_and_other_layers_are_ignored():
    kv_cache = KVCache(format=None)
    a, b = entry(kv_cache, "a"), entry(kv_cache, "b", LAYERS[1:2])
    a.put(4.0, source_pass(4.0))
    assert b.lookup(4.0) is None
    level = b.put(4.0, source_pass(4.0))
    assert list(level) == [LAYERS[1]]
    assert LAYERS[1] in level
    assert LAYERS[0] not in level
    assert level.get("blocks.9") is None
    assert kv_cache.used == LEVEL_BYTES * 4 // 3


def test_mistakes_are_named():
    one = entry(KVCache(format=None))
    with pytest.raises(KVCacheError, match=r"no K/V of blocks\.2\.attn1; it had blocks\.0\.attn1, blocks"):
        one.put(1.0, source_pass(1.0, layers=LAYERS[:2]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0"),
        ({"every": 2.5}, "whole number"),
        ({"every": True}, "every=True; expected a whole number >= 1, .* default is 3"),
        ({"every": "3"}, "every='3'"),
        ({"ratio": 0.9}, "ratio=0.9"),
        ({"ratio": float("nan")}, "ratio=nan"),
        ({"ratio": True}, "ratio=True; expected a finite number >= 1, .* default is 1.5"),
        ({"ratio": "1.5"}, "ratio='1.5'"),
        ({"every": None, "ratio": None}, "at least one"),
        ({"every": None, "ratio": math.inf}, "ratio=inf; expected a finite number >= 1, .* None is no limit"),
        ({"budget": "4 bananas"}, "budget='4 bananas'; expected bytes"),
        ({"budget": -1}, "-1"),
        ({"budget": 0}, "budget=0 leaves no room; pass a directory"),
        ({"budget": True}, "budget=True; expected bytes"),
        ({"directory": ""}, r"directory='' names no folder; .*KVCache\('kv-cache'\)[^$]*KVCache\('\.'\)"),
        ({"directory": " "}, "directory=' ' names no folder"),
        ({"directory": 3}, "directory=3 names no folder"),
        ({"directory": b"kv-cache"}, "directory=b'kv-cache' names no folder"),
        ({"format": "in8"}, "format='in8'; expected \"int8\", or None"),
        ({"format": 8}, "format=8"),
    ],
)
def test_settings_outside_their_range(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KVCacheError, match=message):
        KVCache(**arguments)
    assert not list(tmp_path.iterdir())


def test_settings_are_pickled_and_shown(tmp_path):
    settings = {"budget": "2GB", "format": None, "every": 2, "ratio": None}
    kv_cache = KVCache(tmp_path, **settings)
    assert repr(kv_cache) == f"KVCache('{tmp_path}', format=None, 0 bytes of 2 GB used)"
    other = pickle.loads(pickle.dumps(kv_cache))
    assert (other.directory, other.budget, other.format, other.refresh) == (
        tmp_path,
        2 * 10**9,
        None,
        Refresh(2, None),
    )


# -- the budget -------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 300),
    st.lists(st.tuples(st.sampled_from("gp"), st.integers(0, 3), st.integers(1, 120)), max_size=60),
)
@settings(max_examples=100, deadline=None)
def test_memory_evicts_the_least_recently_used_within_the_budget(budget, steps):
    tier, model = MemoryTier(budget), OrderedDict()
    for action, sigma, size in steps:
        if action == "p":
            model.pop(sigma, None)
            level = {"layer": ((torch.float32, {"values": torch.zeros(size, dtype=torch.int8)}),)}
            if size <= budget:
                while sum(model.values()) + size > budget:
                    model.popitem(last=False)
                model[sigma] = size
            assert tier.put("entry", sigma, level) == (size <= budget)
        else:
            assert (tier.get("entry", sigma) is not None) == (sigma in model)
            if sigma in model:
                model.move_to_end(sigma)
        assert tier.sigmas("entry") == set(model)
        assert tier.used == sum(model.values()) <= budget


@given(
    st.integers(1, 5),
    st.integers(0, LEVEL_BYTES),
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([16.0, 8.0, 4.0, 2.0, 1.0, 0.5])), min_size=1, max_size=25),
    st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_tight_budget_never_changes_what_is_served(levels, extra, steps, disk):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        budget = levels * LEVEL_BYTES + extra
        kv_cache = KVCache(folder if disk else None, budget=budget, format=None, every=None, ratio=1.2)
        for clip, sigma in steps:
            one = entry(kv_cache, str(clip))
            level = one.lookup(sigma) or one.put(sigma, source_pass(sigma))
            assert equal(level, source_pass(sigma))
            assert kv_cache.used <= budget


def test_the_level_used_least_recently_goes_first():
    kv_cache = KVCache(budget=3 * LEVEL_BYTES, format=None, every=1, ratio=1.1)
    run(entry(kv_cache, "old"), [5.0])
    one = entry(kv_cache)
    run(one, [8.0, 4.0, 2.0])
    assert entry(kv_cache, "old").sigmas == set()
    assert one.lookup(8.0) is not None
    run(one, [1.0])
    assert one.sigmas == {8.0, 2.0, 1.0}
    assert kv_cache.used == 3 * LEVEL_BYTES


def test_a_level_in_use_stays_readable_after_its_eviction():
    kv_cache = KVCache(budget=LEVEL_BYTES, format=None)
    level = entry(kv_cache, "a").put(1.0, source_pass(1.0))
    entry(kv_cache, "b").put(2.0, source_pass(2.0))
    assert entry(kv_cache, "a").lookup(1.0) is None
    assert equal(level, source_pass(1.0))


def test_a_budget_below_one_level_warns_once_and_keeps_nothing():
    kv_cache = KVCache(budget=LEVEL_BYTES - 1, format=None)
    one = entry(kv_cache)
    with pytest.warns(KVCacheWarning, match=r"one level needs 4\.61 kB and the budget is 4\.61 kB[^$]*int8") as told:
        passes = run(one, FALLING)
    keys = source_pass(9.0)
    assert one.put(9.0, keys) is keys
    assert (passes, len(told)) == (FALLING, 1)
    assert kv_cache.used == 0
    one = entry(KVCache(budget=LEVEL_BYTES - 1, format="int8"))
    one.put(1.0, source_pass(1.0))
    assert one.sigmas == {1.0}


def test_a_failure_while_packing_leaves_nothing_behind(monkeypatch):
    from kvlock_sampling.kv_cache import cache as module

    kv_cache, calls = KVCache(format=None), []

    def fail(x, *how):
        calls.append(x)
        if len(calls) == 4:
            raise MemoryError
        return pack(x, *how)

    one = entry(kv_cache)
    monkeypatch.setattr(module, "pack", fail)
    with pytest.raises(MemoryError):
        one.put(1.0, source_pass(1.0))
    assert kv_cache.used == 0
    assert one.sigmas == set()


def test_runs_in_several_threads_agree_and_keep_the_budget(tmp_path):
    for kv_cache in (
        KVCache(budget=8 * LEVEL_BYTES, ratio=1.2),
        KVCache(tmp_path, budget=LEVEL_BYTES + 100, ratio=1.2),
    ):
        sigmas, failures, barrier = [8.0 * 0.7**i for i in range(12)], [], threading.Barrier(4)

        def work(clip, kv_cache=kv_cache, sigmas=sigmas, failures=failures, barrier=barrier):
            try:
                one = entry(kv_cache, clip)
                barrier.wait()
                for sigma in sigmas:
                    level = one.lookup(sigma) or one.put(sigma, source_pass(sigma))
                    expected = [unpack(pack(x, "int8")) for pair in source_pass(sigma).values() for x in pair]
                    assert all(torch.equal(a, b) for a, b in zip(contents(level), expected, strict=True))
                    assert kv_cache.used <= kv_cache.budget
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(clip,)) for clip in ("a", "a", "b", "c")]
        [t.start() for t in threads]
        [t.join() for t in threads]
        assert failures == []


def test_sizes_are_read_and_written_with_units():
    assert parse_bytes("4GB") == 4 * 10**9
    assert parse_bytes("1.5 gib") == 3 * 2**29
    assert parse_bytes("512MiB") == 2**29
    assert parse_bytes("100") == parse_bytes(100) == 100
    assert parse_bytes(None) is None
    assert readable(2_147_000_000) == "2.15 GB"
    assert readable(999) == "999 bytes"


# -- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_is_printed_with_what_it_means():
    sizes = {"levels": 17, "per_level": 2_147_000_000}
    assert str(Plan(**sizes, budget=4 * 10**9)).startswith("17 levels of 2.15 GB: 36.5 GB. 1 of them fit in memory")
    assert "Everything fits in memory" in str(Plan(**sizes))
    assert "on disk for the next edit" in str(Plan(**sizes, directory=True))
    assert 'use format="int8"' in str(Plan(**sizes, budget=10**9))


@pytest.mark.parametrize(("free", "unused", "fits"), [(50, 0, True), (35, 0, True), (29, 0, False), (10, 25, True)])
def test_a_level_stays_on_a_device_that_keeps_a_fifth_free(monkeypatch, free, unused, fits):
    from kvlock_sampling.kv_cache.memory import room_on

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 40)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 40 - unused)
    assert room_on(torch.device("cuda"), 10) is fits
    assert room_on(torch.device("cpu"), 10**18)


def test_a_level_is_read_once_from_its_device(monkeypatch):
    """One transfer says for all tensors of a level whether they can be quantized."""
    asked, together = [], HostReads.together

    def counted(reads, *values):
        asked.extend([len(values)] * any(id(value) not in reads._known for value in values))
        together(reads, *values)

    monkeypatch.setattr(HostReads, "together", counted)
    one, keys = entry(KVCache(format="int8")), source_pass(1.0)
    bad = {name: (key, value.clone()) for name, (key, value) in keys.items()}
    name = next(iter(bad))
    bad[name][1][..., 0, 0] = 1e38  # does not fit into 8 bits
    one.put(1.0, bad)
    assert asked == [2 * len(keys)]
    assert torch.equal(one.lookup(1.0)[name][1], bad[name][1])


@pytest.mark.parametrize("format", ["int8", None])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_a_failed_kernel_left_is_not_kept(tmp_path, format, bad):
    one, keys = entry(KVCache(tmp_path, format=format)), source_pass(1.0)
    broken = {name: (key, value.clone()) for name, (key, value) in keys.items()}
    broken[next(iter(broken))][1][..., 0, 0] = bad
    assert one.put(1.0, broken) is broken
    one.settle()
    assert one.lookup(1.0) is None
    one.put(1.0, keys)
    assert one.lookup(1.0) is not None
