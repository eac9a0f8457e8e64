"""edit_video on the embedded model: seeds, batches, pasting, start part-way, and bad input."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import pytest
import torch
from world.compare import Task, make_task

import kvlock_sampling as kv
from kvlock_sampling import samplers
from kvlock_sampling.app.edit import start_noise
from kvlock_sampling.tiny import TinyVideo, load, sample_edit
from kvlock_sampling.types import KVLockError, MaskError, PolicyError, SamplerError, SourceError

STEPS = 3


@pytest.fixture(scope="module")
def video():
    return load()


@pytest.fixture(scope="module")
def task() -> Task:
    return make_task([sample_edit(1, "reshape"), sample_edit(2, "recolour")])


@pytest.fixture
def edit(video, task):
    """edit_video of the first clip in few steps; keywords change anything."""

    def run(**change):
        arguments = {"clip": task.source[0], "mask": task.mask[0, 0], "prompt": task.prompts[0]}
        return kv.edit_video(**{**arguments, "model": video, "steps": STEPS, **change})

    return run


def test_an_edit_keeps_the_background_and_changes_the_rest(edit, task):
    result = edit(policy="half", source_prompt=task.source_prompts[0])
    assert result.pixels.shape == (1, 3, 8, 64, 64)
    assert result.pixels.abs().max() <= 1
    assert result.nfe == 3 * STEPS == result.trace.nfe
    assert result.seconds > 0
    assert float(result.background_psnr[0]) == float(result.ceiling_psnr[0]) == 100
    inside = task.mask[0].expand(3, -1, -1, -1) == 1
    assert (result.pixels[0] - task.source[0])[inside].abs().mean() > 0.1
    result.pixels.add_(1)  # ordinary tensors, not those of inference mode


@pytest.mark.parametrize("floats", [False, True])
def test_faint_values_of_a_mask_are_not_edited(edit, task, floats):
    painted = (task.mask[0, 0] * 255).byte()
    faint = painted.clone()
    faint[:, ::7, ::5] = faint[:, ::7, ::5].clamp(3, 255 if floats else 250)
    exact, noisy = (edit(policy="full", mask=mask / 255 if floats else mask) for mask in (painted, faint))
    assert torch.equal(exact.pixels, noisy.pixels)
    assert float(noisy.trace.steps[0].computed) < 0.5


def test_the_same_seed_gives_equal_pixels_and_another_does_not(edit):
    first = edit(policy="half", seed=5).pixels
    assert torch.equal(first, edit(policy="half", seed=5).pixels)
    assert not torch.equal(first, edit(policy="half", seed=6).pixels)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral", "dpmpp_sde"])
def test_the_same_seed_is_enough_whatever_the_global_generator_did(edit, sampler):
    torch.manual_seed(0)
    first = edit(sampler=sampler, seed=3).pixels
    torch.manual_seed(1)
    assert torch.equal(first, edit(sampler=sampler, seed=3).pixels)


@pytest.mark.parametrize("sampler", ["heun", "euler_ancestral"])
def test_a_clip_of_a_batch_equals_the_clip_alone_with_its_seed(video, task, sampler):
    options = {"model": video, "steps": STEPS, "policy": "threshold", "sampler": sampler}
    seeds = [7, 8]
    both = kv.edit_video(task.source, task.mask, task.prompts, seed=seeds, **options)
    assert both.background_psnr.shape == both.ceiling_psnr.shape == (2,)
    for i in range(2):
        alone = kv.edit_video(task.source[i], task.mask[i : i + 1], task.prompts[i], seed=[seeds[i]], **options)
        torch.testing.assert_close(both.pixels[i : i + 1], alone.pixels, rtol=0, atol=1e-4)
        assert alone.nfe == both.nfe


def test_start_noise_counts_up_from_an_int_seed():
    like = torch.zeros(3, 2, 4)
    assert torch.equal(start_noise(like, 5), start_noise(like, [5, 6, 7]))
    assert torch.equal(start_noise(like, 5)[1:], start_noise(like[:2], 6))
    with pytest.raises(SourceError, match="2 entries for 3 clips"):
        start_noise(like, [1, 2])


def test_a_low_strength_stays_near_the_clip(edit, task):
    def away(strength):
        return float((edit(strength=strength, composite=False).pixels[0] - task.source[0]).abs().mean())

    assert away(0.1) < away(0.6) < away(1.0)
    assert edit(strength=0.5).trace.steps[0].sigma == pytest.approx(1.0, rel=1e-3)  # t / (1 - t)


def test_a_policy_may_be_a_function_or_a_class_of_ones_own(edit):
    @kv.stateless(uses_risk=False)
    def early(obs):
        return kv.Control(lock=1.0 if obs.sigma > 3 else 0.0)

    trace = edit(policy=early).trace
    assert [bool(s.lock[0]) for s in trace] == [True, *(a.sigma > 3 for a in trace.steps[:-1])]

    @dataclass(frozen=True)
    class Counting(kv.Policy):
        def init(self):
            return 0

        def step(self, count, obs):
            return count + 1, kv.Control(lock=min(count / 2, 1.0))

    assert edit(policy=Counting()).trace.rows()[-1]["next_lock"] == 0.5  # the first evaluation cannot be measured


def test_a_sampler_may_be_any_callable(edit):
    def euler(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            denoised = model(x, sigma * x.new_ones(len(x)), **(extra_args or {}))
            x = x + (x - denoised) / sigma * (following - sigma)
            if callback is not None:
                callback({"i": i})
        return x

    steps: list[int] = []
    ours = edit(policy="half", sampler=euler, on_step=steps.append).pixels
    torch.testing.assert_close(ours, edit(policy="half", sampler="euler").pixels, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, edit(policy="half", sampler=samplers.euler).pixels, rtol=0, atol=1e-5)
    assert steps == list(range(STEPS))

    def documented(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return euler(model, x, sigmas, extra_args, callback, disable)

    plain = edit(policy="half", sampler="dpmpp_2m").pixels  # its wrapper takes anything, and it takes no noise
    assert torch.equal(edit(policy="half", sampler=lambda *a, **k: samplers.dpmpp_2m(*a, **k)).pixels, plain)
    for other in (documented, partial(euler), lambda *given, **named: euler(*given, **named)):
        assert torch.equal(edit(policy="half", sampler=other).pixels, ours)
    churned = edit(policy="half", sampler=partial(samplers.heun, s_churn=5.0)).pixels  # by torch's own generator
    assert churned.isfinite().all()


@pytest.mark.parametrize("sampler", ["dpm_fast", "dpm_adaptive"])
def test_samplers_of_a_range_end_nearly_clean(edit, sampler):
    result = edit(sampler=sampler, policy="half")
    assert float(result.background_psnr[0]) > 35


@pytest.mark.parametrize("feather", [0.0, 3.0])
def test_pasting_is_exact_outside_the_ramp(edit, task, feather):
    # Without compositing in latents every pixel outside the mask is the model's own: only pasting can restore it.
    result = edit(policy="half", feather=feather).pixels[0]
    outside = (kv.masks.feather(task.mask[:1, 0], feather) == 0)[0].expand_as(result)
    assert outside.any()
    assert torch.equal(result[outside], task.source[0][outside])
    bare = edit(policy="half", composite=False).pixels[0]
    assert not torch.equal(bare[outside], task.source[0][outside])
    inside = task.mask[0].expand_as(result) == 1
    assert torch.equal(result[inside], edit(policy="half", paste=False).pixels[0][inside])


def test_off_is_the_model_alone(edit, video, task):
    result = edit(policy="off", seed=4)
    sigmas = video.sigmas(STEPS)
    prompts = {"cond": video.prompt(task.prompts[0]), "uncond": video.prompt(""), "cond_scale": video.cfg_scale}
    with torch.inference_mode():
        x = start_noise(task.source[:1], 4) * sigmas[0]
        bare = samplers.dpmpp_2m(kv.CFGDenoiser(video.denoiser), x, sigmas, extra_args=prompts, disable=True)
    assert torch.equal(result.pixels, bare.clamp(-1, 1))


BAD = {
    "mask of another size": ({"mask": torch.eye(20)}, MaskError, "20 x 20.*masks.resize"),
    "mask of half the size": ({"mask": torch.eye(32)}, MaskError, r"32 x 32, the clip 64 x 64: .*\(8, 64, 64\)"),
    "mask of other frames": ({"mask": torch.ones(5, 64, 64)}, MaskError, "mask has 5 frames; expected 8"),
    "mask of colours": (
        {"mask": torch.eye(64).unsqueeze(-1).expand(-1, -1, 3).numpy()},
        MaskError,
        r"shape is \(64, 64, 3\).*from_diffusers\(mask\)",
    ),
    "nothing to edit": ({"mask": torch.zeros(64, 64)}, MaskError, "0 everywhere: nothing to edit"),
    "nothing to keep": ({"mask": torch.ones(64, 64)}, MaskError, "1 everywhere.*polarity"),
    "clip with NaN": ({"clip": torch.full((3, 8, 64, 64), float("nan"))}, SourceError, "NaN or inf"),
    "clip of another size": ({"clip": torch.zeros(3, 8, 48, 32)}, SourceError, r"read_clip\(path, frames=8"),
    "clip of other frames": ({"clip": torch.zeros(3, 5, 64, 64)}, SourceError, "this model edits"),
    "clip without frames": ({"clip": torch.zeros(3, 64, 64)}, SourceError, "this model edits"),
    "no clip": ({"clip": torch.zeros(0, 3, 8, 64, 64)}, SourceError, r"shape \(0, 3, 8, 64, 64\); this model edits"),
    "unknown word": ({"prompt": "a red ball, a squirrel"}, KVLockError, "cannot read 'squirrel'"),
    "too many prompts": ({"prompt": ["a red ball"] * 2}, SourceError, "prompt has 2 entries for 1 clips"),
    "too many seeds": ({"seed": [1, 2]}, SourceError, "2 entries for 1 clips"),
    "missing sampler": ({"sampler": "dpmpp_2n"}, SamplerError, "did you mean 'dpmpp_2m'"),
    "no steps": ({"steps": 0}, SamplerError, "steps=0; expected a whole number >= 1"),
    "endless steps": ({"steps": 10**8}, SamplerError, "steps=100000000; expected .* <= 10000"),
    "unknown policy": ({"policy": "steddy"}, PolicyError, "steady"),
    "policy of another shape": (
        {"policy": kv.stateless(lambda obs: kv.Control(lock=torch.zeros(2, 9)))},
        PolicyError,
        r"shape \(2, 9\)",
    ),
    "path of a clip": ({"clip": "clip.mp4"}, SourceError, r"path 'clip.mp4'.*read_clip\('clip.mp4'\)"),
    "no pixels": ({"clip": [0.0]}, SourceError, "clip is a list; expected pixels"),
    "bytes": ({"clip": torch.zeros(3, 8, 64, 64, dtype=torch.uint8).numpy()}, SourceError, r"torch.uint8.*127.5"),
    "a number": ({"clip": torch.tensor(1.0)}, SourceError, "this model edits"),
    "path of a mask": ({"mask": "mask.png"}, MaskError, r"path 'mask.png'.*read_mask\('mask.png'"),
    "prompt of no text": ({"prompt": 5}, SourceError, "prompt=5; expected a text"),
    "prompts of no text": ({"source_prompt": [5]}, SourceError, r"source_prompt=\[5\]; expected a text"),
    "half a step": ({"steps": 2.5}, SamplerError, "steps=2.5; expected"),
    "seed of no number": ({"seed": 1.5}, SourceError, "seed=1.5; expected a whole number"),
    "scale of no number": ({"cfg_scale": "7"}, KVLockError, "cfg_scale='7'; expected a finite number"),
    "strength of no number": ({"strength": "1"}, KVLockError, "strength='1'; expected a finite number > 0 and <= 1"),
    "noise of no tensor": ({"noise": 1.0}, SourceError, "noise=1.0; expected a tensor"),
    "model that is not there": ({"model": "no/such/folder"}, KVLockError, "no model at 'no/such/folder'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_the_fix(edit, name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=f"(?s){message}"):
        edit(**change)


@pytest.mark.parametrize("spoilt", [1, 2])
def test_a_decoder_that_overflows_is_named_before_the_run_where_it_can_be(edit, monkeypatch, spoilt):
    real, calls, steps = TinyVideo.decode, [], []

    def decode(self, latents):
        calls.append(len(latents))
        pixels = real(self, latents).clone()
        if len(calls) == spoilt:
            pixels[..., 3:5, :] = float("inf")
        return pixels

    monkeypatch.setattr(TinyVideo, "decode", decode)
    with pytest.raises(KVLockError, match=r"decoded \d+ of \d+ values as NaN or inf.*\n.*float32"):
        edit(on_step=steps.append)
    assert bool(steps) == (spoilt == 2)


@pytest.mark.parametrize("name", ["source", "source_args"])
def test_the_source_is_the_clip(edit, task, name):
    with pytest.raises(SourceError, match=f"^{name}= is made from clip and source_prompt"):
        edit(**{name: task.source})


@pytest.mark.parametrize("feather", [-1.0, float("nan"), "2"])
def test_a_feather_is_a_width(edit, feather):
    with pytest.raises(KVLockError, match=r"feather=.*expected a finite number >= 0"):
        edit(feather=feather)


def test_a_feather_without_pasting_is_told(edit):
    with pytest.warns(UserWarning, match="feather=4.0 without effect: with paste=False"):
        plain = edit(feather=4.0, paste=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(edit(paste=False).pixels, plain.pixels)


def test_a_judge_without_candidates_is_told(edit):
    with pytest.warns(UserWarning, match="judge= without effect") as told:
        edit(judge=lambda *given: 1 / 0, policy="half", steps=1)
    assert [w.filename for w in told if "judge" in str(w.message)] == [__file__]


def test_a_wrong_sampler_is_refused_before_the_clip_is_encoded(edit, video, monkeypatch):
    monkeypatch.setattr(TinyVideo, "encode", lambda *given: pytest.fail("encoded"))
    with pytest.raises(SamplerError, match="euler"):
        edit(sampler="eulr")
    with pytest.raises(SamplerError, match="steps=0"):
        edit(steps=0)


def test_a_seed_may_be_a_tensor(edit):
    made = edit(policy="half", seed=torch.tensor(3)).pixels
    assert torch.equal(made, edit(policy="half", seed=3).pixels)


def test_arrays_are_clips_too(edit, task):
    clip, mask = task.source[0].double().numpy(), task.mask[0, 0].numpy()
    flipped = edit(clip=clip[..., ::-1], mask=mask[..., ::-1])
    assert flipped.pixels.dtype == torch.float32
    assert torch.equal(flipped.pixels, edit(clip=task.source[0].flip(-1), mask=task.mask[0, 0].flip(-1)).pixels)


def test_a_model_without_attention_says_what_to_pass(edit, video):
    class Other:
        frames, size, cfg_scale = video.frames, video.size, 3.0
        encode, decode, prompt, sigmas = video.encode, video.decode, video.prompt, video.sigmas
        denoiser = staticmethod(lambda x, sigma, cond: x / (1 + sigma.view(-1, 1, 1, 1, 1)))

    with pytest.raises(KVLockError, match="sdpa_layers"):
        edit(model=Other(), policy="half")
    assert torch.isfinite(edit(model=Other(), policy="off").pixels).all()


def test_a_guidance_that_is_no_number_is_refused():
    clip = torch.zeros(3, 8, 64, 64)
    mask = torch.zeros(8, 64, 64)
    mask[:, 8:16, 8:16] = 1
    with pytest.raises(kv.KVLockError, match="cfg_scale=nan; expected a finite number"):
        kv.edit_video(clip, mask, "a red ball moving left", cfg_scale=float("nan"))


@pytest.mark.parametrize("sampler", ["euler", "euler_ancestral"])
def test_the_best_of_several_seeds_is_that_seed_alone(edit, task, sampler):
    options = {"sampler": sampler, "steps": 4, "policy": "release", "source_prompt": task.source_prompts[0], "seed": 5}
    found = edit(candidates=3, **options)
    assert found.candidates.shape == (3, *found.pixels.shape[1:])
    assert not found.candidates.is_inference()
    alone = edit(**{**options, "seed": found.seed})
    assert torch.equal(found.pixels, alone.pixels)
    assert alone.nfe < found.nfe < 3 * alone.nfe
    assert alone.candidates is None
    assert alone.seed == found.seed in (5, 6, 7)
    worst = edit(candidates=3, judge=lambda denoised, trace: -5.0 if len(trace) else 0.0, **options)
    assert worst.seed == 5  # the first of equals


def test_several_seeds_are_for_one_clip(video, task):
    with pytest.raises(SourceError, match="for 2 clips"):
        kv.edit_video(task.source, task.mask[:, 0], task.prompts, model=video, steps=2, candidates=2)
