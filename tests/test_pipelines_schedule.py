"""Schedulers of diffusers as noise levels: the scheduler's own, exactly, whatever the start."""

from __future__ import annotations

import itertools
from contextlib import suppress

import diffusers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_pipelines import tiny_pipeline

import kvlock_sampling as kv
from kvlock_sampling.integrations.diffusers import PipelineError
from kvlock_sampling.integrations.diffusers.schedule import (
    ddpm_sigmas,
    ddpm_time,
    flow_times,
    schedule_sigmas,
    sigmas_of,
)

SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0),
    "euler, karras": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0, use_karras_sigmas=True),
    "heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=5.0),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ),
}


def times(sigmas: torch.Tensor) -> torch.Tensor:
    return sigmas / (1 + sigmas)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 30])
def test_the_levels_are_the_schedulers(name, steps):
    pipe = tiny_pipeline("wan")
    pipe.scheduler = SCHEDULERS[name]()
    before = pipe.scheduler.timesteps.clone()
    sigmas = kv.from_pipeline(pipe).sigmas(steps)
    own = SCHEDULERS[name]()
    own.set_timesteps(steps)
    expected = torch.as_tensor(own.sigmas).unique().flip(0)
    expected = expected[expected > 0]
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == len(expected) + 1
    assert sigmas[-1] == 0
    torch.testing.assert_close(times(sigmas[1:-1]), expected[1:].float(), rtol=1e-5, atol=1e-6)
    assert float(times(sigmas[0])) == pytest.approx(min(float(expected[0]), 0.9999), abs=1e-6)
    assert torch.equal(pipe.scheduler.timesteps, before)  # the pipeline's own is left alone


def test_ltx_shifts_by_the_size_of_the_clip():
    pipe = tiny_pipeline("ltx")
    small, large = torch.zeros(1, 3, 9, 32, 32), torch.zeros(1, 3, 65, 256, 256)
    schedules = []
    for clip in (small, large):
        video = kv.from_pipeline(pipe).given(clip)
        tokens = ((clip.shape[2] - 1) // 8 + 1) * (clip.shape[3] // 32) * (clip.shape[4] // 32)
        own = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
        mu = diffusers.pipelines.ltx.pipeline_ltx.calculate_shift(tokens, 1024, 4096, 0.95, 2.05)
        own.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=mu)
        schedules.append(times(video.sigmas(4)))
        torch.testing.assert_close(schedules[-1][1:], own.sigmas[1:], rtol=1e-5, atol=1e-6)
    assert (schedules[1][1:3] > schedules[0][1:3]).all()


def test_cogvideox_starts_at_its_last_step_and_asks_for_whole_ones():
    pipe = tiny_pipeline("cogvideox")
    video = kv.from_pipeline(pipe)
    requested = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: requested.append(float(kwargs["timestep"][0])), with_kwargs=True
    )
    sigmas = video.sigmas(5)
    with torch.no_grad():
        kv.samplers.euler(
            video.denoiser, torch.randn(1, 4, 3, 8, 8) * sigmas[0], sigmas, extra_args={"cond": video.prompt("a")}
        )
    assert requested == pytest.approx([999, 799, 599, 399, 199], abs=1e-2)
    assert kv.from_pipeline(pipe, t_max=0.9).sigmas(5)[0] < sigmas[0]
    with pytest.raises(PipelineError, match="steps='5'"):
        video.sigmas("5")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["wan", "cogvideox", "hunyuan"])
@pytest.mark.parametrize("strength", [0.9, 0.5, 0.05])
def test_a_start_part_way_keeps_the_number_of_steps_and_the_spacing(name, strength):
    video = kv.from_pipeline(tiny_pipeline(name))
    part, whole = times(video.sigmas(10, strength)), times(video.sigmas(1000))
    assert len(part) == 11
    assert float(part[0]) == pytest.approx(strength, abs=1e-4)
    assert part[-1] == 0
    assert (part[1:] < part[:-1]).all()
    # Equal shares of the scheduler's own steps lie between its levels.
    counts = [int(((whole <= high) & (whole > low)).sum()) for high, low in itertools.pairwise(part)]
    assert max(counts) - min(counts) <= 2


@settings(max_examples=60, deadline=None)
@given(
    steps=st.integers(1, 120),
    strength=st.floats(0.01, 1.0),
    shift=st.floats(0.3, 30.0),
    t_max=st.floats(0.9, 0.9999),
)
def test_levels_always_fall_strictly_from_finite_to_zero(steps, strength, shift, t_max):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    sigmas = schedule_sigmas(lambda n: flow_times(scheduler, num_inference_steps=n), steps, strength, t_max)
    assert torch.isfinite(sigmas).all()
    assert (sigmas[1:] < sigmas[:-1]).all()
    assert sigmas[-1] == 0
    assert len(sigmas) == steps + 1


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (5, 0.0), (5, 1.5)])
def test_no_schedule_at_all_is_refused(steps, strength):
    with pytest.raises(PipelineError, match=rf"(steps={steps}|strength={strength}); expected a"):
        kv.from_pipeline(tiny_pipeline("wan")).sigmas(steps, strength)


def test_a_scheduler_that_needs_mu_is_refused_with_the_fix():
    pipe = tiny_pipeline("wan")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(PipelineError, match=r"(?s)mu.*kv\.from_pipeline\(pipe, shift=3\.0\)"):
        kv.from_pipeline(pipe).sigmas(4)


def test_the_training_steps_of_noise_levels_are_exact_at_whole_steps_and_clamped_outside():
    alphas = tiny_pipeline("cogvideox").scheduler.alphas_cumprod
    table = ddpm_sigmas(alphas)
    steps = torch.arange(1000)
    back = ddpm_time(table, table.float())
    torch.testing.assert_close(back, steps.float(), rtol=0, atol=2e-2)
    assert float(table[-1]) == pytest.approx(2 * float(((1 - alphas[998]) / alphas[998]).sqrt()), rel=1e-6)
    ends = ddpm_time(table, torch.tensor([0.0, 1e-9, 1e9]))
    assert ends.tolist() == [0.0, 0.0, 999.0]
    middle = ddpm_time(table, (table[500] * table[501]).sqrt()[None])
    assert float(middle) == pytest.approx(500.5, abs=1e-3)


def test_the_clock_of_a_ddpm_model_makes_no_float64_where_a_device_has_none():
    """A fake of such a device: operations on its tensors compute shapes and dtypes alone."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for made in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(made, torch.Tensor) and made.dtype == torch.float64:
                    assert made.device.type != "mps", f"{func} makes float64 there"
            return out

    table = ddpm_sigmas(torch.linspace(0.999, 0.001, 1000))
    with FakeTensorMode(allow_non_fake_inputs=True), NoFloat64():
        sigma = torch.empty(3, device="mps")
        time = ddpm_time(table, sigma)
        with pytest.raises(AssertionError, match="makes float64 there"):
            sigma.double()
        with suppress(DataDependentOutputException):  # which asks for a number
            ddpm_sigmas(torch.empty(1000, device="mps"))  # where `add_noise` of a scheduler leaves its table
        sigmas_of(torch.empty(3, device="mps"))
    assert (time.device.type, time.dtype, time.shape) == ("mps", torch.float32, (3,))
