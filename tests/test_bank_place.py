"""Where K/V are kept and how they travel. The side stream needs CUDA; its order of doing things does not."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from banks import LEVEL_BYTES, SITES, contents, equal, key, run, store

from kvlock_sampling.kv_cache import KVCache
from kvlock_sampling.kv_cache import place as module
from kvlock_sampling.kv_cache.format import pack
from kvlock_sampling.kv_cache.place import Mover
from kvlock_sampling.kv_cache.pool import Drawer, Stored

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def level(sigma):
    stored = Stored(Drawer(SITES, None), sigma)
    stored.held = {layer: (pack(k, "int8"), pack(v, "int8")) for layer, (k, v) in store(sigma).items()}
    return stored


@pytest.fixture
def staged(monkeypatch):
    """A mover with a side stream that only notes what is asked of it."""
    log = []
    current = SimpleNamespace(wait_stream=lambda side: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "stream", lambda side: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("record"))
    real = module._both
    monkeypatch.setattr(module, "_both", lambda pair, device: (log.append("copy"), real(pair, device))[1])
    mover = Mover(torch.device("cpu"))
    mover._stream = object()
    return mover, log


def test_the_next_site_is_under_way_while_this_one_is_used(staged):
    mover, log = staged
    stored = level(2.0)
    for i, layer in enumerate(SITES):
        assert mover.fetch(stored, layer) is not None
        ahead = None if mover._ahead is None else mover._ahead[1]
        assert ahead == next(iter(SITES[i + 1 :]), None)
    # One copy per layer. What was made on the side stream is waited for, and kept from reuse on the one it is used on.
    assert log.count("copy") == len(SITES)
    assert log.count("wait") == len(SITES) - 1
    assert log.count("record") == (len(SITES) - 1) * 2 * 3
    assert log[:3] == ["copy", "copy", "wait"]


def test_sites_out_of_order_another_level_and_letting_go_copy_afresh(staged):
    mover, log = staged
    one, other = level(2.0), level(4.0)
    for stored, layer in ((one, SITES[0]), (one, SITES[2]), (one, SITES[0]), (other, SITES[1]), (other, SITES[1])):
        for packed, x in zip(mover.fetch(stored, layer), store(stored.sigma)[layer], strict=True):
            assert torch.equal(packed.parts["values"], pack(x, "int8").parts["values"])
    mover.fetch(one, SITES[0])
    mover.forget()
    assert mover._ahead is None
    mover.fetch(one, SITES[1])
    assert "wait" not in log


def test_on_the_cpu_nothing_is_copied():
    stored = level(2.0)
    mover = Mover(torch.device("cpu"))
    for layer in SITES:
        assert mover.fetch(stored, layer)[0].parts["values"] is stored.held[layer][0].parts["values"]


@CUDA
@pytest.mark.parametrize("tier", ["host", "device"])
@pytest.mark.parametrize("format", [None, "bf16", "int8", "fp8"])
def test_tiers_and_disk_agree_on_cuda(tmp_path, tier, format):
    sigmas = [8.0, 6.5, 4.0, 3.0, 2.0, 1.5]
    memory = KVCache(budget=None, format=format, tier=tier)
    disk = KVCache(tmp_path, budget=LEVEL_BYTES, format=format, tier=tier)
    for again in range(2):
        with memory.opened(key(), device="cuda") as a, disk.opened(key(), device="cuda") as b:
            for sigma in [*sigmas, 5.0] if again else sigmas:
                one, other = a.lookup(sigma), b.lookup(sigma)
                assert (one is None) == (other is None)
                if one is None:
                    kv = {layer: (k.cuda(), v.cuda()) for layer, (k, v) in store(sigma).items()}
                    one, other = a.put(sigma, kv), b.put(sigma, kv)
                got = contents(one)
                assert all(x.is_cuda for x in got)
                assert equal(got, contents(other))
        assert disk.peak <= disk.budget
    held = [p for s in next(iter(memory._pool.drawers.values())).levels for pair in s.held.values() for p in pair]
    parts = [part for packed in held for part in packed.parts.values()]
    assert all(part.is_cuda if tier == "device" else part.is_pinned() for part in parts)
    with KVCache(tmp_path, budget=0, format=format, tier=tier).opened(key(), device="cuda") as shelf:
        assert run(shelf, sigmas) == []
