"""No wrong number runs to the end in silence: a table of arguments times a table of wrong values.

Whatever is not listed as right must end in one of the library's errors. What kind of conditions a model reads is its
own affair.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from functools import partial
from inspect import unwrap

import pytest
import torch
from conftest import Setup
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

import kvlock_sampling as kv
from kvlock_sampling import masks, samplers, variance
from kvlock_sampling.app.edit import start_noise
from kvlock_sampling.presets import ESTIMATORS, POLICIES, Preset
from kvlock_sampling.tiny import edit_mask, render, sample_edit
from kvlock_sampling.types import Control, EstimatorError, KVLockError, RunError, SamplerError, SourceError
from kvlock_sampling.variance.thresholds import reference_bands
from kvlock_sampling.video import side_by_side

NAN, INF = math.nan, math.inf


def poked(value):
    """Put a number in the middle of a tensor."""

    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[tensor.numel() // 2] = value
        return tensor

    return change


CHANGES = {
    "NaN": poked(NAN),
    "inf": poked(INF),
    "-inf": poked(-INF),
    "negative": lambda v: -v.abs() - 1,
    "zero": lambda v: v * 0,
    "more rows": lambda v: torch.cat([v, v, v]),
    "no rows": lambda v: v[:0],
    "another rank": lambda v: v[None],
    "int": lambda v: v.long(),
    "bool": lambda v: v.bool(),
    "complex": lambda v: v.to(torch.complex64),
}
# What is a right value of an argument: any finite number of latents or conditions, bool masks, one x per row of noise.
RIGHT = {
    "x": ("negative",),
    "sigmas": (),
    "source": ("negative", "zero"),
    "mask": ("bool",),
    "noise": ("negative",),
    **dict.fromkeys(("cond", "uncond", "source_cond"), ("negative", "zero")),
}
THE_MODELS = ("cond", "uncond", "source_cond"), ("another rank", "int", "bool", "complex")
RUN, GUIDE = ("x", "sigmas", "seed"), ("cond", "uncond", "cond_scale")


def run(setup, policy="sigmoid", **given):
    """A run with some arguments exchanged."""
    options = {name: value for name, value in given.items() if name not in (*RUN, *GUIDE, "source_cond")}
    if "source_cond" in given:
        options["source_args"] = {"cond": given["source_cond"]}
    lock = setup.lock(policy=policy, **options)
    guide = {**setup.cfg, **{name: value for name, value in given.items() if name in GUIDE}}
    x, sigmas, seed = (given.get(name, default) for name, default in zip(RUN, (setup.x, setup.sigmas, 0), strict=True))
    return lock.sample("euler_ancestral", x, sigmas, extra_args=guide, seed=seed)


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("policy", ["sigmoid", "full", "default", "half"])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", RIGHT)
def test_no_wrong_tensor_runs_to_the_end(name, batch, policy):
    setup = Setup(batch=batch)
    given = {
        **{"x": setup.x, "sigmas": setup.sigmas, "source": setup.source, "mask": setup.mask},
        **{"cond": setup.cond, "uncond": setup.uncond, "source_cond": setup.cond},
        "noise": torch.randn(setup.source.shape, generator=torch.Generator().manual_seed(1)),
    }[name]
    for kind, change in CHANGES.items():
        if kind in RIGHT[name] or (name, batch, kind) == ("x", 1, "more rows"):  # one source serves several clips
            assert torch.isfinite(run(setup, policy, **{name: change(given)})).all()
        elif not (name in THE_MODELS[0] and kind in THE_MODELS[1]):
            with pytest.raises((KVLockError, UserWarning)):
                run(setup, policy, **{name: change(given)})


BAD = {
    **{"NaN": NAN, "inf": INF, "negative": -1, "zero": 0, "half": 2.5, "huge": 10**400, "complex": 1j},
    **{"word": "word", "list": [1.0, 2.0, 3.0], "tensor": torch.ones(3), "bool": True},
}
FREE = ("NaN", "inf", "huge", "complex", "word", "list", "tensor", "bool")  # wrong for every number
NOT_NEGATIVE, POSITIVE = (*FREE, "negative"), (*FREE, "negative", "zero")
COUNT, FROM_0 = (*POSITIVE, "half"), (*NOT_NEGATIVE, "half")
PAIR = tuple(BAD)
LESS, RATIO = (tuple(kind for kind in kinds if kind != "huge") for kinds in (COUNT, POSITIVE))

DISC = torch.zeros(5, 16, 16)
DISC[:, 4:8, 4:8] = 1
CALM = [(i, float(i + 1), 1.0) for i in range(40)]
PIXELS = torch.zeros(3, 4, 16, 16)


def bare(**given):
    return samplers.run("euler", lambda x, sigma: x * 0.5, torch.ones(1, 2), torch.tensor([2.0, 1.0, 0.0]), **given)


# Unwrapped, because the tests' own check of types would be first, as it is in functions that these call.
FUNCTIONS = {
    "flow_sigmas": (partial(samplers.flow_sigmas, n=4), {"n": COUNT, "shift": POSITIVE, "t_max": (*POSITIVE, "half")}),
    "samplers.run": (bare, {"seed": FROM_0}),
    "gaussian_noise": (partial(samplers.gaussian_noise, torch.ones(1, 2)), {"seed": FROM_0}),
    "grow": (partial(unwrap(masks.grow), DISC), {"radius": NOT_NEGATIVE}),
    "latent_mask": (partial(unwrap(masks.latent_mask), DISC), {"temporal": COUNT, "spatial": COUNT}),
    "token_mask": (partial(unwrap(masks.token_mask), DISC), {"patch": PAIR}),
    "resize": (
        partial(unwrap(masks.resize), DISC, frames=5, height=8, width=8),
        {"frames": COUNT, "height": COUNT, "width": COUNT},
    ),
    "as_mask": (partial(unwrap(masks.as_mask), DISC), {"frames": COUNT}),
    "KVCache": (kv.KVCache, {"every": LESS, "ratio": RATIO, "budget": NOT_NEGATIVE, "format": PAIR}),
    "Preset": (
        partial(Preset, kv.Sigmoid()),
        {"threshold": POSITIVE, "cfg_floor": NOT_NEGATIVE, "rescale": FREE[:-1], "kv_cache": PAIR},
    ),
    "ThresholdCurve": (
        partial(variance.ThresholdCurve, sigmas=(2.0, 1.0), values=(1.0, 1.0)),
        {"sigmas": PAIR, "values": PAIR},
    ),
    "reference_bands": (partial(reference_bands, CALM), {"quantile": (*POSITIVE, "half"), "bands": COUNT}),
    "side_by_side": (partial(side_by_side, [PIXELS], ["a"]), {"scale": COUNT, "columns": COUNT}),
    "lock": (
        lambda **given: run(Setup(), **given),
        {
            **{"cond_scale": FREE, "threshold": POSITIVE, "cfg_floor": NOT_NEGATIVE, "seed": FROM_0},
            **{"composite": (*NOT_NEGATIVE[:-2], "negative", "half"), "transition": PAIR},
        },
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_wrong_number_is_taken(name):
    call, arguments = FUNCTIONS[name]
    for argument, wrong in arguments.items():
        for kind in wrong:
            with pytest.raises((KVLockError, TypeCheckError), match=argument.partition("_")[0]):
                call(**{argument: BAD[kind]})


TYPED = {"float": FREE[:-1], "int": COUNT, "bool": tuple(k for k in FREE if k != "bool"), "Range": PAIR}
INNER = {
    "Sparse": {"estimator": kv.TrajectoryVariance(), "every": 2},
    "Clamped": {"policy": kv.PID()},
    "Smoothed": {"policy": kv.PID(), "half_life": 2.0},
    "Windowed": {"policy": kv.PID(), "last": 3},
}
SETTINGS = [(made, field) for made in (*ESTIMATORS.values(), *POLICIES.values()) for field in dataclasses.fields(made)]


@pytest.mark.parametrize(("made", "field"), SETTINGS, ids=lambda v: getattr(v, "__name__", None) or v.name)
def test_no_setting_of_a_policy_or_estimator_takes_a_value_of_another_kind(made, field):
    """What kind a setting is of is read from its type; a count takes no half, a number no word, a switch no number."""
    kind = getattr(field.type, "__name__", str(field.type))
    numeric = next((wrong for word, wrong in TYPED.items() if kind.startswith(word)), PAIR)
    for wrong in (*numeric, *(("bool",) if kind.startswith(("float", "int")) else ())):
        right = {"memory": ("inf",), "seed": ("zero",)}.get(field.name, ())
        if wrong not in right and not (kind.startswith("str") and wrong == "word"):
            with pytest.raises(KVLockError, match=field.name):
                made(**{**INNER.get(made.__name__, {}), field.name: BAD[wrong]})


class Broken(variance.Estimator):
    """An estimator that returns what it is told to, from the second evaluation on."""

    def __init__(self, answer):
        self.answer = answer

    def step(self, state, evaluation):
        return self.answer(torch.ones(len(evaluation.x))) if state else (True, None)


NO_VARIANCES = {
    "NaN": lambda v: (True, v * NAN),
    "inf": lambda v: (True, v * INF),
    "negative": lambda v: (True, -v),
    "one for all": lambda v: (True, v.mean()),
    "too many": lambda v: (True, v.repeat(3)),
    "whole numbers": lambda v: (True, v.long()),
    "a float": lambda v: (True, 1.0),
    "no state": lambda v: v,
    "three": lambda v: (True, v, None),
}


@pytest.mark.parametrize("policy", ["sigmoid", "threshold", "pid"])
@pytest.mark.parametrize("kind", NO_VARIANCES)
def test_what_an_estimator_returns_is_the_estimators_fault(kind, policy):
    with pytest.raises(EstimatorError, match="Broken"):
        run(Setup(batch=2), policy, estimator=Broken(NO_VARIANCES[kind]))


@pytest.mark.parametrize("value", [NAN, -1.0])
def test_a_variance_on_a_device_is_checked_with_the_next_transfer(value, monkeypatch):
    """NaN must never mean that nothing is locked, and no evaluation reads from a device twice."""
    monkeypatch.setattr("kvlock_sampling.utils.host.HostReads.free", lambda value: False)
    with pytest.raises(EstimatorError, match=r"Broken.* returned a variance from"):
        run(Setup(), "threshold", estimator=Broken(lambda v: (True, v * value)))


@pytest.mark.parametrize("answer", [NAN, INF, 0.0, -1.0, None, "0.01", torch.tensor(0.01)])
def test_a_threshold_function_returns_a_variance(answer):
    with pytest.raises(EstimatorError, match=r"threshold\(.*\) returned .*threshold=lambda sigma: 0.01"):
        run(Setup(), threshold=lambda sigma: answer)


@pytest.mark.parametrize("policy", ["off", "full", "half", "threshold", "default", "release", "static"])
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize("at", [0, 3, 5])
def test_a_prediction_that_is_not_finite_ends_the_run(policy, on_host, at, monkeypatch):
    """Also the last one of a block, where no evaluation follows."""
    setup, sigmas = Setup(), []
    inner = setup.model.inner_model.forward

    def overflowing(z, t, cond):
        sigmas.append(float(t.flatten()[0]))
        return inner(z, t, cond) * (INF if len(set(sigmas)) > at else 1.0)

    setup.model.inner_model.forward = overflowing
    if not on_host:
        monkeypatch.setattr("kvlock_sampling.utils.host.HostReads.free", lambda value: False)
    with pytest.raises(RunError, match=r"prediction at sigma=.* holds NaN or inf.*\n.*bfloat16"):
        run(setup, policy)


def test_noise_of_another_scale_is_refused():
    """Noise that is multiplied by sigma already, and x that is not: both are easy to write."""
    setup = Setup()
    noise = torch.randn(setup.source.shape)
    with pytest.raises(SourceError, match=r"standard deviation of .*e.02; expected 1"):
        setup.lock(noise=noise * setup.sigmas[0])
    with pytest.warns(UserWarning, match=r"x lies 0.001. sigma from the source.*\* sigmas\[0\]"):
        run(setup, "half", x=noise)


def test_a_run_beyond_the_schedule_that_was_told_is_refused():
    setup = Setup()
    lock = setup.lock(policy="sigmoid", sigmas=setup.sigmas / 100)
    with lock, pytest.raises(RunError, match=r"asked at sigma=999.*schedule, 9.99 to"):
        lock(setup.x, setup.sigmas[:1], **setup.cfg)
    for wrong in (setup.sigmas.flip(0), setup.sigmas * NAN, setup.sigmas[[0, 1, 1, 2]]):
        with pytest.raises(KVLockError, match="no schedule"):
            setup.lock(sigmas=wrong)


@given(st.integers(-(2**70), 2**70), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_one_rule_for_seeds(seed, clips):
    x = torch.zeros(clips, 2)
    calls = [
        lambda: samplers.gaussian_noise(x, seed)(1.0, 0.5),
        lambda: samplers.gaussian_noise(x, [seed] * clips)(1.0, 0.5),
        lambda: samplers.run("dpmpp_2m_sde", lambda x, sigma: x * 0.5, x + 1, torch.tensor([2.0, 1.0, 0.0]), seed=seed),
        lambda: variance.RenoiseVariance(seed=seed),
        lambda: start_noise(x, seed),
        lambda: start_noise(x, [seed] * clips),
    ]
    for call in calls:
        if 0 <= seed < 2**64:
            call()
        else:
            with pytest.raises(KVLockError, match=rf"seed={seed}; expected a whole number in \[0, 2\*\*64\)"):
                call()


def test_a_policy_that_sees_no_measurement_says_so():
    """An estimator that never knows: its policy never takes a step, and the block warns at its end."""
    with pytest.warns(UserWarning, match="nothing was measured"):
        run(Setup(), "threshold", estimator=Broken(lambda v: (True, None)))


@kv.stateless
def unread(obs):
    return Control(lock=0.5)


def test_right_values_run_in_silence():
    """The table's counterpart: the same calls with right values neither raise nor warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        setup = Setup(batch=2)
        noise = torch.randn(setup.source.shape)
        out = run(setup, unread, noise=noise, threshold=lambda sigma: 0.01, source_cond=setup.cond, seed=[1, 2])
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("sampler", [5, None, ("euler",)])
def test_a_sampler_is_a_name_or_a_function(sampler):
    with pytest.raises(SamplerError, match=r"sampler=.*; expected a name"):
        samplers.run(sampler, lambda x, sigma: x, torch.ones(1, 2), torch.tensor([1.0, 0.0]))


def test_a_clip_in_0_to_1_is_told():
    before, after = sample_edit(6, "reshape")
    clip, mask = render([before]), edit_mask([before], [after])
    with pytest.warns(UserWarning, match=r"if it is in \[0, 1\], pass clip \* 2 - 1"):
        kv.edit_video((clip + 1) / 2, mask, after.prompt, policy="off", steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        kv.edit_video(clip, mask, after.prompt, policy="off", steps=1)
