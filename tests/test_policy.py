"""Every built-in policy keeps the contract, and each does what the formula at the top of its file says."""

import ast
import doctest
import importlib
import math
import sys
from dataclasses import FrozenInstanceError, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvlock_sampling as kv
import kvlock_sampling.policy as room
from kvlock_sampling.policy import (
    PID,
    Clamped,
    Constant,
    Linear,
    Policy,
    Release,
    ReleaseBelow,
    Sigmoid,
    Smoothed,
    Stateless,
    Threshold,
    Windowed,
    as_policy,
    stateless,
)
from kvlock_sampling.testing import check_policy
from kvlock_sampling.types import Control, Observation, PolicyError


@stateless
def fade(obs):
    """Lock by risk."""
    return Control(lock=obs.risk.clamp(0, 1))


@dataclass(frozen=True)
class Silent(Policy):
    """Leaves every actuator as it is."""

    def step(self, state, obs):
        return state, Control()


BUILT_IN = [
    Constant(),
    Constant(lock=0.3, cfg_scale=4.0),
    Linear(),
    Linear(gain=0.5, cfg_max=None),
    ReleaseBelow(),
    ReleaseBelow(below=1.0, lock=0.0),
    Release(),
    Release(below=8.0, lock=1.0, firm=1.0),
    Release(early=False),
    Threshold(),
    Threshold(on=1.5, off=0.5, locked=0.9, free=0.1, cfg_calm=1.2, cfg_alarm=0.5),
    Sigmoid(),
    Sigmoid(centre=2.0, width=0.1, lock_range=(0.2, 0.8), cfg_range=(1.5, 0.5)),
    PID(),
    PID(target=0.5, kp=0.5, ki=0.5, kd=0.1, lock_range=(0.1, 0.6), cfg_range=(1.0, 2.0), bias=0.3, slew=0.5),
    PID(kp=-0.2, ki=-0.1, kd=0.0, bias=1.0),
    Windowed(Linear(), last=5),
    Windowed(PID(), below=5.0, above=0.1),
    Smoothed(PID(kd=0.1), half_life=0.3),
    Smoothed(Windowed(Linear(), last=6), half_life=0.5),
    Smoothed(Constant(lock=1.0), half_life=0.5),
    Clamped(Linear(), lock=(0.1, 0.5), cfg=(1.0, 6.0)),
    Clamped(Windowed(Threshold(cfg_alarm=3.0), last=5), lock=(0.0, 0.0)),
    fade,
    Silent(),
    Smoothed(Silent(), half_life=0.5),
    Clamped(Silent(), lock=(0.1, 0.5), cfg=(1.0, 6.0)),
]


def observe(risk, sigma=1.0, cfg_scale=5.0, steps_left=None, dtype=torch.float32):
    risk = torch.as_tensor(risk, dtype=dtype).reshape(-1)
    scale = torch.full_like(risk, cfg_scale)
    return Observation(sigma, 0.01 * risk, risk, torch.zeros_like(risk), scale, steps_left, effect=risk.flip(0))


def follow(policy, risk_of, sigmas, dtype=torch.float64):
    """The locks of one clip over a run."""
    state, locks = policy.init(), []
    for sigma in sigmas:
        state, control = policy.step(state, observe([risk_of(sigma)], sigma, dtype=dtype))
        locks.append(float(control.lock))
    return locks


def falling(steps, high=80.0, low=0.03):
    return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp().tolist()


# -- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", BUILT_IN, ids=repr)
def test_built_in_policies_keep_the_contract(policy):
    check_policy(policy, tokens=4)


@pytest.mark.parametrize("policy", BUILT_IN, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_is_kept_and_the_first_control_holds_the_range(policy, dtype):
    obs = observe([0.3, 1.1, 9.0], sigma=3.0, steps_left=3, dtype=dtype)
    for control in (policy.start(obs), policy.step(policy.init(), obs)[1]):
        for value in control:
            assert not isinstance(value, torch.Tensor) or value.dtype == dtype
        lock = torch.as_tensor(0.0 if control.lock is None else control.lock)
        assert 0.0 <= float(lock.min()) <= float(lock.max()) <= 1.0


@settings(max_examples=40, deadline=None)
@given(
    risk=st.floats(0.0, math.inf, width=32),
    then=st.floats(0.0, math.inf, width=32),
    fall=st.floats(0.0, 10.0),
    policy=st.sampled_from(BUILT_IN),
)
def test_any_risk_from_zero_to_infinity_gives_a_lock_in_range(risk, then, fall, policy):
    state, _ = policy.step(policy.init(), observe([risk], 10.0, steps_left=6))
    control = policy.step(state, observe([then], 10.0 * math.exp(-fall), steps_left=5))[1]
    assert control.lock is None or 0.0 <= float(control.lock) <= 1.0
    assert control.cfg_scale is None or math.isfinite(float(control.cfg_scale))


@settings(max_examples=60, deadline=None)
@given(
    a=st.floats(0.0, math.inf, width=32),
    b=st.floats(0.0, math.inf, width=32),
    policy=st.sampled_from([Linear(), Linear(gain=3.0), Sigmoid(), Sigmoid(width=0.05), Threshold(), fade]),
)
def test_more_risk_never_means_less_lock(a, b, policy):
    low, high = policy.step(policy.init(), observe(sorted([a, b])))[1].lock.tolist()
    assert low <= high


@pytest.mark.parametrize(
    ("policy", "may"),
    [
        (Constant(), False),
        (Constant(lock=0.1), True),
        (Linear(), True),
        (Threshold(locked=0.0), False),
        (Threshold(), True),
        (Sigmoid(lock_range=(0, 0)), False),
        (PID(lock_range=(0, 0), cfg_range=(1, 2)), False),
        (PID(), True),
        (Clamped(Linear(), lock=(0, 0)), False),
        (Clamped(Constant(), lock=(0.1, 1)), True),
        (Windowed(Constant(), last=3), False),
        (Smoothed(Clamped(PID(), lock=(0, 0)), half_life=1), False),
    ],
    ids=repr,
)
def test_settings_say_whether_a_policy_may_lock(policy, may):
    assert policy.may_lock is may


def test_whether_risk_is_used_is_handed_up():
    assert Linear().uses_risk
    assert not Constant().uses_risk
    assert not Smoothed(Windowed(Constant(), last=3), half_life=1).uses_risk
    assert Windowed(PID(), last=3).uses_risk


@pytest.mark.parametrize(
    "policy",
    [
        Constant(),
        Threshold(),
        Sigmoid(),
        PID(),
        Linear(cfg_max=None),
        Windowed(Linear(), last=1),
        Smoothed(PID(), 1),
        Smoothed(Clamped(PID(), lock=(0.1, 0.9)), half_life=0.5),
    ],
    ids=repr,
)
def test_unscheduled_guidance_and_compositing_are_left_as_they_are(policy):
    obs = observe([0.2, 3.0], steps_left=9)
    for control in (policy.start(obs), policy.step(policy.init(), obs)[1]):
        assert control[1:] == (None, None)


def test_wrappers_carry_compositing_through():
    inner = stateless(lambda obs: Control(lock=1.0, composite=0.25))
    for policy in (Windowed(inner, below=2), Clamped(inner), Smoothed(inner, half_life=1)):
        assert policy.step(policy.init(), observe([1.0]))[1].composite == 0.25
    assert Windowed(inner, below=0.5).step(None, observe([1.0]))[1] == Control(lock=0.0)
    check_policy(inner)


def test_what_an_inner_policy_leaves_as_it_is_starts_from_what_holds():
    obs = observe([1.0, 1.0])._replace(lock=torch.tensor([0.0, 0.75]))
    clamped = Clamped(Silent(), lock=(0.0, 0.5), cfg=(1.0, 4.0)).step(None, obs)[1]
    assert (clamped.lock.tolist(), clamped.cfg_scale.tolist()) == ([0.0, 0.5], [4.0, 4.0])
    assert Smoothed(fade, half_life=1).step(Smoothed(fade, half_life=1).init(), obs)[1].cfg_scale is None
    state, first = Smoothed(Silent(), half_life=1).step(Smoothed(Silent(), half_life=1).init(), obs)
    assert (first.lock.tolist(), state[2].cfg_scale) == ([0.0, 0.0], None)


def test_guidance_listens_to_the_worst_token():
    obs = observe([0.0, 0.0])._replace(risk=torch.tensor([[0.1, 0.5], [0.2, 1.5]]))
    control = Linear().step(None, obs)[1]
    torch.testing.assert_close(control.lock, torch.tensor([[0.1, 0.5], [0.2, 1.0]]))
    torch.testing.assert_close(control.cfg_scale, torch.tensor([2.5, 7.5]))


# -- the formulas -----------------------------------------------------------------------------------------------------


def test_constant():
    obs = observe([math.nan, math.nan])
    assert Constant(lock=0.5).step(None, obs)[1] == Control(0.5)
    assert Constant(lock=0.5, cfg_scale=3.0).start(obs) == Control(0.5, 3.0)


def test_linear_is_the_paper():
    control = Linear().step(None, observe([0.0, 0.4, 1.5, 3.0]))[1]
    torch.testing.assert_close(control.lock, torch.tensor([0.0, 0.4, 1.0, 1.0]))
    torch.testing.assert_close(control.cfg_scale, torch.tensor([0.0, 2.0, 7.5, 10.0]))


def test_threshold_remembers_between_off_and_on():
    policy, state, seen = Threshold(on=1.0, off=0.7, cfg_alarm=0.5), None, []
    for risk in (0.9, 1.1, 0.9, 0.71, 0.69, 0.9, 1.1):
        state, control = policy.step(state, observe([risk]))
        seen.append((float(control.lock), float(control.cfg_scale)))
    free, locked = (0.0, 5.0), (1.0, 2.5)
    assert seen == [free, locked, locked, locked, free, free, locked]


def test_sigmoid_is_a_hill_curve():
    policy = Sigmoid(centre=2.0, width=0.5, lock_range=(0.1, 0.9))
    risk = torch.tensor([0.0, 0.5, 2.0, 8.0, math.inf], dtype=torch.float64)
    lock = policy.step(None, observe(risk, dtype=torch.float64))[1].lock
    hill = torch.tensor([0.0, 0.5**2 / (4 + 0.5**2), 0.5, 64 / 68, 1.0], dtype=torch.float64)
    torch.testing.assert_close(lock, 0.1 + 0.8 * hill)


# -- PID --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("slew", [None, 0.2])
def test_pid_without_gains_is_a_constant_bit_for_bit(dtype, slew):
    policy, state = PID(kp=0.0, ki=0.0, kd=0.0, bias=0.3, slew=slew), None
    for i, sigma in enumerate(falling(9)):
        obs = observe([0.0, 0.3 * i, 1e9], sigma, dtype=dtype)
        state, control = policy.step(state, obs)
        assert torch.equal(control.lock, torch.full_like(obs.risk, Constant(lock=0.3).step(None, obs)[1].lock))
        assert control.cfg_scale is None
    assert policy.start(obs) == Constant(lock=0.3).start(obs)


@pytest.mark.parametrize("gains", [(0.0, 0.3, 0.0), (0.1, 0.3, 0.0), (0.5, 1.0, 0.2)])
def test_pid_does_not_wind_up(gains):
    policy, sigmas = PID(*(1.0, *gains)), falling(40)
    locks = follow(policy, lambda s: 100.0 if s > sigmas[30] else 0.5, sigmas)
    assert locks[10:30] == [1.0] * 20
    assert locks[30] < 1.0  # at the first evaluation after the error turned
    locks = follow(policy, lambda s: 0.001 if s > sigmas[30] else 2.0, sigmas)
    assert locks[:30] == [0.0] * 30
    assert locks[30] > 0.0


def test_pid_has_no_derivative_kick():
    policy = PID(kp=0.0, ki=0.0, kd=0.1, bias=0.5, filter_width=0.3)
    assert follow(policy, lambda s: 50.0, falling(3)) == [0.5, 0.5, 0.5]
    # A jump by log(e) = 1 within a step too short to see raises u by kd / filter_width at most, not by kd / dt.
    locks = follow(policy, lambda s: 1.0 if s > 1.0 else math.e, [1.0 + 1e-6, 1.0 - 1e-6])
    assert locks[1] == pytest.approx(0.5 + 0.1 / 0.3, rel=1e-4)


@pytest.mark.parametrize(
    "policy",
    [PID(kd=0.05), PID(kp=0.0, ki=1.0), PID(slew=0.1), Smoothed(Sigmoid(), half_life=0.5), Smoothed(PID(), 0.3)],
    ids=repr,
)
def test_twenty_steps_give_the_lock_of_fifty(policy):
    def risk(sigma):
        return math.exp(1.2 * math.sin(math.log(sigma)))

    coarse, fine = falling(20), falling(58)  # every third of the fine steps is a coarse one
    few, many = follow(policy, risk, coarse), follow(policy, risk, fine)[::3]
    assert max(abs(a - b) for a, b in zip(few, many, strict=True)) < 0.06
    assert max(many) - min(many) > 0.2


def test_pid_holds_a_plant_at_its_target():
    policy, state, lock = PID(kp=0.1, ki=0.5), None, 0.0
    for sigma in falling(60):
        risk = 4.0 * math.exp(-2.5 * lock)  # locking lowers risk
        state, control = policy.step(state, observe([risk], sigma))
        lock = float(control.lock)
    assert risk == pytest.approx(1.0, abs=0.05)


def test_pid_slew_limits_the_move_per_log_sigma():
    sigmas = falling(20)
    locks = follow(PID(kp=5.0, slew=0.1), lambda s: 100.0, sigmas)
    steps = [math.log(a / b) for a, b in pairwise(sigmas)]
    assert locks[0] == 0.0
    for (before, after), dt in zip(pairwise(locks), steps, strict=True):
        assert after - before == pytest.approx(0.1 * dt)


def test_pid_drives_lock_and_guidance_by_one_signal():
    policy = PID(kp=1.0, ki=0.0, lock_range=(0.0, 0.5), cfg_range=(1.0, 2.0))
    control = policy.step(policy.init(), observe([math.exp(0.2), math.exp(0.8), 100.0]))[1]
    torch.testing.assert_close(control.lock, torch.tensor([0.2, 0.5, 0.5]))
    torch.testing.assert_close(control.cfg_scale, torch.tensor([6.0, 9.0, 10.0]))


# -- wrappers ---------------------------------------------------------------------------------------------------------


def test_window_by_steps_and_by_noise_level():
    by_steps = Windowed(Constant(lock=1.0), last=20, below=3.3)
    assert by_steps.start(observe([1.0], 9.0, steps_left=20)).lock == 1.0
    assert by_steps.start(observe([1.0], 0.1, steps_left=21)).lock == 0.0
    assert by_steps.start(observe([1.0], 3.3)).lock == 1.0  # unknown schedule: the fallback
    assert by_steps.start(observe([1.0], 3.4)).lock == 0.0
    band = Windowed(Constant(lock=1.0), below=3.0, above=1.0)
    assert [float(band.step(None, observe([1.0], s))[1].lock) for s in (3.1, 3.0, 1.0, 0.9)] == [0, 1, 1, 0]


def test_a_window_holds_the_level_that_it_names_in_the_schedules_precision():
    levels, on = torch.tensor([2.0, 1.0, 0.7, 0.4, 0.1]), Constant(lock=1.0)
    for window, wanted in ((Windowed(on, above=0.7), [1, 1, 1, 0, 0]), (Windowed(on, below=0.4), [0, 0, 0, 1, 1])):
        controls = [window.step(None, observe([1.0])._replace(sigma=float(level)))[1] for level in levels]
        assert [float(control.lock) for control in controls] == wanted


def test_window_needs_a_schedule_or_a_fallback():
    with pytest.raises(PolicyError, match=r"sigmas=\.\.\. to KVLock.*lock\.sample.*kvlock_sampling\.samplers") as info:
        Windowed(Linear(), last=20).start(observe([1.0]))
    assert "below=SIGMA" in str(info.value)


def test_window_keeps_the_inner_memory_warm():
    policy = Windowed(Threshold(on=1.0, off=0.5), last=1)
    state, control = policy.step(policy.init(), observe([2.0], 2.0, steps_left=2))
    assert control == Control(lock=0.0)
    assert float(policy.step(state, observe([0.8], 1.0, steps_left=1))[1].lock) == 1.0


def test_smoothing_halves_the_rest_per_half_life():
    policy = Smoothed(fade, half_life=0.5)
    locks = follow(policy, lambda s: 1.0, [math.exp(-0.5 * i) for i in range(5)])
    assert locks == pytest.approx([0.0, 0.5, 0.75, 0.875, 0.9375])
    assert follow(policy, lambda s: 1.0, [1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]


def test_smoothing_guidance_begins_at_the_callers():
    policy = Smoothed(Linear(), half_life=1.0)
    state, first = policy.step(policy.init(), observe([2.0], 1.0))
    _, second = policy.step(state, observe([2.0], math.exp(-1.0)))
    assert float(first.cfg_scale) == 5.0
    assert float(second.cfg_scale) == pytest.approx(7.5)


def test_clamping():
    policy = Clamped(Linear(), lock=(0.2, 0.6), cfg=(1.0, 8.0))
    control = policy.step(None, observe([0.0, 0.4, 3.0]))[1]
    torch.testing.assert_close(control.lock, torch.tensor([0.2, 0.4, 0.6]))
    torch.testing.assert_close(control.cfg_scale, torch.tensor([1.0, 2.0, 8.0]))
    assert policy.start(observe([1.0])).lock == 0.2
    assert Clamped(Constant(cfg_scale=9.0), cfg=(1, 8)).start(observe([1.0])).cfg_scale == 8.0


# -- making policies --------------------------------------------------------------------------------------------------


def test_a_function_is_a_policy():
    assert repr(fade) == "stateless(fade)"
    assert fade.__doc__ == "Lock by risk."
    assert fade(observe([0.5])).lock.item() == 0.5
    assert fade.start(observe([math.nan])).lock == 0.0
    by_sigma = stateless(uses_risk=False)(lambda obs: Control(min(obs.sigma, 1.0)))
    assert repr(by_sigma) == "stateless(<lambda>, uses_risk=False)"
    assert by_sigma.start(observe([math.nan], 0.25)).lock == 0.25


def test_as_policy_takes_policies_and_functions():
    pid = PID()
    assert as_policy(pid) is pid
    assert isinstance(as_policy(lambda obs: Control(0.0)), Stateless)
    assert Smoothed(lambda obs: Control(0.0), half_life=1.0).policy.start(observe([1.0])).lock == 0.0


def test_clamped_brings_what_overshoots_into_range():
    eager = Clamped(lambda obs: Control(2 * obs.risk))
    assert torch.equal(eager.step(None, observe([0.25, 3.0]))[1].lock, torch.tensor([0.5, 1.0]))


def test_settings_are_frozen_and_compare_by_value():
    with pytest.raises(FrozenInstanceError):
        PID().target = 2.0  # type: ignore[misc]
    assert Sigmoid(lock_range=[0, 1]) == Sigmoid()
    assert len({PID(), PID(), Windowed(PID(), last=3)}) == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Constant(lock=1.5), ["Constant(lock=1.5)", ">= 0 and <= 1", "Constant(lock=0.0)"]),
        (lambda: Constant(lock=math.nan), ["nan", "finite"]),
        (lambda: Constant(lock=True), ["lock=True", "finite number"]),
        (lambda: Linear(gain=0), ["> 0", "Linear(gain=1.0)"]),
        (lambda: Linear(cfg_max=-1), ["cfg_max=-1", ">= 0", "Linear(cfg_max=2.0)"]),
        (lambda: Linear(gain=10**400), ["> 0", "Linear(gain=1.0)"]),
        (lambda: Threshold(on=0.5, off=1.0), ["on=0.5, off=1", "off must be below on", "Threshold(on=0.5, off=0.35)"]),
        (lambda: Sigmoid(width=-1), ["width=-1", "> 0"]),
        (lambda: Sigmoid(lock_range=(0.8, 0.2)), ["the lower first", "[0, 1]"]),
        (lambda: Sigmoid(lock_range=0.5), ["two finite numbers"]),
        (lambda: PID(target="1"), ["target='1'", "PID(target=1.0)"]),
        (lambda: PID(bias=0.1, lock_range=(0.2, 1)), ["bias must lie within", "PID(bias=0.2"]),
        (lambda: PID(slew=0), ["slew=0", "PID(slew=1.0)"]),
        (lambda: Windowed(PID()), ["no window given", "last=20"]),
        (lambda: Windowed(PID(), last=0), ["whole number >= 1", "Windowed(policy, last=1)"]),
        (lambda: Windowed(PID(), below=1, above=2), ["empty window", "below=2, above=1"]),
        (lambda: Smoothed(PID(), half_life=0), ["half_life=0", "Smoothed(policy, half_life=1.0)"]),
        (lambda: Release(early=1), ["early=1", "True or False", "Release(early=True)"]),
        (lambda: Clamped(PID(), lock=(0, 2)), ["lock=(0, 2)", "[0, 1]"]),
        (lambda: Smoothed("pid", half_life=1), ["'pid' is a name", "load_policy('pid')"]),
        (lambda: as_policy(PID), ["is a class", "PID(...)"]),
        (lambda: as_policy(3), ["policy=3", "int", "@stateless"]),
        (lambda: as_policy(lambda: 0), ["expected a function of the observation"]),
    ],
)
def test_errors_show_what_was_given_and_what_works(make, words):
    with pytest.raises(PolicyError) as info:
        make()
    for word in words:
        assert word in str(info.value)


def test_a_step_with_the_wrong_arguments_is_caught_where_it_is_written():
    with pytest.raises(PolicyError, match=r"Forgot\.step\(self, obs\); expected step\(self, state, obs\)"):

        @dataclass(frozen=True)
        class Forgot(Policy):
            def step(self, obs):
                return None


# -- the room ---------------------------------------------------------------------------------------------------------

FILES = sorted(Path(room.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_policies_import_only_torch_and_the_shared_words(path):
    known = {*sys.stdlib_module_names, "torch"}
    words = {"types", "utils"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert all(a.name.split(".")[0] in known for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            root = (node.module or "").split(".")[0]
            assert node.level == 1 or (node.level == 2 and root in words) or (not node.level and root in known)


@pytest.mark.parametrize("name", [f"policy.{p.stem}" for p in FILES if p.stem != "__init__"] + ["presets"])
def test_the_examples_in_the_docstrings_run(name):
    assert doctest.testmod(importlib.import_module(f"kvlock_sampling.{name}")).failed == 0


def test_release_lets_go_of_effects_and_unlocks_where_they_are_firm():
    effect = torch.tensor([0.0, 1.0, 1.1, 2.0, 4.0, 32.0])
    obs = observe(torch.zeros(6).tolist())._replace(effect=effect, sigma=2.0)
    lock, cfg_scale, composite = Release(lock=0.5, firm=4.0).step(None, obs)[1]
    assert composite.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(lock, torch.tensor([0.5, 0.5, 0.5, 0.5, 0.5, 1 / 16]))
    assert cfg_scale is None
    torch.testing.assert_close(
        Release(lock=0.5, firm=1.0).step(None, obs)[1].lock, 0.5 * torch.tensor([1, 1, 1 / 1.1, 1 / 2, 1 / 4, 1 / 32])
    )


@pytest.mark.parametrize("policy", [ReleaseBelow(below=3.0), Release(below=3.0)])
def test_nothing_is_released_above_its_noise_level(policy):
    obs = observe([0.1, 5.0])._replace(effect=torch.tensor([1e6, 1e6]))
    for sigma, composite in ((3.0 + 1e-6, 1.0), (80.0, 1.0), (2.9, 0.0)):
        assert policy.step(None, obs._replace(sigma=sigma))[1].composite == pytest.approx(composite, abs=1e-5)
    assert policy.start(obs._replace(sigma=80.0)) == Control(policy.lock, composite=1.0)
    assert policy.may_lock
    assert not type(policy)(lock=0.0).may_lock


def released_by(policy, effect, risk):
    effect, risk = torch.tensor(effect), torch.tensor(risk)
    control = policy.step(None, Observation(1.0, risk, risk, risk * 0, torch.ones(len(risk)), None, effect))[1]
    return control.lock.tolist(), (1 - control.composite).tolist()


def test_a_clip_that_is_not_locked_early_is_locked_while_something_of_it_is_released():
    policy = Release(lock=0.5, firm=4.0, early=False)
    start = policy.start(observe([math.nan, math.nan]))
    assert start == Control(0.0, composite=1.0)
    tokens = released_by(policy, [[0.1, 0.9], [0.1, 8.0]], [[0.01, 0.01], [0.01, 0.01]])
    assert tokens == ([[0.0, 0.0], [0.5, 0.25]], [[0.0, 0.0], [0.0, 1.0]])
    assert released_by(policy, [0.1, 8.0], [0.01, 0.01]) == ([0.0, 0.25], [0.0, 1.0])
    assert policy.may_lock


def test_only_a_change_that_hardly_varies_is_released():
    for snr, wanted in ((0.0, [1.0, 1.0, 1.0, 0.0]), (4.0, [1.0, 0.0, 0.0, 0.0]), (10.0, [0.0] * 4)):
        assert released_by(Release(snr=snr), [8.0, 8.0, 2.0, 0.9], [1.0, 2.1, 1.0, 0.0])[1] == wanted
    assert released_by(Release(), [8.0], [math.nan])[1] == [0.0]


@pytest.mark.parametrize("target", [1e-4, 1e4])
def test_pid_holds_any_target(target):
    """Risk is limited in units of the target."""

    def locks(target):
        policy = PID(target=target, kp=0.3, ki=0.5, kd=0.1, bias=0.5)
        state, found = policy.init(), []
        for i, share in enumerate([0.5, 0.5, 2.0, 3.0, 0.1]):
            obs = observe(share * target, sigma=4.0 * 0.6**i)
            state, control = policy.step(state, obs)
            found.append(control.lock)
        return torch.stack(found)

    torch.testing.assert_close(locks(target), locks(1.0), rtol=0, atol=1e-4)


@dataclass(frozen=True)
class Half(room.Policy):
    answer: object = None
    uses_risk = False

    def step(self, state, obs):
        return self.answer


@pytest.mark.parametrize("around", [lambda p: p, Clamped, lambda p: Smoothed(p, half_life=1.0)])
@pytest.mark.parametrize("answer", [None, Control(lock=1.0), (None, 0.5), (None, torch.ones(1))])
def test_a_broken_policy_is_named_under_wrappers_and_without_risk(around, answer):
    policy, obs = around(Half(answer)), observe(1.0)
    said = r"Half\.step returned \w+; expected (a Control|\(state, Control\))"
    with pytest.raises(PolicyError, match=said):
        policy.start(obs)
    if not isinstance(policy, Half):
        with pytest.raises(PolicyError, match=said):
            policy.step(policy.init(), obs)


@dataclass(frozen=True)
class Mute(room.Policy):
    def start(self, obs):
        return None

    def step(self, state, obs):
        return state, Control(lock=0.5)


def test_a_start_that_gives_nothing_is_named_under_wrappers():
    for policy in (Clamped(Mute()), Smoothed(Mute(), half_life=1.0)):
        with pytest.raises(PolicyError, match=r"Mute\.start returned NoneType; expected a Control"):
            policy.start(observe(1.0)), policy.step(policy.init(), observe(1.0))


@pytest.mark.parametrize("lock", ["high", [1.0, 1.0], np.ones(2)])
def test_an_answer_that_is_no_number_is_named_through_a_clamp(lock):
    policy = Clamped(kv.stateless(lambda obs: Control(lock), uses_risk=False))
    with pytest.raises(PolicyError, match="lock"):
        kv.testing.check_policy(policy)


def test_a_class_whose_methods_take_other_arguments_is_refused_at_its_body():
    with pytest.raises(PolicyError, match=r"Late.start\(self\); expected start\(self, obs\), or without memory"):

        class Late(kv.Policy):
            def start(self):
                return Control(0.0)

    with pytest.raises(PolicyError, match=r"Sized.init\(self, batch\); expected init\(self\)"):

        class Sized(kv.Policy):
            def init(self, batch):
                return batch
