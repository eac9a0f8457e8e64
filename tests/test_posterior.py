"""PosteriorVariance is unbiased: the exact value lies inside the 99% interval, in every precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from kvlock_sampling import FlowDenoiser
from kvlock_sampling.testing import GaussianDenoiser, MixtureDenoiser
from kvlock_sampling.types import EstimatorError, Evaluation
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
        "float32": (exact, x, PosteriorVariance()),
        "bf16 x0": (Bfloat16(exact, "x0"), x, PosteriorVariance()),
        "bf16 velocity": (Bfloat16(exact, "velocity"), x, PosteriorVariance()),
        "bf16 latents": (
            Bfloat16(exact, "velocity"),
            x.bfloat16(),
            PosteriorVariance(),
        ),
    }


@pytest.mark.parametrize("kind", ["float32", "bf16 x0", "bf16 velocity", "bf16 latents"])
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


def test_a_gaussian_needs_one_probe():
    """A diagonal Jacobian: every direction gives the exact trace; a mask selects its elements, a soft one weighs."""
    model, sigma = GaussianDenoiser(mean=0.5, std=torch.linspace(0.1, 2, 12).double()).double(), 0.7
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mask in (None, torch.tensor([[1.0] * 5 + [0.0] * 7, [0.25] * 6 + [1.0] * 6]).double()):
        weight = torch.ones(2, 12) if mask is None else mask
        exact = (model.variance(sigma) * weight).sum(1) / weight.sum(1)
        torch.testing.assert_close(measure(PosteriorVariance(), model, x, sigma, mask), exact)


def test_small_noise_on_bfloat16_latents_does_not_round_away():
    """sigma / 8 is far below the spacing of bfloat16 at 5; the step grows to what the latents can hold."""
    model, sigma = GaussianDenoiser(std=1.0), 0.01
    x = torch.full((1, 4096), 5.0).bfloat16() + torch.arange(4096).view(1, -1).bfloat16() / 2048
    variance = measure(PosteriorVariance(), model, x, sigma)
    assert variance.dtype == torch.float32
    assert float(variance) == pytest.approx(float(model.variance(sigma)), rel=0.02)


def test_probes_average(one_draw_per_clip):
    model, x, sigma = mixture(2)
    exact = model.variance(x, sigma).mean(1)
    few, many = (measure(PosteriorVariance(passes=k), model, x, sigma) - exact for k in (1, 16))
    assert float(few.std() / many.std()) == pytest.approx(4, rel=0.25)


def test_a_negative_estimate_is_zero():
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    found = PosteriorVariance().step(0, Evaluation(1.0, x, -x, None, lambda x, s: -x))[1]
    assert found.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"passes": 0}, "passes=1"),
        ({"step_size": 0.0}, "a finite number > 0"),
    ],
)
def test_settings_are_checked(settings, words):
    with pytest.raises(EstimatorError, match=words):
        PosteriorVariance(**settings)


def test_differences_come_near_the_derivative_of_a_transformer(setup):
    """Fused attention has no forward mode, so the exact derivative is taken with plain attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def probe(x, sigma):
        return setup.model(x, torch.full((len(x),), sigma), cond=setup.cond)

    x, sigma = setup.x / setup.sigmas[0] + setup.source, 1.0
    _, found = PosteriorVariance().step(0, Evaluation(sigma, x, probe(x, sigma), setup.mask, probe))
    v = posterior.draw("signs", 1, x, 0, 0) * setup.mask
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(probe(forward_ad.make_dual(x, v), sigma)).tangent
    weight = setup.mask.expand_as(x).flatten(1).sum(1)
    torch.testing.assert_close(found, sigma**2 * (v * tangent).flatten(1).sum(1) / weight, rtol=0.02, atol=0)
