"""Samplers: all of k-diffusion's are found, are bit-equal to it, and finding them leaves no trace."""

import functools
import importlib
import inspect
import math
import pickle
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

from kvlock_sampling import samplers
from kvlock_sampling.types import SamplerError

NAMES = ["dpm_2", "dpm_2_ancestral", "dpm_adaptive", "dpm_fast", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s_ancestral"]
NAMES += ["dpmpp_3m_sde", "dpmpp_sde", "euler", "euler_ancestral", "heun", "lms"]
RANDOM = [name for name in NAMES if "sde" in name or "ancestral" in name]
SIGMAS = torch.cat([torch.linspace(2.0, -2.0, 9).exp(), torch.zeros(1)])


def gaussian(x, sigma, mean=0.5):
    """Exact denoiser of data N(mean, 1)."""
    sigma = sigma.view(-1, *[1] * (x.ndim - 1))
    return (x + sigma**2 * mean) / (1 + sigma**2)


class Listening:
    def __init__(self):
        self.heard = []

    def __call__(self, x, sigma):
        return gaussian(x, sigma)

    def on_schedule(self, sigmas):
        self.heard.append(sigmas)


def start(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * SIGMAS[0]


def raw(name):
    return inspect.unwrap(samplers.get(name), stop=lambda f: f.__module__ != samplers.__name__)


def test_all_thirteen_are_there():
    assert samplers.names() == tuple(NAMES)
    assert set(NAMES) < set(dir(samplers))
    for name in NAMES:
        assert getattr(samplers, name) is samplers.get(name) is samplers.get(f"sample_{name}")
        assert pickle.loads(pickle.dumps(samplers.get(name))) is samplers.get(name)
    assert {"get_sigmas_karras", "get_sigmas_vp", "log_likelihood"} < set(dir(samplers))
    assert samplers.get_sigmas_karras(5, 0.1, 10.0).shape == (6,)


@pytest.mark.filterwarnings("ignore:Should have")  # torchsde's rounding, in k-diffusion's own default
@pytest.mark.parametrize("name", NAMES)
def test_same_signature_and_bit_equal_to_k_diffusion(name):
    ours, theirs = samplers.get(name), raw(name)
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert (ours.__doc__, ours.__name__) == (theirs.__doc__, theirs.__name__)
    schedule = {"dpm_fast": (0.1, 7.0, 8), "dpm_adaptive": (0.1, 7.0)}.get(name, (SIGMAS,))
    results = []
    for function in (ours, theirs):
        torch.manual_seed(3)
        results.append(function(gaussian, start(2, 3), *schedule, disable=True))
    assert results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.filterwarnings("ignore:Should have")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_listens_is_told_the_schedule(name):
    for call in (lambda f, m: f(m, start(1, 2), SIGMAS), lambda f, m: f(sigmas=SIGMAS, x=start(1, 2), model=m)):
        model = Listening()
        if samplers.is_ranged(name):
            samplers.get(name)(model, start(1, 2), 0.1, 7.0, **({"n": 4} if name == "dpm_fast" else {}), disable=True)
            assert model.heard == []
        else:
            call(samplers.get(name), model)
            assert len(model.heard) == 1
            assert model.heard[0] is SIGMAS


def test_errors_inside_on_schedule_are_not_swallowed():
    class Broken(Listening):
        def on_schedule(self, sigmas):
            raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        samplers.euler(Broken(), start(1, 2), SIGMAS)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'sigmas'"):
        samplers.euler(gaussian, start(1, 2))
    with pytest.raises(TypeError, match="nonsense"):
        samplers.euler(gaussian, start(1, 2), SIGMAS, nonsense=1)


# run


@pytest.mark.parametrize("name", NAMES)
def test_run_is_uniform_and_quiet(name, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = samplers.run(name, gaussian, start(2, 3), SIGMAS, seed=7)
    assert x.shape == (2, 3)
    assert x.isfinite().all()
    assert capfd.readouterr().err == ""
    before = torch.get_rng_state()
    again = samplers.run(samplers.get(name), gaussian, start(2, 3), SIGMAS, seed=7)
    assert torch.equal(x, again)
    if name in RANDOM:
        assert torch.equal(before, torch.get_rng_state())
        assert not torch.equal(x, samplers.run(name, gaussian, start(2, 3), SIGMAS, seed=8))


@pytest.mark.parametrize("name", RANDOM)
def test_one_seed_per_clip_makes_clips_independent(name):
    x = start(3, 4)
    batch = samplers.run(name, gaussian, x, SIGMAS, seed=[1, 2, 3])
    alone = samplers.run(name, gaussian, x[1:2], SIGMAS, seed=[2])
    assert torch.allclose(batch[1:2], alone, atol=1e-6)
    with pytest.raises(SamplerError, match="2 seeds for a batch of 3"):
        samplers.run(name, gaussian, x, SIGMAS, seed=[1, 2])


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_flow_schedules_make_no_rounding_warning(name):
    sigmas = samplers.flow_sigmas(20, shift=5.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = samplers.run(name, gaussian, start(1, 2) * sigmas[0], sigmas, seed=0)
    assert x.isfinite().all()


def test_ranged_samplers_end_at_0_as_all_others_do():
    """They stop at the last level above 0; one evaluation there predicts the clean x, as euler's last step does."""
    x, calls = start(2, 3), []

    def counting(x, sigma):
        calls.append(sigma[0].item())
        return gaussian(x, sigma)

    last = SIGMAS[-2].expand(2)
    got = samplers.run("dpm_fast", counting, x, SIGMAS)
    assert len(calls) == len(SIGMAS) - 1
    noisy = raw("dpm_fast")(gaussian, x, SIGMAS[-2].item(), SIGMAS[0].item(), 8, disable=True)
    assert torch.equal(got, gaussian(noisy, last))
    assert torch.equal(samplers.run("dpm_fast", gaussian, x, SIGMAS[:-1]), noisy)  # this schedule does not end in 0
    calls.clear()
    samplers.run(functools.partial(samplers.dpm_fast, n=4), counting, x, SIGMAS)
    assert len(calls) == 4 + 1
    got, info = samplers.run("dpm_adaptive", gaussian, x, SIGMAS, rtol=0.01, return_info=True)
    noisy = raw("dpm_adaptive")(gaussian, x, SIGMAS[-2].item(), SIGMAS[0].item(), rtol=0.01, disable=True)
    assert torch.equal(got, gaussian(noisy, last))
    assert info["n_accept"] > 0
    with pytest.raises(SamplerError, match="two non-zero noise levels"):
        samplers.run("dpm_adaptive", gaussian, x, torch.tensor([1.0, 0.0]))


def test_run_takes_any_callable_and_announces_once():
    model, seen = Listening(), {}

    def mine(model, x, sigmas, extra_args=None, noise_sampler=None):
        seen["noise"] = noise_sampler(sigmas[0], sigmas[1])
        return model(x, sigmas[:1].expand(len(x)))

    samplers.run(mine, model, start(2, 3), SIGMAS, seed=1)
    assert seen["noise"].shape == (2, 3)
    samplers.run(samplers.euler, model, start(2, 3), SIGMAS)
    assert len(model.heard) == 2
    assert samplers.is_ranged("dpm_fast")
    assert not samplers.is_ranged(mine)


def test_seeded_noise_is_not_the_noise_that_people_start_from():
    x = torch.zeros(2, 3)
    noise = samplers.gaussian_noise(x, 7)
    first, second = noise(1.0, 0.5), noise(0.5, 0.1)
    assert not torch.equal(first, torch.randn(2, 3, generator=torch.Generator().manual_seed(7)))
    assert not torch.equal(first, second)
    assert torch.equal(first, samplers.gaussian_noise(x, 7)(1.0, 0.5))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("dpm_adaptive", "dpm_fast")])
@pytest.mark.parametrize("kind", [list, np.float32])
def test_a_schedule_may_be_a_list_where_a_sampler_is_called_itself(name, kind):
    random = {"noise_sampler": lambda *_: torch.ones(2, 3)} if name in RANDOM else {}
    given = (SIGMAS, kind(SIGMAS.tolist()))
    runs = [samplers.get(name)(gaussian, start(2, 3), sigmas, disable=True, **random) for sigmas in given]
    assert torch.equal(*runs)


def test_a_sampler_of_ours_that_draws_nothing_is_not_tried(monkeypatch):
    """A trial rewinds torch's generator, also for other threads."""
    monkeypatch.setattr(samplers, "_tried", None)
    without = [name for name in NAMES if not samplers.seeding(name, 0)]
    assert without == ["dpm_2", "dpmpp_2m", "euler", "heun", "lms"]


def test_a_schedule_may_be_a_reversed_array():
    rising = np.ascontiguousarray(SIGMAS.numpy()[::-1])
    runs = [samplers.run("euler", gaussian, start(2, 3), sigmas) for sigmas in (rising[::-1], SIGMAS)]
    assert torch.equal(*runs)


def test_what_a_sampler_evaluates_does_not_depend_on_noise_and_draws_none():
    def churned(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return samplers.heun(model, x + 0 * torch.randn_like(x), sigmas, s_churn=5.0)

    before = torch.get_rng_state()
    for sampler in (churned, functools.partial(samplers.heun, s_churn=5.0)):
        levels = samplers.evaluated_sigmas(sampler, SIGMAS)
        assert len(levels) == 2 * (len(SIGMAS) - 1) - 1
    assert torch.equal(torch.get_rng_state(), before)


def test_samplers_of_few_or_other_arguments_are_tried_as_they_are():
    def bare(model, x, sigmas):
        return samplers.euler(model, x, sigmas)

    def reads(model, x, sigmas, **options):
        return samplers.euler(
            model, x, sigmas, extra_args={"cond": options.pop("extra_args")["cond"].clone()}, **options
        )

    for sampler in (bare, reads):
        assert samplers.seeding(sampler, 0) == {}
        assert samplers.evaluated_sigmas(sampler, SIGMAS) == samplers.evaluated_sigmas("euler", SIGMAS)


@pytest.mark.parametrize("name", ["heun", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "dpm_fast", "dpm_adaptive"])
def test_a_seed_is_given_to_what_takes_noise(name):
    takes = "noise_sampler" in inspect.signature(samplers.get(name)).parameters
    assert samplers.seeding(name, 3) == ({"seed": 3} if takes else {})
    if not samplers.is_ranged(name):
        wrapped = lambda *given, **named: samplers.get(name)(*given, **named)  # noqa: E731
        assert samplers.seeding(wrapped, 3) == samplers.seeding(name, 3)
        assert samplers.evaluated_sigmas(wrapped, SIGMAS.numpy()[::-1].copy()[::-1])


def test_run_takes_partials_of_ours():
    model = Listening()
    sampler = functools.partial(samplers.dpmpp_2m_sde, eta=0.5)
    x = samplers.run(sampler, model, start(2, 3), SIGMAS, seed=1)
    assert torch.equal(x, samplers.run("dpmpp_2m_sde", gaussian, start(2, 3), SIGMAS, seed=1, eta=0.5))
    assert len(model.heard) == 1
    churned = functools.partial(samplers.heun, s_churn=5.0)
    assert samplers.run(churned, model, start(2, 3), SIGMAS).isfinite().all()
    with pytest.raises(SamplerError, match=r"torch\.manual_seed"):
        samplers.run(churned, model, start(2, 3), SIGMAS, seed=1)
    mine = functools.partial(samplers.euler_ancestral, noise_sampler=lambda sigma, sigma_next: 0.0)
    runs = [samplers.run(mine, gaussian, start(2, 3), SIGMAS, seed=seed) for seed in (1, 2)]
    assert torch.equal(*runs)


def test_run_says_what_it_cannot_do():
    rising, repeated = [0.0, 1.0, 2.0], [3.0, 2.0, 2.0, 0.0]
    for levels in ([1.0], [[1.0, 1.0]] * 2, [math.inf, 1.0], [1.0, -1.0], [2.0, math.nan, 0.0], rising, repeated):
        for sampler in ("euler", "dpmpp_2m", "dpm_adaptive", lambda model, x, sigmas: x):
            with pytest.raises(SamplerError, match=r"no schedule; expected .*flow_sigmas") as raised:
                samplers.run(sampler, gaussian, start(1, 2), torch.tensor(levels))
    said = str(raised.value).rpartition("To invert a clip: ")[2].rstrip(".")
    given = {"samplers": samplers, "torch": torch, "model": gaussian, "x": start(1, 2)}
    assert eval(said, given | {"sigmas": [0.1, 1.0, 2.0]}).isfinite().all()
    with pytest.raises(SamplerError, match=r"torch\.manual_seed"):
        samplers.run("euler", gaussian, start(1, 2), SIGMAS, seed=1, s_churn=5.0)


def test_unknown_names():
    with pytest.raises(SamplerError, match=r"'dpmpp_2n'; did you mean 'dpmpp_2m'\? Known: dpm_2, .*lms"):
        samplers.get("dpmpp_2n")
    with pytest.raises(AttributeError, match="known: dpm_2"):
        _ = samplers.nope
    assert not hasattr(samplers, "nope")
    assert not hasattr(samplers, "__path__")


# schedules


def test_flow_sigmas():
    assert torch.allclose(samplers.flow_sigmas(4, t_max=0.8), torch.tensor([4.0, 1.5, 2 / 3, 0.25, 0.0]))
    for shift in (1.0, 3.0, 8.0):
        sigmas = samplers.flow_sigmas(30, shift=shift, dtype=torch.float64)
        t = sigmas / (1 + sigmas)
        u = t / (shift - (shift - 1) * t)
        assert sigmas.shape == (31,)
        assert sigmas[0] == pytest.approx(999)
        assert sigmas[-1] == 0
        assert (sigmas.diff() < 0).all()
        assert torch.allclose(u.diff(), u.diff()[:1])
    assert samplers.flow_sigmas(1)[0] == pytest.approx(999)


@pytest.mark.parametrize("wrong", [{"n": 0}, {"shift": 0.0}, {"t_max": 1.0}, {"t_max": 0.0}])
def test_flow_sigmas_refuses(wrong):
    with pytest.raises(SamplerError, match="expected"):
        samplers.flow_sigmas(**{"n": 10, **wrong})


# how k-diffusion is found


def fresh(code):
    """Run `code` in a new interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_fresh_process_where_import_k_diffusion_fails():
    out = fresh("""
import sys
for name in ("clip", "torchvision", "cleanfid", "skimage"):
    sys.modules[name] = None                       # what a broken machine looks like: importing any of them fails
from kvlock_sampling import samplers
import torch, torchsde, torchdiffeq, scipy.integrate, PIL.Image, safetensors, tqdm.auto
assert "kvlock_sampling._k_diffusion" not in sys.modules           # lazy
before = set(sys.modules)
samplers.euler, samplers.external()
new = {name for name in set(sys.modules) - before if name.split(".")[0] in ("torchvision", "k_diffusion")}
ours = {name for name in sys.modules if name.startswith("kvlock_sampling._k_diffusion")}
print(len(samplers.names()), len(new), len(ours))
try:
    import k_diffusion
except Exception as error:
    print(type(error).__name__)
print(samplers.run("heun", lambda x, s: 0 * x, torch.ones(1, 2), torch.tensor([1.0, 0.5, 0.0])).sum().item())
""")
    assert out[:3] == ["13", "0", "4"]  # the bare parent, utils, sampling, external
    assert out[-1] == "0.0"
    assert out[3].endswith("Error")


def test_fresh_process_where_the_user_imported_the_real_submodule():
    assert fresh("""
import sys, types, importlib.util
real = types.ModuleType("k_diffusion")
real.__path__ = list(importlib.util.find_spec("k_diffusion").submodule_search_locations)
sys.modules["k_diffusion"] = real
sys.modules["torchvision"] = types.ModuleType("torchvision")
sys.modules["torchvision.transforms"] = transforms = types.ModuleType("torchvision.transforms")
transforms.functional = types.ModuleType("functional")
import k_diffusion.sampling
from kvlock_sampling import samplers
print(samplers.dpmpp_2m.__wrapped__ is k_diffusion.sampling.sample_dpmpp_2m)
print(any(name.startswith("kvlock_sampling._k_diffusion") for name in sys.modules))
""") == ["True", "False"]


def test_without_k_diffusion_the_error_names_both_ways_out(monkeypatch):
    monkeypatch.setattr(samplers, "_SAMPLERS", {})
    hidden = {name: module for name, module in sys.modules.items() if name.startswith(samplers._PARENT)}
    for name in hidden:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "k_diffusion", None)
    for use in (samplers.names, samplers.external, lambda: samplers.euler, lambda: samplers.get("euler")):
        with pytest.raises(SamplerError, match=r"pip install k-diffusion .*sampler\(model, x, sigmas"):
            use()
    assert "run" in dir(samplers)
    assert samplers._PARENT not in sys.modules
    euler_step = samplers.run(lambda model, x, sigmas: model(x, sigmas[:1]), gaussian, start(1, 2), SIGMAS)
    assert euler_step.shape == (1, 2)


def test_a_missing_dependency_is_named_and_may_be_installed_then(monkeypatch):
    monkeypatch.setattr(samplers, "_SAMPLERS", {})
    for name in [name for name in sys.modules if name.startswith(samplers._PARENT)]:
        monkeypatch.delitem(sys.modules, name)
    installed = importlib.import_module("torchsde")
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(SamplerError, match=r"sampling\.py needs torchsde: pip install torchsde"):
        samplers.names()
    monkeypatch.setitem(sys.modules, "torchsde", installed)
    assert "dpmpp_2m_sde" in samplers.names()
    assert samplers.external().CompVisDenoiser


def test_threads_get_the_same_function(monkeypatch):
    monkeypatch.setattr(samplers, "_SAMPLERS", {})
    found = []
    threads = [threading.Thread(target=lambda: found.append(samplers.get("heun"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1
