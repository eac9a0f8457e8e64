"""A known plant is recovered, tuned gains hold it, and the outcome is that of the run, not of its sampler or steps."""

import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from kvlock_sampling import samplers
from kvlock_sampling.policy import PID, Constant, Sigmoid, Smoothed
from kvlock_sampling.testing import GaussianDenoiser, check_policy
from kvlock_sampling.types import PolicyError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from tuning import Plant, Tuned, cost, fit_plant, simulate, tune_pid

KNOWN = Plant(-2.0, -2.0, -2.0, sigmas=(5.0, 0.5), drift=(0.9, 0.5, 0.7), start=3.0)
RISING = Plant(-2.0, -2.0, -2.0, drift=(0.6,))


def falling(steps, high=80.0, low=0.03):
    return torch.linspace(math.log(high), math.log(low), steps, dtype=torch.float64).exp().tolist()


def resting(lock):
    return PID(kp=0.0, ki=0.0, kd=0.0, bias=lock)


def record(plant, locks=(0.0, 0.25, 0.5), noise=0.05, seed=0, visits=None):
    """Rows as traces give them, of three clips per run, with noisy measurements."""
    generator, runs = torch.Generator().manual_seed(seed), []
    for lock in locks:
        run = simulate(resting(lock), plant, visits or falling(30), start=[1.0, 2.0, 4.0])
        risk = run.risk * torch.randn(run.risk.shape, generator=generator).mul(noise).exp()
        runs.append(
            [
                {"clip": c, "sigma": float(sigma), "risk": float(risk[i, c]), "lock": float(run.lock[i, c])}
                for i, sigma in enumerate(run.sigmas)
                for c in range(3)
            ]
        )
    return runs


def visits(sampler, steps):
    """The noise levels at which a sampler really asks its model."""
    seen, exact = [], GaussianDenoiser()

    def model(x, sigma, **_):
        seen.append(float(sigma[0]))
        return exact(x, sigma)

    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)) * 80
    samplers.run(sampler, model, x, samplers.get_sigmas_karras(steps, 0.03, 80.0), seed=0)
    return seen


@pytest.fixture(scope="module")
def tuned():
    return tune_pid(record(KNOWN))


# -- the plant --------------------------------------------------------------------------------------------------------


def test_a_simulated_run_is_the_exact_solution():
    run = simulate(Constant(lock=0.25), KNOWN, [80.0, 2.0, 0.1], start=1.0)
    drift = [0.0, 0.9 * math.log(16) + 0.5 * math.log(2.5), 0.5 * math.log(4) + 0.7 * math.log(5)]
    response = [0.0, -0.5 * math.log(40), -0.5 * math.log(20)]
    expected = torch.tensor(drift, dtype=torch.float64).cumsum(0) + torch.tensor(response, dtype=torch.float64).cumsum(
        0
    )
    torch.testing.assert_close(run.risk[:, 0].log(), expected)
    assert run.lock.tolist() == [[0.25]] * 3
    assert run.sigmas.tolist() == [80.0, 2.0, 0.1]


def test_the_lock_acts_on_the_next_evaluation():
    run = simulate(Sigmoid(), RISING, [80.0, 40.0, 20.0], start=[1.0, 8.0])
    assert run.lock[0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(run.lock[1], 1 / (1 + torch.tensor([1.0, 8.0]).double() ** -2))


def test_a_known_plant_is_recovered():
    plant = fit_plant(record(KNOWN, noise=0.02), pieces=3)
    assert plant.low < -2.0 < plant.high
    assert plant.high - plant.low < 0.1
    assert plant.controllable
    edges = [80.0, *plant.sigmas, 0.03]
    for high, low in itertools.pairwise(edges):
        assert plant.drifted(high, low) == pytest.approx(KNOWN.drifted(high, low), abs=0.1)
    assert fit_plant(record(KNOWN, noise=0.0), pieces=1, confidence=0.99).response == pytest.approx(-2.0, abs=0.02)


def test_the_interval_holds_what_it_says():
    plants = [fit_plant(record(KNOWN, noise=0.3, seed=seed)) for seed in range(40)]
    inside = sum(p.low < -2.0 < p.high for p in plants)
    assert inside >= 34  # 95% of 40 is 38; fewer than 34 has a chance of 1 in 100


def test_what_a_sampler_repeats_is_replaced():
    heun = visits("heun", 30)
    assert len(heun) == 59
    runs = record(KNOWN, noise=0.0, visits=heun)
    for run in runs:  # the first of each pair of evaluations was far off
        for row, again in itertools.pairwise(row for row in run if row["clip"] == 0):
            row["risk"] *= 50.0 if row["sigma"] == again["sigma"] else 1.0
    once = fit_plant(record(KNOWN, noise=0.0, visits=visits("euler", 30)))
    assert fit_plant(runs)[:3] == pytest.approx(once[:3], rel=1e-6)


def test_recordings_may_come_from_a_file_and_begin_unmeasured():
    runs = record(KNOWN)
    for run in runs:
        run[0]["risk"] = math.nan
        run[1]["risk"] = None
    assert fit_plant(json.loads(json.dumps(runs).replace("NaN", "null"))) == fit_plant(runs)


@pytest.mark.parametrize(
    ("runs", "words"),
    [
        ([], ["0 clips", "needs 3", "trace.rows()"]),
        (record(KNOWN, locks=(0.5,)), ["every run locked alike (0.5 to 0.5)", "bias=0.8"]),
    ],
)
def test_recordings_that_cannot_tell_are_refused(runs, words):
    with pytest.raises(PolicyError) as info:
        tune_pid(runs)
    for word in words:
        assert word in str(info.value)


# -- the gains --------------------------------------------------------------------------------------------------------


def test_tuning_pays(tuned):
    assert isinstance(tuned, Tuned)
    assert tuned.controllable
    assert tuned.after < 0.5 * tuned.before
    assert tuned.policy.kp > 0
    assert tuned.policy.ki > 0
    assert f"kp={tuned.policy.kp:g}" in tuned.verdict
    assert cost(tuned.policy, tuned.plant, [falling(35)]) == pytest.approx(tuned.after, rel=0.2)
    check_policy(tuned.policy)


def test_what_was_set_stays():
    base = PID(target=0.5, bias=0.2, lock_range=(0.1, 0.9), slew=2.0, filter_width=0.5)
    policy = tune_pid(record(KNOWN), base=base).policy
    for name in ("target", "bias", "lock_range", "slew", "filter_width"):
        assert getattr(policy, name) == getattr(base, name)
    with pytest.raises(PolicyError, match="leaves nothing to control"):
        tune_pid(record(KNOWN), base=PID(lock_range=(0.0, 0.0)))


@pytest.mark.parametrize("seed", [0, 1])
def test_no_gain_helps_where_locking_does_nothing_to_be_seen(seed):
    found = tune_pid(record(KNOWN._replace(response=0.0), noise=0.3, seed=seed), confidence=0.99)
    assert not found.controllable
    assert found.policy == PID()
    assert found.before == found.after
    assert "No gain helps" in found.verdict


def test_a_lock_that_raises_risk_gets_gains_below_zero():
    found = tune_pid(record(Plant(1.5, 1.5, 1.5, drift=(-0.6,))))
    assert found.controllable
    assert found.policy.kp < 0
    assert found.policy.ki < 0
    run = simulate(found.policy, found.plant, falling(30), start=1 / 3)
    assert float(run.risk[-1]) == pytest.approx(1.0, abs=0.05)


def test_a_lock_too_weak_to_hold_is_told():
    assert "no lock within (0.0, 1.0) can hold" in tune_pid(record(Plant(-0.5, 0, 0, drift=(0.9,)))).verdict


@pytest.mark.parametrize("steps", [20, 30, 50])
@pytest.mark.parametrize("jump", [3.0, 10.0])
def test_step_response(tuned, steps, jump):
    run = simulate(tuned.policy, RISING, falling(steps), start=jump)
    error = run.risk[:, 0].log()
    assert -float(error.min()) <= 0.1 * math.log(jump)  # no overshoot
    assert float(error[-1]) == pytest.approx(0.0, abs=0.02)  # no steady-state error
    assert float(run.lock[-1]) == pytest.approx(0.3, abs=0.02)  # which takes 0.6 / 2 of lock


@pytest.mark.parametrize("steps", [20, 30, 50])
def test_risk_that_rises_from_below_is_caught(tuned, steps):
    """There is no lock below 0 to prepare with, so it passes the target, but not far, and comes back."""
    run = simulate(tuned.policy, RISING, falling(steps), start=0.2)
    assert float(run.lock[run.risk < 0.9].max()) == 0.0
    assert float(run.risk.max()) < 1.3
    assert float(run.risk[-1]) == pytest.approx(1.0, abs=0.03)


def test_the_outcome_is_the_same_for_every_sampler_and_number_of_steps(tuned):
    outcomes = {}
    for sampler, steps in itertools.product(["euler", "heun", "dpmpp_2m", "dpm_2"], [20, 30, 50]):
        seen = visits(sampler, steps)
        run = simulate(tuned.policy, KNOWN, seen, start=3.0)
        last = [i for i in range(len(seen)) if i + 1 == len(seen) or seen[i + 1] < seen[i]]
        time, error, lock = -run.sigmas[last].log(), run.risk[last, 0].log(), run.lock[last, 0]
        held = float(torch.trapezoid(lock, time) / (time[-1] - time[0]))
        outcomes[sampler, steps] = (float(error[-1].exp()), held, float(torch.trapezoid(error.abs(), time)))
    for found in outcomes.values():
        assert found[:2] == pytest.approx(outcomes["euler", 30][:2], rel=0.05)  # final risk and mean lock
        # The error over the run also tells how long the first step is, during which nothing is known and nothing locks.
        assert found[2] == pytest.approx(outcomes["euler", 30][2], rel=0.1)
    for steps in (20, 30, 50):  # heun comes back to levels it has seen, and the last word counts
        assert outcomes["heun", steps] == pytest.approx(outcomes["euler", steps], rel=1e-6)


def test_a_loop_that_was_powerless_does_not_wind_up(tuned):
    """Risk rises beyond any lock at high noise, then falls by itself: the lock lets go at once."""
    plant = RISING._replace(sigmas=(2.0,), drift=(2.5, -3.0))
    run = simulate(tuned.policy, plant, falling(50), start=2.0)
    high = run.sigmas > 2.0
    assert run.lock[high, 0].max() == 1.0
    below = int((run.risk[:, 0] < 1.0).nonzero()[0])
    assert float(run.lock[below + 2, 0]) < 0.2
    assert float(run.lock[-1, 0]) == 0.0


def test_the_first_evaluation_gives_no_derivative_kick(tuned):
    without = PID(kp=tuned.policy.kp, ki=tuned.policy.ki)
    run, other = (simulate(p, RISING, falling(30), start=3.0) for p in (tuned.policy, without))
    assert torch.equal(run.lock[:2], other.lock[:2])


def test_without_gains_a_run_is_that_of_a_constant_bit_for_bit():
    run, constant = (
        simulate(p, KNOWN, visits("heun", 20), start=[1.0, 5.0]) for p in (resting(0.3), Constant(lock=0.3))
    )
    assert all(torch.equal(a, b) for a, b in zip(run, constant, strict=True))


def test_any_policy_can_be_simulated():
    run = simulate(Smoothed(Sigmoid(), half_life=0.5), RISING, falling(30), start=3.0)
    assert float(run.risk[-1]) < 1.5
