"""Source and edit block by block: the edit of the dense route, and one layer's K/V at a time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from networks import FAMILIES, random_network
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import kvlock_sampling as kv
from kvlock_sampling.attention import FusionContext
from kvlock_sampling.route import Route
from kvlock_sampling.types import AttentionError, KVLockError

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore:.*deprecated")

FULL = kv.Constant(lock=1.0)
INTERLEAVED = Route.INTERLEAVED.value


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
    """The second evaluation of a run, in which it is known where the source's pass may end."""
    generator = torch.Generator().manual_seed(1)
    source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
    given = {"source": source, "noise": noise, "mask": masks(made), "layers": made.layers, **options}
    with kv.KVLock(made.denoiser, policy=policy, **given) as lock:
        for sigma in (2.0, 1.0):
            out = lock(made.x, torch.full((len(made.x),), sigma), **made.extra_args, **(extra_args or {}))
    return out, lock.trace.steps[-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_edit_is_that_of_the_dense_route(name):
    made = network(name)
    out, step = evaluated(made)
    assert (step.route == INTERLEAVED) == made.layers.interleaves
    if not made.layers.interleaves:
        return
    assert step.computed < 1
    dense, other = evaluated(made, foreground=False)
    assert other.route == Route.LOCKSTEP.value
    assert (step.nfe, step.fused_layers) == (other.nfe, other.fused_layers)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))


@pytest.mark.parametrize("name", ["wan", "wan-2.2", "flux", "hunyuan-video", "wan-vace"])
@pytest.mark.parametrize("frames", [2, 3, 4])
def test_guided_with_a_transition_band_and_as_many_frames_as_rows(name, frames):
    """Three rows, [uncond, cond, source]: no axis of the clip is taken for them."""
    made = network(name, grid=(frames, 5, 6), clips=1)
    cond = made.extra_args["cond"]
    more = {"uncond": {k: v.flip(-1) if v.is_floating_point() else v for k, v in cond.items()}, "cond_scale": 3.0}
    out, step = evaluated(made, extra_args=more, transition=(1, 0.5))
    dense, _ = evaluated(made, extra_args=more, transition=(1, 0.5), foreground=False)
    assert step.route == INTERLEAVED
    assert step.computed < 1
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sources_pass_ends_with_its_last_keys_unless_its_prediction_is_read(name):
    made = network(name)
    if not made.layers.interleaves:
        return

    def run(**options):
        with FlopCounterMode(display=False) as counter:
            out, step = evaluated(made, **options)
        assert step.route == INTERLEAVED
        return out.detach(), counter.get_total_flops()

    seen: list[torch.Tensor] = []

    @dataclass(frozen=True)
    class Reads(kv.variance.Estimator):
        def step(self, state, evaluation):
            seen.append(evaluation.source)
            return state, evaluation.denoised.new_full((len(evaluation.x),), 0.01)

    whole, most = run()  # a checkpoint around the lock must find the same when it runs the evaluation again
    with torch.no_grad():
        ended, fewer = run()
        read, more = run(policy=kv.PID(kp=0.0, ki=0.0, bias=1.0), estimator=Reads())
    assert torch.equal(ended, read)
    assert torch.equal(ended, whole)
    assert seen[0].isfinite().all()
    assert fewer < more == most


class Refined(nn.Module):
    """A denoiser that calls its network twice, the second time on what the first call gave."""

    def __init__(self, inner):
        super().__init__()
        self.inner_model = inner

    def forward(self, x, sigma, **args):
        first = self.inner_model(x, sigma, **args)
        return self.inner_model(torch.lerp(x, first, 0.5), sigma / 2, **args)


class RowByRow(Refined):
    def forward(self, x, sigma, cond):
        rows = [{"cond": {name: value[i : i + 1] for name, value in cond.items()}} for i in range(len(x))]
        sigma = sigma.expand(len(x))
        return torch.cat([self.inner_model(x[i : i + 1], sigma[i : i + 1], **rows[i]) for i in range(len(x))])


@pytest.mark.parametrize("name", ["wan", "flux", "hunyuan-video"])
@torch.no_grad()
def test_a_network_that_is_called_twice(name):
    made = network(name)
    made = made._replace(denoiser=Refined(made.denoiser))
    out, step = evaluated(made)
    assert step.route == INTERLEAVED
    dense, _ = evaluated(made, foreground=False)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_a_denoiser_that_runs_its_rows_one_by_one(name):
    made = network(name, clips=1)
    apart = made._replace(denoiser=RowByRow(made.denoiser))
    with pytest.raises(AttentionError, match=r"called with 1 of 2 rows; .*\n.*one by one: one clip, and batched=False"):
        evaluated(apart)
    out, _ = evaluated(apart, batched=False)
    torch.testing.assert_close(out, evaluated(made, batched=False)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_block_that_returns_another_dtype_than_it_was_given():
    made = network("ltx")
    inner = made.layers.networks[0]
    inner.transformer_blocks = inner.transformer_blocks[:1]
    layers = kv.find_layers(inner)
    with torch.autocast("cpu", torch.bfloat16):
        out, step = evaluated(made, layers=layers)
        dense, _ = evaluated(made, layers=layers, foreground=False)
    assert step.route == INTERLEAVED
    torch.testing.assert_close(out, dense, rtol=0, atol=0.02 * float(dense.std()))


@torch.no_grad()
def test_blocks_and_layers_that_act_several_times():
    made = network("wan")
    inner = made.layers.networks[0]
    inner.blocks.append(inner.blocks[0])
    out, step = evaluated(made)
    assert step.route == INTERLEAVED
    dense, _ = evaluated(made, foreground=False)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))

    def lengthen(*_):
        if len(inner.blocks) == 3 and len(lock.trace) == 1:
            inner.blocks.append(inner.blocks[1])

    generator = torch.Generator().manual_seed(1)
    source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
    lock = kv.KVLock(made.denoiser, source=source, noise=noise, mask=masks(made), layers=made.layers, policy=FULL)
    sigmas = torch.tensor([2.0, 1.0, 0.5, 0.0])
    with pytest.raises(AttentionError, match=r"once more than in the evaluation before; foreground=False"):
        lock.sample("euler", 2 * made.x, sigmas, extra_args=made.extra_args, callback=lengthen)


@pytest.mark.parametrize("text", range(1, 16))
def test_a_text_as_long_as_what_is_computed(text):
    made = network("wan", clips=1)
    made.extra_args["cond"]["encoder_hidden_states"] = torch.randn(1, text, 32)
    out, step = evaluated(made)
    assert step.route == INTERLEAVED
    dense, _ = evaluated(made, foreground=False)
    torch.testing.assert_close(out, dense, rtol=0, atol=1e-4 * float(dense.std()))


def kept_at_once(monkeypatch, **options):
    """The largest number of layers whose K/V existed at a time."""
    sizes, process = [], FusionContext.process

    def noting(self, layer, key, value, start, ratio):
        out = process(self, layer, key, value, start, ratio)
        sizes.append(max(len(self.record.captured), len(self.source)))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(FusionContext, "process", noting)
        evaluated(network("wan"), **options)
    return max(sizes)


def test_what_is_kept_does_not_grow_with_depth(monkeypatch):
    assert kept_at_once(monkeypatch) == 1
    assert kept_at_once(monkeypatch, batched=False) == 2  # a pass of its own keeps both layers' K/V


def test_a_function_compiled_elsewhere_changes_neither_route_nor_memory(monkeypatch):
    made = network("wan")
    before, step = evaluated(made)
    kept = kept_at_once(monkeypatch)
    assert torch.compile(lambda a: a + 1, backend="eager")(torch.ones(2)).sum() == 4
    after, again = evaluated(made)
    assert torch.equal(before, after)
    assert again.route == step.route == INTERLEAVED
    assert kept_at_once(monkeypatch) == kept


@pytest.mark.parametrize("options", [{"batched": False}, {"kv_cache": True}, {"estimator": True}])
def test_a_source_whose_keys_serve_again_has_a_pass_of_its_own(options):
    made = network("wan")
    if "kv_cache" in options:
        _, step = evaluated(made, kv_cache=kv.KVCache(format=None))
        assert step.route == Route.CACHED.value
    elif "estimator" in options:
        generator = torch.Generator().manual_seed(1)
        source, noise = (torch.randn(made.x.shape, generator=generator) for _ in range(2))
        lock = kv.KVLock(
            made.denoiser,
            policy=kv.stateless(lambda obs: kv.Control(lock=1.0)),
            estimator=kv.variance.RenoiseVariance(passes=1),
            source=source,
            noise=noise,
            mask=masks(made),
            layers=made.layers,
        )
        lock.sample("euler", 2 * made.x, torch.tensor([2.0, 1.0, 0.5, 0.0]), extra_args=made.extra_args)
        assert lock.trace.steps[-1].nfe == 3  # the source, the edit, a probe
        assert lock.trace.steps[-1].route == Route.SOURCE_PASS.value
    else:
        _, step = evaluated(made, **options)
        assert step.route == Route.SOURCE_PASS.value


def test_a_hook_on_the_network_sees_whole_passes():
    made = network("wan")
    inner = made.layers.networks[0]
    handle = inner.register_forward_hook(lambda *_: None)
    whole, step = evaluated(made)
    handle.remove()
    assert step.route == Route.SOURCE_PASS.value
    interleaved, step = evaluated(made)
    assert step.route == INTERLEAVED
    torch.testing.assert_close(interleaved, whole, rtol=0, atol=1e-6)


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
    block = made.layers.blocks[0][1]
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


def test_a_flow_that_does_not_interleave_has_a_source_pass():
    made = network("wan")
    flow = replace(made.layers.flow, interleaves=False)
    out, step = evaluated(made, layers=replace(made.layers, flow=flow))
    assert step.route == Route.SOURCE_PASS.value
    torch.testing.assert_close(out, evaluated(made)[0], rtol=0, atol=1e-6)
