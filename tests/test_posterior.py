"""PosteriorVariance is unbiased: the exact value lies inside the 99% interval, for every method and precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from kvlock_sampling import FlowDenoiser
from kvlock_sampling.testing import GaussianDenoiser, MixtureDenoiser
from kvlock_sampling.types import EstimatorError, Evaluation, RunError
from kvlock_sampling.variance import PosteriorVariance, posterior

CLIPS, SIZE = 384, 64
T99 = 2.589  # two-sided 99% point of Student's t with 383 degrees of freedom


class Bfloat16(nn.Module):
    """A denoiser as a network in bfloat16 behind float32 latents: input and output are rounded."""

    def __init__(self, exact: nn.Module, prediction: str) -> None:
        super().__init__()

        def network(z, t):
            sigma = (t / (1 - t)).view(-1, 1).float()
            clean = exact(z.float() * (1 + sigma), sigma)
            out = clean if prediction == "x0" else (z.float() - clean) / t.view(-1, 1)
            return out.to(torch.bfloat16)

        self.model = FlowDenoiser(network, prediction, model_dtype=torch.bfloat16)

    def forward(self, x, sigma):
        return self.model(x, sigma)


def mixture(index):
    """One of 20 configurations: a denoiser, a batch of points drawn as x0 + sigma * noise, and the noise level."""
    g = torch.Generator().manual_seed(index)
    sigma, std = (0.05, 0.2, 0.5, 1.0, 3.0)[index % 5], (0.1, 0.3, 0.6)[index % 3]
    apart = (1.0, 2.0, 3.0, 4.0)[index % 4] * math.hypot(sigma, std)  # of the modes: this is where a gate is soft
    modes = 2 + index % 4
    means = 0.7 * torch.randn(SIZE, generator=g) + torch.randn(modes, SIZE, generator=g) * apart / (2 * SIZE) ** 0.5
    chosen = torch.randint(modes, (CLIPS,), generator=g)
    x = means[chosen] + math.hypot(sigma, std) * torch.randn(CLIPS, SIZE, generator=g)
    return MixtureDenoiser(means, std=std), x, sigma


def measure(estimator, model, x, sigma, mask=None):
    def probe(at, level):
        return model(at, torch.full((len(at),), level))

    return estimator.step(estimator.init(), Evaluation(sigma, x, probe(x, sigma), mask, probe))[1]


@pytest.fixture
def one_draw_per_clip(monkeypatch):
    """A probe of its own for each clip, so that the errors of a batch are independent."""
    draw = posterior.draw

    def apart(kind, passes, like, seed, count):
        draws = [draw(kind, passes, clip[None], index, count) for index, clip in enumerate(like)]
        return torch.stack(draws, 1).flatten(0, 1)

    monkeypatch.setattr(posterior, "draw", apart)


def models(index):
    exact, x, _ = mixture(index)
    return {
        "forward": (exact, x, PosteriorVariance(method="forward")),
        "float32": (exact, x, PosteriorVariance(method="finite")),
        "bf16 x0": (Bfloat16(exact, "x0"), x, PosteriorVariance(method="finite")),
        "bf16 velocity": (Bfloat16(exact, "velocity"), x, PosteriorVariance(method="finite")),
        "bf16 latents": (
            Bfloat16(exact, "velocity"),
            x.bfloat16(),
            PosteriorVariance(method="finite"),
        ),
    }


@pytest.mark.parametrize("kind", ["forward", "float32", "bf16 x0", "bf16 velocity", "bf16 latents"])
def test_the_exact_value_is_inside_the_99_percent_interval(kind, one_draw_per_clip):
    """20 mixtures, one probe per clip: errors of the clips have mean 0. One of 20 may fall outside by chance (18%)."""
    scores, biases = [], []
    for index in range(20):
        (model, x, estimator), sigma = models(index)[kind], mixture(index)[2]
        exact = mixture(index)[0].double().variance(x.double(), sigma).mean(1)
        errors = measure(estimator, model, x, sigma).double() - exact
        scores.append(float(errors.mean() / (errors.std() / CLIPS**0.5)))
        biases.append(float(errors.mean() / exact.mean()))
    outside = [s for s in scores if abs(s) > T99]
    assert len(outside) <= 1, (scores, biases)
    assert max(map(abs, scores)) < 4, (scores, biases)


@pytest.mark.parametrize("method", ["forward", "finite"])
def test_a_gaussian_needs_one_probe(method):
    """A diagonal Jacobian: every direction gives the exact trace; a mask selects its elements, a soft one weighs."""
    model, sigma = GaussianDenoiser(mean=0.5, std=torch.linspace(0.1, 2, 12).double()).double(), 0.7
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask in (None, torch.tensor([[1.0] * 5 + [0.0] * 7, [0.25] * 6 + [1.0] * 6]).double()):
        weight = torch.ones(2, 12) if mask is None else mask
        exact = (model.variance(sigma) * weight).sum(1) / weight.sum(1)
        torch.testing.assert_close(measure(PosteriorVariance(method=method), model, x, sigma, mask), exact)


def test_small_noise_on_bfloat16_latents_does_not_round_away():
    """sigma / 8 is far below the spacing of bfloat16 at 5; the step grows to what the latents can hold."""
    model, sigma = GaussianDenoiser(std=1.0), 0.01
    x = torch.full((1, 4096), 5.0).bfloat16() + torch.arange(4096).view(1, -1).bfloat16() / 2048
    variance = measure(PosteriorVariance(method="finite"), model, x, sigma)
    assert variance.dtype == torch.float32
    assert float(variance) == pytest.approx(float(model.variance(sigma)), rel=0.02)


def test_probes_average(one_draw_per_clip):
    model, x, sigma = mixture(2)
    exact = model.variance(x, sigma).mean(1)
    few, many = (measure(PosteriorVariance(passes=k), model, x, sigma) - exact for k in (1, 16))
    assert float(few.std() / many.std()) == pytest.approx(4, rel=0.25)


class NoForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 0.5


def test_auto_falls_back_once_and_remembers():
    calls = []

    def probe(x, sigma):
        calls.append(len(x))
        return NoForwardMode.apply(x)

    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    evaluation, estimator = Evaluation(0.5, x, x * 0.5, None, probe), PosteriorVariance(passes=2)
    state, variance = estimator.step(estimator.init(), evaluation)
    torch.testing.assert_close(variance, torch.full((2,), 0.125))
    assert state == (1, True)
    assert calls == [4, 4]  # the attempt and the differences
    assert estimator.step(state, evaluation)[0] == (2, True)
    assert calls == [4, 4, 4]
    with pytest.raises(EstimatorError, match=r"forward mode(.|\n)*method=\"finite\""):
        PosteriorVariance(method="forward").step(estimator.init(), evaluation)


def test_inference_mode_falls_back():
    x = torch.randn(1, 6, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        evaluation = Evaluation(0.5, x, x / 2, None, lambda x, s: x / 2)
        state, variance = PosteriorVariance().step((0, False), evaluation)
    assert state[1]
    assert float(variance) == pytest.approx(0.125, rel=1e-5)


def test_errors_of_the_run_are_not_mistaken_for_a_missing_derivative():
    def probe(x, sigma):
        raise RunError("no")

    x = torch.zeros(1, 2)
    with pytest.raises(RunError):
        PosteriorVariance().step((0, False), Evaluation(1.0, x, x, None, probe))


def test_a_negative_estimate_is_zero():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    for method in ("finite", "forward"):
        found = PosteriorVariance(method=method).step((0, False), Evaluation(1.0, x, -x, None, lambda x, s: -x))[1]
        assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"passes": 0}, "passes=1"),
        ({"method": "reverse"}, '"auto", "finite" or "forward"'),
        ({"step_size": 0.0}, "a finite number > 0"),
        ({"step_size": 0.1, "method": "forward"}, 'method="forward" takes none'),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(EstimatorError, match=words):
        PosteriorVariance(**settings)


def test_a_transformer_both_ways(setup):
    """Fused attention has no forward mode, so "auto" takes differences there; plain attention shows them right."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def probe(x, sigma):
        return setup.model(x, torch.full((len(x),), sigma), cond=setup.cond)

    x, sigma = setup.x / setup.sigmas[0] + setup.source, 1.0
    evaluation = Evaluation(sigma, x, probe(x, sigma), setup.mask, probe)
    state, differences = PosteriorVariance().step((0, False), evaluation)
    assert state[1]
    with sdpa_kernel(SDPBackend.MATH):
        state, exact = PosteriorVariance().step((0, False), evaluation)
    assert not state[1]
    torch.testing.assert_close(differences, exact, rtol=0.02, atol=0)
