"""Composite as an actuator: exact ends, per token, on every route, in wrappers, in pasting, and back up the noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_sampling as kv
from kvlock_sampling import masks
from kvlock_sampling.guidance import composite
from kvlock_sampling.masks.fitted import FittedMask
from kvlock_sampling.masks.morphology import dilate
from kvlock_sampling.masks.tokens import on_latents, on_pixels
from kvlock_sampling.policy import Clamped
from kvlock_sampling.types import Control, EstimatorError, PolicyError, SourceError

TOKENS = 3 * 4 * 4  # of the fixture's clips: patches of (1, 2, 2)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def always(lock: float, weight: Any) -> kv.Policy:
    return kv.stateless(lambda obs: Control(lock, None, weight), uses_risk=False)


def never_locking(lock: float, weight: Any) -> kv.Policy:
    class Free(kv.Policy):
        uses_risk, may_lock = False, False

        def step(self, state, obs):
            return state, Control(lock, None, weight)

    return Free()


def outputs(setup, policy, levels=None, **options):
    """What a lock returns at falling noise levels from fixed x, and its trace."""
    lock = setup.lock(policy=policy, **options)
    levels = setup.sigmas[:3].tolist() if levels is None else levels
    with lock, torch.no_grad():
        out = [lock(setup.x * s / float(setup.sigmas[0]), torch.tensor([s]), **setup.cfg) for s in levels]
    return out, lock.trace


def release_by(weight) -> kv.Policy:
    return kv.stateless(lambda obs: Control(0.0, None, weight(obs)))


# -- the arithmetic ---------------------------------------------------------------------------------------------------


@given(st.sampled_from(FLOATS), st.integers(0, 2**31), st.booleans())
@settings(max_examples=60, deadline=None)
def test_both_ends_are_exact(dtype, seed, soft):
    g = torch.Generator().manual_seed(seed)
    denoised, source = (
        (torch.randn(2, 3, 2, 4, 4, generator=g) * 10).to(dtype),
        torch.randn(2, 3, 2, 4, 4, generator=g).to(dtype),
    )
    mask = torch.rand(2, 1, 2, 4, 4, generator=g).to(dtype)
    mask = mask if soft else mask.round()
    for weight in (0.0, torch.zeros(2, 1, 1, 1, 1, dtype=dtype), torch.zeros(2, 1, 2, 4, 4, dtype=dtype)):
        assert torch.equal(composite(denoised, source, mask, weight), denoised)
    whole = torch.lerp(source, denoised, mask)
    for weight in (1.0, torch.ones(2, 1, 1, 1, 1, dtype=dtype), torch.ones(2, 1, 2, 4, 4, dtype=dtype)):
        assert torch.equal(composite(denoised, source, mask, weight), whole)
    background = mask.expand_as(source) == 0
    assert torch.equal(whole[background], source[background])
    half = composite(denoised, source, mask, 0.5)
    inside = mask.expand_as(source) == 1
    assert torch.equal(half[inside], denoised[inside])


@given(st.floats(0, 1), st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_one_weight_for_all_tokens_is_the_clips(weight, seed):
    g = torch.Generator().manual_seed(seed)
    denoised, source = torch.randn(2, 2, 4, 2, 4, 4, generator=g)
    mask = torch.rand(2, 1, 2, 4, 4, generator=g).round()
    for shape, patch in (((2, 4, 2, 4, 4), (1, 2, 2)), ((2, 4, 2, 4, 4), (2, 1, 4))):
        tokens = torch.full((2, 2 * 4 * 4 // (patch[0] * patch[1] * patch[2])), weight)
        spread = on_latents(tokens, shape, patch)
        assert torch.equal(
            composite(denoised, source, mask, spread),
            composite(denoised, source, mask, torch.full((2, 1, 1, 1, 1), weight)),
        )


@pytest.mark.parametrize(
    ("shape", "patch", "wanted"),
    [
        ((1, 4, 2, 4, 4), (1, 2, 2), lambda i: (i[2] * 2 + i[3] // 2) * 2 + i[4] // 2),
        ((1, 4, 4, 4), (1, 2, 2), lambda i: i[2] // 2 * 2 + i[3] // 2),
        ((1, 8, 5), (1, 1, 1), lambda i: i[1]),
    ],
)
def test_a_tokens_value_lies_on_its_latents(shape, patch, wanted):
    count = {5: 8, 4: 4, 3: 8}[len(shape)]
    spread = on_latents(torch.arange(float(count))[None], shape, patch).expand(shape)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        assert spread[tuple(index)] == wanted(index)


# -- in a run ---------------------------------------------------------------------------------------------------------

ROUTES = [
    ("unlocked", 0.0, {}),
    ("lockstep", 0.5, {}),
    ("lockstep", 1.0, {"foreground": False}),
    ("source pass", 0.5, {"batched": False}),
    ("cached", 0.5, {"kv_cache": True}),
]


def cached(options):
    return {**options, "kv_cache": kv.KVCache(every=1, format=None)} if "kv_cache" in options else options


@pytest.mark.parametrize(("route", "lock", "options"), ROUTES)
@pytest.mark.parametrize("guided", [False, True])
def test_every_route_honours_every_form(setup, route, lock, options, guided):
    if guided:
        setup.model = kv.CFGDenoiser(setup.model)
        options = {name: value for name, value in options.items() if name != "batched"}
    free, _ = outputs(setup, always(lock, 0.0), **cached(options))
    none, trace = outputs(setup, always(lock, None), **cached(options), composite=False)
    whole, _ = outputs(setup, always(lock, 1.0), **cached(options))
    if not guided:
        assert {step.route for step in trace} == {route}
    tokens = torch.zeros(1, TOKENS)
    tokens[:, ::3] = 1.0
    mixed, trace = outputs(setup, always(lock, tokens), **cached(options))
    kept = on_latents(tokens, setup.source.shape, (1, 2, 2)) == 1
    for a, b, c, d in zip(free, none, whole, mixed, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, torch.where(setup.mask == 1, a, setup.source))
        assert torch.equal(d, torch.where(kept & (setup.mask == 0), setup.source, a))
    assert all(torch.equal(step.composite, tokens) for step in trace)
    assert trace.rows()[0]["composite"] == pytest.approx(float(tokens.mean()))
    for weight in (0.25, torch.tensor(0.25), torch.tensor([0.25]), torch.full((1, TOKENS), 0.25)):
        for a, b in zip(outputs(setup, always(lock, weight), **cached(options))[0], free, strict=True):
            background = torch.lerp(setup.source, b, 1 - torch.tensor(0.25))
            torch.testing.assert_close(a, torch.where(setup.mask == 1, b, background), rtol=1e-5, atol=1e-5)


def test_clips_have_their_own_weights(pair):
    weights = torch.tensor([0.0, 1.0])
    mixed, _ = outputs(pair, always(0.5, weights))
    for weight, clip in ((0.0, 0), (1.0, 1)):
        for a, b in zip(mixed, outputs(pair, always(0.5, weight))[0], strict=True):
            assert torch.equal(a[clip], b[clip])


@pytest.mark.parametrize("weight", [0.0, 0.25, torch.tensor([0.25]), torch.linspace(0, 1, TOKENS)[None]])
@pytest.mark.parametrize("lock", [0.0, 0.5])
def test_beyond_the_reach_the_background_is_the_sources(setup, lock, weight):
    """And within it everything is as without a reach, at the first evaluation, in which nothing else differs."""
    policy, far = (
        (always if lock else never_locking)(lock, weight),
        FittedMask(setup.mask, 0.3).kept(0.0, setup.source, (1, 2, 2)) == 1,
    )
    assert 0 < far.float().mean() < 1
    (free, *_), _ = outputs(setup, policy, reach=100.0)
    (held, *_), trace = outputs(setup, policy, reach=0.3)
    beyond = on_latents(far.float(), setup.source.shape, (1, 2, 2)).expand_as(held) == 1
    assert torch.equal(held[beyond], setup.source[beyond])
    assert torch.equal(held[~beyond], free[~beyond])
    wanted = torch.as_tensor(weight).expand(1, TOKENS) if torch.as_tensor(weight).ndim < 2 else weight
    assert torch.equal(trace.steps[0].composite, torch.where(far, 1.0, wanted))


@pytest.mark.parametrize("weight", [0.0, 0.01, False])
def test_beyond_the_reach_it_is_the_sources_also_where_the_lock_itself_composites_nothing(setup, weight):
    far = FittedMask(setup.mask, 0.3).kept(0.0, setup.source, (1, 2, 2)) == 1
    beyond = on_latents(far.float(), setup.source.shape, (1, 2, 2)).expand_as(setup.source) == 1
    (held, *_), _ = outputs(setup, always(0.5, None), reach=0.3, composite=weight)
    assert torch.equal(held[beyond], setup.source[beyond])


def test_composited_then_free_is_narrow_above_and_full_below(setup):
    """The evaluation that releases the background is made again in full: its nfe is that of both."""
    levels = setup.sigmas[:4].tolist()
    policy = kv.stateless(lambda o: Control(1.0, None, 1.0 if o.sigma > levels[2] else 0.0), uses_risk=False)
    narrow, trace = outputs(setup, policy, levels)
    dense, full = outputs(setup, policy, levels, foreground=False)
    assert [step.route for step in trace] == ["interleaved", "interleaved", "lockstep", "lockstep"]
    assert [step.nfe for step in trace] == [3, 3, 6, 3]
    assert [step.computed < 1 for step in trace] == [True, True, False, False]
    assert [step.nfe for step in full] == [3, 3, 3, 3]
    assert [float(step.composite) for step in trace] == [1, 1, 0, 0]
    for a, b in zip(narrow, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("released", [torch.zeros(1, TOKENS), torch.tensor([0.5])])
@pytest.mark.parametrize(
    ("options", "passes"), [({}, (3, 6, 3)), ({"batched": False}, (3, 6, 3)), ({"kv_cache": True}, (3, 5, 3))]
)
def test_every_narrow_route_is_made_again_and_keeps_the_decision(setup, released, options, passes):
    levels = setup.sigmas[:3].tolist()
    calls = []

    @kv.stateless(uses_risk=False)
    def policy(obs):
        calls.append(obs.sigma)
        return Control(1.0, 2.0 if obs.sigma > levels[1] else 4.0, 1.0 if obs.sigma > levels[1] else released)

    lock = setup.lock(policy=policy, **cached(options))
    with lock, torch.no_grad():
        narrow = [lock(setup.x * s / levels[0], torch.tensor([s]), **setup.cfg) for s in levels]
    assert calls == [levels[0], *levels]  # once at the start, once per evaluation
    assert [s.computed < 1 for s in lock.trace] == [True, False, False]
    assert tuple(s.nfe for s in lock.trace) == passes
    assert [float(s.cfg_scale) for s in lock.trace] == [2.0, 4.0, 4.0]
    dense, _ = outputs(setup, policy, levels, foreground=False)
    for a, b in zip(narrow, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_model_that_guides_itself_is_made_again_too(setup):
    setup.model = kv.CFGDenoiser(setup.model)
    policy = kv.stateless(lambda o: Control(1.0, None, float(o.sigma > float(setup.sigmas[1]))), uses_risk=False)
    narrow, trace = outputs(setup, policy)
    dense, _ = outputs(setup, policy, foreground=False)
    assert [(s.nfe, s.computed < 1) for s in trace] == [(4, True), (8, False), (4, False)]
    for a, b in zip(narrow, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_static_weight_below_1_never_runs_narrow(setup):
    for policy in (kv.Constant(lock=1.0, composite=0.5), always(1.0, torch.tensor([0.5]))):
        _, trace = outputs(setup, policy)
        assert [(s.nfe, s.computed, s.route) for s in trace] == [(3, 1.0, "lockstep")] * 3


def test_a_weight_belongs_to_its_noise_level(setup):
    """Going back up restores the weight of that level, so that the route follows from the state alone."""
    levels = setup.sigmas[:3].tolist()
    policy = kv.stateless(lambda o: Control(1.0, None, 1.0 if o.sigma > levels[2] else 0.0), uses_risk=False)
    _, trace = outputs(setup, policy, [*levels, levels[1], levels[2]])
    assert [s.computed < 1 for s in trace] == [True, True, False, True, False]
    assert [s.nfe for s in trace] == [3, 3, 6, 3, 6]


def test_at_sigma_0_the_last_weight_acts(setup):
    level = float(setup.sigmas[2])
    for weight in (0.0, 0.5, torch.zeros(1, TOKENS)):
        lock = setup.lock(policy=always(0.5, weight))
        with lock, torch.no_grad():
            lock(setup.x, torch.tensor([level]), **setup.cfg)
            out = lock(setup.x, torch.tensor([0.0]), **setup.cfg)
        plain = kv.KVLock(setup.model, policy="off")
        with plain, torch.no_grad():
            wanted = plain(setup.x, torch.tensor([0.0]), **setup.cfg)
        own = 1 - torch.as_tensor(weight).flatten()[0] * (1 - setup.mask)
        torch.testing.assert_close(out, torch.lerp(setup.source, wanted, own.expand_as(wanted)))


@pytest.mark.parametrize("bad", [1.5, -0.1, float("nan")])
def test_a_weight_out_of_range_names_policy_and_range(setup, bad):
    for form in (bad, torch.tensor([bad]), torch.full((1, TOKENS), bad)):

        @kv.stateless(uses_risk=False)
        def release(obs, form=form):
            return Control(0.5, None, form)

        with pytest.raises(PolicyError, match=r"release returned a composite in (.|\n)*\[0, 1\](.|\n)*clamp\(0, 1\)"):
            outputs(setup, release)


def test_a_weight_on_a_device_is_checked_at_the_next_evaluation(setup, monkeypatch):
    """There a check at once would cost a transfer."""
    monkeypatch.setattr("kvlock_sampling.utils.host.HostReads.free", lambda value: False)
    policy = kv.stateless(lambda o: Control(0.5, None, torch.tensor([1.5 if o.sigma < 3 else 1.0])), uses_risk=False)
    assert len(outputs(setup, policy, [4.0, 2.0])[0]) == 2
    with pytest.raises(PolicyError, match=r"returned a composite in \[1.5, 1.5\]"):
        outputs(setup, policy, [4.0, 2.0, 1.0])


def test_shapes_that_do_not_fit(setup):
    with pytest.raises(PolicyError, match=r"composite of shape \(1, 5\).*\(batch, tokens\) = \(1, 48\)"):
        outputs(setup, always(0.5, torch.ones(1, 5)))
    release = kv.stateless(lambda obs: Control(0.0, None, 1 / (1 + obs.risk)))
    moves = kv.TrajectoryVariance(patch=(1, 4, 4))
    with pytest.raises(EstimatorError, match="measures 12 tokens per clip, the model has 48"):
        outputs(setup, release, estimator=moves)


def test_without_a_lock_the_estimators_patch_spreads_the_weight(setup):
    """A policy that can never lock touches no layer, and still releases token by token."""

    @dataclass(frozen=True)
    class Release(kv.Policy):
        may_lock = False

        def step(self, state, obs):
            return state, Control(0.0, None, (obs.risk < obs.risk.median()).float())

    out, trace = outputs(setup, Release(), estimator=kv.TrajectoryVariance(patch=(1, 4, 4)))
    assert trace.steps[-1].composite.shape == (1, 12)
    kept = (on_latents(trace.steps[-1].composite, setup.source.shape, (1, 4, 4)) == 1) & (setup.mask == 0)
    kept = kept.expand_as(setup.source)
    assert torch.equal(out[-1][kept], setup.source[kept])
    assert (out[-1][~kept] != setup.source[~kept]).all()


def test_without_a_source_there_is_nothing_to_composite(setup):
    lock = kv.KVLock(setup.model, policy=kv.Constant(composite=0.5))
    with lock, pytest.raises(SourceError, match=r"asks for composite 0.5.*\n.*source=latents.*composite=\(0.0, 0.0\)"):
        lock(setup.x, setup.sigmas[:1], **setup.cfg)
    lock = kv.KVLock(setup.model, policy=kv.Constant(composite=0.0))
    with lock, torch.no_grad():
        lock(setup.x, setup.sigmas[:1], **setup.cfg)


# -- policies and presets ---------------------------------------------------------------------------------------------


def test_constant_holds_a_weight_also_in_a_preset(setup):
    text = '[policy]\ntype = "Constant"\nlock = 0.5\ncomposite = 0.25\n'
    assert kv.load_policy(text) == kv.Constant(0.5, composite=0.25)
    assert kv.load_policy(kv.to_toml(kv.Constant(0.5, composite=0.25))) == kv.Constant(0.5, composite=0.25)
    given_, option = outputs(setup, kv.load_policy(text))[0], outputs(setup, kv.Constant(0.5), composite=0.25)[0]
    assert all(torch.equal(a, b) for a, b in zip(given_, option, strict=True))
    with pytest.raises(PolicyError, match=r"Constant\(composite=2.0\)"):
        kv.Constant(composite=2.0)


def test_wrappers_carry_it(setup):
    half = kv.Constant(lock=0.5, composite=0.4)
    limited = Clamped(half, composite=(0.6, 1.0))
    for policy, weight in (
        (kv.Smoothed(half, half_life=0.5), 0.4),
        (kv.Windowed(half, below=100.0), 0.4),
        (kv.Windowed(half, below=1e-6), 1.0),  # outside the window the lock's option
        (limited, 0.6),
        (Clamped(release_by(lambda o: torch.full_like(o.risk, 0.4)), composite=(0.0, 0.1)), 0.1),
        (Clamped(kv.Constant(lock=0.5), composite=(0.0, 0.1)), 1.0),  # where the policy gives no weight
    ):
        kv.testing.check_policy(policy)
        assert outputs(setup, policy)[1].rows()[-1]["composite"] == pytest.approx(weight)
    with pytest.raises(PolicyError, match="composite"):
        Clamped(half, composite=(0.5, 2.0))
    assert kv.load_policy(kv.to_toml(limited)) == limited


def test_the_suite_checks_the_weight():
    kv.testing.check_policy(release_by(lambda o: 1 / (1 + o.risk)), tokens=4)
    kv.testing.check_policy(release_by(lambda o: (o.effect < 4 * o.risk).float()), tokens=4)
    for broken, words in (
        (lambda o: 1 + o.risk, r"composite in \["),
        (lambda o: o.risk / (1 + o.risk.max()), "work elementwise"),
        (lambda o: o.risk.clamp(0, 1).double(), r"composite as torch\.float64"),
        (lambda o: o.risk.clamp(0, 1)[:1], r"composite of shape \(1,"),
    ):
        with pytest.raises(PolicyError, match=words):
            kv.testing.check_policy(release_by(broken), tokens=4)


# -- pasting ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(0.5, 4.0))
@settings(max_examples=20, deadline=None)
def test_a_released_region_has_the_masks_soft_edge(seed, radius):
    """Of 0 and 1 the dilation is `feather`; of any values it is not below them, and 1 where nothing is kept."""
    g = torch.Generator().manual_seed(seed)
    hard = (torch.rand(1, 1, 2, 12, 12, generator=g) > 0.9).float()
    torch.testing.assert_close(dilate(hard, radius), masks.feather(hard, radius), rtol=0, atol=1e-5)
    values = torch.rand(1, 1, 2, 12, 12, generator=g)
    assert (dilate(values, radius) >= values).all()
    assert torch.equal(dilate(torch.full_like(values, 0.3), radius), torch.full_like(values, 0.3))
    assert torch.equal(dilate(values, 0), values)


@pytest.mark.parametrize(("frames", "latents"), [(9, 3), (3, 3), (8, 4), (5, 1), (1, 1)])
def test_latents_on_pixels_undo_the_latent_mask(frames, latents):
    values = torch.rand(1, 1, latents, 3, 2, generator=torch.Generator().manual_seed(0))
    pixels = on_pixels(values, frames, 12, 16)
    assert pixels.shape == (1, 1, frames, 12, 16)
    if frames % 2:  # a causal VAE
        step = (frames - 1) // (latents - 1) if latents > 1 else max(1, frames - 1)
        back = masks.latent_mask(pixels, temporal=step, spatial=(4, 8))
        assert torch.equal(back if latents > 1 else back[:, :, :1], values)
    else:
        assert torch.equal(pixels[:, :, ::2, ::4, ::8], values)


class Blurred:
    """The fixture's model with a codec of 4 pixels per latent that loses what is within them."""

    cfg_scale, frames, size = 3.0, 3, (32, 32)

    def __init__(self, setup):
        self.denoiser, self.setup = setup.model, setup

    def encode(self, pixels):
        small = torch.nn.functional.avg_pool3d(pixels, (1, 4, 4))
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def decode(self, latents):
        return latents[:, :3].repeat_interleave(4, 3).repeat_interleave(4, 4).clamp(-1, 1)

    def prompt(self, texts):
        return self.setup.cond.expand(len(texts), -1, -1)

    def sigmas(self, steps, strength=1.0):
        return kv.samplers.flow_sigmas(steps, t_max=min(0.98, strength))


def edited(setup, policy, **options):
    g = torch.Generator().manual_seed(5)
    clip = torch.rand(1, 3, 3, 32, 32, generator=g) * 1.6 - 0.8
    mask = torch.zeros(32, 32)
    mask[8:16, 8:16] = 1
    if options.get("paste", True):
        options.setdefault("feather", 0.0)
    return clip, mask, kv.edit_video(clip, mask, "", model=Blurred(setup), steps=2, policy=policy, **options)


def test_what_was_released_is_not_pasted_over(setup):
    tokens = torch.ones(1, TOKENS)
    tokens.view(3, 4, 4)[:, :, 3] = 0  # the last column of tokens, 8 pixels each
    policy = always(0.5, tokens)
    clip, mask, bare = edited(setup, policy, paste=False)
    _, _, hard = edited(setup, policy)
    own = mask.bool() | (torch.arange(32) >= 24)
    assert torch.equal(hard.pixels, torch.where(own, bare.pixels, clip))
    _, _, soft = edited(setup, policy, feather=4.0)
    edge = (soft.pixels - clip) / (bare.pixels - clip)
    row = edge.masked_fill((bare.pixels - clip).abs() < 0.05, torch.nan).nanmedian(dim=1).values[0, 0, 28]
    wanted = masks.feather((torch.arange(32) >= 24).float().expand(32, 32), 4.0)[0, 0, 0, 0]
    torch.testing.assert_close(row, wanted, rtol=0, atol=1e-3)


def test_a_clips_weight_is_that_of_its_pasting(setup):
    for weight in (0.0, 0.25, 1.0):
        clip, mask, bare = edited(setup, always(0.5, weight), paste=False)
        _, _, pasted = edited(setup, always(0.5, weight))
        wanted = torch.lerp(bare.pixels, clip, weight * (1 - mask))
        torch.testing.assert_close(pasted.pixels, wanted, rtol=0, atol=1e-6)
        assert weight > 0 or torch.equal(pasted.pixels, bare.pixels)
    _, _, option = edited(setup, kv.Constant(lock=0.5), composite=0.25)
    _, _, policy = edited(setup, kv.Constant(lock=0.5, composite=0.25))
    assert torch.equal(option.pixels, policy.pixels)
