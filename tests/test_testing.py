"""check_policy catches what breaks the contract and says so; the denoisers are exact."""

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from kvlock_sampling.policy import Constant, Policy, Smoothed, stateless
from kvlock_sampling.testing import GaussianDenoiser, MixtureDenoiser, check_policy
from kvlock_sampling.types import Control, Denoiser, PolicyError


def lock_by(rule, **settings):
    return stateless(**settings)(lambda obs: Control(lock=rule(obs)))


def guide_by(rule):
    return stateless(lambda obs: Control(0.0, rule(obs)))


@dataclass(frozen=True)
class Mutating(Policy):
    def step(self, state, obs):
        state = torch.zeros_like(obs.risk) if state is None else state
        state += obs.risk.clamp(0, 1)
        return state, Control(lock=state.clamp(0, 1).clone())


@dataclass(frozen=True)
class Forgetful(Policy):
    calls: list[int] = field(default_factory=list)

    def step(self, state, obs):
        self.calls.append(1)
        return state, Control(lock=1.0 / len(self.calls))


@dataclass
class Melting(Policy):
    def step(self, state, obs):
        return state, Control(lock=0.0)


class Bare(Melting):
    __repr__ = object.__repr__


@dataclass(frozen=True, repr=False)
class Shy(Policy):
    __repr__ = object.__repr__

    def step(self, state, obs):
        return state, Control(lock=0.0)


@dataclass(frozen=True)
class Positional(Policy):
    def step(self, state, obs):
        return Control(lock=0.0)


@dataclass(frozen=True)
class Clocked(Policy):
    """A slope without a guard: at the same sigma no time has passed."""

    def step(self, last, obs):
        slope = 0.0 * obs.risk if last is None else (obs.risk - last[1]) / math.log(last[0] / obs.sigma)
        return (obs.sigma, obs.risk), Control(lock=slope.clamp(0, 1))


@dataclass(frozen=True)
class Eager(Policy):
    """Reads, in start, what is not measured yet."""

    def start(self, obs):
        return Control(lock=obs.risk.clamp(0, 1))

    def step(self, state, obs):
        return state, Control(lock=0.0)


@dataclass(frozen=True)
class Boastful(Policy):
    may_lock = False

    def step(self, state, obs):
        return state, Control(lock=obs.risk.clamp(0, 1))


@dataclass(frozen=True)
class Counting(Policy):
    """Counts, in start, the steps of an unknown schedule."""

    def start(self, obs):
        return Control(lock=min(1.0, 1 / obs.steps_left))

    def step(self, state, obs):
        return state, Control(lock=0.0)


BROKEN: list[tuple[str, Any, str]] = [
    (
        "wrong shape",
        lock_by(lambda o: o.risk[:, None].expand(-1, 16).clamp(0, 1)),
        r"lock of shape \(3, 16\); expected",
    ),
    ("scalar over the batch", lock_by(lambda o: o.risk[:2].clamp(0, 1)), r"lock of shape \(2,\); expected"),
    (
        "wide guidance",
        guide_by(lambda o: o.requested_cfg_scale[:, None]),
        r"cfg_scale of shape \(3, 1\)",
    ),
    ("not a control", stateless(lambda o: (0.0, 1.0)), r"expected a Control"),
    ("out of range", lock_by(lambda o: o.risk), r"lock in \[.*expected \[0, 1\](.|\n)*Clamped\(policy(.|\n)*at sigma="),
    ("ever more", lock_by(lambda o: o.lock + 0.05), r"lock in \[.*1\.04\d*\]; expected \[0, 1\]"),
    ("negative", lock_by(lambda o: -0.1), r"lock in \[-0\.1, -0\.1\](.|\n)*at sigma=14\.6"),
    ("not a number", lock_by(lambda o: o.risk / o.risk * 0.5), r"expected finite numbers"),
    (
        "infinite guidance",
        guide_by(lambda o: o.requested_cfg_scale / o.risk),
        r"cfg_scale with NaN or inf(.|\n)*finite(.|\n)*risk=",
    ),
    ("batch-coupled", lock_by(lambda o: o.risk / (1 + o.risk.max())), r"a batch of 3(.|\n)*bit for bit"),
    ("random", lock_by(lambda o: torch.rand_like(o.risk)), r"two answers to one question"),
    ("hidden memory", Forgetful(), r"Forgetful\.step gave two answers(.|\n)*must be in the state"),
    ("state in place", Mutating(), r"Mutating\.step changed the state it was given"),
    ("observation in place", lock_by(lambda o: o.risk.clamp_(0, 1).clone()), r"changed the observation it was given"),
    ("other dtype", lock_by(lambda o: o.risk.clamp(0, 1).double()), r"lock as torch\.float64(.|\n)*obs\.risk"),
    ("not frozen", Melting(), r"Melting can be changed(.|\n)*@dataclass\(frozen=True\)"),
    ("not a dataclass", Bare(), r"Bare can be changed"),
    ("no repr", Shy(), r"does not show its settings; expected Shy\(\.\.\.\)"),
    ("no state", Positional(), r"return state, Control"),
    ("no time", Clocked(), r"expected finite numbers(.|\n)*second evaluation at the same sigma"),
    ("crash", lock_by(lambda o: o.rsik), r"AttributeError(.|\n)*risk of shape \(3,\)"),
    ("start reads risk", Eager(), r"Eager\.start returned lock with NaN(.|\n)*do not read them in start"),
    (
        "no measurement",
        lock_by(lambda o: o.risk.clamp(0, 1), uses_risk=False),
        r"start returned lock with(.|\n)*are NaN",
    ),
    (
        "no measurement, and no number of it",  # NaN is not above 1
        lock_by(lambda o: torch.where(o.risk > 1, 0.2, 0.8), uses_risk=False),
        r"reads risk, variance or effect(.|\n)*uses_risk be True",
    ),
    (
        "schedule unknown",
        lock_by(lambda o: 1.0 if o.steps_left > 3 else 0.0),
        r"TypeError(.|\n)*steps_left was None(.|\n)*obs\.sigma",
    ),
    ("schedule unknown at the start", Counting(), r"Counting\.start raised TypeError(.|\n)*steps_left was None"),
    ("compositing out of range", stateless(lambda o: Control(composite=1.0 + o.risk)), r"composite in \[1\..*\[0, 1\]"),
    ("compositing of a wrong type", stateless(lambda o: Control(composite="all")), r"composite of type str"),
    ("locks after all", Boastful(), r"may_lock is False; expected lock 0"),
]


@pytest.mark.parametrize(("policy", "words"), [b[1:] for b in BROKEN], ids=[b[0] for b in BROKEN])
def test_broken_policies_are_caught(policy, words):
    with pytest.raises(PolicyError, match=words):
        check_policy(policy)


def test_good_policies_pass():
    check_policy(lambda obs: Control(obs.risk.clamp(0, 1)), batch=1)
    check_policy(lock_by(lambda obs: min(obs.sigma, 1.0), uses_risk=False), batch=5, tokens=2)
    check_policy(lock_by(lambda obs: 1.0 if obs.steps_left is None or obs.steps_left > 3 else 0.0))
    check_policy(stateless(lambda obs: Control()))  # leaves every actuator as it is
    check_policy(guide_by(lambda obs: -obs.requested_cfg_scale))  # negative guidance may be meant
    check_policy(lock_by(lambda obs: (obs.risk > 1).float()))  # float32 is always welcome
    one = lock_by(lambda obs: torch.tensor(0.5))  # a number for all
    check_policy(one)
    check_policy(Smoothed(one, half_life=0.3), tokens=4)


def test_tokens_are_asked_for_only_where_wanted():
    per_clip = stateless(lambda o: Control(o.risk.clamp(0, 1), o.requested_cfg_scale * o.risk.clamp(0, 1)))
    check_policy(per_clip)
    with pytest.raises(PolicyError, match=r"risk of shape \(3, 4\)"):
        check_policy(per_clip, tokens=4)


# -- denoisers --------------------------------------------------------------------------------------------------------


def mixture(shape):
    return MixtureDenoiser(torch.stack([torch.full(shape, v) for v in (-1.0, 0.0, 1.0)]), std=0.1)


@pytest.mark.parametrize("make", [lambda shape: GaussianDenoiser(mean=0.5, std=0.8), mixture])
@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 4)])
def test_exact_denoisers_are_models_of_any_shape(make, shape):
    model = make(shape)
    assert isinstance(model, Denoiser)
    x = torch.randn(2, *shape)
    for sigma in (torch.tensor([0.5, 2.0]), torch.tensor(0.5), 0.5):
        assert model(x, sigma, cond="ignored").shape == x.shape
    assert model.double()(x.double(), torch.tensor([1.0, 1.0])).dtype == torch.float64
    alone = model(x.double()[:1], torch.tensor([0.5]))
    torch.testing.assert_close(model(x.double(), torch.tensor([0.5, 2.0]))[:1], alone)


def test_gaussian_agrees_with_its_formula_and_with_tweedie():
    model = GaussianDenoiser(mean=torch.tensor([1.0, -1.0]), std=0.5).double()
    x = torch.tensor([[0.3, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(model(x, 2.0), (0.25 * x + 4.0 * torch.tensor([[1.0, -1.0]])) / 4.25)
    slope = torch.autograd.functional.jacobian(lambda v: model(v, 2.0).sum(0), x).squeeze(1)
    torch.testing.assert_close(model.variance(2.0) * torch.eye(2, dtype=x.dtype), 4.0 * slope)  # Cov = sigma^2 dD/dx


def test_mixture_agrees_with_numerical_integration():
    model = MixtureDenoiser(torch.tensor([[-1.0], [2.0]]), std=0.3, weights=[1.0, 3.0]).double()
    x, sigma = torch.tensor([[0.4]], dtype=torch.float64), 0.9
    grid = torch.linspace(-6, 8, 200001, dtype=torch.float64)
    std = model.std
    prior = 0.25 * (-((grid + 1) ** 2) / (2 * std**2)).exp() + 0.75 * (-((grid - 2) ** 2) / (2 * std**2)).exp()
    weight = prior * (-((x[0] - grid) ** 2) / (2 * sigma**2)).exp()
    weight = weight / weight.sum()
    mean = (weight * grid).sum()
    torch.testing.assert_close(model(x, sigma)[0, 0], mean)
    torch.testing.assert_close(model.variance(x, sigma)[0, 0], (weight * (grid - mean) ** 2).sum())


def test_mixture_variance_is_tweedies():
    model = mixture((2, 2)).double()
    x, sigma = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.7
    jacobian = torch.autograd.functional.jacobian(lambda v: model(v, sigma).flatten(), x).reshape(4, 4)
    torch.testing.assert_close(model.variance(x, sigma).flatten(), sigma**2 * jacobian.diagonal())


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_a_risk_of_any_size_is_asked_of_any_batch(batch):
    with pytest.raises(PolicyError, match=r"returned a lock in \["):
        check_policy(lock_by(lambda o: 1.9 * o.risk), batch=batch)


@pytest.mark.parametrize("batch", [0, -1, 2.5, None])
def test_a_batch_is_a_whole_number_of_clips(batch):
    with pytest.raises(PolicyError, match=f"batch={batch}; expected a whole number >= 1"):
        check_policy(Constant(lock=0.5), batch=batch)
