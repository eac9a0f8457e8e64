"""A locked model in ComfyUI's own sampling: everything off is bit-identical, and a lock gives the library's result."""

from __future__ import annotations

import os
import warnings

import comfy.model_management
import comfy.samplers
import nodes
import pytest
import torch
from conftest import CHANNELS, FRAMES, SIDE, box, latents, made_by, sample, text, wan

import kvlock_sampling as kv
from kvlock_sampling.integrations.comfyui import ComfyLock

SAMPLERS = ("euler", "dpmpp_2m", "uni_pc", "res_multistep", "dpmpp_2m_sde", "euler_ancestral", "heun")
EDITED = (..., slice(0, SIDE // 2), slice(0, SIDE // 2))


def locked(model, policy="full", *, source=None, mask=None, **given):
    """The lock and the locked model."""
    lock = ComfyLock(source or latents(), mask=box() if mask is None else mask, options={"policy": policy}, **given)
    return lock, lock.patch(model)


def background(samples, source=None):
    """The largest difference to the source outside the mask."""
    gap = (samples - (source or latents())["samples"]).abs()
    gap[EDITED] = 0
    return float(gap.max())


def foreground(samples, others):
    return float((samples - others)[EDITED].abs().max())


@pytest.fixture(scope="module")
def plain(model):
    return {name: sample(model, name) for name in SAMPLERS}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_off_is_bit_identical_and_a_lock_leaves_nothing_behind(model, plain, sampler):
    lock, patched = locked(model, "off")
    assert torch.equal(sample(patched, sampler), plain[sampler])
    assert len(lock.trace) == 0
    idle = kv.stateless(lambda obs: kv.Control(lock=0.0, composite=0.0))
    lock = ComfyLock(latents(), mask=box(), options={"policy": idle, "composite": 0.0})
    assert torch.equal(sample(lock.patch(model), sampler), plain[sampler])
    assert lock.trace.routes == {"unlocked": len(lock.trace)}
    lock, patched = locked(model, "full")
    assert foreground(sample(patched, sampler), plain[sampler]) > 0.1
    assert torch.equal(sample(model, sampler), plain[sampler])


class ByTheLibrary:
    """ComfyUI's network as the library's own denoiser, in flow form: the lock guides it and appends its own rows."""

    def __init__(self, network):
        self.model = network

    def add_noise(self, x0, noise, sigma):
        return sigma * noise + (1 - sigma) * x0

    def to_ve(self, sigma):
        return min(sigma / max(1 - sigma, 1e-9), 1e4)

    def __call__(self, x, sigma, cond):
        t = sigma.expand(len(x))
        v = self.model(x, t * 1000, context=cond, transformer_options={})
        return x - t.view(-1, 1, 1, 1, 1) * v


@pytest.mark.parametrize("negative", [text(6), text(6, 7)], ids=["as long", "shorter"])
@pytest.mark.parametrize("source_prompt", [None, text(9)])
@pytest.mark.parametrize("policy", ["full", "half", "release", "static"])
@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "res_multistep", "uni_pc", "dpmpp_2m_sde"])
def test_the_result_is_the_librarys_own(model, sampler, policy, source_prompt, negative):
    lock, patched = locked(model, policy, source_prompt=source_prompt)
    found = sample(patched, sampler, negative=negative)

    inner = model.model
    source = inner.process_latent_in(latents()["samples"])
    own = kv.KVLock(
        ByTheLibrary(inner.diffusion_model),
        source=source,
        mask=box(),
        policy=policy,
        source_args=None if source_prompt is None else {"cond": source_prompt[0][0]},
    )
    sigmas = comfy.samplers.KSampler(model, 4, "cpu", sampler, "simple").sigmas
    extra = {"cond": text(5)[0][0], "uncond": negative[0][0], "cond_scale": 4.0}

    class Guider:
        """What a sampler of ComfyUI needs of a guider."""

        inner_model, model_patcher, cfg = inner, model, 4.0

        def __call__(self, x, sigma, model_options=None, seed=None):
            return own(x, sigma, **extra)

    noise = torch.randn(source.shape, generator=torch.manual_seed(3))
    with own:
        expected = comfy.samplers.sampler_object(sampler).sample(
            Guider(), sigmas, {"seed": 3, "model_options": {}}, None, noise, source, None, True
        )
    expected = inner.process_latent_out(expected)
    if sampler == "uni_pc":  # it ends above noise level 0, where only the node composites the result
        expected, found = expected[EDITED], found[EDITED]
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    for mine, theirs in zip(lock.trace, own.trace, strict=True):
        torch.testing.assert_close(mine.lock, theirs.lock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("policy", ["full", "half", "fast", "paper", "default"])
def test_the_background_is_the_sources(model, sampler, policy):
    _, patched = locked(model, policy)
    if policy == "default":
        patched = locked(model, kv.Constant(lock=0.0, composite=1.0))[1]
    assert background(sample(patched, sampler)) <= 1e-5


def test_the_lock_takes_the_mask_of_the_latent_over(model):
    """A noise mask in the sampler's latent, or in the source's, gives the same result as a mask of the lock."""
    masked = {**latents(), "noise_mask": box().reshape(-1, 1, 8 * SIDE, 8 * SIDE)}
    expected = sample(locked(model)[1])
    for source, given, sampled in ((latents(), None, masked), (masked, None, latents()), (latents(), box(), masked)):
        lock = ComfyLock(source, mask=given, options={"policy": "full"})
        torch.testing.assert_close(sample(lock.patch(model), source=sampled), expected)
    with pytest.raises(kv.types.MaskError, match="there is no mask"):
        sample(ComfyLock(latents(), options={"policy": "full"}).patch(model))


def test_a_released_background_is_not_pasted_over(model):
    """The host's noise mask would paste the source over what a policy released."""
    masked = {**latents(), "noise_mask": box().reshape(-1, 1, 8 * SIDE, 8 * SIDE)}
    _, patched = locked(model, kv.Constant(lock=1.0, composite=0.0))
    assert background(sample(patched, source=masked)) > 0.01
    releases = kv.policy.ReleaseBelow(below=1e3, lock=0.0)
    for policy in (releases, kv.Windowed(releases, above=0.1)):
        lock, patched = locked(model, policy)
        assert background(sample(patched, source=masked)) > 0.01
        assert lock.released is not None


def test_off_leaves_the_hosts_noise_mask_alone(model):
    masked = {**latents(), "noise_mask": box().reshape(-1, 1, 8 * SIDE, 8 * SIDE)}
    assert torch.equal(sample(locked(model, "off")[1], source=masked), sample(model, source=masked))


def test_conditions_split_by_memory_change_nothing(model, monkeypatch):
    expected = {policy: sample(locked(model, policy)[1]) for policy in ("full", "half", "release")}
    none = lambda *asked: (0, 0) if True in asked else 0  # noqa: E731
    asked_of = type(model) if hasattr(model, "get_free_memory") else comfy.model_management
    monkeypatch.setattr(asked_of, "get_free_memory", none)
    for policy, result in expected.items():
        torch.testing.assert_close(sample(locked(model, policy)[1]), result, rtol=0, atol=1e-4)


def test_memory_is_planned_for_the_sources_rows(model, monkeypatch):
    asked = []
    plan = comfy.sampler_helpers.estimate_memory
    monkeypatch.setattr(
        comfy.sampler_helpers, "estimate_memory", lambda m, shape, conds: asked.append(shape) or plan(m, shape, conds)
    )
    sample(locked(model)[1])
    sample(model)
    assert [shape[0] for shape in asked] == [2, 1]


@pytest.mark.parametrize("length", [12, 7])
def test_a_source_prompt_of_another_length_goes_alone(model, length):
    lock, patched = locked(model, "half", source_prompt=text(9, length))
    assert background(sample(patched)) <= 1e-5
    assert lock.trace.routes == {"lockstep" if length == 12 else "source pass": 4}


@pytest.mark.parametrize("policy", ["off", "full", "half"])
def test_a_batch_of_two(model, policy):
    pair = latents(batch=2)
    _, patched = locked(model, policy, source=pair)
    found = sample(patched, source=pair)
    if policy == "off":
        assert torch.equal(found, sample(model, source=pair))
    else:
        assert background(found, pair) <= 1e-5
        one = {"samples": pair["samples"][:1]}
        alone = sample(locked(model, policy, source=one)[1], source=one)
        torch.testing.assert_close(found[:1], alone, rtol=0, atol=1e-3)


@pytest.mark.parametrize("policy", ["off", "full", "half", "release"])
def test_guidance_of_one(model, policy):
    lock, patched = locked(model, policy)
    found = sample(patched, cfg=1.0)
    if policy == "off":
        assert torch.equal(found, sample(model, cfg=1.0))
    else:
        assert lock.trace.steps[0].nfe == {"full": 2, "half": 2, "release": 3}[policy]


def test_a_policy_schedules_guidance(model):
    scales = []

    def spy(given):
        scales.append(float(given["cond_scale"]))
        return given["denoised"]

    patched = locked(model, kv.stateless(lambda obs: kv.Control(lock=0.0, cfg_scale=2 * obs.requested_cfg_scale)))[1]
    patched.set_model_sampler_post_cfg_function(spy)
    sample(patched, cfg=4.0)
    assert scales[-1] == 8.0


def test_guidance_per_clip(model):
    """Each clip of a batch has the guidance that its policy asks for."""
    pair = latents(batch=2)
    scale = torch.tensor([2.0, 6.0])
    policy = kv.stateless(lambda obs: kv.Control(lock=0.0, cfg_scale=scale.to(obs.risk)), uses_risk=False)
    found = sample(locked(model, policy, source=pair)[1], source=pair)
    for clip, cfg in enumerate((2.0, 6.0)):
        constant = kv.stateless(lambda obs, cfg=cfg: kv.Control(lock=0.0, cfg_scale=cfg), uses_risk=False)
        both = sample(locked(model, constant, source=pair)[1], source=pair)
        torch.testing.assert_close(found[clip], both[clip], rtol=0, atol=1e-4)


def windows(model, length=3, overlap=1):
    from comfy_extras.nodes_context_windows import WanContextWindowsManualNode

    return made_by(
        WanContextWindowsManualNode,
        model,
        context_length=4 * (length - 1) + 1,
        context_overlap=4 * overlap,
        context_schedule="standard_static",
        context_stride=1,
        closed_loop=False,
        fuse_method="pyramid",
        freenoise=False,
    )


@pytest.mark.parametrize("policy", ["off", "full", "half", "fast", "release"])
@pytest.mark.parametrize("lock_first", [True, False])
def test_context_windows(model, policy, lock_first):
    lock = ComfyLock(latents(frames=7), mask=box(7), options={"policy": policy})
    patched = windows(lock.patch(model)) if lock_first else lock.patch(windows(model))
    found, bare = sample(patched, frames=7), sample(windows(model), frames=7)
    assert not torch.equal(bare, sample(model, frames=7))  # the windows act
    if policy == "off":
        assert torch.equal(found, bare)
    else:
        assert foreground(found, bare) > 0.01
        if policy != "release":
            assert background(found, latents(frames=7)) <= 1e-5


def test_one_window_over_the_whole_clip_is_no_window(model):
    lock = ComfyLock(latents(), mask=box(), options={"policy": "half", "foreground": False})
    whole = sample(windows(lock.patch(model), length=FRAMES))
    torch.testing.assert_close(whole, sample(lock.patch(model)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("lock_first", [True, False])
def test_another_packs_override_is_called_in_every_layer(model, lock_first):
    calls = []

    def theirs(func, *args, **kwargs):
        calls.append(func)
        return func(*args, **kwargs)

    def overridden(patcher):
        clone = patcher.clone()
        clone.model_options["transformer_options"]["optimized_attention_override"] = theirs
        return clone

    lock, patched = locked(overridden(model) if not lock_first else model, "half")
    patched = overridden(patched) if lock_first else patched
    expected = sample(locked(model, "half")[1])
    assert torch.equal(sample(patched), expected)
    assert len(calls) >= 2 * 3 * len(lock.trace)  # self- and cross-attention of three blocks


def test_an_interrupt_leaves_nothing(model):
    before, count = sample(model), 0
    _, patched = locked(model, "half")

    def stop(given):
        nonlocal count
        count += 1
        if count == 2:
            raise comfy.model_management.InterruptProcessingException
        return given["denoised"]

    stopped = patched.clone()
    stopped.set_model_sampler_post_cfg_function(stop)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(stopped)
    assert torch.equal(sample(model), before)
    assert background(sample(patched)) <= 1e-5
    network = model.model.diffusion_model
    assert not any("forward" in vars(module) or module._forward_hooks for module in network.modules())


def test_a_lock_serves_any_number_of_runs(model):
    """ComfyUI serves a cached model again when only the seed changes."""
    _, patched = locked(model, "half")
    first = sample(patched, seed=3)
    other = sample(patched, seed=4)
    assert not torch.equal(first, other)
    assert background(other) <= 1e-5
    assert torch.equal(sample(patched, seed=3), first)


UNLOCKED = kv.policy.Release(below=1e3, lock=0.0)


@pytest.mark.parametrize("policy", ["full", "half", "release", kv.Constant(lock=0.0, composite=1.0), UNLOCKED], ids=str)
def test_two_stages_keep_their_background(model, policy):
    """As of Wan 2.2: two samplers, each with its own network, and the first one's noisy latent between them."""
    low = wan(num_layers=2)
    masked = {**latents(), "noise_mask": box().reshape(-1, 1, 8 * SIDE, 8 * SIDE)}

    def two(high, low):
        advanced = nodes.KSamplerAdvanced().sample
        common = (text(5), text(6))
        (half,) = advanced(high, "enable", 3, 6, 4.0, "euler", "simple", *common, masked, 0, 3, "enable")
        return advanced(low, "disable", 3, 6, 4.0, "euler", "simple", *common, half, 3, 1000, "disable")[0]["samples"]

    lock, high = locked(model, policy)
    second = lock.next_stage()
    found = two(high, second.patch(low))
    assert background(two(model, low)) > 1
    if policy not in ("release", UNLOCKED):
        assert background(found) <= 1e-5
    # Both stages on one network are one run.
    second = lock.next_stage()
    both = two(high, second.patch(model))
    whole = sample(high, steps=6, source=masked)
    torch.testing.assert_close(both, whole, rtol=0, atol=1e-3)


def test_a_second_stage_without_its_first(model):
    lock, _ = locked(model, "full")
    with pytest.raises(kv.types.SourceError, match="no run to continue"):
        sample(lock.next_stage().patch(model))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_loras_before_and_after(model, order):
    """A patch of the weights acts the same on either side of the lock."""
    name = "diffusion_model.blocks.0.self_attn.q.weight"
    change = torch.randn(64, 64, generator=torch.Generator().manual_seed(2)) * 0.1

    def lora(patcher):
        clone = patcher.clone()
        assert clone.add_patches({name: (change,)}, 1.0)
        return clone

    steps = (lora, lambda patcher: locked(patcher, "half")[1])
    patched = model
    for step in order:
        patched = steps[step](patched)
    found = sample(patched)
    assert background(found) <= 1e-5
    other = sample(locked(lora(model), "half")[1])
    torch.testing.assert_close(found, other, rtol=0, atol=1e-5)
    assert foreground(found, sample(locked(model, "half")[1])) > 1e-3


def test_another_guider(model):
    """SamplerCustomAdvanced with a guider of its own."""
    from comfy_extras.nodes_custom_sampler import BasicGuider, CFGGuider, DualCFGGuider

    def sampled(patched, node, *given):
        guider = made_by(node, patched, *given)
        sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 4)
        noise = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.manual_seed(3))
        return guider.sample(noise, latents()["samples"], comfy.samplers.sampler_object("euler"), sigmas, seed=3)

    for node, given in (
        (BasicGuider, (text(5),)),
        (CFGGuider, (text(5), text(6), 4.0)),
        (DualCFGGuider, (text(5), text(7), text(6), 4.0, 2.0, "regular")),
    ):
        bare = sampled(model, node, *given)
        assert torch.equal(sampled(locked(model, "off")[1], node, *given), bare)
        found = sampled(locked(model, "half")[1], node, *given)
        assert background(found) <= 1e-5
        assert foreground(found, bare) > 0.01


def test_wrong_inputs_are_one_clear_line(model):
    for given, message in (
        ({"source": latents(frames=4)}, "expected the same"),
        ({"mask": torch.zeros(1, 64, 64)}, "0 everywhere"),
        ({"mask": torch.ones(1, 64, 64)}, "1 everywhere"),
        ({"mask": box()[:10]}, "the mask has 10 frames; expected 17"),
        ({"policy": "nosuch"}, "nosuch"),
    ):
        options = {"source": latents(), "mask": box(), "policy": "full", **given}
        lock = ComfyLock(options["source"], mask=options["mask"], options={"policy": options["policy"]})
        with pytest.raises(kv.types.KVLockError, match=message) as error:
            sample(lock.patch(model), source=latents())
        assert "\n" not in str(error.value)
    with pytest.raises(kv.types.RunError, match="has a KV lock already"):
        locked(locked(model)[1])


def test_a_mask_of_another_height_and_width_is_resized(model):
    small = torch.zeros(1, 50, 50)
    small[:, :25, :25] = 1
    found = sample(locked(model, "full", mask=small)[1])
    assert background(found) <= 1e-5


def test_the_example_is_the_embedded_model():
    from kvlock_sampling.integrations.comfyui.example import PixelVAE, conditioning, example, model

    if not os.environ.get("KVLOCK_EMBEDDED"):
        pytest.skip("KVLOCK_EMBEDDED names no file of predictions; tests/test_comfyui.py makes it")
    known = torch.load(os.environ["KVLOCK_EMBEDDED"])
    text = torch.cat([conditioning(known["prompt"])[0][0]] * 2)
    found = model().model.diffusion_model(known["z"], known["t"] * 1000, context=text)
    torch.testing.assert_close(found, known["x0"], rtol=0, atol=1e-4)
    clip = example("glow", 3).clip
    torch.testing.assert_close(PixelVAE().decode(PixelVAE().encode(clip))[0], clip)


@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "res_multistep_cfg_pp", "ipndm", "er_sde", "lcm", "ddim"])
def test_further_samplers(model, sampler):
    bare = sample(model, sampler)
    assert torch.equal(sample(locked(model, "off")[1], sampler), bare)
    found = sample(locked(model, "half")[1], sampler)
    assert background(found) <= 1e-5
    assert foreground(found, bare) > 0.01


def test_two_locks_in_one_run(model):
    """A lock around the model and one around the sampler."""
    lock = ComfyLock(latents(), mask=box(), options={"policy": "full"})
    guider = comfy.samplers.CFGGuider(locked(model)[1])
    guider.set_conds(text(5), text(6))
    guider.set_cfg(4.0)
    sigmas = comfy.samplers.KSampler(model, 4, "cpu", "euler", "simple").sigmas
    noise = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.manual_seed(3))
    sampler = lock.around(comfy.samplers.sampler_object("euler"))
    with pytest.raises(kv.types.RunError, match="has a KV lock already"):
        guider.sample(noise, latents()["samples"], sampler, sigmas, seed=3)


def test_a_lazy_cache_skips_whole_steps_and_an_easy_cache_is_refused(model):
    extras = pytest.importorskip("comfy_extras.nodes_easycache")
    lazy = made_by(extras.LazyCacheNode, locked(model, "half")[1], 0.2, 0.15, 0.95, False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert background(sample(lazy, steps=8)) <= 1e-5
    easy = made_by(extras.EasyCacheNode, locked(model, "half")[1], 0.2, 0.15, 0.95, False)
    tea = locked(model, "half")[1].clone()  # another pack's, which keeps something for each prompt
    tea.model_options["transformer_options"]["teacache_device"] = torch.device("cpu")
    for patched, name in ((easy, "EasyCache"), (tea, "teacache_device")):
        with pytest.raises(kv.types.RunError, match=f"a step cache, {name}, .*expected LazyCache"):
            sample(patched, steps=8)


def told(cond, **more):
    return [[tensor, {**said, **more}] for tensor, said in cond]


@pytest.mark.parametrize("policy", ["full", "half", "release"])
@pytest.mark.parametrize("which", ["positive", "negative", "source_prompt"])
@pytest.mark.parametrize("span", [(0.0, 0.5), (0.5, 1.0)])
def test_a_condition_of_part_of_the_run_does_not_lose_the_lock(model, policy, which, span):
    part = told(text(5), start_percent=span[0], end_percent=span[1])
    if which == "positive":
        part = part + told(text(7))
    given = {"source_prompt": part if which == "source_prompt" else text(9)}
    lock, patched = locked(model, policy, **given)
    found = sample(patched, steps=8, **({} if which == "source_prompt" else {which: part}))
    assert all(step.fused_layers == 3 for step in lock.trace)
    if policy != "release":
        assert background(found) <= 1e-5


def test_a_condition_for_an_area_is_an_error_in_words(model):
    area = told(text(5), area=(4, 4, 0, 0), set_area_to_bounds=False) + text(7)
    with pytest.raises(kv.types.AttentionError, match="Use Conditioning"):
        sample(locked(model)[1], positive=area)


@pytest.mark.parametrize("policy", ["full", "fast", "half"])
def test_patches_of_other_packs_see_every_token(model, policy):
    lengths = set()

    def patch(given):
        lengths.add(given["img"].shape[1])
        return given

    clone = model.clone()
    clone.set_model_patch(patch, "double_block")
    assert background(sample(locked(clone, policy)[1])) <= 1e-5
    assert lengths <= {FRAMES * (SIDE // 2) ** 2}  # older versions call no such patch of Wan


def test_off_needs_nothing(model):
    """No mask, another clip, a reversed schedule, two stages: as without the lock."""
    lock = ComfyLock(latents(frames=3), options={"policy": "off"})
    assert torch.equal(sample(lock.patch(model)), sample(model))
    assert torch.equal(sample(lock.next_stage().patch(model)), sample(model))


def test_a_release_brings_its_estimator(model):
    alone = locked(model, kv.policy.Release())[0]
    found = sample(alone.patch(model))
    assert torch.isfinite(found).all()
    assert torch.isfinite(alone.trace.steps[-1].effect).all()
    options = {"policy": "release", "estimator": kv.variance.TrajectoryVariance()}
    wrong = ComfyLock(latents(), mask=box(), options=options)
    with pytest.raises(kv.types.PolicyError, match="expected the estimator divergence"):
        sample(wrong.patch(model))


def test_a_stage_that_no_run_explains(model):
    """Noise of another clip, or of a run that is forgotten, is not taken for the stage before."""
    lock, high = locked(model, "full")
    sample(high, seed=3)
    other = lock.next_stage()
    strange = {"samples": torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE) * 3}
    advanced = nodes.KSamplerAdvanced().sample
    late = (other.patch(model), "disable", 3, 6, 4.0, "euler", "simple", text(5), text(6), strange, 3, 1000, "disable")
    with pytest.raises(kv.types.SourceError, match="no run of the stage before explains"):
        advanced(*late)


def test_pixels_of_a_batch_are_pasted_clip_by_clip():
    from kvlock_sampling.integrations.comfyui.pixels import pasted

    frames, clips = 5, 2
    edited, original = torch.ones(frames * clips, 8, 8, 3), torch.zeros(frames * clips, 8, 8, 3)
    mask = torch.zeros(frames, 8, 8)
    mask[:, :2, :2] = 1
    released = torch.zeros(clips, 1, 2, 1, 1)
    released[1, 0, 1] = 1
    found = pasted(edited, original, mask, 0.0, released)
    assert found[: frames + 1].mean((1, 2, 3)).allclose(torch.full((frames + 1,), 4 / 64))
    assert (found[frames + 1 :] == 1).all()


def test_the_start_image_stays_beside_a_source_prompt(model):
    from kvlock_sampling.integrations.comfyui.host import _with_the_rest

    positive = [{"model_conds": {"c_crossattn": "new", "c_concat": "image"}}]
    positive[0]["model_conds"]["txt_byt5"] = "letters that the source does not have"
    found = _with_the_rest({"uuid": 1, "model_conds": {"c_crossattn": "old", "c_concat": "nothing"}}, positive)
    assert found == {"uuid": 1, "model_conds": {"c_crossattn": "old", "c_concat": "image"}}


def test_layers_are_numbers_and_ranges():
    from kvlock_sampling.integrations.comfyui import layer_indices

    assert layer_indices(" all ") is None
    assert layer_indices("0, 2-4") == [0, 2, 3, 4]
    for wrong in ("0-", "2-0", "a", "-1", "1,,2"):
        with pytest.raises(kv.types.AttentionError, match="numbers and ranges"):
            layer_indices(wrong)


def test_scheduled_guidance_without_a_negative_prompt_changes_nothing(model):
    """ComfyUI then gives zeros as the negative's prediction."""
    custom = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    noise = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 4)
    found = []
    for scale in (1.0, 2.0):
        policy = kv.Constant(lock=0.5, cfg_scale=scale)
        guider = made_by(custom.BasicGuider, locked(model, policy)[1], text(5))
        euler = comfy.samplers.sampler_object("euler")
        found.append(guider.sample(noise, latents()["samples"], euler, sigmas, seed=3))
    assert torch.equal(*found)


def test_a_further_call_that_skips_layers_is_not_the_sources_prediction(model):
    slg = pytest.importorskip("comfy_extras.nodes_slg")
    found = []
    for skipping in (False, True):
        lock, patched = locked(model, kv.policy.Release())
        if skipping:
            given = {"scale": 1e-6, "start_percent": 0.0, "end_percent": 1.0, "rescaling_scale": 0}
            patched = made_by(slg.SkipLayerGuidanceDiT, patched, double_layers="1", single_layers="", **given)
        sample(patched, steps=8)
        found.append(torch.stack([step.effect for step in lock.trace][1:]))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_mask_with_the_frames_of_a_clip_that_a_vae_cut(model):
    """80 frames of which ComfyUI's VAE took 77."""
    whole = torch.zeros(1 + 4 * (FRAMES - 1) + 3, 8 * SIDE, 8 * SIDE)
    whole[:, : 4 * SIDE, : 4 * SIDE] = 1
    found = [sample(locked(model, "half", mask=mask)[1]) for mask in (whole, whole[:-3])]
    assert torch.equal(*found)


def test_a_mask_of_another_aspect_is_resized(model):
    wide = {"samples": latents()["samples"].repeat(1, 1, 1, 1, 2)}
    mask = torch.zeros(1, 64, 64)
    mask[:, :, :16] = 1
    found = sample(locked(model, "half", source=wide, mask=mask)[1], source=wide)
    assert float((found - wide["samples"])[..., SIDE // 2 :].abs().max()) <= 1e-5


def test_the_mask_of_a_repeated_latent_and_one_source(model):
    both = {"samples": latents()["samples"].repeat(2, 1, 1, 1, 1)}
    both["noise_mask"] = box().reshape(1, 1, -1, 8 * SIDE, 8 * SIDE).repeat(2, 1, 1, 1, 1)
    lock = ComfyLock(latents(), options={"policy": "half"})
    found = sample(lock.patch(model), source=both)
    assert background(found, both) <= 1e-5


def test_a_second_stage_goes_on_with_the_latest_of_runs_alike(model):
    """With one seed, what two runs leave explains the same background; only one left off here."""

    def second(splits):
        masked = {**latents(), "noise_mask": box().reshape(-1, 1, 8 * SIDE, 8 * SIDE)}
        lock, high = locked(model, "sigmoid")
        advanced, common = nodes.KSamplerAdvanced().sample, (text(5), text(6))
        for split in splits:
            following = lock.next_stage()
            (half,) = advanced(high, "enable", 3, 8, 4.0, "euler", "simple", *common, masked, 0, split, "enable")
            low = following.patch(model)
            advanced(low, "disable", 3, 8, 4.0, "euler", "simple", *common, half, split, 1000, "disable")
        return torch.stack([step.lock for step in following.trace])

    assert torch.equal(second([5, 3]), second([3]))


@pytest.mark.parametrize("policy", ["half", "default"])
def test_reference_images_are_an_error_in_words(model, policy):
    told_more = [[tensor, {**said, "reference_latents": [latents()["samples"]]}] for tensor, said in text(5)]
    with pytest.raises(kv.types.RunError, match="reference images"):
        sample(locked(model, policy)[1], positive=told_more)


def test_guidance_of_one_leaves_the_negative_prompt_out(model):
    """As distilled models are sampled: its length then does not matter."""
    lock, patched = locked(model, "half")
    assert background(sample(patched, cfg=1.0, negative=text(6, 7))) <= 1e-5
    assert lock.trace.routes == {"lockstep": 4}
    scheduled = kv.Constant(lock=0.5, cfg_scale=2.0)
    with pytest.raises(kv.types.AttentionError, match="set cfg above 1"):
        sample(locked(model, scheduled)[1], cfg=1.0, negative=text(6, 7))


@pytest.mark.parametrize("kind", ["dual", "perpneg"])
@pytest.mark.parametrize("length", [12, 7])
@pytest.mark.parametrize("policy", ["half", "full"])
def test_guiders_with_a_third_prompt(model, kind, length, policy):
    """The same as with a pass of the source's own."""
    custom, perpneg = (pytest.importorskip(f"comfy_extras.nodes_{n}") for n in ("custom_sampler", "perpneg"))
    noise = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.manual_seed(3))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 4)
    found = []
    for batched in (None, False):
        lock = ComfyLock(latents(), mask=box(), options={"policy": policy, "batched": batched})
        if kind == "dual":
            guider = custom.Guider_DualCFG(lock.patch(model))
            guider.set_conds(text(5), text(7, length), text(6))
            guider.set_cfg(3.0, 2.0)
        else:
            guider = perpneg.Guider_PerpNeg(lock.patch(model))
            guider.set_conds(text(5), text(6), text(7, length))
            guider.set_cfg(3.0, 1.0)
        euler = comfy.samplers.sampler_object("euler")
        found.append(guider.sample(noise, latents()["samples"], euler, sigmas, seed=3))
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)


def test_the_second_prompt_of_a_guider_is_not_measured(model):
    custom = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 4)
    noise = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.manual_seed(3))
    effects = []
    for second in (text(7), text(9)):  # the latter is what the source shows
        lock, patched = locked(model, "release", source_prompt=text(9))
        guider = custom.Guider_DualCFG(patched)
        guider.set_conds(text(5), second, text(6))
        guider.set_cfg(4.0, 1.0)
        guider.sample(noise, latents()["samples"], comfy.samplers.sampler_object("euler"), sigmas, seed=3)
        effects.append(float(lock.trace.steps[1].effect.mean()))
    assert effects[1] > 0.5 * effects[0]


def test_a_guider_that_passes_by_the_hosts_wrappers_is_told(model):
    class Direct(comfy.samplers.CFGGuider):
        def __call__(self, *args, **kwargs):
            return self.predict_noise(*args, **kwargs)

    guider = Direct(locked(model, "half")[1])
    guider.set_conds(text(5), text(6))
    guider.set_cfg(4.0)
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 4)
    noise = torch.randn(1, CHANNELS, FRAMES, SIDE, SIDE, generator=torch.manual_seed(3))
    with pytest.raises(kv.types.RunError, match="Direct predicts without ComfyUI's own wrappers"):
        guider.sample(noise, latents()["samples"], comfy.samplers.sampler_object("euler"), sigmas, seed=3)


def test_a_rising_schedule_is_told_without_python(model):
    guider = comfy.samplers.CFGGuider(locked(model, "half")[1])
    guider.set_conds(text(5), text(6))
    sigmas = comfy.samplers.calculate_sigmas(model.model.model_sampling, "simple", 4).flip(0)
    with pytest.raises(kv.types.KVLockError, match="each below the one before") as raised:
        guider.sample(latents()["samples"], latents()["samples"], comfy.samplers.sampler_object("euler"), sigmas)
    assert "samplers." not in str(raised.value)


@pytest.mark.parametrize("more", [5, 9, 16, 20, 42])
def test_a_mask_of_another_clip_is_not_cut(model, more):
    mask = torch.zeros(1 + 4 * (FRAMES - 1) + more, 8 * SIDE, 8 * SIDE)
    mask[:, : 4 * SIDE, : 4 * SIDE] = 1
    with pytest.raises(kv.types.MaskError):
        sample(locked(model, "half", mask=mask)[1])


def edited(found, source):
    """Which latents of each clip and frame are not the source's, on the grid of tokens."""
    return (found - source["samples"]).abs().amax(1).unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2)) > 1e-4


def moving():
    mask = torch.zeros(4 * (FRAMES - 1) + 1, 8 * SIDE, 8 * SIDE)
    for t, frame in enumerate(mask):
        frame[:32, 2 * t : 2 * t + 16] = 1
    return mask


def test_each_clip_of_a_repeated_latent_has_its_mask(model):
    one = nodes.SetLatentNoiseMask().set_mask(latents(), moving())[0]
    two = nodes.RepeatLatentBatch().repeat(one, 2)[0]
    lock = ComfyLock(two, options={"policy": "half"})
    alone = ComfyLock(one, options={"policy": "half"})
    wanted = edited(sample(alone.patch(model), source=one), one)
    assert 0 < wanted.float().mean() < 0.5
    assert torch.equal(edited(sample(lock.patch(model), source=two), two), wanted.expand(2, -1, -1, -1))


def test_each_of_several_pictures_has_its_mask(model):
    pictures = latents(batch=2, frames=1)
    mask = torch.zeros(2, 8 * SIDE, 8 * SIDE)
    mask[0, : 4 * SIDE, : 4 * SIDE] = mask[1, 4 * SIDE :, 4 * SIDE :] = 1
    found = edited(sample(locked(model, "half", source=pictures, mask=mask)[1], source=pictures), pictures)[:, 0]
    half = SIDE // 4
    for clip, inside in enumerate((slice(0, half), slice(half, None))):
        assert found[clip, inside, inside].all()
        assert found[clip].sum() == half**2


def test_a_rule_of_guidance_that_measures_the_whole_gets_all_tokens(model):
    rescale = pytest.importorskip("comfy_extras.nodes_model_advanced").RescaleCFG
    zero = pytest.importorskip("comfy_extras.nodes_cfg").CFGZeroStar
    for node, given in ((rescale, (0.7,)), (zero, ())):
        lock, patched = locked(model, "full")
        sample(made_by(node, patched, *given))
        assert {step.computed for step in lock.trace} == {1.0}
    lock, patched = locked(model, "full")
    sample(patched)
    assert {step.computed for step in lock.trace} == {0.25}


def test_a_rule_of_guidance_has_one_scale_for_all_clips(model):
    rescale = pytest.importorskip("comfy_extras.nodes_model_advanced").RescaleCFG
    each = kv.stateless(lambda obs: kv.Control(lock=0.5, cfg_scale=torch.tensor([6.0, 3.0])))
    patched = locked(model, each, source=latents(batch=2))[1]
    sample(patched, batch=2)
    with pytest.raises(kv.types.RunError, match="one clip at a time"):
        sample(made_by(rescale, patched, 0.7), batch=2)


def test_a_start_image_is_not_kept_by_a_lock(model):
    start = torch.ones(1, 1, FRAMES, 1, 1)
    start[:, :, 0] = 0
    latent = {**latents(2), "noise_mask": start}
    sample(model, source=latent)
    with pytest.raises(kv.types.SourceError, match="keeps whole frames, such as a start image"):
        sample(locked(model, "half")[1], source=latent)
    sample(locked(model, "off")[1], source=latent)
    late = box()
    late[0] = 0  # an object that appears
    assert background(sample(locked(model, "half", mask=late)[1], source=latent), latents(2)) > 0


@pytest.mark.parametrize("frame", range(5, 9))
def test_an_object_that_is_seen_for_a_moment_is_no_start_image(model, frame):
    """ComfyUI thins the frames of the noise mask; the lock takes every frame of it."""
    mask = 0 * box()
    mask[frame, :32, :32] = 1
    masked = nodes.SetLatentNoiseMask().set_mask(latents(), mask)[0]
    lock = ComfyLock(masked, options={"policy": "half"})
    found = edited(sample(lock.patch(model), steps=2, source=masked), masked)
    assert found.any(-1).any(-1).tolist() == [[False, False, True, False, False]]


def test_the_sources_prompt_has_the_control_of_the_edit(model):
    from comfy.controlnet import ControlBase

    class Control(ControlBase):
        seen: list = []  # noqa: RUF012

        def get_control(self, x, t, cond, *_):
            self.seen.append(cond["c_crossattn"][:, 0, 0].tolist())
            return {"input": [], "middle": [], "output": []}

        def copy(self):
            return Control()

        def get_models(self):
            return []

        def inference_memory_requirements(self, dtype):
            return 0

        def pre_run(self, *_):
            pass

        cleanup = pre_run

    def controlled(words):
        return [[tensor, {**told, "control": Control(), "control_apply_to_uncond": False}] for tensor, told in words]

    lock = ComfyLock(latents(), mask=box(), source_prompt=text(9), kv_cache={"every": 1}, options={"policy": "full"})
    sample(lock.patch(model), steps=2, positive=controlled(text(5)), negative=controlled(text(6)))
    first = {float(text(seed)[0][0][0, 0, 0]) for seed in (5, 6, 9)}  # of the source in a pass of its own, too
    assert {value for seen in Control.seen for value in seen} == first
