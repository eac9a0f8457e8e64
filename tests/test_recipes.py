"""Every recipe on the shelf is a complete policy that keeps the contract, and does what its first line says."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

from kvlock_sampling.testing import check_policy
from kvlock_sampling.types import Observation

RECIPES = sorted((Path(__file__).parent.parent / "policies" / "recipes").glob("*.py"))


def load(name):
    path = next(p for p in RECIPES if p.stem == name)
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def play(policy, sigmas, risks):
    state, controls = policy.init(), []
    for sigma, risk in zip(sigmas, risks, strict=True):
        risk = torch.tensor([risk])
        state, control = policy.step(state, Observation(sigma, risk, risk, risk * 0, torch.tensor([5.0])))
        controls.append((float(control.lock), float(control.cfg_scale)))
    return controls


@pytest.mark.parametrize("name", [p.stem for p in RECIPES])
def test_recipes_keep_the_contract(name):
    check_policy(load(name).policy)


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
