"""Only what can change runs: the same edit as on the dense path, to rounding, wherever it is taken."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import FunctionType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import FAMILIES, random_network

import kvlock_sampling as kv
from kvlock_sampling.attention import CallRecord, FusionContext, Table
from kvlock_sampling.attention.foreground import _narrow, narrow_mask
from kvlock_sampling.masks.tokens import Selection, token_grid
from kvlock_sampling.types import AttentionError, KVLockError

FULL = kv.Constant(lock=1.0)


def both(setup, **options):
    """The same run on the dense path and on the foreground alone, with their traces."""
    runs = []
    for foreground in (False, True):
        lock = setup.lock(**{"policy": FULL, **options}, foreground=foreground)
        runs.append((lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg), lock.trace))
    return runs


def test_the_foreground_alone_gives_the_dense_result(setup):
    (dense, slow), (narrow, fast) = both(setup)
    torch.testing.assert_close(narrow, dense, rtol=1e-4, atol=1e-4)
    assert {s.computed for s in slow} == {1.0}
    assert all(0 < s.computed < 0.6 for s in fast)
    assert all(s.fused_layers == 2 for s in fast)
    for one, other in zip(slow, fast, strict=True):
        torch.testing.assert_close(one.variance, other.variance, rtol=1e-3, atol=1e-7, equal_nan=True)


def test_two_clips_with_masks_of_their_own(setup):
    """Tokens that only one of two clips edits run for both, and are fused for the other."""
    left, right = torch.zeros(2, 1, *setup.source.shape[2:])
    left[..., :2], right[..., 6:] = 1, 1
    masks = torch.stack([left, right])
    two = torch.cat([setup.source, setup.source.flip(-1)])
    x = torch.cat([setup.x, setup.x.flip(2)])
    results = []
    for foreground in (False, True):
        lock = kv.KVLock(setup.model, source=two, mask=masks, policy=FULL, foreground=foreground)
        results.append(lock.sample("heun", x, setup.sigmas, extra_args=setup.cfg))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=5e-3)  # from sigma 999 in float32
    assert lock.trace.steps[0].computed == 0.5
    for clip in range(2):
        lock = kv.KVLock(setup.model, source=two[clip : clip + 1], mask=masks[clip : clip + 1], policy=FULL)
        alone = lock.sample("heun", x[clip : clip + 1], setup.sigmas, extra_args=setup.cfg)
        torch.testing.assert_close(results[1][clip : clip + 1], alone, rtol=1e-3, atol=5e-3)


@pytest.mark.parametrize("transition", [(1, 0.0), (1, 0.4)])
def test_a_transition_band_with_another_fraction_is_computed(setup, transition):
    (dense, _), (narrow, fast) = both(setup, transition=transition)
    torch.testing.assert_close(narrow, dense, rtol=1e-4, atol=1e-4)
    assert fast.steps[0].computed > both(setup)[1][1].steps[0].computed


@pytest.mark.parametrize("options", [{"batched": False}, {"estimator": kv.variance.RenoiseVariance(passes=2)}])
def test_other_ways_to_evaluate(setup, options):
    policy = kv.stateless(lambda obs: kv.Control(lock=1.0))
    (dense, _), (narrow, fast) = both(setup, policy=policy, **options)
    torch.testing.assert_close(narrow, dense, rtol=1e-4, atol=1e-4)
    assert fast.steps[-1].computed < 1


def test_a_model_that_guides_itself(setup):
    guided = kv.CFGDenoiser(setup.model)
    results = []
    for foreground in (False, True):
        lock = kv.KVLock(guided, source=setup.source, mask=setup.mask, policy=FULL, foreground=foreground)
        results.append(lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)
    assert lock.trace.steps[0].computed < 1


def test_it_is_entered_and_left_as_the_policy_asks(setup):
    levels = setup.sigmas[setup.sigmas > 0].tolist()
    middle = levels[len(levels) // 2]
    policy = kv.stateless(lambda obs: kv.Control(lock=1.0 if obs.sigma > middle else 0.5))
    (dense, _), (narrow, fast) = both(setup, policy=policy)
    torch.testing.assert_close(narrow, dense, rtol=1e-4, atol=1e-4)
    shares = [s.computed < 1 for s in fast]
    assert True in shares
    assert False in shares
    assert shares == [float(s.lock) == 1 for s in fast]


def test_what_needs_every_token_gets_them_and_says_why(setup):
    for options, why in (
        ({"rescale": True}, "rescaled guidance"),
        ({"composite": False}, "composite=True"),
        ({"layers": [0]}, "not every layer is locked"),
    ):
        with pytest.warns(UserWarning, match=why):
            lock = setup.lock(policy=FULL, foreground=True, **options)
        lock.sample("euler", setup.x, setup.sigmas[-3:], extra_args=setup.cfg)
        assert {s.computed for s in lock.trace} == {1.0}


def test_a_mask_over_most_of_the_clip_is_not_worth_gathering(setup):
    mask = torch.ones_like(setup.mask)
    mask[..., :2, :2] = 0
    lock = kv.KVLock(setup.model, source=setup.source, mask=mask, policy=FULL)
    lock.sample("euler", setup.x, setup.sigmas[-3:], extra_args=setup.cfg)
    assert {s.computed for s in lock.trace} == {1.0}


@given(st.integers(1, 3), st.integers(2, 12), st.integers(0, 4), st.booleans(), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_a_joined_call_is_attention_over_everything(chunks, tokens, text, first, seed):
    """K/V and mask of a narrowed call, put back in order, are those of the dense call."""
    g = torch.Generator().manual_seed(seed)
    ratio = (torch.rand(2, tokens, generator=g) > 0.5).float()
    ratio[:, 0] = 0
    selection = Selection(ratio)
    rows, length = chunks * 2, tokens + text
    start = text if first else 0
    source, own = (torch.randn(r, 1, length, 3, generator=g) for r in (2, rows))
    mask = torch.rand(rows, 1, length, length, generator=g) > 0.3
    capture = FusionContext("capture", ratio, selection=selection, narrow=True)
    capture.process("layer", source, source, start, ratio)
    context = FusionContext("inject", ratio, source=capture.record.captured, selection=selection, narrow=True)
    video = selection.computed + start
    order = torch.cat([torch.arange(start), video, torch.arange(start + tokens, length)])
    key, value = context.process("layer", own[:, :, order], own[:, :, order], start, ratio)
    assert torch.equal(key, value)

    weight = torch.zeros(2, length)
    weight[:, start : start + tokens] = ratio
    dense = torch.lerp(own, source.repeat(chunks, 1, 1, 1), weight.repeat(chunks, 1)[:, None, :, None])
    columns = torch.cat([torch.arange(start), video, selection.kept + start, torch.arange(start + tokens, length)])
    assert torch.equal(key, dense[:, :, columns])
    expected = mask[..., columns][..., order, :]
    narrow = len(order)
    assert torch.equal(narrow_mask(mask, context, start, narrow), expected)
    assert torch.equal(narrow_mask(mask[..., :1, :], context, start, narrow), mask[..., :1, :][..., columns])
    for own_mask in (mask[..., order], torch.randn(rows, 1, 1, narrow, generator=g)):  # made where tokens are left out
        held = len(context.record.cut)
        joined = narrow_mask(own_mask, context, start, narrow)
        assert len(context.record.cut) == held  # every layer makes another: none may outlive its layer
        end = start + len(selection.computed)
        kept = joined[..., end : end + len(selection.kept)]
        assert kept.all() if kept.dtype == torch.bool else not kept.any()
        rest = torch.cat([joined[..., :end], joined[..., end + len(selection.kept) :]], -1)
        assert torch.equal(rest, own_mask)


def test_tables_are_cut_to_the_computed_tokens():
    ratio = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]])
    context = FusionContext("inject", ratio, selection=Selection(ratio), narrow=True, text=2, text_first=True)
    joint, video = torch.arange(7)[:, None], torch.arange(5)[:, None]
    assert _narrow((joint, video), Table("rope", 0), context)[0].flatten().tolist() == [0, 1, 2, 5]
    assert _narrow((joint, video), Table("rope", 0), context)[1].flatten().tolist() == [0, 3]
    assert _narrow(joint, Table("rope", 0), context) is _narrow(joint, Table("rope", 0), context)
    context = replace(context, text_first=False, record=CallRecord())
    assert _narrow(joint, Table("rope", 0), context).flatten().tolist() == [0, 3, 5, 6]
    assert _narrow(joint, Table("rope", 0, ndim=3), context) is joint


@pytest.mark.parametrize("name", ["flux", "chroma", "hunyuan-video", "cogvideox", "qwen-image", "sd3"])
def test_as_many_kept_tokens_as_text_tokens(name):
    """A narrowed sequence of video and text is then as long as the whole video, and is not cut again."""
    made = random_network(name, clips=1)
    text = made.extra_args["cond"]["text"].shape[1]
    mask = torch.ones(1, 1, *token_grid(made.x.shape, made.layers.patch))
    mask.flatten()[:text] = 0
    for axis, size in enumerate(made.layers.patch, start=2):
        mask = mask.repeat_interleave(size, axis)
    given = {"source": made.x.flip(-1), "mask": mask[:, :, 0] if made.x.ndim == 4 else mask, "layers": made.layers}
    found = []
    for foreground in (True, False):
        lock = kv.KVLock(made.denoiser, policy=FULL, batched=False, foreground=foreground, **given)
        with lock, torch.no_grad():
            found.append(lock(made.x, torch.ones(1), **made.extra_args))
        assert (lock.trace.steps[0].computed < 1) == foreground
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_network_that_declares_its_flow_gives_the_dense_result(name):
    try:
        network = random_network(name, grid=(2, 4, 4), clips=2)
    except KVLockError as missing:
        pytest.skip(str(missing))
    if not network.layers.narrows:
        pytest.skip("declares no flow: every token is always computed")
    latents = network.x
    mask = torch.zeros(2, 1, *latents.shape[2:])
    mask[0, ..., : latents.shape[-1] // 4] = 1
    mask[1, ..., latents.shape[-2] // 2 :, : latents.shape[-1] // 2] = 1
    source = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    sigmas = torch.tensor([1.5, 0.9, 0.4, 0.0])
    results = []
    for foreground in (False, True, None):
        kv_cache = None if foreground is not None else kv.KVCache(every=1, format=None)
        lock = kv.KVLock(
            network.denoiser,
            source=source,
            mask=mask,
            policy=FULL,
            layers=network.layers,
            foreground=foreground,
            kv_cache=kv_cache,
        )
        results.append(lock.sample("euler", latents * sigmas[0], sigmas, extra_args=network.extra_args))
        assert (lock.trace.steps[0].computed < 1) == (foreground is not False)
    off = kv.KVLock(network.denoiser, source=source, mask=mask, policy=kv.Constant(lock=0.0), composite=True)
    plain = off.sample("euler", latents * sigmas[0], sigmas, extra_args=network.extra_args)
    effect = (plain - results[0]).abs().max()
    for fewer in results[1:]:
        assert (fewer - results[0]).abs().max() < 0.01 * effect


class ByHand:
    """Attention that no hook of a lock sees."""

    def __call__(self, attn, hidden_states, *args, **kwargs):
        q, k, v = (
            f(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for f in (attn.to_q, attn.to_k, attn.to_v)
        )
        out = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, -1) @ v
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("own", [True, False])
def test_a_layer_whose_attention_is_not_seen_is_reported(setup, monkeypatch, own):
    """Of a processor of a user's own all tokens are computed. One of the library's must not be missed."""
    if not own:
        scope = {**globals(), "__name__": "diffusers.kernels"}
        monkeypatch.setattr(ByHand, "__call__", FunctionType(ByHand.__call__.__code__, scope))
    setup.model.inner_model.transformer.blocks[1].attn1.set_processor(ByHand())
    lock = setup.lock(policy=FULL)
    if own:
        with pytest.warns(UserWarning, match="The others are not locked"):
            lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        assert {s.computed for s in lock.trace} == {1.0}
        with pytest.warns(UserWarning, match="foreground=True: every token is computed all the same; .* not its own"):
            setup.lock(policy=FULL, foreground=True)
        return
    with pytest.raises(AttentionError, match=r"(?s)1 of 2 layers.*not blocks.1.attn1.*foreground=False"):
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    lock = setup.lock(policy=FULL, foreground=False)
    with pytest.warns(UserWarning, match="The others are not locked"):
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert {s.fused_layers for s in lock.trace} == {1}


def test_a_mask_that_leaves_no_token_locks_nothing_and_warns(setup):
    mask = torch.ones_like(setup.mask)
    mask[..., ::2] = 0  # half of every token is kept, and no token
    with pytest.warns(UserWarning, match="no token is left to lock"):
        lock = kv.KVLock(setup.model, source=setup.source, mask=mask, policy=FULL, composite=True)
    out = lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    off = kv.KVLock(setup.model, source=setup.source, mask=mask, policy="off", composite=True)
    assert torch.equal(out, off.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg))
    assert {(s.fused_layers, s.nfe) for s in lock.trace} == {(0, 2)}


def test_gradient_checkpointing_is_refused(setup):
    setup.model.inner_model.transformer.enable_gradient_checkpointing()
    lock = setup.lock(policy=FULL)
    with lock, torch.enable_grad(), pytest.raises(AttentionError, match="disable_gradient_checkpointing"):
        lock(setup.x, setup.sigmas[:1], **setup.cfg)
    with torch.no_grad():
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)


def test_what_measures_every_token_gets_every_token(setup):
    for estimator in (
        kv.TrajectoryVariance(window=3, patch=(1, 2, 2)),
        kv.variance.Sparse(kv.variance.RenoiseVariance(patch=(1, 2, 2)), every=2, hold=True),
    ):
        measuring = kv.PID(kp=0.0, ki=0.0, bias=1.0)  # locks as the constant does, and measures
        lock = setup.lock(policy=measuring, estimator=estimator)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        assert {s.computed for s in lock.trace} == {1.0}
        with pytest.warns(UserWarning, match="measures the background too"):
            setup.lock(policy=measuring, estimator=estimator, foreground=True)
        with pytest.warns(UserWarning, match="estimator= without effect"):  # so it does not prevent it
            idle = setup.lock(policy=kv.Constant(lock=1.0), estimator=estimator, foreground=True)
        idle.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        assert max(s.computed for s in idle.trace) < 1.0


@pytest.mark.parametrize("name", ["flux", "sd3", "qwen-image"])
def test_residuals_of_a_controlnet_are_of_all_tokens(name):
    made = random_network(name, grid=(1, 4, 6), clips=1)
    inner, model = made.layers.networks[0], made.denoiser.inner_model
    residuals = [torch.ones(1, 24, inner.inner_dim)] * 2
    argument = "block_controlnet_hidden_states" if name == "sd3" else "controlnet_block_samples"
    plain = model.call

    class Controlled:
        config = inner.config

        def __call__(self, *args, **kwargs):
            return inner(*args, **kwargs, **{argument: residuals})

    model.call = lambda network, *args: plain(Controlled(), *args)
    source = torch.randn(made.x.shape, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros_like(made.x[:, :1])
    mask[..., : made.x.shape[-1] // 3] = 1
    options = {"source": source, "mask": mask, "layers": made.layers, "policy": FULL, "batched": False}
    found = []
    for more in ({"foreground": False}, {"batched": True}):
        with kv.KVLock(made.denoiser, **options | more) as lock, torch.no_grad():
            found.append(lock(made.x, torch.tensor(1.0), **made.extra_args))
    torch.testing.assert_close(*found, rtol=0, atol=1e-4 * float(found[0].std()))
    lock = kv.KVLock(made.denoiser, **options)
    with lock, pytest.raises(AttentionError, match=r"ControlNet adds to all tokens.*foreground=False"):
        lock(made.x, torch.tensor(1.0), **made.extra_args)


def test_pictures_with_references_before_them_are_refused():
    made = random_network("z-image", grid=(1, 4, 6))
    model, plain = made.denoiser.inner_model, made.denoiser.inner_model.call
    model.call = lambda network, *args: plain(partial(network, image_noise_mask=[[0, 1]]), *args)
    source, mask = torch.zeros_like(made.x), torch.ones_like(made.x[:, :1])
    mask[..., 2:] = 0
    lock = kv.KVLock(made.denoiser, source=source, mask=mask, layers=made.layers, policy="half")
    with lock, pytest.raises(AttentionError, match="reference images come before the picture's tokens"):
        lock(made.x, torch.tensor(1.0), **made.extra_args)
