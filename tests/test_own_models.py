"""Networks and samplers of users' own, in the forms that scripts have: what fits is right, and what cannot is told."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from functools import wraps
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kvlock_sampling as kv
from kvlock_sampling import tiny
from kvlock_sampling.batching import check_rows, join_calls, take
from kvlock_sampling.masks.fitted import FittedMask
from kvlock_sampling.restart import restart
from kvlock_sampling.types import AttentionError, EstimatorError, MaskError, RunError, SamplerError, SourceError

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


class Multihead(Homemade):
    """torch's own layers, which call the function themselves."""

    def __init__(self, made=lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)):
        super().__init__()
        self.layers = nn.ModuleList(made() for _ in range(2)).requires_grad_(False)

    def attend(self, h):
        h = super().attend(h)
        for layer in self.layers:
            h = layer(h) if isinstance(layer, nn.TransformerEncoderLayer) else layer(h, h, h, need_weights=False)[0]
        return h


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


class SingleHead(Homemade):
    def attend(self, h):
        return h + F.scaled_dot_product_attention(*self.qkv(h).chunk(3, -1))


def test_heads_folded_into_rows_are_refused_in_a_model_that_guides_itself():
    refused = r"(?s)4 rows; expected 1 for .* an axis of their own"
    for network, wanted in ((Homemade(), None), (SingleHead(), None), (Folded(), refused)):
        inner = kv.FlowDenoiser(network)

        def guided(x, sigma, cond_scale=1.0, inner=inner):
            uncond, cond = inner(x.repeat(2, 1, 1, 1, 1), sigma.repeat(2)).chunk(2)
            return uncond + cond_scale * (cond - uncond)

        options = {
            "source": CLIP,
            "mask": MASK,
            "policy": kv.Constant(lock=1.0),
            "noise": "fixed",
            "branch": inner,
            "composite": False,
        }
        lock = kv.KVLock(guided, layers=kv.sdpa_layers(network, patch=PATCH), scale_arg="cond_scale", **options)
        if wanted is None:
            alone = lock_of(network)  # of a scale of 1
            torch.testing.assert_close(evaluated(lock), evaluated(alone))
        else:
            with pytest.raises(AttentionError, match=wanted):
                evaluated(lock)


def test_a_declared_network_is_asked_the_same_in_a_model_that_guides_itself():
    for kind in (Homemade, Folded):
        network = kind()
        name = f"{kind.__module__}:{kind.__name__}"
        declared = kv.attention.Architecture("mine", (name,), layers=("",), patch=PATCH)
        options = {"source": CLIP, "mask": MASK, "policy": kv.Constant(1.0), "noise": "fixed", "composite": False}
        lock = kv.KVLock(Guides(kv.FlowDenoiser(network)), layers=declared.find(network), **options)
        given = {"cond": torch.zeros(1, 1), "uncond": torch.zeros(1, 1), "cond_scale": 1.0}
        with lock:
            if kind is Homemade:
                torch.testing.assert_close(lock(X * 5, SIGMA, **given), evaluated(lock_of(network)))
            else:
                with pytest.raises(AttentionError, match=r"(?s)8 rows; expected 2 for .* an axis of their own"):
                    lock(X * 5, SIGMA, **given)


@pytest.mark.parametrize("policy", ["half", "default", "sigmoid"])
@pytest.mark.parametrize("clips", [1, 3])
def test_other_clips_in_a_block_are_another_run(setup, policy, clips):
    def stepped(lock, x, sigmas):
        for level, below in pairwise(sigmas):
            x = x + (x - lock(x, level.expand(len(x)), **setup.cfg)) / level * (below - level)
        return x

    x, below = setup.x.repeat(3, 1, 1, 1, 1), setup.source + setup.x.repeat(clips + 1, 1, 1, 1, 1)
    with setup.lock(policy=policy) as lock:
        stepped(lock, x, setup.sigmas)
        found = stepped(lock, below, setup.sigmas[1:])
    with setup.lock(policy=policy) as lock:
        assert torch.equal(found, stepped(lock, below, setup.sigmas[1:]))


def test_a_sampler_that_takes_clips_apart_stays_in_its_run(setup):
    def stepped(lock, parts):
        x = setup.x.repeat(2, 1, 1, 1, 1)
        for level, below in pairwise(setup.sigmas):
            lock(x[:parts], level.expand(parts), **setup.cfg)
            x = x + (x - lock(x, level.expand(len(x)), **setup.cfg)) / level * (below - level)
        return x

    with setup.lock(policy="half", noise="fixed") as lock:
        found = stepped(lock, 1)
    with setup.lock(policy="half", noise="fixed") as lock:
        assert torch.equal(found, stepped(lock, 2))


@pytest.mark.parametrize("policy", ["off", "half"])
def test_a_stage_within_the_last_step_is_a_level_of_the_schedule(setup, policy):
    def midpoint(model, x, sigmas, extra_args=None, callback=None, disable=None):
        for high, low in pairwise(sigmas):
            middle = (high + low) / 2
            half = x + (x - model(x, high.expand(len(x)), **extra_args)) / high * (middle - high)
            x = x + (half - model(half, middle.expand(len(x)), **extra_args)) / middle * (low - high)
        return x

    lock = setup.lock(policy=policy)
    found = lock.sample(midpoint, setup.x, setup.sigmas, extra_args=setup.cfg)
    with lock:
        assert torch.equal(midpoint(lock, setup.x, setup.sigmas, extra_args=setup.cfg), found)


def test_a_policy_that_reads_an_effect_by_token_is_told_that_none_is_measured(pair):
    options = {"policy": kv.policy.Release(), "estimator": kv.TrajectoryVariance(patch="model")}
    with pytest.raises(kv.types.PolicyError, match="effect is NaN unless it is measured"):
        pair.lock(**options).sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)


def test_a_default_dtype_does_not_round_the_noise_level_of_the_source(setup):
    source = kv.source.Source(setup.source, noise="fixed")
    noise, expected = source.noise, source.at(setup.x, 10.9701, source.noise)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(source.at(setup.x, 10.9701, noise), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_network_that_is_traced_within_a_block_keeps_no_fusion():
    network = Homemade()

    def traced(m, z, t):
        if not hasattr(traced, "made"):
            traced.made = torch.jit.trace(lambda z: Homemade.forward(m, z, None), (z,), check_trace=False)
        return traced.made(z)

    free = evaluated(lock_of(network, 0.0))
    with pytest.raises(AttentionError):
        evaluated(lock_of(network, call=traced))
    torch.testing.assert_close(kv.FlowDenoiser(network, call=traced)(X * 5, SIGMA), free)


@pytest.mark.parametrize("policy", ["off", kv.Constant(lock=0.5), kv.Constant(lock=1.0)])
@pytest.mark.parametrize("batched", [True, False])
def test_a_denoiser_may_write_every_result_to_the_same_memory(setup, policy, batched):
    """As CUDA graphs and compiled engines do."""
    buffers = {}

    class Buffered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner_model = setup.model

        def forward(self, x, sigma, cond):
            out = self.inner_model(x, sigma, cond=cond)
            return buffers.setdefault(out.shape, torch.empty_like(out)).copy_(out)

    options = {"source": setup.source, "mask": setup.mask, "policy": policy, "batched": batched}
    found = []
    for model in (setup.model, Buffered()):
        with kv.KVLock(model, **options) as lock:
            found.append([lock(setup.x, level[None], **setup.cfg) for level in setup.sigmas[:2]])
    for wanted, out in zip(*found, strict=True):
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [None, "wan", kv.FlowDenoiser])
def test_what_is_no_denoiser_is_refused(wrong):
    with pytest.raises(kv.KVLockError, match=r"model=.*; expected a denoiser, model\(x, sigma"):
        kv.KVLock(wrong, policy="off")
    if wrong is not None:
        with pytest.raises(kv.KVLockError, match=r"branch=.*; expected a denoiser"):
            kv.KVLock(lambda x, sigma, cond_scale=1.0: x, branch=wrong, policy="off")


@pytest.mark.parametrize("sigma", [None, "1", [[1.0], 2.0]])
def test_what_is_no_noise_level_is_refused(setup, sigma):
    with pytest.raises(RunError, match="expected a noise level"), setup.lock(policy="off") as lock:
        lock(setup.x, sigma, **setup.cfg)


def test_layers_may_be_an_array_and_calls_a_number():
    layers = kv.find_layers(tiny.TinyWan())
    for chosen in (np.array([0, 2]), torch.tensor([0, 2]), np.int64(1)):
        names = [layer.name for layer in layers.select(chosen).layers]
        assert names == [layers.layers[i].name for i in np.atleast_1d(np.asarray(chosen))]
    network = Homemade()
    assert kv.sdpa_layers(network, patch=PATCH, calls=0).calls == {0}
    for calls in (-1, [0.5], ["a"]):
        with pytest.raises(AttentionError, match="count no call"):
            kv.sdpa_layers(network, patch=PATCH, calls=calls)


def test_further_tokens_add_up():
    layers = kv.find_layers(tiny.TinyWan())
    assert layers.with_extra(before=2).with_extra(after=3).extra == (2, 3)


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


class Guides(torch.nn.Module):
    """A model that guides by itself."""

    def __init__(self, inner) -> None:
        super().__init__()
        self.inner_model = inner

    def forward(self, x, sigma, cond, uncond, cond_scale=7.5):
        return kv.CFGDenoiser(self.inner_model)(x, sigma, cond=cond, uncond=uncond, cond_scale=cond_scale)


def test_a_compiled_model_that_guides_is_known(setup):
    def arg(model):
        return kv.KVLock(model, source=setup.source, mask=setup.mask, policy="off").settings.scale_arg

    compiled = torch.compile(Guides(setup.model), backend="eager")
    assert arg(compiled) == arg(kv.CFGDenoiser(torch.compile(setup.model, backend="eager"))) == "cond_scale"
    assert arg(torch.compile(setup.model, backend="eager")) is None


def test_a_guidance_scale_of_none_is_one(setup):
    class Own(Guides):
        def forward(self, x, sigma, cond, uncond=None, cond_scale=None):
            return self.inner_model(x, sigma, cond=cond)

    lock = kv.KVLock(Own(setup.model), source=setup.source, mask=setup.mask, policy="off")
    assert lock.sample("euler", setup.x, setup.sigmas, extra_args={"cond": setup.cfg["cond"]}).isfinite().all()


class FlowTime(kv.denoisers.DenoiserWrapper):
    """A model in flow time, x_t = (1 - t) x0 + t noise, around one in variance-exploding form."""

    def forward(self, x, t, **extra_args):
        tt = t.view(-1, *[1] * (x.ndim - 1))
        return self.inner_model(x / (1 - tt), t / (1 - t), **extra_args)

    def add_noise(self, x0, noise, t):
        t = torch.as_tensor(t)
        t = t.view(-1, *[1] * (x0.ndim - 1)) if t.ndim else t
        return (1 - t) * x0 + t * noise

    def to_ve(self, t):
        return t / (1 - t)


@pytest.mark.parametrize("estimator", [kv.variance.RenoiseVariance(), kv.variance.PosteriorVariance()])
@pytest.mark.parametrize("guides", [False, True])
def test_probes_do_not_depend_on_the_models_form(setup, estimator, guides):
    given = setup.cfg if guides else {"cond": setup.cfg["cond"]}

    def risks(model, form):
        lock = kv.KVLock(model, source=setup.source, mask=setup.mask, policy="sigmoid", estimator=estimator)
        with lock:
            for sigma in setup.sigmas[:3]:
                level, x = (sigma / (1 + sigma), setup.x / (1 + sigma)) if form else (sigma, setup.x)
                lock(x, level.expand(len(x)), **given)
        return torch.tensor([row["variance"] for row in lock.trace.rows()])

    wrap = kv.CFGDenoiser if guides else (lambda model: model)
    torch.testing.assert_close(
        risks(wrap(FlowTime(setup.model)), True), risks(wrap(setup.model), False), rtol=2e-2, atol=1e-6
    )


def test_a_probe_at_another_level_of_a_model_with_its_own_levels_is_refused(setup):
    @dataclass(frozen=True)
    class Elsewhere(kv.variance.Estimator):
        cost = 1

        def step(self, state, evaluation):
            moved = evaluation.probe(evaluation.x, evaluation.sigma / 2) - evaluation.denoised
            return state, moved.float().square().flatten(1).mean(1)

    half = setup.lock(policy="sigmoid", estimator=Elsewhere(), threshold=1.0)  # a rounded level is none of its own
    half.sample("euler", setup.x.bfloat16(), setup.sigmas, extra_args=setup.cfg)
    lock = kv.KVLock(
        FlowTime(setup.model),
        source=setup.source,
        mask=setup.mask,
        policy="sigmoid",
        estimator=Elsewhere(),
        threshold=1.0,
    )
    with lock, pytest.raises(EstimatorError, match="expected a probe at"):
        lock(setup.x / 9, torch.full((len(setup.x),), 8 / 9), cond=setup.cfg["cond"])


def test_a_source_without_its_object_is_not_read_under_the_edits_prompt(setup):
    prompts = []

    class Seen(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_model = setup.model

        def forward(self, x, sigma, cond):
            prompts.append(cond.tolist())
            return self.inner_model(x, sigma, cond=cond)

    cond, own = setup.cfg["cond"][:1], setup.cfg["uncond"][:1]
    lock = kv.KVLock(
        Seen(), source=setup.source[:1], mask=setup.mask, policy="half", erase=True, source_args={"cond": own}
    )
    with lock:
        lock(setup.x[:1], setup.sigmas[:1], cond=cond)
    assert prompts == [[*cond.tolist(), *own.tolist()]]


def test_a_prompt_of_more_rows_than_clips_is_never_split_among_branches():
    two, table = torch.ones(2, 5, 8), torch.ones(3, 7)
    check_rows({"cond": {"pooled": two[:1, 0], "freqs": torch.ones(77, 1, 64)}}, 1, "extra_args")
    with pytest.raises(RunError, match="cond in extra_args has 2 rows for 1 clip"):
        check_rows({"cond": {"text": two, "table": table}}, 1, "extra_args")
    check_rows({"cond": {"text": two[:1], "image": torch.ones(3, 8, 8)}}, 1, "extra_args")
    assert join_calls([{"rope": table, "cond": two[:1]}] * 3, 1)["rope"] is table


def test_the_order_in_which_a_dict_was_written_says_nothing():
    one, other = {"text": torch.ones(1, 5, 8), "mask": torch.ones(1, 5)}, {"mask": torch.zeros(1, 5)}
    joined = join_calls([{"cond": one}, {"cond": {**other, "text": torch.zeros(1, 5, 8)}}], 1)
    assert joined["cond"]["text"].flatten(1).mean(1).tolist() == joined["cond"]["mask"].mean(1).tolist() == [1, 0]


def test_one_text_per_clip_goes_with_its_clip():
    texts = [torch.ones(5, 8), torch.zeros(7, 8)]
    assert take({"cond": texts}, torch.tensor([1]), 2)["cond"][0] is texts[1]
    for others in ([torch.ones(77, 8), torch.ones(16, 4)], {"text": torch.ones(2, 5, 8), "rope": texts}):
        kept = take({"cond": others}, torch.tensor([1]), 2)["cond"]
        assert len(kept) == 2  # two encoders of one prompt, and the cosines and sines of all clips
        assert isinstance(others, list) or kept["rope"] == texts


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_a_sampler_of_a_range_tells_the_schedule(setup, sampler):
    lock = setup.lock(policy=kv.Windowed(kv.Constant(lock=1.0), last=2))
    with lock:
        inside = kv.samplers.run(sampler, lock, setup.x, setup.sigmas, extra_args=setup.cfg)
    assert torch.equal(inside, lock.sample(sampler, setup.x, setup.sigmas, extra_args=setup.cfg))


@pytest.mark.parametrize("sampler", ["dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_more_noise_than_the_schedule_says_is_sampled(setup, sampler):
    given = {"extra_args": setup.cfg, "eta": 1.05, "seed": 1}
    assert setup.lock(policy="off").sample(sampler, setup.x, setup.sigmas, **given).isfinite().all()


@pytest.mark.parametrize("sampler", ["dpmpp_2m_sde", "dpmpp_3m_sde", "dpm_fast", "dpm_adaptive"])
def test_samplers_that_need_two_steps_say_so(setup, sampler):
    with pytest.raises(
        SamplerError, match=f"{sampler} needs two non-zero noise levels; sigmas has 1. One step: 'euler'"
    ):
        kv.samplers.run(
            sampler, setup.model, setup.x, torch.tensor([1.0, 0.0]), seed=0, extra_args={"cond": setup.cfg["cond"]}
        )


def test_states_of_deques_and_arrays_are_compared():
    @dataclass(frozen=True)
    class Remembers(kv.Policy):
        def step(self, state, obs):
            seen, count = state or (deque(maxlen=3), np.zeros(2))
            seen = deque([*seen, obs.risk], maxlen=3)
            return (seen, count + 1), kv.Control(lock=seen[-1].clamp(0, 1))

    kv.testing.check_policy(Remembers())


def test_a_smoothed_lock_per_token_needs_no_risk_per_token(setup):
    tokens = setup.lock(policy="half").settings.tokens
    ramp = torch.linspace(0, 1, tokens)[None]
    given = kv.stateless(lambda obs: kv.Control(lock=ramp.expand(len(obs.risk), -1)), uses_risk=False)
    plain, smooth = (
        setup.lock(policy=p).sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        for p in (given, kv.Smoothed(given, half_life=1e-6))
    )
    torch.testing.assert_close(smooth, plain, atol=1e-4, rtol=1e-4)


def test_a_branch_gets_the_arguments_that_it_takes(setup):
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner_model = setup.model

        def forward(self, x, sigma, text, neg, guidance):
            return kv.CFGDenoiser(self.inner_model)(x, sigma, cond=text, uncond=neg, cond_scale=guidance)

    def branch(x, sigma, text):
        return setup.model(x, sigma, cond=text)

    given = {"text": setup.cfg["cond"], "neg": setup.cfg["uncond"], "guidance": 3.0}
    options = {"scale_arg": "guidance", "branch": branch, "policy": "half", "layers": kv.find_layers(setup.model)}
    lock = kv.KVLock(Own(), source=setup.source, mask=setup.mask, **options)
    assert lock.sample("euler", setup.x, setup.sigmas, extra_args=given).isfinite().all()
    wrong = kv.KVLock(Own(), source=setup.source, mask=setup.mask, source_args={"txet": given["text"]}, **options)
    with pytest.raises(TypeError, match="txet"):
        wrong.sample("euler", setup.x, setup.sigmas, extra_args=given)


def test_a_fixed_noise_is_that_of_a_clip_alone(pair):
    both = pair.lock(policy="full", noise="fixed").sample("euler", pair.x, pair.sigmas, extra_args=pair.cfg)
    cut = {"cond": pair.cond[1:], "uncond": pair.uncond[1:], "cond_scale": 3.0}
    lock = pair.lock(source=pair.source[1:], mask=pair.mask[1:], policy="full", noise="fixed")
    alone = lock.sample("euler", pair.x[1:], pair.sigmas, extra_args=cut)
    torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


def test_hooks_of_a_users_on_a_block_see_every_token(setup):
    seen, steer = [], torch.randn(24)

    def hook(module, args, out):
        seen.append(out.shape[1])
        out = out.clone()
        out[:, 5] += steer
        return out

    handle = setup.model.inner_model.transformer.blocks[0].register_forward_hook(hook)
    given = {"extra_args": setup.cfg}
    default, dense = (
        setup.lock(policy="full", foreground=f).sample("euler", setup.x, setup.sigmas, **given) for f in (None, False)
    )
    handle.remove()
    assert set(seen) == {setup.lock(policy="full").settings.tokens}
    torch.testing.assert_close(default, dense, atol=1e-5, rtol=1e-5)


def test_blocks_that_were_compiled_before_are_found(setup):
    blocks = setup.model.inner_model.transformer.blocks
    plain = [layer.name for layer in kv.find_layers(setup.model).layers]
    for index, block in enumerate(blocks):
        blocks[index] = torch.compile(block, backend="eager")
    assert [layer.name for layer in kv.find_layers(setup.model).layers] == plain


class Wrapped(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("wrapped", [(1,), (0, 1)], ids=["one", "all"])
def test_blocks_in_modules_of_ones_own_are_locked(setup, wrapped):
    def edit(**options):
        lock = setup.lock(policy="full", **options)
        return lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg), lock.trace

    plain, trace = edit(foreground=False)
    blocks = setup.model.inner_model.transformer.blocks
    for index in wrapped:
        blocks[index] = Wrapped(blocks[index])
    out, its_trace = edit()
    assert torch.equal(plain, out)
    assert [step.fused_layers for step in trace] == [step.fused_layers for step in its_trace]


def test_another_module_of_the_last_name_is_no_layer():
    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.cross = nn.Identity(), nn.ModuleDict({"attn": nn.Identity()})

    network, direct = nn.Module(), nn.Module()
    direct.attn = nn.Identity()
    network.blocks = nn.ModuleList([direct, Crossed(), Crossed()])
    mine = kv.attention.Architecture("mine", ("*:Module",), ("blocks.*.attn",), patch=(1, 1, 1))
    assert [layer.name for layer in mine.find(network).layers] == ["blocks.0.attn"]
    network.blocks = network.blocks[1:]
    with pytest.raises(AttentionError, match=r"no module of Module is named 'blocks\.\*\.attn'"):
        mine.find(network)


class Rolling(Wrapped):
    """Mixes tokens once more."""

    def forward(self, hidden_states, *args, **kwargs):
        return self.inner(hidden_states, *args, **kwargs) + 0.3 * hidden_states.roll(1, 1)


def rolling_forward(block):
    inner = block.forward
    block.forward = lambda hidden, *args, **kwargs: inner(hidden, *args, **kwargs) + 0.3 * hidden.roll(1, 1)


def rolling_under_a_hook(block):
    from accelerate.hooks import ModelHook, add_hook_to_module

    rolling_forward(block)
    add_hook_to_module(block, ModelHook())


def rolling_over_a_hook(block):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(block, ModelHook())
    rolling_forward(block)


def hidden_arguments(block):
    class Block(type(block)):
        def forward(self, hidden_states, *rest, **named):
            return super().forward(hidden_states, *rest, **named)

    block.__class__ = Block


def other_signature(block):
    class Block(type(block)):
        def forward(self, x, *rest, **named):
            return super().forward(x, *rest, **named)

    block.__class__ = Block


def same_signature(block):
    class Block(type(block)):
        def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
            out = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
            return out + 0.3 * hidden_states.roll(1, 1)

    block.__class__ = Block


def near_processor(block):
    from diffusers.models.transformers.transformer_wan import WanAttnProcessor

    class Near(WanAttnProcessor):
        def __call__(self, attn, hidden_states, text=None, mask=None, rotary=None, **named):
            place = torch.arange(hidden_states.shape[1])
            mask = ((place[:, None] - place).abs() < 8)[None, None]
            return super().__call__(attn, hidden_states, text, mask, rotary, **named)

    block.attn1.set_processor(Near())


def function_processor(block):
    own = block.attn1.processor

    def near(attn, hidden_states, text=None, mask=None, rotary=None, **named):
        place = torch.arange(hidden_states.shape[1])
        return own(attn, hidden_states, text, ((place[:, None] - place).abs() < 8)[None, None], rotary, **named)

    block.attn1.processor = near


def own_attention(block):
    class Attention(type(block.attn1)):
        def forward(self, hidden_states, *rest, **named):
            return super().forward(hidden_states, *rest, **named) + 0.1 * hidden_states.roll(1, 1)

    block.attn1.__class__ = Attention


def own_cross_attention(block):
    class Crossed(type(block.attn2.processor)):
        def __call__(self, attn, hidden_states, *rest, **named):
            return super().__call__(attn, hidden_states, *rest, **named) + 0.3 * hidden_states.roll(1, 1)

    block.attn2.set_processor(Crossed())


def dressed_up(block):
    original = type(block).forward

    @wraps(original)
    def forward(self, hidden_states, encoder_hidden_states, temb, rotary_emb):
        return original(self, hidden_states, encoder_hidden_states, temb, rotary_emb) + 0.3 * hidden_states.roll(1, 1)

    block.__class__ = type("Block", (type(block),), {"forward": forward})


CHANGES = [Rolling, rolling_forward, rolling_under_a_hook, rolling_over_a_hook, hidden_arguments, other_signature]


def decorated(block):
    class Mean(type(block.attn1.processor)):
        @torch.no_grad()
        def __call__(self, attn, hidden_states, *rest, **named):
            return super().__call__(attn, hidden_states, *rest, **named) + hidden_states.mean(1, keepdim=True)

    block.attn1.set_processor(Mean())


class Around(Wrapped):
    def forward(self, hidden_states, *rest, **named):
        return self.inner(hidden_states, *rest, **named) + 0.3 * hidden_states.mean(1, keepdim=True)


def around_attention(block):
    block.attn1 = Around(block.attn1)


def around_feed_forward(block):
    block.ffn = Around(block.ffn)


CHANGES += [
    decorated,
    around_attention,
    around_feed_forward,
    same_signature,
    near_processor,
    function_processor,
    own_attention,
    own_cross_attention,
    dressed_up,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_block_that_may_mix_tokens_gets_all_of_them(setup, change):
    blocks = setup.model.inner_model.transformer.blocks
    changed = change(blocks[1])
    if changed is not None:
        blocks[1] = changed
    default, dense, apart = (
        setup.lock(policy="full", **options).sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        for options in ({}, {"foreground": False}, {"batched": False})
    )
    torch.testing.assert_close(default, dense, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(apart, dense, atol=1e-5, rtol=1e-5)


def test_a_restart_noises_as_the_model_does(setup):
    ts, given = setup.sigmas / (1 + setup.sigmas), {"extra_args": setup.cfg}
    options = {"source": setup.source, "mask": setup.mask, "policy": "sigmoid", "threshold": 1e-9}
    plain, flow = kv.KVLock(setup.model, **options), kv.KVLock(FlowTime(setup.model), **options)
    x = plain.sample("euler", setup.x, setup.sigmas, **given)
    y = flow.sample("euler", setup.x * (1 - ts[0]), ts, **given)
    back = float(setup.sigmas[2]) * 1.01
    one = restart(plain, "euler", x, setup.sigmas, back_to=back, limit=0.0, **given)
    other = restart(flow, "euler", y, ts, back_to=back / (1 + back), limit=0.0, **given)
    torch.testing.assert_close(other.x, one.x, atol=2e-3, rtol=2e-3)


def test_a_transition_that_reaches_every_token_is_told(setup):
    with pytest.warns(UserWarning, match="no token is left to lock"):
        lock = setup.lock(policy="half", transition=(16.0, 0.0))
    assert lock.settings.layers is None
    with pytest.raises(MaskError, match="transition="):
        setup.lock(policy="half", transition=(float("inf"), 0.5))


def test_a_mask_of_a_vae_that_is_not_causal_is_not_squeezed():
    fitted = FittedMask(F.pad(torch.ones(3, 16, 16), (16, 32, 16, 32, 1, 12)))
    with pytest.raises(MaskError, match="no whole compression factor"):
        fitted.latent(torch.zeros(1, 4, 4, 8, 8))
    assert FittedMask(torch.ones(1, 1, 1, 8, 12).tril()).latent(torch.zeros(1, 4, 8, 12)).shape == (1, 1, 8, 12)


def test_a_network_whose_forward_was_replaced_gets_all_tokens(setup):
    network = setup.model.inner_model.transformer
    own = network.forward

    def forward(hidden_states, *rest, **named):
        return (own(hidden_states, *rest, **named)[0] + 0.3 * hidden_states.mean((2, 3, 4), keepdim=True),)

    network.forward = forward
    default, dense = (
        setup.lock(policy="full", **options).sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        for options in ({}, {"foreground": False})
    )
    assert torch.equal(default, dense)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("made", [None, lambda: nn.MultiheadAttention(16, 4, batch_first=True)])
def test_torchs_own_layers_are_seen(made, training):
    torch.manual_seed(0)
    net = (Multihead() if made is None else Multihead(made)).train(training)
    x, source = torch.randn(1, 3, 2, 8, 8), torch.randn(1, 3, 2, 8, 8)
    mask = torch.zeros(1, 1, 2, 8, 8)
    mask[..., :4] = 1
    model, layers = kv.FlowDenoiser(net), kv.sdpa_layers(net, patch=PATCH)
    own, given = F.scaled_dot_product_attention, {"source": source, "mask": mask, "layers": layers, "noise": "fixed"}
    plain = model(x, torch.ones(1))
    found = {}
    for lock in (0.0, 0.5):
        with kv.KVLock(model, policy=kv.Constant(lock=lock, composite=0.0), **given) as on:
            found[lock] = on(x, torch.ones(1))
            assert [step.fused_layers for step in on.trace] == [3 if lock else 0]
    assert torch.equal(found[0.0], plain)
    assert (found[0.5] - plain).abs().max() > 1e-3
    assert F.scaled_dot_product_attention is own
    assert torch.equal(model(x, torch.ones(1)), plain)


def test_methods_of_a_models_training_are_not_taken_for_a_denoisers():
    class Trained(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner_model, self.expert = inner, nn.Linear(2, 2)

        def add_noise(self, x0, t):
            raise AssertionError("a helper of the training")

        def forward(self, *args, **kwargs):
            return self.inner_model(*args, **kwargs)

    torch.manual_seed(0)
    net, x, mask = Homemade(), torch.randn(1, 3, 2, 8, 8), torch.zeros(1, 1, 2, 8, 8)
    mask[..., :4] = 1
    outs, given = [], {"source": torch.randn(1, 3, 2, 8, 8), "mask": mask, "policy": "half"}
    for model in (kv.FlowDenoiser(net), Trained(kv.FlowDenoiser(net)), kv.FlowDenoiser(Trained(net))):
        with kv.KVLock(model, layers=kv.sdpa_layers(net, patch=PATCH), **given) as lock:
            outs.append(lock(x, torch.ones(1)))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_prompts_of_two_lengths_beside_watched_video_tokens_are_told():
    class Joint(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Homemade()

        def forward(self, z, t, cond):
            grid = self.net.embed(z)
            h = self.net.attend(torch.cat([grid.flatten(2).mT, cond.expand(len(z), -1, -1)], 1))
            return self.net.unembed(h[:, : grid[0, 0].numel()].mT.reshape(grid.shape))

    torch.manual_seed(0)
    net, x, mask = Joint(), torch.randn(1, 3, 2, 8, 8), torch.zeros(1, 1, 2, 8, 8)
    mask[..., :4] = 1
    layers = kv.sdpa_layers(net, patch=PATCH, trailing=7)
    lock = kv.KVLock(kv.FlowDenoiser(net), source=torch.randn_like(x), mask=mask, policy="half", layers=layers)
    prompts = {"cond": torch.randn(1, 7, 16), "uncond": torch.randn(1, 5, 16), "cond_scale": 3.0}
    with lock, pytest.warns(UserWarning, match=r"Expected 0 \+ 32 video tokens \+ 7 after them; other calls .*37 x 37"):
        lock(x, torch.ones(1), **prompts)


def test_a_source_prompt_for_a_model_that_guides_itself_asks_for_its_branch():
    class Guided(nn.Module):
        """Its own empty prompt, second, as DiT does."""

        def __init__(self, inner):
            super().__init__()
            self.inner_model = inner

        def forward(self, x, sigma, cond, cond_scale=3.0):
            cond = torch.cat([cond.expand(len(x), -1), torch.zeros_like(cond)])
            given, empty = self.inner_model(torch.cat([x, x]), torch.cat([sigma, sigma]), cond=cond).chunk(2)
            return empty + (given - empty) * cond_scale

    class Prompted(Homemade):
        def forward(self, z, t, cond):
            return super().forward(z + cond.mean(-1).view(-1, 1, 1, 1, 1), t)

    torch.manual_seed(0)
    net, x, mask = Prompted(), torch.randn(1, 3, 2, 8, 8), torch.zeros(1, 1, 2, 8, 8)
    mask[..., :4] = 1
    inner, source = kv.FlowDenoiser(net), torch.randn(1, 3, 2, 8, 8)

    def run(prompt, **branch):
        given = {"source": source, "mask": mask, "policy": "half", "source_args": {"cond": torch.full((1, 4), prompt)}}
        lock = kv.KVLock(Guided(inner), layers=kv.sdpa_layers(net, patch=PATCH), **given, **branch)
        with lock:
            return lock(x, torch.ones(1), cond=torch.ones(1, 4), cond_scale=3.0)

    with pytest.warns(UserWarning, match=r"last branch is its conditional one.*\n.*branch="):
        assert torch.equal(run(1.0), run(-1.0))
    assert not torch.equal(run(1.0, branch=inner), run(-1.0, branch=inner))
