"""Denoisers against a world with a known answer, and k-diffusion's samplers at their theoretical order on top of them.

The world is N(MU, diag S^2). Exact denoiser: D = (S^2 x + sigma^2 MU) / (S^2 + sigma^2). Exact solution of the sampling
ODE: x(sigma) = MU + (x_T - MU) sqrt((S^2 + sigma^2) / (S^2 + sigma_T^2)).
"""

import copy
import inspect
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import kvlock_sampling as kv
from kvlock_sampling import denoisers, samplers
from kvlock_sampling.denoisers import CFGDenoiser, DenoiserError, EpsDenoiser, FlowDenoiser, VDenoiser

MU = torch.tensor([0.7, -1.2, 0.3], dtype=torch.float64)
S = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
SIGMAS = [1e-3, 0.1, 1.0, 30.0, 999.0]
SIGMA_MAX, SIGMA_MIN = 10.0, 0.1


def column(value, x):
    return value.reshape(-1, *[1] * (x.ndim - 1)).to(x)


def exact(x, sigma):
    sigma = column(sigma, x)
    return (S.to(x) ** 2 * x + sigma**2 * MU.to(x)) / (S.to(x) ** 2 + sigma**2)


def velocity(z, t):
    """E[noise - x0 | z_t = z] for z_t = (1 - t) x0 + t noise: linear regression of jointly Gaussian variables."""
    t = column(t, z)
    gain = (t - (1 - t) * S.to(z) ** 2) / ((1 - t) ** 2 * S.to(z) ** 2 + t**2)
    return -MU.to(z) + gain * (z - (1 - t) * MU.to(z))


def clean(z, t):
    return z - column(t, z) * velocity(z, t)


def eps(z, angle):
    sigma = (column(angle, z) * math.pi / 2).tan()
    x = z * (1 + sigma**2) ** 0.5
    return (x - exact(x, sigma)) / sigma


def v(z, angle):
    sigma = (column(angle, z) * math.pi / 2).tan()
    x = z * (1 + sigma**2) ** 0.5
    return (eps(z, angle) - sigma * exact(x, sigma)) / (1 + sigma**2) ** 0.5


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


class Net(nn.Module):
    """A small module that records what it was called with."""

    config = "the config"

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), 0.5, dtype=dtype))

    def forward(self, z, t, **extra):
        self.seen = (z, t, extra)
        return z * self.weight


# the exact answers


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize(
    "model",
    [FlowDenoiser(velocity), FlowDenoiser(clean, prediction="x0"), EpsDenoiser(eps), VDenoiser(v)],
    ids=["flow velocity", "flow x0", "eps", "v"],
)
def test_the_exact_model_gives_the_exact_denoiser(model, sigma):
    x = MU + draw(5, 3) * (S**2 + sigma**2).sqrt()
    sigmas = torch.full((5,), sigma, dtype=torch.float64)
    expected = exact(x, sigmas)
    # An eps model pays sigma for its rounding (x - sigma * eps cancels), the others do not.
    assert torch.allclose(model(x, sigmas), expected, rtol=0, atol=1e-10)
    assert torch.equal(model(x, sigmas[0]), model(x, sigmas))


def test_every_clip_has_its_own_sigma_and_any_latent_shape():
    model = FlowDenoiser(velocity)
    x, sigma = draw(4, 2, 5, 3), torch.tensor([0.1, 1.0, 5.0, 900.0], dtype=torch.float64)
    together = model(x, sigma)
    assert torch.allclose(together, exact(x, sigma), atol=1e-12)
    assert torch.equal(together[2:3], model(x[2:3], sigma[2:3]))


def test_time_and_noise_level_are_inverse_to_machine_precision():
    sigma = torch.logspace(-4, 3, 50, dtype=torch.float64)
    t = FlowDenoiser.t_from_sigma(sigma)
    assert torch.allclose(FlowDenoiser.sigma_from_t(t), sigma, rtol=1e-12, atol=0)
    assert FlowDenoiser.t_from_sigma(3.0) == 0.75
    assert FlowDenoiser.sigma_from_t(0.75) == 3.0


def test_the_clock_is_variance_exploding():
    model = FlowDenoiser(velocity)
    x0, noise, sigma = draw(2, 4, 3), draw(2, 4, 3, seed=1), torch.tensor([0.5, 9.0])
    assert torch.equal(model.add_noise(x0, noise, sigma), x0 + sigma.view(2, 1, 1) * noise)
    assert torch.equal(model.add_noise(x0, noise, 2.0), x0 + 2.0 * noise)
    assert model.add_noise(x0.bfloat16(), noise.bfloat16(), sigma).dtype == torch.bfloat16
    assert model.to_ve(sigma) is sigma


# what the inner model sees


def test_inner_model_sees_flow_time_and_its_own_dtype():
    net = Net(torch.bfloat16)
    model = FlowDenoiser(net, time_scale=1000.0)
    x = draw(2, 4, 3, dtype=torch.float32)
    out = model(x, torch.tensor([1.0, 999.0]), cond="a prompt")
    z, t, extra = net.seen
    assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    assert z.dtype == torch.bfloat16
    assert torch.equal(z, (x * torch.tensor([0.5, 0.001]).view(2, 1, 1)).bfloat16())
    assert t.dtype == torch.float32  # 999 is not a bfloat16 number
    assert torch.allclose(t, torch.tensor([500.0, 999.0]))
    assert extra == {"cond": "a prompt"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [FlowDenoiser, EpsDenoiser, VDenoiser])
def test_shape_and_dtype_are_those_of_x(kind, dtype):
    for net in (Net(), Net(torch.bfloat16), lambda z, t: z):
        out = kind(net)(draw(2, 3).to(dtype), torch.tensor(0.5))
        assert (out.shape, out.dtype) == ((2, 3), dtype)


def test_model_dtype_and_call_are_the_users_choice():
    seen = []

    def call(model, z, t, cond):
        seen.append((z.dtype, t.dtype, cond))
        return (model(z, t),)[0]

    net = Net()
    FlowDenoiser(net, call=call, model_dtype=torch.float64)(draw(2, 3), torch.ones(2), cond=7)
    assert seen == [(torch.float64, torch.float64, 7)]


def test_a_bfloat16_model_costs_bfloat16_accuracy_and_no_more():
    x, sigma = draw(4, 3, dtype=torch.float32) * 10, torch.tensor([0.1, 1.0, 10.0, 100.0])
    rough = FlowDenoiser(velocity, model_dtype=torch.bfloat16)(x, sigma)
    assert (rough - exact(x, sigma)).abs().max() < 0.05 * exact(x, sigma).abs().max()


# being a good wrapper


def test_unknown_attributes_come_from_the_inner_model():
    net = Net()
    for wrapper in (FlowDenoiser(net), CFGDenoiser(FlowDenoiser(net))):
        assert wrapper.config == "the config"
        assert wrapper.weight is net.weight
        assert not hasattr(wrapper, "on_schedule")
        with pytest.raises(AttributeError, match="nonsense"):
            _ = wrapper.nonsense
    assert FlowDenoiser(net).inner_model is net
    assert list(FlowDenoiser(net).state_dict()) == ["inner_model.weight"]
    assert not hasattr(FlowDenoiser(velocity), "nonsense")


def test_copies_and_pickles():
    model = FlowDenoiser(Net(), time_scale=1000.0)
    x, sigma = draw(2, 3, dtype=torch.float32), torch.ones(2)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin) is FlowDenoiser
        assert twin.inner_model is not model.inner_model
        assert torch.equal(twin(x, sigma), model(x, sigma))
    assert pickle.loads(pickle.dumps(EpsDenoiser(eps))).time is denoisers.angle


def test_errors_name_the_way_out():
    with pytest.raises(DenoiserError, match=r"prediction='eps'.*EpsDenoiser"):
        FlowDenoiser(velocity, prediction="eps")
    with pytest.raises(DenoiserError, match=r"sigma has shape \(3,\); expected \(\) or \(batch,\) = \(2,\)"):
        FlowDenoiser(velocity)(draw(2, 3), torch.ones(3))
    with pytest.raises(DenoiserError, match=r"returned tuple.*FlowDenoiser\(model, call=lambda"):
        FlowDenoiser(lambda z, t: (z,))(draw(2, 3), torch.ones(2))
    with pytest.raises(DenoiserError, match=r"returned \(2, 6\); expected .* \(2, 3\)"):
        EpsDenoiser(lambda z, t: z.repeat(1, 2))(draw(2, 3), torch.ones(2))
    with pytest.raises(
        DenoiserError, match=r"model_dtype='bfloat16'; expected a dtype, e.g. model_dtype=torch.bfloat16"
    ):
        EpsDenoiser(velocity, model_dtype="bfloat16")
    with pytest.raises(DenoiserError, match=r"time_scale='1000'; expected a finite number"):
        FlowDenoiser(velocity, time_scale="1000")


def test_k_diffusions_own_wrappers_are_there_and_ours_agree():
    external = samplers.external()
    x, sigma = draw(4, 3), torch.tensor([0.05, 0.5, 3.0, 40.0], dtype=torch.float64)
    assert torch.allclose(VDenoiser(v)(x, sigma), external.VDenoiser(v)(x, sigma), atol=1e-13)
    alphas = torch.linspace(0.9999, 0.98, 1000, dtype=torch.float64).cumprod(0)
    discrete = external.DiscreteEpsDDPMDenoiser(lambda z, t: z * 0.3, alphas, quantize=False)
    ours = EpsDenoiser(lambda z, t: z * 0.3, time=discrete.sigma_to_t)
    assert torch.allclose(ours(x, sigma), discrete(x, sigma), atol=1e-13)


# classifier-free guidance


def test_cfg_is_the_reference_formula_in_one_call():
    calls = []

    def model(x, sigma, cond):
        calls.append((x.shape, sigma.tolist(), cond))
        return x + column(cond, x) * column(sigma, x)

    x, sigma = draw(2, 5, 3), torch.tensor([1.0, 2.0], dtype=torch.float64)
    uncond, cond = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 5.0])
    out = CFGDenoiser(model)(x, sigma, uncond=uncond, cond=cond, cond_scale=7.5)
    assert len(calls) == 1
    assert calls[0][0] == (4, 5, 3)
    assert calls[0][1] == [1, 2, 1, 2]
    assert calls[0][2].tolist() == [0, 1, 3, 5]
    expected = x + column((uncond + (cond - uncond) * 7.5) * sigma, x)
    assert torch.allclose(out, expected, atol=1e-12)
    empty, full = model(x, sigma, uncond), model(x, sigma, cond)
    assert torch.equal(out, empty + (full - empty) * 7.5)
    mixed = CFGDenoiser(model)(x, sigma, uncond, cond, torch.tensor([1.0, 7.5]))
    assert torch.equal(mixed[1], out[1])
    assert torch.allclose(mixed[0], model(x, sigma, cond)[0], atol=1e-12)


def test_guidance_around_a_lock_is_refused(setup):
    with pytest.raises(DenoiserError, match=r"given a KVLock.*\n.*Pass the lock to the sampler"):
        CFGDenoiser(kv.KVLock(setup.model, policy="off"))


def test_cfg_conditions_may_be_mappings_and_must_match():
    def model(x, sigma, cond):
        return x * column(cond["text"]["a"], x)

    x, ones = draw(2, 3), torch.ones(2)
    tree = {"text": {"a": ones}}
    assert torch.equal(CFGDenoiser(model)(x, torch.tensor(1.0), tree, tree, 3.0), x)
    with pytest.raises(DenoiserError, match=r"uncond is \(2, 3\), cond \(2, 4\).*the same shapes.*pad the shorter"):
        CFGDenoiser(model)(x, ones, torch.ones(2, 3), torch.ones(2, 4), 3.0)
    with pytest.raises(DenoiserError, match=r"uncond is {}, cond {'text': {'a': \(2,\)}}.*the same keys"):
        CFGDenoiser(model)(x, ones, {}, tree, 3.0)


def test_cfg_takes_one_row_for_all_clips_and_one_text_per_clip():
    def model(x, sigma, cond):
        return x * column(torch.tensor([float(text) for text in cond]), x)

    x, ones = draw(2, 3), torch.ones(2)
    texts = CFGDenoiser(model)(x, ones, ["1", "1"], ["2", "3"], 2.0)
    assert torch.equal(CFGDenoiser(model)(x, ones, ones[:1], torch.tensor([2.0, 3.0]), 2.0), texts)
    assert torch.allclose(texts, x * torch.tensor([[3.0], [5.0]]))


# samplers at their order

ORDER = {
    "euler": 1,
    "euler_ancestral": 1,
    "heun": 2,
    "dpm_2": 2,
    "dpm_2_ancestral": 2,
    "lms": 2,
    "dpm_fast": 2,
    "dpmpp_2m": 2,
    "dpmpp_2s_ancestral": 2,
    "dpmpp_sde": 2,
    "dpmpp_2m_sde": 2,
    "dpmpp_3m_sde": 2,
}


def ode_error(name, steps, **options):
    """Largest error against the exact ODE solution, from SIGMA_MAX to SIGMA_MIN in geometric steps, without noise."""
    parameters = inspect.signature(samplers.get(name)).parameters
    if "eta" in parameters:
        options |= {"eta": 0.0, "noise_sampler": lambda sigma, sigma_next: 0.0}
    start = MU + torch.tensor([[1.0, -1.0, 0.5], [-0.3, 2.0, 1.0]], dtype=torch.float64) * (S**2 + SIGMA_MAX**2).sqrt()
    # No final 0: there every sampler takes one Euler step, and all errors would look alike.
    sigmas = torch.linspace(math.log(SIGMA_MAX), math.log(SIGMA_MIN), steps + 1, dtype=torch.float64).exp()
    solution = MU + (start - MU) * ((S**2 + SIGMA_MIN**2) / (S**2 + SIGMA_MAX**2)).sqrt()
    return (samplers.run(name, FlowDenoiser(velocity), start, sigmas, **options) - solution).abs().max().item()


@pytest.mark.parametrize("name", ORDER)
def test_deterministic_samplers_converge_at_their_order(name):
    coarse, fine = ode_error(name, 48), ode_error(name, 96)
    order = math.log2(coarse / fine)
    assert order >= ORDER[name] - 0.4, f"{name}: errors {coarse:.2e} -> {fine:.2e}, order {order:.2f}"
    assert fine < (0.05 if ORDER[name] == 1 else 1e-3)


def test_dpm_adaptive_follows_its_tolerance():
    errors = [ode_error("dpm_adaptive", 48, rtol=tolerance, atol=tolerance) for tolerance in (1e-2, 1e-3, 1e-5)]
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-4


@pytest.mark.parametrize("name", [name for name in samplers.names() if "ancestral" in name or "sde" in name])
def test_stochastic_samplers_draw_from_the_world(name):
    """With their default eta. Standard errors: S / sqrt(n) of the mean, sqrt(2 / n) of the variance, relative.

    Tight enough to notice noise that is 5% too strong, which makes the variance 10% too large.
    """
    n, sigma_max = 10_000, 20.0
    steps = 400 if name == "euler_ancestral" else 50  # first order: a variance about 10 / steps too small
    sigmas = samplers.get_sigmas_karras(steps, 0.02, sigma_max).double()
    start = MU + draw(n, 3) * (S**2 + sigma_max**2).sqrt()
    x = samplers.run(name, FlowDenoiser(velocity), start, sigmas, seed=1)
    assert ((x.mean(0) - MU).abs() / S).max() < 4 / math.sqrt(n)
    assert (x.var(0) / S**2 - 1).abs().max() < 4 * math.sqrt(2 / n) + 0.01


def test_a_guidance_scale_for_each_clip_has_as_many_as_clips():
    x = torch.zeros(2, 4)
    guided = kv.CFGDenoiser(lambda x, sigma, cond: x + cond)
    with pytest.raises(DenoiserError, match="cond_scale has 3 values for 2 clips; pass 1 or 2"):
        guided(x, torch.tensor(1.0), torch.zeros(1, 4), torch.ones(1, 4), torch.tensor([1.0, 2.0, 3.0]))
    for scales in (torch.tensor([1.0, 3.0]), [1.0, 3.0], np.array([1.0, 3.0])):
        out = guided(x, torch.tensor(1.0), torch.zeros(1, 4), torch.ones(1, 4), scales)
        assert out[:, 0].tolist() == [1.0, 3.0]
