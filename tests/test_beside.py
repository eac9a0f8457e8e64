"""The source on all tokens and the edit on some, block by block: the same edit, and one layer's K/V at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from networks import FAMILIES, random_network

import kvlock_sampling as kv
from kvlock_sampling.attention import ending
from kvlock_sampling.attention import interleaved as beside
from kvlock_sampling.types import KVLockError

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*deprecated")

FULL = kv.Constant(lock=1.0)


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch):
    """Whatever other tests have compiled in this process."""
    monkeypatch.setattr(ending, "anything_compiled", lambda: False)
    monkeypatch.setattr("kvlock_sampling.attention.hooks.anything_compiled", lambda: False)


@pytest.fixture
def stored(monkeypatch):
    """How many layers' K/V were kept whenever an edit's block ran, and what the rows were."""
    seen, together = [], beside._together

    def noting(changed, source, rows, frame):
        if isinstance(changed, torch.Tensor):
            seen.append((len(frame.store), rows, source is None))
        return together(changed, source, rows, frame)

    monkeypatch.setattr(beside, "_together", noting)
    return seen


def network(name, grid=(3, 3, 5), clips=2):
    try:
        return random_network(name, grid=grid, clips=clips)
    except KVLockError as error:
        pytest.skip(str(error).splitlines()[0])


def masks(made):
    mask = torch.zeros_like(made.x[:, :1])
    mask[0::2, ..., : made.x.shape[-1] // 3] = 1
    mask[1::2, ..., made.x.shape[-2] // 2 :, :] = 1
    return mask


def evaluated(made, policy=FULL, extra_args=None, **options):
    generator = torch.Generator().manual_seed(1)
    source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
    given = {"source": source, "noise": noise, "mask": masks(made), "layers": made.layers, **options}
    with kv.KVLock(made.denoiser, policy=policy, **given) as lock:
        out = lock(made.x, torch.ones(len(made.x)), **made.extra_args, **(extra_args or {}))
    return out, lock.trace.steps[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edit_is_that_of_the_dense_way(name, stored):
    made = network(name)
    out, step = evaluated(made)
    able = made.layers.narrows and made.layers.rows_first
    assert bool(stored) == able
    if not able:
        return
    # One layer's K/V at a time; after the last layer nothing more of the source.
    assert {kept for kept, _, _ in stored} <= {0, 1, 2}
    assert {rows for _, rows, _ in stored} == {4}
    assert [ended for *_, ended in stored].count(True) in (1, 2)  # its tokens, and its text
    assert step.computed < 1
    dense, other = evaluated(made, foreground=False)
    assert (step.evaluations, step.fused_layers) == (other.evaluations, other.fused_layers)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))


@pytest.mark.parametrize("name", ["wan", "wan-2.2", "flux", "hunyuan-video", "wan-vace"])
def test_guided_and_with_a_ring(name, stored):
    made = network(name, grid=(4, 5, 6), clips=1)
    cond = made.extra_args["cond"]
    more = {"uncond": {k: v.flip(-1) if v.is_floating_point() else v for k, v in cond.items()}, "cond_scale": 3.0}
    out, step = evaluated(made, extra_args=more, transition=(1, 0.5))
    assert {rows for _, rows, _ in stored} == {3}
    dense, _ = evaluated(made, extra_args=more, transition=(1, 0.5), foreground=False)
    assert step.computed < 1
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))


def test_what_is_kept_does_not_grow_with_depth():
    """Of every layer's K/V only one layer's are there at a time."""
    sizes, process = [], kv.attention.foreground.ForegroundFrame.process

    def noting(self, layer, key, value, start, ratio=None):
        out = process(self, layer, key, value, start, ratio)
        sizes.append(len(self.store))
        return out

    made = network("wan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv.attention.foreground.ForegroundFrame, "process", noting)
        evaluated(made)
        assert max(sizes) == 1
        sizes.clear()
        evaluated(made, batched=False)
        assert max(sizes) == 2  # a pass of its own keeps all of them


@pytest.mark.parametrize(
    "options", [{"batched": False}, {"kv_cache": True}, {"estimator": kv.RenoiseVariance(passes=1)}]
)
def test_a_source_whose_keys_serve_again_has_a_pass_of_its_own(options, stored):
    made = network("wan")
    if "kv_cache" in options:
        options = {"kv_cache": kv.KVCache(format=None)}
    policy = FULL
    if "estimator" in options:
        policy = kv.stateless(lambda obs: kv.Control(lock=1.0, cfg_scale=obs.cfg_scale))
        given = options
        generator = torch.Generator().manual_seed(1)
        source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
        lock = kv.KVLock(
            made.denoiser, policy=policy, source=source, noise=noise, mask=masks(made), layers=made.layers, **given
        )
        lock.sample("euler", 2 * made.x, torch.tensor([2.0, 1.0, 0.5, 0.0]), extra_args=made.extra_args)
        assert lock.trace.steps[-1].evaluations == 3  # the source, the edit, a probe
    else:
        evaluated(made, **options)
    assert not stored


def test_where_rows_cannot_be_told_apart_the_source_has_a_pass_of_its_own(stored):
    made = network("wan", grid=(4, 3, 5))  # four frames, four rows
    out, step = evaluated(made)
    assert not stored
    assert step.evaluations == 2
    dense, _ = evaluated(made, foreground=False)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-5)


def test_a_hook_on_the_network_sees_whole_passes(stored):
    made = network("wan")
    inner = made.layers.networks[0]
    handle = inner.register_forward_hook(lambda *_: None)
    whole, _ = evaluated(made)
    handle.remove()
    assert not stored
    beside_each_other, _ = evaluated(made)
    torch.testing.assert_close(beside_each_other, whole, rtol=0, atol=1e-6)


def test_gradients_reach_the_edit():
    made = network("wan")
    grads = []
    for foreground in (True, False):
        x = made.x.clone().requires_grad_()
        evaluated(made._replace(x=x), foreground=foreground)[0].square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-3, atol=1e-4)


def test_an_error_inside_leaves_the_network_as_it_was():
    made = network("wan")
    block = made.layers.blocks[1]
    forward = block.ffn.forward

    def failing(x, *args, **kwargs):
        raise ValueError("out of luck")

    block.ffn.forward = failing
    with pytest.raises(ValueError, match="out of luck"):
        evaluated(made)
    block.ffn.forward = forward
    del block.ffn.forward
    assert all("forward" not in part.__dict__ for part in made.layers.networks[0].modules())
    out, _ = evaluated(made)
    torch.testing.assert_close(out, evaluated(made, foreground=False)[0], rtol=0, atol=1e-5)


def test_rows_that_do_not_come_first_are_never_cut(stored):
    made = network("wan")
    out, _ = evaluated(made, layers=replace(made.layers, rows_first=False))
    assert not stored
    torch.testing.assert_close(out, evaluated(made)[0], rtol=0, atol=1e-6)
