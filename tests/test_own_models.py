"""Networks and samplers of users' own, in the forms that scripts have: what fits is right, and what cannot is told."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.batching import join_calls, take
from kvlock_sampling.restart import restart
from kvlock_sampling.types import AttentionError, MaskError, RunError, SourceError

PATCH = (1, 2, 2)


class Homemade(nn.Module):
    """One attention with four heads, in the form that the subclass says."""

    def __init__(self):
        super().__init__()
        self.embed, self.unembed = nn.Conv3d(3, 16, PATCH, PATCH), nn.ConvTranspose3d(16, 3, PATCH, PATCH)
        self.qkv = nn.Linear(16, 48)
        self.requires_grad_(False)

    def attend(self, h):
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(h).chunk(3, -1))
        return h + self.attention(q, k, v).transpose(1, 2).flatten(2)

    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def forward(self, z, t, **_):
        grid = self.embed(z)
        return self.unembed(self.attend(grid.flatten(2).mT).mT.reshape(grid.shape))


class Folded(Homemade):
    """Heads lie in the rows, (rows * heads, length, dim)."""

    def attention(self, q, k, v):
        return F.scaled_dot_product_attention(*(x.flatten(0, 1) for x in (q, k, v))).unflatten(0, (-1, 4))


class Checkpointed(Homemade):
    reentrant = True

    def attend(self, h):
        return torch.utils.checkpoint.checkpoint(super().attend, h, use_reentrant=self.reentrant)


class NotReentrant(Checkpointed):
    reentrant = False


CLIP, X = torch.randn(2, 1, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0)).unbind()
MASK = torch.zeros(3, 8, 8)
MASK[:, 2:6, 2:6] = 1
SIGMA = torch.tensor([5.0])


def lock_of(network, lock=1.0, call=None, **options):
    options = {"policy": kv.Constant(lock=lock), "composite": False, "noise": "fixed", "mask": MASK, **options}
    layers = kv.sdpa_layers(network, patch=PATCH)
    return kv.KVLock(kv.FlowDenoiser(network, call=call), source=CLIP, layers=layers, **options)


def evaluated(lock, x=X * 5):
    with lock:
        return lock(x, SIGMA)


def by_row(network, z, t):
    return torch.cat([network(row[None], level[None]) for row, level in zip(z, t, strict=True)])


def test_rows_that_are_not_the_branches_are_refused_and_not_fused_with_others():
    network, folded = Homemade(), Folded()
    folded.load_state_dict(network.state_dict())
    free, locked = evaluated(lock_of(network, 0.0)), evaluated(lock_of(network))
    assert (locked - free).norm() > 0.1
    torch.testing.assert_close(evaluated(lock_of(folded, 0.0)), free)
    with pytest.raises(AttentionError, match=r"(?s)8 rows; expected 2 for .* of their own"):
        evaluated(lock_of(folded))
    with pytest.raises(AttentionError, match=r"(?s)1 rows; expected 2 for .*batched=False"):
        evaluated(lock_of(network, call=by_row))
    torch.testing.assert_close(evaluated(lock_of(network, call=by_row, batched=False)), locked)


@pytest.mark.parametrize("kind", [Checkpointed, NotReentrant])
def test_checkpointing_by_the_networks_own_code_is_refused_where_gradients_are_taken(kind):
    lock, plain = lock_of(kind()), lock_of(Homemade())
    lock.model.inner_model.load_state_dict(plain.model.inner_model.state_dict())
    with torch.no_grad():
        assert torch.equal(evaluated(lock), evaluated(plain))
    with pytest.raises(AttentionError, match=r"gradient checkpointing .*\n.*no_grad"):
        evaluated(lock, (X * 5).requires_grad_())


def test_a_method_other_than_forward_is_named_as_a_reason():
    network = Homemade()
    network.predict = lambda z, t: Homemade.forward(network, z, t)
    with pytest.raises(AttentionError, match="another method of it was called"):
        evaluated(lock_of(network, call=lambda m, z, t: m.predict(z, t)))


def test_a_sampler_may_write_to_what_a_lock_returns():
    def risks(clamp):
        lock = kv.KVLock(lambda x, sigma, cond=None: x / (1 + sigma.view(-1, 1, 1, 1) ** 2), policy="default")
        x, levels = X[:, :, 0] * 10, torch.tensor([10.0, 5.0, 2.0, 1.0])
        with lock:
            for a, b in pairwise(levels):
                denoised = clamp(lock(x, a.expand(1)))
                x = denoised + (x - denoised) * (b / a)
        return [row["risk"] for row in lock.trace.rows()][1:]

    assert risks(lambda x: x.clamp_(-0.1, 0.1)) == risks(lambda x: x.clamp(-0.1, 0.1))


@pytest.mark.parametrize("size", [(8, 16), (32, 16), (8, 24)])
def test_a_mask_of_another_shape_is_not_squeezed_onto_the_clip(size):
    mask = torch.zeros(3, *size)
    mask[:, :4, :4] = 1
    with pytest.raises(MaskError, match="one for both sides"):
        lock_of(Homemade(), mask=mask)


def test_a_registry_of_subclasses_sees_no_class_of_the_locks():
    registry = {}

    class Registered(nn.Module):
        def __init_subclass__(cls, **_):
            if cls.__name__ in registry:
                raise ValueError(f"{cls.__name__} registered twice")
            registry[cls.__name__] = cls

    class Mine(Registered, Homemade):
        pass

    evaluated(lock_of(Mine()))
    assert registry == {"Mine": Mine}


def test_a_block_that_another_task_leaves_keeps_the_error_that_it_leaves_by():
    lock = lock_of(Homemade())

    async def steps():
        with lock:
            for level in (5.0, 3.0):
                yield lock(X * level, torch.tensor([level]))

    async def client():
        made = steps()
        await asyncio.create_task(anext(made))
        await asyncio.create_task(made.aclose())  # the client has gone: GeneratorExit, not an error

    asyncio.run(client())
    with pytest.raises(RunError, match="outside its `with` block"):
        lock(X, SIGMA)


def test_the_runs_noise_holds_no_graph():
    start = CLIP.clone().requires_grad_()
    with lock_of(Homemade(), noise=None) as lock:
        x = start.tanh() * 5
        for level in (5.0, 3.0):
            denoised = lock(x, torch.tensor([level]))
            denoised.square().mean().backward()
            x = (x + (x - denoised) / level).detach().requires_grad_()


@dataclass
class Text:
    ids: torch.Tensor


@pytest.mark.parametrize("wrap", [Text, lambda ids: ids.numpy(), lambda ids: {"a": [np.float32(ids.mean())]}])
def test_conditioning_of_any_class_is_evaluated_branch_by_branch(wrap):
    seen = []

    def model(x, sigma, cond):
        seen.append(cond)
        return x * 0.5

    one, two = wrap(torch.ones(2, 3)), wrap(torch.zeros(2, 3))
    lock = kv.KVLock(model, policy="off")
    with lock:
        lock(X, SIGMA, cond=one, uncond=two, cond_scale=3.0)
    assert len(seen) == 2


def test_lists_of_one_text_per_clip_are_never_shared_by_more_rows():
    texts = [torch.ones(5, 8), torch.ones(7, 8)]
    assert join_calls([{"cond": texts}, {"cond": texts}], 2) is None
    assert join_calls([{"cond": texts}], 2) == {"cond": texts}
    shared = [torch.ones(5, 8)]  # of one clip out of two: not a row each
    assert join_calls([{"cond": shared}, {"cond": shared}], 2) == {"cond": shared}
    assert take({"rope": texts}, torch.tensor([1]), 2)["rope"] == texts  # which may as well be tables of all clips


def test_clips_are_restarted_by_a_sampler_without_noise_of_its_own(pair):
    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for a, b in pairwise(sigmas):
            x = x + (x - model(x, a.expand(len(x)), **extra_args)) / a * (b - a)
        return x

    lock = pair.lock(policy=kv.policy.Clamped(kv.Linear(), lock=(0.2, 1.0)), threshold=1.0)
    given = {"back_to": 3.0, "limit": 0.0, "extra_args": pair.cfg}
    x = lock.sample(euler, pair.x, pair.sigmas, extra_args=pair.cfg)
    own = restart(lock, euler, x, pair.sigmas.tolist(), **given)
    assert torch.equal(own.x, restart(lock, "euler", x, pair.sigmas, **given).x)
    with pytest.raises(RunError, match="back_to='2'; expected"):
        restart(lock, euler, x, pair.sigmas, **{**given, "back_to": "2"})


def test_a_clip_with_its_frames_first_is_told_to_turn_its_axes():
    clip = torch.zeros(8, 3, 64, 64)
    with pytest.raises(SourceError, match=r"clip\.transpose\(-4, -3\)"):
        kv.edit_video(clip, torch.ones(8, 64, 64), "a red ball", model=tiny.load())


def test_a_mask_alone_under_the_default_policy_is_not_called_a_lock_of_nothing():
    with pytest.raises(SourceError, match="the default policy may lock"):
        kv.KVLock(kv.FlowDenoiser(Homemade()), mask=MASK)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (3,)])
def test_a_noise_level_of_another_shape_is_told(shape):
    lock = lock_of(Homemade())
    with lock, pytest.raises(RunError, match=r"sigma has shape .*; expected \(\) or \(batch,\)"):
        lock(X, torch.full(shape, 5.0))


class Guided(Homemade):
    """Doubles its rows itself, with a fixed guidance."""

    def forward(self, z, t, **_):
        one, two = super().forward(torch.cat([z, z * 0.9]), torch.cat([t, t])).chunk(2)
        return one + 4 * (two - one)


def test_a_network_that_doubles_its_rows_is_locked():
    network = Guided()
    free, locked = evaluated(lock_of(network, 0.0)), evaluated(lock_of(network))
    assert (locked - free).norm() > 0.1


def test_a_checkpoint_around_the_lock_has_right_gradients():
    lock, grads = lock_of(Homemade()), []
    for around in (lambda f, x: f(x), lambda f, x: torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False)):
        x = (X * 5).requires_grad_()
        with lock:
            around(lambda x: lock(x, SIGMA), x).square().sum().backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_layers_of_ones_own_need_no_blocks():
    network = Homemade()
    layers = kv.attention.AttentionLayers(PATCH, watch=network, networks=(network,))
    locked = kv.KVLock(
        kv.FlowDenoiser(network),
        source=CLIP,
        mask=MASK,
        layers=layers,
        policy=kv.Constant(lock=1.0),
        composite=False,
        noise="fixed",
    )
    torch.testing.assert_close(evaluated(locked), evaluated(lock_of(network)))
