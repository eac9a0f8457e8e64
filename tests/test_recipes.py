"""Every recipe on the shelf is a complete policy or estimator that keeps the contract."""

import math

import pytest
import torch
from recipes import RECIPES, load

from kvlock_sampling.testing import check_estimator, check_policy
from kvlock_sampling.types import Evaluation, Observation


def play(policy, sigmas, risks):
    state, controls = policy.init(), []
    for sigma, risk in zip(sigmas, risks, strict=True):
        risk = torch.tensor([risk])
        state, control = policy.step(state, Observation(sigma, risk, risk, risk * 0, torch.tensor([5.0])))
        controls.append((float(control.lock), 5.0 if control.cfg_scale is None else float(control.cfg_scale)))
    return controls


@pytest.mark.parametrize("name", [p.stem for p in RECIPES])
def test_recipes_keep_the_contract(name):
    recipe = load(name)
    if hasattr(recipe, "estimator"):
        check_estimator(recipe.estimator)
    else:
        check_policy(recipe.policy)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipes_are_short_and_on_public_names(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 40
    assert "import kvlock_sampling as kv" in text
    assert "from kvlock_sampling" not in text
    assert text.startswith('"""')


def test_hysteresis():
    assert play(load("hysteresis").policy, [4, 3, 2, 1], [1.0, 1.3, 1.0, 0.7]) == [(0, 5), (1, 5), (1, 5), (0, 5)]


def test_fade():
    assert play(load("fade").policy, [2, 1], [0.25, 3.0]) == [(0.25, 5), (1, 5)]


def test_cosine_by_sigma():
    policy = load("cosine_by_sigma").policy
    assert not policy.uses_risk
    locks = [lock for lock, _ in play(policy, [80.0, 10.0, 1.0, 0.1, 0.01], [math.nan] * 5)]
    assert locks == pytest.approx([1, 1, 0.5, 0, 0])


def test_panic_brake():
    scales = [scale for _, scale in play(load("panic_brake").policy, [4.0, 2.0, 1.0], [0.1, 0.4, 0.2])]
    assert scales == pytest.approx([5.0, 1 + 4 * math.exp(-0.5 * 2), 5.0])


def test_early_then_release():
    policy = load("early_then_release").policy
    locks = [lock for lock, _ in play(policy, [80, 20, 4, 2, 1], [0.0, 0.1, 0.75, 2.0, 0.25])]
    assert locks == [1, 1, 0.75, 0.75, 0.25]


def refuse(x, sigma):
    raise AssertionError("this estimator must not evaluate the model")


def feed(estimator, sigmas, predictions):
    state, out = estimator.init(), []
    for sigma, prediction in zip(sigmas, predictions, strict=True):
        state, variance = estimator.step(state, Evaluation(sigma, prediction, prediction, None, refuse))
        out.append(variance)
    return out


def test_a_line_in_log_sigma_is_no_disagreement():
    estimator = load("solver_disagreement").estimator
    sigmas = [8.0, 5.0, 2.0, 1.5, 0.3]
    out = feed(estimator, sigmas, [torch.full((2, 4), 3 - 2 * math.log(s)) for s in sigmas])
    assert out[:2] == [None, None]
    assert all(float(v.max()) < 1e-10 for v in out[2:])
    bent = feed(estimator, [4.0, 2.0, 1.0], [torch.full((1, 1), v) for v in (0.0, 1.0, 5.0)])
    assert float(bent[2]) == pytest.approx(9.0)  # 5 against 2 expected, at sigma 1


def test_the_gap_is_that_of_velocities():
    estimator = load("guidance_gap").estimator
    x, uncond = torch.full((1, 4), 7.0), torch.full((1, 4), 1.0)
    evaluation = Evaluation(2.0, x, torch.full((1, 4), 2.0), None, refuse, uncond)
    assert float(estimator.step(None, evaluation)[1]) == pytest.approx(0.5625)  # (7 - D) / 2 - D: 2 and 0.5
    assert estimator.step(None, evaluation._replace(uncond=None)) == (None, None)
    assert not estimator.step(None, evaluation._replace(uncond=evaluation.denoised))[1].any()
