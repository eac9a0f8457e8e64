"""Every estimator and wrapper: the public suite, exact values, and runs through the lock."""

from __future__ import annotations

import math
import re
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling import samplers, tiny
from kvlock_sampling.attention.hooks import Hooks
from kvlock_sampling.kv_cache.fingerprint import model_fingerprint
from kvlock_sampling.presets import ESTIMATORS, load_preset, preset_names
from kvlock_sampling.testing import GaussianDenoiser, check_estimator
from kvlock_sampling.testing.estimator import CheckModel
from kvlock_sampling.types import EstimatorError, Evaluation, PolicyError
from kvlock_sampling.utils.tables import from_table, to_table
from kvlock_sampling.variance import (
    Divergence,
    DropoutVariance,
    Estimator,
    PosteriorVariance,
    RenoiseVariance,
    Sparse,
    TrajectoryVariance,
    masked_mean,
)
from kvlock_sampling.variance.base import draw
from kvlock_sampling.variance.dropout import RESIDUAL, dropout_hooks, droppable

PATCH = (1, 2, 2)

BUILT_IN: list[Estimator] = [
    TrajectoryVariance(),
    TrajectoryVariance(window=4, patch=PATCH),
    TrajectoryVariance(window=None, span=8.0, normalise=True),
    TrajectoryVariance(window=None, normalise=True, integral=True, patch=PATCH),
    Divergence(),
    Divergence(memory=math.inf, patch=PATCH),
    RenoiseVariance(),
    RenoiseVariance(passes=3, patch=PATCH),
    RenoiseVariance(passes=1),
    PosteriorVariance(),
    PosteriorVariance(passes=3),
    DropoutVariance(),
    DropoutVariance(passes=2, rate=0.5, patch=PATCH),
    Sparse(RenoiseVariance(), sigmas=(2.0, 0.3)),
    Sparse(PosteriorVariance(), every=3),
    Sparse(TrajectoryVariance(), sigmas=(2.0, 0.5, 0.1)),
    Sparse(DropoutVariance(), every=4, hold=True),
    Sparse(Sparse(RenoiseVariance(passes=1, patch=PATCH), every=3, hold=True), every=1),
    Sparse(TrajectoryVariance(patch=PATCH), every=2, hold=True),
    Sparse(Sparse(Divergence(memory=0.05, patch=PATCH), every=2, hold=True), every=1),
]
OF_PRESETS = [preset.estimator for preset in map(load_preset, preset_names()) if preset.estimator is not None]


@pytest.mark.parametrize("estimator", [*BUILT_IN, *OF_PRESETS], ids=lambda estimator: type(estimator).__name__)
def test_the_public_suite(estimator):
    check_estimator(estimator)


def test_everything_registered_is_tested():
    def names(estimator):
        inner = getattr(estimator, "estimator", None)
        return {type(estimator).__name__} | (set() if inner is None else names(inner))

    assert set().union(*map(names, BUILT_IN)) == set(ESTIMATORS)


@pytest.mark.parametrize("estimator", BUILT_IN, ids=lambda e: type(e).__name__)
@given(batch=st.integers(1, 4), seed=st.integers(0, 2**31), data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_run_replays_from_any_state(estimator, batch, seed, data):
    """Random noise levels, up and down, each continued from a state of a higher level: the answers repeat."""
    g = torch.Generator().manual_seed(seed)
    model = CheckModel()
    estimator = estimator.bound(model.modules())
    x = torch.randn(batch, 4, 2, 4, 4, generator=g)
    mask = torch.zeros(1, 1, 2, 4, 4).index_fill_(-1, torch.tensor([0, 1]), 1.0)
    levels = data.draw(st.lists(st.floats(0.05, 8.0), min_size=2, max_size=8, unique=True))
    falling = sorted(levels, reverse=True)

    def play(state, sigmas):
        states, out = [state], []
        for sigma in sigmas:
            denoised = model(x * sigma, sigma)
            given = Evaluation(sigma, x * sigma, denoised, mask, model, denoised * 0.9, denoised * sigma)
            state, variance = estimator.step(state, given)
            states.append(state)
            out.append(variance)
        return states, out

    states, out = play(estimator.init(), falling)
    assert all(v is None or (bool(v.isfinite().all()) and float(v.min()) >= 0) for v in out)
    cut = data.draw(st.integers(0, len(levels) - 1))
    again = play(states[cut], falling[cut:])[1]
    for a, b in zip(again, out[cut:], strict=True):
        assert a is b is None or torch.equal(a, b)


# -- what the suite catches -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken(Estimator):
    rule: Any
    price: float = 0.0
    calls: list[int] = field(default_factory=list)

    @property
    def cost(self):
        return self.price

    def step(self, state, evaluation):
        self.calls.append(1)
        return self.rule(self, state, evaluation)


@dataclass
class Melting(Estimator):
    def step(self, state, evaluation):
        return state, masked_mean(evaluation.x**2, None)


def squares(e):
    return masked_mean(e.denoised.float().square(), e.mask)


def between_neighbours(s, st, e):
    out = e.probe(e.x.repeat_interleave(2, 0), e.sigma).float()  # not x.repeat(2, ...)
    return st, masked_mean((out[::2] - e.denoised).square() + (out[1::2] - e.denoised).square(), e.mask)


BROKEN = [
    ("not frozen", Melting(), r"Melting can be changed(.|\n)*frozen=True"),
    ("no pair", Broken(lambda s, st, e: squares(e)), r"returned Tensor; expected \(state, variance\)"),
    (
        "a source unasked",
        Broken(lambda s, st, e: (st, squares(e) - e.source.mean())),
        r"AttributeError(.|\n)*was given",
    ),
    (
        "guided always",
        Broken(lambda s, st, e: (st, squares(e) + e.uncond.mean() ** 2)),
        r"AttributeError(.|\n)*was given",
    ),
    ("a float", Broken(lambda s, st, e: (st, 0.5)), r"variance that is 0\.5; expected a floating tensor.*, or None"),
    ("a scalar", Broken(lambda s, st, e: (st, squares(e).mean())), r"shape \(\); expected .*\(batch,\) = \(3,\)"),
    ("negative", Broken(lambda s, st, e: (st, -squares(e))), r"at sigma=.* from -.*expected finite numbers >= 0"),
    ("nan", Broken(lambda s, st, e: (st, squares(e) * math.nan)), r"nan(.|\n)*expected finite"),
    ("half", Broken(lambda s, st, e: (st, e.x.bfloat16().flatten(1).square().mean(1))), r"expected float32"),
    ("coupled", Broken(lambda s, st, e: (st, squares(e) / squares(e).sum())), r"alone and(.|\n)*batch of 3"),
    ("others' prompts", Broken(between_neighbours, price=2.0), r"alone and(.|\n)*batch of 3"),
    ("random", Broken(lambda s, st, e: (st, torch.rand(len(e.x)))), r"two answers to one question"),
    ("memory", Broken(lambda s, st, e: (st, squares(e) * len(s.calls))), r"two answers(.|\n)*must be in the state"),
    ("in place", Broken(lambda s, st, e: (st, masked_mean(e.x.square_().float(), None))), r"changed the evaluation"),
    ("silent", Broken(lambda s, st, e: (st, None)), r"None at all 12 evaluations"),
    ("dear", Broken(lambda s, st, e: (st, masked_mean(e.probe(e.x, e.sigma) ** 2, None))), r"1 times(.|\n)*cost is 0"),
    ("cheap", Broken(lambda s, st, e: (st, squares(e)), price=2.0), r"0 times(.|\n)*cost is 2"),
    ("rows", Broken(lambda s, st, e: (st, squares(e) + e.probe(e.x[:1], 1.0).sum())), r"probed \(1, 4, 2, 4, 4\)"),
    ("crash", Broken(lambda s, st, e: (st, e.noise)), r"raised AttributeError(.|\n)*x of shape \(3, 4"),
    ("no estimator", TrajectoryVariance, r"is not an Estimator"),
    ("no price", Broken(lambda s, st, e: (st, squares(e)), price=-1.0), r"cost is -1"),
]


@pytest.mark.parametrize(("estimator", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_estimators_are_caught(estimator, words):
    with pytest.raises(EstimatorError, match=words):
        check_estimator(estimator)


# -- exact values -----------------------------------------------------------------------------------------------------


def refuse(x, sigma):
    raise AssertionError("this estimator must not evaluate the model")


def feed(estimator, sigmas, predictions, mask=None, **more):
    state, out = estimator.init(), []
    for sigma, prediction in zip(sigmas, predictions, strict=True):
        given = Evaluation(sigma, prediction, prediction, mask, refuse, **more)
        state, variance = estimator.step(state, given)
        out.append(variance)
    return out


def along_the_flow(estimator, steps, sampler="euler", seed=0):
    """The last variance of a run on an analytic denoiser."""
    model = GaussianDenoiser(mean=torch.linspace(-1, 1, 64), std=0.5)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(seed)) * 10
    policy = kv.policy.Clamped(kv.Linear(), lock=(0.0, 0.0))
    lock = kv.KVLock(model, policy=policy, estimator=estimator)
    lock.sample(sampler, x, samplers.get_sigmas_karras(steps, 0.05, 10.0), seed=1)
    return lock.trace.steps[-1].variance


def exact_flow(estimator, steps):
    """The last variance along the exact deterministic trajectory of a Gaussian, seen at `steps` noise levels."""
    model = GaussianDenoiser(mean=torch.linspace(-1, 1, 64), std=0.5).double()
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).double() * 10
    sigmas = samplers.get_sigmas_karras(steps, 0.05, 10.0)[:-1].double().tolist()
    predictions = []
    for sigma in sigmas:
        shrunk = ((0.25 + sigma**2) / (0.25 + sigmas[0] ** 2)) ** 0.5
        predictions.append(model(model.mean + (x - model.mean) * shrunk, sigma))
    return feed(estimator, sigmas, predictions)[-1]


PLAIN = TrajectoryVariance(window=None, normalise=True)
INTEGRAL = TrajectoryVariance(window=None, normalise=True, integral=True)


def test_the_integral_converges_to_second_order():
    limit = exact_flow(INTEGRAL, 400)
    errors = {n: float((exact_flow(INTEGRAL, n) / limit - 1).abs().max()) for n in (20, 50, 100)}
    assert errors[20] < 0.02, errors
    assert errors[50] < errors[20] / 4, errors
    assert errors[100] < errors[20] / 16, errors
    assert float(exact_flow(PLAIN, 20)[0] / exact_flow(PLAIN, 100)[0]) > 5


@pytest.mark.parametrize(("sampler", "allowed"), [("euler", 0.3), ("dpmpp_2m", 0.1), ("heun", 0.05)])
def test_the_integral_does_not_depend_on_the_number_of_steps(sampler, allowed):
    """What is left is the sampler's own error; the plain sum falls by the factor 5 of the steps from 20 to 100."""
    limit = exact_flow(INTEGRAL, 400).float()
    for steps in (20, 50, 100):
        error = float((along_the_flow(INTEGRAL, steps, sampler) / limit - 1).abs().max())
        assert error < allowed * 20 / steps, (steps, error)
    assert float(along_the_flow(PLAIN, 20, sampler)[0] / along_the_flow(PLAIN, 100, sampler)[0]) > 4


def test_the_integral_is_the_integral():
    """x0-hat = sigma^2 has |d x0-hat / d log sigma|^2 / sigma^2 = 4 sigma^2, whose integral over log sigma is known."""
    sigmas = torch.linspace(math.log(4.0), math.log(0.5), 200).exp().tolist()
    out = feed(INTEGRAL, sigmas, [torch.full((1, 3), s**2) for s in sigmas])
    assert float(out[-1]) == pytest.approx(2 * (4.0**2 - 0.5**2), rel=1e-3)


def test_under_a_stochastic_sampler_the_plain_sum_is_the_stable_one():
    plain, integral = (
        [float(along_the_flow(e, n, "euler_ancestral").mean()) for n in (50, 200)] for e in (PLAIN, INTEGRAL)
    )
    assert 0.6 < plain[0] / plain[1] < 1.6
    assert integral[1] / integral[0] > 2


@pytest.mark.parametrize("count", range(4))
def test_a_probe_does_not_draw_the_noise_that_a_run_starts_from(count):
    """Else renoised latents are the run's own, and the variance reads 0."""
    like = torch.zeros(1, 4, 1, 4, 4)
    for seed in range(4):
        run = torch.randn(like.shape, generator=torch.Generator().manual_seed(count + seed))
        assert not torch.equal(draw("normal", 1, like, 0, count), run)
    runs = [torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 10 for seed in range(6)]
    read = []
    for x in runs:
        lock = kv.KVLock(
            GaussianDenoiser(std=1.0), policy=kv.Sigmoid(lock_range=(0.0, 0.0)), estimator=RenoiseVariance()
        )
        lock.sample("euler", x, torch.tensor([10.0, 7.0, 5.0, 3.5, 0.0]))
        read.append(float(lock.trace.steps[count].variance))
    assert max(read) < 1.5 * min(read)


@pytest.mark.parametrize("kind", [RenoiseVariance, PosteriorVariance, DropoutVariance])
def test_a_seed_may_be_an_integer_of_numpy(kind):
    found = kind(seed=np.int64(3))
    assert found == kind(seed=3)
    assert type(found.seed) is int


def test_a_local_estimator_agrees_with_the_mean_of_its_tokens():
    g = torch.Generator().manual_seed(0)
    predictions = torch.randn(5, 2, 3, 2, 4, 4, generator=g)
    sigmas = [8.0, 4.0, 2.0, 1.0, 0.5]
    for form in ({"window": 3}, {"window": None, "normalise": True, "integral": True}):
        per_token = feed(TrajectoryVariance(**form, patch=PATCH), sigmas, predictions)[-1]
        assert per_token.shape == (2, 8)
        torch.testing.assert_close(per_token.mean(1), feed(TrajectoryVariance(**form), sigmas, predictions)[-1])
    moved = [torch.zeros(1, 3, 2, 4, 4), torch.zeros(1, 3, 2, 4, 4)]
    moved[1][0, :, 1, 2:, :2] = 1  # frame 1, lower left: token 4 + 2
    local = feed(TrajectoryVariance(patch=PATCH), [2.0, 1.0], moved)[-1]
    assert local[0].nonzero().flatten().tolist() == [6]
    image = [m[:, :, 1] for m in moved]  # one frame: token 2
    assert feed(TrajectoryVariance(patch=PATCH), [2.0, 1.0], image)[-1][0].nonzero().flatten().tolist() == [2]
    packed = [i.flatten(2).mT for i in image]  # (batch, tokens, channels), each latent a token: 8, 9, 12, 13
    assert feed(TrajectoryVariance(patch=PATCH), [2.0, 1.0], packed)[-1][0].nonzero().flatten().tolist() == [
        8,
        9,
        12,
        13,
    ]
    with pytest.raises(EstimatorError, match="whole patches"):
        feed(TrajectoryVariance(patch=(1, 3, 3)), [2.0, 1.0], moved)
    for bad in ((1, 2), (0, 1, 1), 2, "122"):
        with pytest.raises(EstimatorError, match="patch="):
            TrajectoryVariance(patch=bad)


def test_a_patch_that_is_not_the_models_is_the_estimators_fault():
    """A policy that passes on what it was given is not blamed for its shape."""
    video = tiny.load()
    clip = torch.zeros(1, 3, video.frames, *video.size)
    mask = torch.zeros(1, 1, video.frames, *video.size)
    mask[..., :8, :8] = 1

    def sample(policy, patch, clips=1):
        estimator = TrajectoryVariance(window=None, normalise=True, patch=patch)
        lock = kv.KVLock(video.denoiser, source=clip, mask=mask, policy=policy, estimator=estimator)
        lock.sample(
            "euler", clip.repeat(clips, 1, 1, 1, 1) + 1.0, video.sigmas(3), extra_args={"cond": video.prompt("")}
        )
        return lock.trace.steps[-1].lock.shape

    per_token = kv.stateless(lambda obs: kv.Control(lock=obs.risk.clamp(0, 1)))
    with pytest.raises(EstimatorError, match=r"patch=\(4, 8, 8\).* measures 128 tokens per clip, the model has 256"):
        sample(per_token, (4, 8, 8))
    assert sample(per_token, video.patch) == (1, 256)
    pooled = kv.stateless(lambda obs: kv.Control(lock=obs.risk.mean(-1).clamp(0, 1)))
    assert sample(pooled, (4, 8, 8)) == (1,)  # any patch will do for a policy that wants one number
    ratchet = kv.stateless(lambda obs: kv.Control(lock=torch.maximum(obs.lock, obs.risk.clamp(0, 1))))
    kv.testing.check_policy(ratchet, tokens=16)
    assert sample(ratchet, video.patch) == (1, 256)
    assert sample(ratchet, video.patch, clips=2) == (2, 256)
    wrong = kv.stateless(lambda obs: kv.Control(lock=torch.zeros(1, 7)))
    with pytest.raises(kv.KVLockError, match=r"returned lock of shape \(1, 7\)"):
        sample(wrong, (4, 8, 8))


# -- when and how many ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Level(Estimator):
    """Says the noise level, times a factor."""

    factor: float = 1.0
    default_threshold: float = 2.0

    def init(self):
        return 0

    def step(self, state, evaluation):
        return state + 1, torch.full((len(evaluation.x),), evaluation.sigma * self.factor)


def heard(estimator, sigmas):
    one = torch.zeros(2, 3)
    return [None if v is None else round(float(v[0]), 6) for v in feed(estimator, sigmas, [one] * len(sigmas))]


FALL = [8.0, 4.0, 2.0, 1.0, 0.5, 0.25]


@pytest.mark.parametrize(
    ("settings", "measured"),
    [
        ({"sigmas": (3.0, 0.5)}, [2.0, 0.5]),
        ({"sigmas": (3.0, 2.5, 0.01)}, [2.0]),
        ({"sigmas": [100.0]}, [8.0]),
        ({"sigmas": 1.0}, [1.0]),
        ({"every": 1}, FALL),
        ({"every": 2}, [8.0, 2.0, 0.5]),
    ],
)
def test_sparse_measures_at_the_chosen_noise_levels(settings, measured):
    found = heard(Sparse(Level(), **settings), FALL)
    assert [v for v in found if v is not None] == measured
    assert all(v is None or v == s for v, s in zip(found, FALL, strict=True))
    held, last = heard(Sparse(Level(), **settings, hold=True), FALL), None
    for a, b in zip(found, held, strict=True):
        last = last if a is None else a
        assert b == last


def test_a_level_repeated_is_not_new():
    assert heard(Sparse(Level(), every=2), [4.0, 4.0, 2.0, 2.0, 1.0]) == [4.0, None, None, None, 1.0]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Sparse(Level()), "expected one of them"),
        (lambda: Sparse(Level(), sigmas=(1.0,), every=2), "expected one of them"),
        (lambda: Sparse(Level(), sigmas=(-1.0,)), r"finite numbers > 0.*Sparse\(estimator, sigmas=\(1.0, 0.3\)\)"),
        (lambda: Sparse(Level(), every=0), "whole number"),
        (lambda: Sparse("RenoiseVariance", every=2), r"Sparse\(RenoiseVariance\(\), every=5\)"),
        (lambda: DropoutVariance(passes=1), "passes=4"),
        (lambda: DropoutVariance(rate=1.0), "rate=0.1"),
        (lambda: TrajectoryVariance(integral=True), "normalise=True, integral=True"),
    ],
)
def test_settings_are_checked(make, words):
    with pytest.raises(EstimatorError, match=words):
        make()


# -- dropout ----------------------------------------------------------------------------------------------------------


def test_dropout_acts_only_inside_and_in_this_thread():
    model, x = CheckModel(), torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    plain = model(x, 1.0)
    others: list[torch.Tensor] = []
    with pytest.raises(KeyError), dropout_hooks(model, 0.5, seed=1):  # noqa: PT012
        first = model(x, 1.0)
        assert not torch.equal(first, plain)
        assert torch.equal(model(x[1:], 1.0), first[1:])  # one network for all clips
        with dropout_hooks(model, 0.5, seed=2):
            assert not torch.equal(model(x, 1.0), first)
        assert torch.equal(model(x, 1.0), first)
        thread = threading.Thread(target=lambda: others.append(model(x, 1.0)))
        thread.start()
        thread.join()
        raise KeyError
    assert torch.equal(others[0], plain)
    assert torch.equal(model(x, 1.0), plain)
    assert not any(m._forward_hooks for m in model.modules())
    with dropout_hooks(model, 0.5, seed=1):
        assert torch.equal(model(x, 1.0), first)
    with dropout_hooks(model, 0.0, seed=1):
        assert torch.equal(model(x, 1.0), plain)


def test_a_probe_is_nothing_to_a_lock_of_another_thread():
    """Which may ask at any moment what is hooked, to leave tokens out and to name its KV cache."""
    video = tiny.load()
    named, layers = model_fingerprint(video.network), kv.find_layers(video.network)
    with dropout_hooks(video.network, 0.5, seed=1):
        assert not Hooks(layers).watched
        assert model_fingerprint(video.network) == named
    with_a_users = video.network.register_forward_hook(lambda *_: None)
    assert model_fingerprint(video.network) != named
    with_a_users.remove()


def test_dropout_has_the_variance_of_its_rate():
    """One linear layer of ones: an output unit is 0 or 1 / (1 - rate), variance rate / (1 - rate)."""
    model = nn.Sequential(nn.Linear(1, 20_000, bias=False))
    model[0].weight.data.fill_(1.0)
    estimator = DropoutVariance(passes=8, rate=0.2, select=r"0$", model=model)

    def probe(x, sigma):
        return model(x[:, :1])

    x = torch.ones(2, 20_000)
    _, variance = estimator.step(0, Evaluation(1.0, x, x, None, probe))
    torch.testing.assert_close(variance, torch.full((2,), 0.25), rtol=0.03, atol=0)


def test_dropout_finds_the_layers_of_known_models(setup):
    assert sorted(n.split("transformer.")[1] for n in droppable(setup.model)) == sorted(
        f"blocks.{i}.{n}" for i in range(2) for n in ("attn1.to_out.0", "attn2.to_out.0", "ffn.net.2")
    )
    for name in ("blocks.3.self_attn.o", "blocks.0.ffn.2", "double_blocks.1.img_attn_proj", "layers.2.mlp.fc2",
                 "single_transformer_blocks.9.proj_out", "transformer_blocks.0.attn.to_add_out"):  # fmt: skip
        assert re.search(RESIDUAL, "." + name), name
    for name in ("proj_out", "blocks.0.attn1.to_q", "condition_embedder.time_embedder.linear_2", "head.2"):
        assert not re.search(RESIDUAL, "." + name), name
    assert list(droppable(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)), r"^0\.")) == ["0.0"]
    with pytest.raises(EstimatorError, match=r"Its linear layers: 0(.|\n)*regular expression"):
        droppable(nn.Sequential(nn.Linear(2, 2)))


def test_dropout_without_a_model_says_so():
    x = torch.zeros(1, 2)
    with pytest.raises(EstimatorError, match="KVLock"):
        DropoutVariance().step(0, Evaluation(1.0, x, x, None, refuse))
    with pytest.raises(EstimatorError, match="no torch module"):
        DropoutVariance().bound([])
    with pytest.raises(EstimatorError, match="linear layer"):
        kv.KVLock(GaussianDenoiser(), estimator=DropoutVariance())


# -- through the lock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimator",
    [
        PosteriorVariance(),
        DropoutVariance(passes=2),
        Sparse(RenoiseVariance(passes=1), sigmas=(1.0, 0.3), hold=True),
        Sparse(PosteriorVariance(), every=2, hold=True),
        TrajectoryVariance(patch=PATCH),
    ],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("batched", [True, False])
def test_it_runs_on_a_transformer_and_clips_stay_apart(pair, estimator, batched):
    policy = kv.Linear()
    runs = []
    for rows in (slice(None), slice(1, 2)):
        lock = kv.KVLock(
            pair.model,
            source=pair.source[rows],
            mask=pair.mask[rows],
            policy=policy,
            estimator=estimator,
            batched=batched,
        )
        out = lock.sample("euler", pair.x[rows], pair.sigmas, extra_args={**pair.cfg, "cond": pair.cond[rows],
                                                                        "uncond": pair.uncond[rows]})  # fmt: skip
        assert out.isfinite().all()
        runs.append([s.variance[-1:] for s in lock.trace.steps])
    measured = [v for v in runs[0] if not v.isnan().any()]
    assert measured
    assert all(float(v.min()) >= 0 for v in measured)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=1e-6, equal_nan=True)
    assert not any(m._forward_hooks for m in pair.model.modules())


def test_probes_are_counted(setup):
    def passes(estimator):
        lock = setup.lock(policy=kv.policy.Clamped(kv.Linear(), lock=(0.0, 0.0)), estimator=estimator)
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
        return lock.trace.nfe, len(lock.trace)

    base, calls = passes(TrajectoryVariance())
    assert passes(DropoutVariance(passes=3))[0] == base + 3 * calls
    assert passes(Sparse(RenoiseVariance(passes=2), sigmas=(1.0, 0.4)))[0] == base + 4


# -- plain data -------------------------------------------------------------------------------------------------------


def test_nested_estimators_come_from_tables():
    moves = {"type": "TrajectoryVariance", "window": "none", "span": 8.0, "patch": [1, 2, 2]}
    table = {
        "type": "Sparse",
        "every": 3,
        "estimator": {"type": "Sparse", "sigmas": [1.0, 0.3], "hold": True, "estimator": moves},
    }
    inner = Sparse(TrajectoryVariance(window=None, span=8.0, patch=PATCH), sigmas=(1.0, 0.3), hold=True)
    expected = Sparse(inner, every=3)
    assert from_table(table, ESTIMATORS, "estimator") == expected
    hash(expected)


@pytest.mark.parametrize("estimator", BUILT_IN, ids=lambda e: type(e).__name__)
def test_a_table_is_the_estimator(estimator):
    assert from_table(to_table(estimator, ESTIMATORS), ESTIMATORS, "estimator") == estimator


def test_a_preset_names_a_nested_estimator():
    text = """
[estimator]
type = "Sparse"
every = 1
[estimator.estimator]
type = "Sparse"
every = 5
hold = true
estimator = { type = "TrajectoryVariance", patch = [1, 2, 2] }
[policy]
type = "Linear"
"""
    preset = load_preset(text)
    expected = Sparse(Sparse(TrajectoryVariance(patch=PATCH), every=5, hold=True), every=1)
    assert preset.estimator == expected
    assert load_preset(kv.to_toml(preset)) == preset
    assert kv.KVLock(GaussianDenoiser(), policy=preset).settings.estimator == expected


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"type": "Sparse", "estimator": {"type": "Renoise"}}, r"estimator\.estimator\.type.*RenoiseVariance"),
        ({"type": "Sparse"}, "Sparse needs estimator"),
        ({"type": "Sparse", "estimator": {"type": "Sparse", "evry": 2}}, r"estimator\.estimator\.evry.*'every'"),
        ({"type": "Sparse", "estimator": {"type": "RenoiseVariance"}}, "expected one of them"),
        ({"type": "DropoutVariance", "model": "x"}, "model is not a setting"),
        ({"type": "Sparse", "estimator": "RenoiseVariance"}, "expected a table"),
        (3, "expected a table"),
    ],
)
def test_wrong_tables_are_errors(table, words):
    with pytest.raises(PolicyError, match=words):
        from_table(table, ESTIMATORS, "estimator")


class PerToken(Estimator):
    """One number per token, which reads the background."""

    def step(self, state, evaluation):
        return state, evaluation.denoised.square().mean(1)[:, 0].flatten(1)


class Declared(PerToken):
    patch = "model"


def test_an_estimator_per_token_names_its_patch(setup):
    """Only then is the background of every evaluation the edit's own."""
    lock = setup.lock(policy=kv.policy.Clamped(kv.Sigmoid(), lock=(1.0, 1.0)), estimator=PerToken())
    with pytest.raises(EstimatorError, match=r"with patch= \(batch, tokens\)"):
        lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert Declared().on_tokens((1, 2, 2)).patch == (1, 2, 2)
    assert Declared.patch == "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_policy_may_mix_what_it_observes(setup, dtype):
    mixing = kv.stateless(lambda obs: kv.Control(lock=torch.lerp(obs.lock, obs.risk.clamp(0, 1), 0.5)))
    model = GaussianDenoiser(0.0, 1.0)
    lock = kv.KVLock(
        model, source=setup.source.to(dtype), mask=setup.mask, policy=kv.policy.Clamped(mixing, lock=(0.0, 0.0))
    )
    out = lock.sample("euler", setup.x.to(dtype), setup.sigmas.to(dtype), extra_args={})
    assert out.dtype == dtype


def test_tokens_are_measured_without_a_source(setup):
    watch = kv.Sigmoid(lock_range=(0.0, 0.0))
    estimator = kv.TrajectoryVariance(patch=(1, 2, 2))
    lock = kv.KVLock(setup.model, mask=setup.mask, policy=watch, estimator=estimator)
    lock.sample("euler", setup.x, setup.sigmas, extra_args=setup.cfg)
    assert lock.trace.steps[-1].risk.ndim == 2


class Below(Estimator):
    """Measures at a third of the noise level."""

    def step(self, state, evaluation):
        return state, evaluation.probe(evaluation.x, evaluation.sigma / 3).square().flatten(1).mean(1)


def test_a_probe_has_the_samplers_precision():
    linear, seen = nn.Linear(1, 1).half(), []

    def model(x, sigma):
        seen.append(sigma.dtype)
        return x + 0 * linear(sigma.view(-1, 1)).view(-1, 1, 1, 1, 1)

    x = torch.randn(1, 1, 2, 4, 4).half()
    with kv.KVLock(model, policy=kv.Sigmoid(lock_range=(0.0, 0.0)), estimator=Below()) as lock:
        for level in (4.0, 2.0):
            lock(x, torch.tensor([level]).half())
    assert set(seen) == {torch.float16}


def test_noise_levels_in_whole_numbers(setup):
    found = []
    for levels in (torch.tensor([8, 4, 2, 1]), torch.tensor([8.0, 4.0, 2.0, 1.0])):
        with setup.lock(policy=kv.Sigmoid(), estimator=Below(), threshold=1.0) as lock:
            for level in levels:
                lock(setup.source + level, level, **setup.cfg)
        found.append(torch.stack([step.variance for step in lock.trace]))
    assert torch.equal(*found)
