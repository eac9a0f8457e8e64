"""The lock inside a classic pipeline: what the sampler gives, its own bits when off, nothing left behind."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from in_diffusers import (
    CALL,
    EDIT,
    MASK,
    POLICIES,
    SOURCE,
    START,
    by_sampler,
    check_same_trace,
    classic,
    euler_of,
    far_apart,
    in_another_thread,
    modular,
    noise,
    run,
)
from PIL import Image
from torch import Tensor
from toy_pipelines import tiny_pipeline

import kvlock_sampling as kv
from kvlock_sampling.integrations.diffusers import KVLockGuider, encode_clip, locked
from kvlock_sampling.policy import Clamped
from kvlock_sampling.types import MaskError, PipelineError, RunError, SourceError
from kvlock_sampling.utils.host import HostReads


@pytest.fixture(scope="module")
def pipe() -> Any:
    return classic()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("batched", [None, False])
def test_a_locked_pipeline_gives_what_the_sampler_gives(pipe: Any, policy: Any, batched: bool | None) -> None:
    wanted, trace = by_sampler(pipe, policy)
    with locked(pipe, **EDIT, policy=policy, batched=batched) as session:
        got = run(pipe)
    assert far_apart(got, wanted) < 2e-4
    assert far_apart(wanted, run(pipe)) > 0.1  # the lock did something
    check_same_trace(session.trace, trace, route=batched is None)


def test_estimators_that_ask_again_get_the_same_answers(pipe: Any) -> None:
    options = {"estimator": kv.variance.PosteriorVariance(), "policy": kv.Linear(), "threshold": 0.01}
    _, trace = by_sampler(pipe, **options)
    with locked(pipe, **EDIT, **options) as session:
        run(pipe)
    assert session.trace.nfe == trace.nfe > 3 * 5
    for ours, theirs in zip(session.trace.rows(), trace.rows(), strict=True):
        assert ours["variance"] == pytest.approx(theirs["variance"], rel=0.02, nan_ok=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_is_the_same_bits_in_a_classic_pipeline(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline("wan")  # with the scheduler it comes with, UniPC
    pipe.transformer.to(dtype)
    plain = run(pipe)
    with locked(pipe, policy=kv.Constant(lock=0.0)) as session:
        assert torch.equal(run(pipe), plain)
    assert len(session.trace) == 5
    assert session.trace.nfe == 10
    with locked(pipe, **EDIT, policy=kv.Constant(lock=0.0), composite=False):
        assert torch.equal(run(pipe), plain)


def test_off_is_the_same_bits_where_the_schedule_rises() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny_pipeline("wan")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, invert_sigmas=True)  # its first level is clean
    plain = run(pipe)
    with locked(pipe, policy="off"):
        assert torch.equal(run(pipe), plain)


def test_the_pipeline_is_what_it_was(pipe: Any) -> None:
    plain = run(pipe)
    inside, kind = dict(pipe.transformer.__dict__), type(pipe.transformer)
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in pipe.transformer.modules()
    ]
    with locked(pipe, **EDIT):
        run(pipe)
        with pytest.raises(RunError, match="under a lock already"), locked(pipe, **EDIT):
            pass

        def stop(*_: Any) -> Any:
            raise KeyError("stop")

        with pytest.raises(KeyError, match="stop"):
            run(pipe, callback_on_step_end=stop)
        run(pipe)  # a run that broke off does not confuse the next
    with pytest.raises(KeyError, match="stop"), locked(pipe, **EDIT):
        run(pipe, callback_on_step_end=stop)
    assert pipe.transformer.__dict__.keys() == inside.keys()
    assert type(pipe.transformer) is kind
    assert [
        (len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in pipe.transformer.modules()
    ] == hooks
    assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize("name", ["wan", "wan-ti2v", "wan-image", "wan-vace"])
def test_the_background_is_the_sources_and_the_layers_fire(name: str) -> None:
    from PIL import Image

    pipe = tiny_pipeline(name)
    more = {"image": Image.new("RGB", (64, 64), "blue")} if name == "wan-image" else {}
    with locked(pipe, **EDIT, policy=kv.Constant(lock=1.0), source_prompt="a circle") as session:
        got = run(pipe, **more)
    assert far_apart(got * (1 - MASK), SOURCE * (1 - MASK)) < 1e-5
    assert far_apart(got * MASK, SOURCE * MASK) > 0.1
    assert all(step.fused_layers >= 2 for step in session.trace)


def test_without_composite_the_background_is_the_models(pipe: Any) -> None:
    with locked(pipe, **EDIT, policy=kv.Constant(lock=1.0), composite=False):
        got = run(pipe)
    assert far_apart(got * (1 - MASK), SOURCE * (1 - MASK)) > 1e-2


def test_a_policys_weight_acts_without_a_lock_too(pipe: Any) -> None:
    """Also where the lock could change no more than the scale, and would give the pipeline its own bits."""
    plain = run(pipe)
    with locked(pipe, **EDIT, policy=kv.Constant(composite=0.0)):
        assert torch.equal(run(pipe), plain)
    with locked(pipe, **EDIT, policy=kv.Constant(lock=0.0), composite=0.5):
        wanted = run(pipe)
    weights = (0.5, torch.tensor([0.5]))
    for policy in (kv.Constant(composite=0.5), *(Clamped(by(w), lock=(0.0, 0.0)) for w in weights)):
        with locked(pipe, **EDIT, policy=policy) as session:
            assert far_apart(run(pipe), wanted) < 1e-4
        assert all(float(step.composite) == 0.5 for step in session.trace)
    assert far_apart(plain, wanted) > 0.1


def by(weight: Any) -> Any:
    return kv.stateless(lambda obs: kv.Control(0.0, None, weight), uses_risk=False)


def test_divergence_in_a_pipeline_is_the_samplers(pipe: Any) -> None:
    for policy in (kv.Linear(cfg_max=None), kv.Sigmoid(lock_range=(0.0, 0.0))):
        options = {"estimator": kv.variance.Divergence(patch=(1, 2, 2)), "policy": policy, "threshold": 0.5}
        _, trace = by_sampler(pipe, **options)
        with locked(pipe, **EDIT, **options) as session:
            run(pipe)
        assert session.trace.nfe == trace.nfe == 3 * 5
        check_same_trace(session.trace, trace, route=False)
        assert session.trace.rows()[-1]["effect"] > 0


def test_the_source_has_its_own_prompt(pipe: Any) -> None:
    results = []
    for prompt in (None, CALL["prompt"], "something else altogether"):
        with locked(pipe, **EDIT, policy=kv.Constant(lock=0.5), source_prompt=prompt):
            results.append(run(pipe))
    assert far_apart(results[0], results[1]) < 1e-5
    assert far_apart(results[1], results[2]) > 1e-3


def test_the_policy_sets_the_scale_whatever_the_pipeline_was_called_with(pipe: Any) -> None:
    wanted = run(pipe, guidance_scale=2.0)
    policy = kv.Constant(lock=0.0, cfg_scale=2.0)
    for requested in (1.5, 4.0, 9.0):
        with locked(pipe, policy=policy) as session:
            got = run(pipe, guidance_scale=requested)
        assert far_apart(got, wanted) < 1e-4
        assert all(float(step.cfg_scale) == 2.0 for step in session.trace)
    guider = KVLockGuider(9.0, policy=policy, scheduler=pipe.scheduler)
    assert far_apart(modular(pipe, guider=guider)(), wanted) < 1e-4


def test_a_scale_of_one_costs_no_unconditional_pass(pipe: Any) -> None:
    with locked(pipe, policy=kv.Constant(lock=0.0, cfg_scale=1.0)) as session:
        got = run(pipe)
    assert session.trace.nfe == 5
    assert far_apart(got, run(pipe, guidance_scale=1.0)) < 1e-5


def test_a_pipeline_without_guidance_is_locked_too(pipe: Any) -> None:
    with locked(pipe, **EDIT, policy=kv.Constant(lock=1.0)) as session:
        got = run(pipe, guidance_scale=1.0)
    assert session.trace.nfe == 10  # the edit and the source
    assert far_apart(got * (1 - MASK), SOURCE * (1 - MASK)) < 1e-5


def test_every_call_of_the_pipeline_is_a_run(pipe: Any) -> None:
    with locked(pipe, **EDIT) as session:
        assert len(session.trace) == 0
        first = run(pipe)
        kept = session.trace
        run(pipe, latents=noise(7))
        assert session.trace is not kept
        again = run(pipe)
    assert torch.equal(first, again)
    assert len(kept) == len(session.trace) == 5


def test_in_bfloat16_the_background_is_the_sources_to_the_latents_rounding() -> None:
    pipe = tiny_pipeline("wan")
    pipe.transformer.to(torch.bfloat16)
    with locked(pipe, **EDIT, policy=kv.Constant(lock=1.0)):
        got = run(pipe)
    assert got.dtype == torch.float32
    assert far_apart(got * (1 - MASK), SOURCE * (1 - MASK)) < 2e-2
    pipe.text_encoder.to(torch.bfloat16)  # a modular pipeline computes in its dtype
    # A guider knows the latents themselves.
    guided = modular(pipe, guider=KVLockGuider(4.0, policy=kv.Constant(lock=1.0), **EDIT, scheduler=pipe.scheduler))()
    assert far_apart(guided * (1 - MASK), SOURCE * (1 - MASK)) < 1e-5


def test_a_video_to_video_pipeline_starts_part_way() -> None:
    from diffusers import WanVideoToVideoPipeline

    parts = tiny_pipeline("wan")
    names = ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    pipe = WanVideoToVideoPipeline(**{n: getattr(parts, n) for n in names})
    pipe.set_progress_bar_config(disable=True)
    clip = torch.rand(1, 3, 9, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    source = encode_clip(pipe.vae, clip)
    video = ((clip[0] + 1) / 2).permute(1, 2, 3, 0).numpy()
    with locked(pipe, source=source, mask=MASK, policy=kv.Constant(lock=1.0)) as session:
        got = pipe(
            video=list(video),
            prompt="a red square",
            height=64,
            width=64,
            num_inference_steps=6,
            strength=0.5,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames
    assert len(session.trace) == 3
    assert session.trace.steps[0].sigma < 20
    assert far_apart(got * (1 - MASK), source * (1 - MASK)) < 1e-4


def test_one_lock_spans_two_experts() -> None:
    """Boundary at t = 0.875: two steps above it, three below; what is measured begins anew there."""
    pipe = classic("wan-2.2")
    wanted, trace = by_sampler(pipe, "paper")
    with locked(pipe, **EDIT, policy="paper") as session:
        got = run(pipe)
    assert far_apart(got, wanted) < 2e-4
    known = [not bool(step.variance.isnan().any()) for step in session.trace]
    assert known == [not bool(step.variance.isnan().any()) for step in trace] == [False, True, False, True, True]
    assert all(step.fused_layers == 2 for step in session.trace if float(step.lock.max()) > 0)

    second = kv.Constant(lock=1.0)
    with locked(pipe, **EDIT, policy=second) as session:
        run(pipe, guidance_scale=4.0, guidance_scale_2=2.0)
    assert [float(step.cfg_scale) for step in session.trace] == [4, 4, 2, 2, 2]


def test_a_denoiser_of_a_pipeline_says_which_expert_it_asks() -> None:
    denoiser = kv.from_pipeline(classic("wan-2.2")).denoiser
    high, low = (denoiser.expert(torch.tensor([t / (1 - t)])) for t in (0.9, 0.8))
    assert high is denoiser.inner_model.transformer
    assert low is denoiser.inner_model.transformer_2


def test_pipelines_where_it_cannot_work_are_refused() -> None:
    with pytest.raises(kv.KVLockError, match=r"one batch(.|\n)*from_pipeline"), locked(tiny_pipeline("ltx")):
        pass
    with pytest.raises(kv.KVLockError, match="from_pipeline"), locked(tiny_pipeline("wan-image-ti2v")):
        pass
    parts = tiny_pipeline("wan")
    with pytest.raises(kv.KVLockError, match="KVLockGuider"), locked(modular(parts).pipe):  # type: ignore[attr-defined]
        pass
    with pytest.raises(SourceError, match=r"height=\.\.\."), locked(parts, **EDIT):
        run(parts, height=32, latents=None)
    with pytest.raises(kv.KVLockError, match="source_prompt="), locked(parts, **EDIT, source_args={"cond": 1}):
        pass
    both = {"source_prompt": "a", "source_embeds": noise(0, (1, 512, 32))}
    with pytest.raises(kv.KVLockError, match="pass one of them"), locked(parts, **EDIT, **both):
        pass


@pytest.mark.parametrize("name", ["wan", "wan-2.2"])
def test_a_kv_cache_saves_the_sources_passes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from kvlock_sampling.kv_cache import cache as module

    pipe, kv_cache = classic(name), kv.KVCache(format=None, every=1)
    made, keys = module.content_fingerprint, []
    monkeypatch.setattr(module, "content_fingerprint", lambda content: keys.append(made(content)) or keys[-1])
    options = {**EDIT, "policy": kv.Constant(lock=0.5), "source_prompt": "a circle", "noise": noise(9)}
    with locked(pipe, **options):
        wanted = run(pipe)
    for passes, experts in ((15, 1 + (name == "wan-2.2")), (10, 2 * (1 + (name == "wan-2.2")))):
        with locked(pipe, **options, kv_cache=kv_cache) as session:
            assert far_apart(run(pipe), wanted) < 1e-4
        assert session.trace.nfe == passes
        assert len(keys) == experts  # fingerprints are taken once per run and expert, not once per step
    guider = KVLockGuider(4.0, **{k: v for k, v in options.items() if k != "source_prompt"}, scheduler=pipe.scheduler)
    if name == "wan":
        sample = modular(pipe, guider=guider.edit(kv_cache=kv_cache))
        first, kept = sample(), guider.trace.nfe
        assert (kept, far_apart(first, sample()) < 1e-5, guider.trace.nfe) == (15, True, 10)


def test_a_kv_cache_serves_every_seed_and_no_other_argument() -> None:
    pipe, kv_cache = classic("wan-vace"), kv.KVCache(format=None, every=1)
    options = {**EDIT, "policy": kv.Constant(lock=0.5), "source_prompt": "a circle", "noise": noise(9)}
    for given, passes in (
        ({"conditioning_scale": 0.0}, 15),
        ({"conditioning_scale": 0.0, "latents": noise(77)}, 10),  # another seed
        ({"conditioning_scale": 5.0}, 15),
        ({"conditioning_scale": 0.0}, 10),
    ):
        with locked(pipe, **options):
            wanted = run(pipe, **given)
        with locked(pipe, **options, kv_cache=kv_cache) as session:
            assert far_apart(run(pipe, **given), wanted) < 1e-4
        assert session.trace.nfe == passes


@pytest.mark.parametrize("name", ["wan", "wan-2.2"])
def test_step_caches_go_on_beside_the_lock(name: str) -> None:
    from diffusers import FirstBlockCacheConfig

    pipe = classic(name, times=(0.97, 0.95, 0.9, 0.6, 0.5, 0.25))
    plain = run(pipe)
    for network in filter(None, (pipe.transformer, pipe.transformer_2)):
        network.enable_cache(FirstBlockCacheConfig(threshold=50.0))  # whatever comes, the second block is skipped
    cached = run(pipe)
    assert far_apart(cached, plain) > 0.1
    with locked(pipe, policy=kv.Constant(lock=0.0)):
        assert torch.equal(run(pipe), cached)
    for batched in (None, False):
        with locked(pipe, **EDIT, policy=kv.Constant(lock=0.5), batched=batched) as session:
            got = run(pipe)
        assert far_apart(got * (1 - MASK), SOURCE * (1 - MASK)) < 1e-5
        fired = [step.fused_layers for step in session.trace]
        # Every network computes its first step whole, and afterwards one block of two.
        assert fired == ([2, 1, 1, 1, 1, 1] if name == "wan" else [2, 1, 1, 2, 1, 1])
    assert torch.equal(run(pipe), cached)


def test_calls_that_are_not_the_pipelines_pass(pipe: Any) -> None:
    arguments = {
        "hidden_states": START,
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": noise(3, (1, 4, 32)),
        "return_dict": False,
    }
    with torch.no_grad():
        plain = pipe.transformer(**arguments)[0]

        def inside() -> None:
            with locked(pipe, **EDIT):
                assert torch.equal(pipe.transformer(**arguments)[0], plain)
                assert torch.equal(pipe.transformer(**arguments | {"return_dict": True}).sample, plain)

        with pytest.warns(UserWarning, match="pipeline was not called in the block of its lock") as seen:
            inside()
    assert seen[0].filename == __file__


def test_a_locked_pipeline_has_one_run_at_a_time_in_any_thread(pipe: Any) -> None:
    from diffusers import WanPipeline

    plain = run(pipe)
    twin = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, copy.deepcopy(pipe.scheduler), pipe.transformer)
    twin.scheduler = euler_of()
    twin.set_progress_bar_config(disable=True)
    with locked(pipe, **EDIT, policy="full"):
        wanted = run(pipe)
        assert torch.equal(in_another_thread(lambda: run(pipe)), wanted)
        others: list[Any] = []

        def meanwhile(*_: Any) -> dict[str, Any]:
            others.append(in_another_thread(lambda: run(pipe)))  # would take the scheduler and this run's state
            others.append(in_another_thread(lambda: run(twin)))  # another pipeline on the same transformer
            return {}

        assert torch.equal(run(pipe, callback_on_step_end=meanwhile), wanted)
        assert torch.equal(run(pipe), wanted)
    for refused, free in zip(others[::2], others[1::2], strict=True):
        assert isinstance(refused, RunError)
        assert "another thread or task" in str(refused)
        assert torch.equal(free, plain)
    assert len(others) == 2 * 5


def test_a_copy_of_a_locked_pipelines_transformer_is_not_locked(pipe: Any) -> None:
    copies: list[Any] = []
    kind = type(pipe.transformer)

    def copying(*_: Any) -> dict[str, Any]:
        copies.extend([copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))])
        return {}

    with locked(pipe, **EDIT, policy="full"):
        run(pipe, callback_on_step_end=copying)
        whole = copy.deepcopy(pipe)
    guider = KVLockGuider(4.0, **EDIT, policy="full", scheduler=pipe.scheduler)
    handle = pipe.transformer.blocks[1].register_forward_pre_hook(lambda *_: (handle.remove(), copying())[1] or None)
    modular(pipe, guider=guider)()
    assert len(copies) == 2 * 6
    assert type(whole) is type(pipe)
    copies.append(whole.transformer)
    arguments = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": noise(3, (1, 4, 32)), "return_dict": False}
    with torch.no_grad():
        wanted = pipe.transformer(START, **arguments)[0]
        for made in copies:
            assert {type(module) for module in made.modules()} == {
                type(module) for module in pipe.transformer.modules()
            }
            assert type(made) is kind
            assert torch.equal(made(START, **arguments)[0], wanted)
            made.proj_out.weight.mul_(2)
            assert not torch.equal(made(START, **arguments)[0], wanted)


def test_two_clips_are_two_edits() -> None:
    """A clip gives the same result alone and in a batch."""
    pipe = classic()
    starts, sources = torch.cat([noise(4), noise(5)]), torch.cat([noise(6), noise(7)])
    prompts = ["a red square", "a circle"]
    alone = []
    for i in range(2):
        with locked(pipe, source=sources[i : i + 1], mask=MASK, policy="paper"):
            alone.append(run(pipe, prompt=prompts[i : i + 1], latents=starts[i : i + 1].clone()))
    with locked(pipe, source=sources, mask=MASK, policy="paper"):
        both = run(pipe, prompt=prompts, latents=starts.clone())
    for one, part in itertools.zip_longest(alone, both.split(1)):
        assert far_apart(one, part) < 2e-4


def test_offloading_may_renew_its_hooks_between_two_calls() -> None:
    """As `enable_model_cpu_offload` does at the end of every call of a pipeline."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    pipe = classic()
    with locked(pipe, **EDIT) as session:
        without_hook = run(pipe)
    passes = session.trace.nfe
    plain = run(pipe)
    add_hook_to_module(pipe.transformer, ModelHook())
    with locked(pipe, **EDIT):
        wanted = run(pipe)  # blocks under hooks are not called one by one, so the source takes a pass before
    assert far_apart(wanted, without_hook) < 1e-4
    with locked(pipe, **EDIT) as session:
        for _ in range(3):
            assert torch.equal(run(pipe), wanted)
            assert session.trace.nfe == passes
            remove_hook_from_module(pipe.transformer)
            add_hook_to_module(pipe.transformer, ModelHook())
    assert torch.equal(run(pipe), plain)
    remove_hook_from_module(pipe.transformer)
    assert torch.equal(run(pipe), plain)
    assert (
        "forward" not in vars(pipe.transformer) or pipe.transformer.forward.__func__ is type(pipe.transformer).forward
    )


@pytest.mark.parametrize("inside", [True, False], ids=["transformer.compile()", "torch.compile(transformer)"])
def test_a_compiled_transformer_is_locked_and_is_compiled_again_afterwards(pipe: Any, inside: bool) -> None:
    plain, edit = run(pipe), {**EDIT, "policy": "full"}
    with locked(pipe, **edit):
        wanted = run(pipe)
    compiled = classic()
    if inside:
        compiled.transformer.compile(backend="eager")
    else:
        compiled.transformer = torch.compile(compiled.transformer, backend="eager")
    with locked(compiled, **edit) as session:
        assert far_apart(run(compiled), wanted) < 1e-5
    assert all(step.fused_layers == 2 for step in session.trace)
    assert torch.equal(run(compiled), plain)


@pytest.mark.parametrize("loop", ["classic", "modular"])
def test_the_last_prediction_is_checked_where_reading_it_waits_for_a_device(loop: str, monkeypatch) -> None:
    monkeypatch.setattr(HostReads, "free", staticmethod(lambda value: False))  # as on a GPU
    pipe, left = classic(), [10**6]
    forward = pipe.transformer.forward

    def spoilt(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return tuple(out if left[0] else out * float("nan") for out in forward(*args, **kwargs))

    pipe.transformer.forward = spoilt
    sample = modular(pipe, guider=KVLockGuider(4.0, **EDIT, policy="half"))

    def sampled() -> None:
        with locked(pipe, **EDIT, policy="half") if loop == "classic" else nullcontext():
            run(pipe) if loop == "classic" else sample()

    sampled()
    left[0] = 10**6 - left[0]  # the last call of the next run
    with pytest.raises(Exception, match=r"prediction at sigma=.* holds NaN"):
        sampled()
    assert left == [0]


def test_a_transformer_that_is_replaced_in_the_block_is_locked() -> None:
    pipe, edit = classic(), {**EDIT, "policy": "full"}
    with locked(pipe, **edit):
        wanted = run(pipe)
    with locked(pipe, **edit) as session:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
        assert far_apart(run(pipe), wanted) < 1e-5
    assert len(session.trace) == 5


def test_a_callback_does_not_change_the_guidance(pipe: Any) -> None:
    def callback(pipe: Any, step: int, time: Any, given: Any) -> Any:
        pipe._guidance_scale = 2.0
        return given

    with locked(pipe, **EDIT, policy="full") as session:
        wanted = run(pipe)
        assert torch.equal(run(pipe, callback_on_step_end=callback), wanted)
    assert [float(step.cfg_scale) for step in session.trace] == [4.0] * 5


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_off_has_the_second_experts_scale(scale: float) -> None:
    pipe = classic("wan-2.2")
    plain = run(pipe, guidance_scale_2=scale)
    with locked(pipe, policy="off"):
        assert far_apart(run(pipe, guidance_scale_2=scale), plain) < 1e-6  # at 1 the unconditional pass is left out


@pytest.mark.parametrize("kind", ["DEISMultistepScheduler", "SASolverScheduler"])
def test_schedulers_that_miss_the_clip_are_refused(kind: str) -> None:
    import diffusers

    pipe = classic(times=None)
    pipe.scheduler = getattr(diffusers, kind)(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(PipelineError, match="UniPCMultistepScheduler"), locked(pipe, **EDIT, policy="full"):
        pass
    torch.manual_seed(0)  # SASolver draws from the global generator
    plain = run(pipe)
    with locked(pipe, policy="off"):
        torch.manual_seed(0)
        assert torch.equal(run(pipe), plain)


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        ({"mask": MASK.new_zeros(17, 64, 64)}, MaskError, "17 frames; expected 9"),
        ({"mask": MASK.new_zeros(64, 64, 3)}, MaskError, "masks.from_diffusers"),
        ({"source": SOURCE[0]}, SourceError, r"\(16, 3, 8, 8\); expected latents \(batch or 1,"),
    ],
    ids=["length", "picture", "axes"],
)
def test_shapes_that_do_not_fit_the_pipeline_are_told(pipe: Any, edit: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message), locked(pipe, **{**EDIT, **edit}, policy="full"):
        pass


def test_a_clip_is_encoded_by_an_offloaded_vae() -> None:
    from accelerate.hooks import CpuOffload, add_hook_to_module

    vae = classic().vae
    add_hook_to_module(vae, CpuOffload(execution_device="meta"))  # in the place of a GPU
    assert encode_clip(vae, torch.zeros(3, 9, 64, 64)).device.type == "meta"


def test_a_callback_may_call_the_transformer(pipe: Any) -> None:
    def ask(pipe: Any, index: int, time: Any, given: dict[str, Any]) -> dict[str, Any]:
        if index == 1:
            states = {"hidden_states": given["latents"], "encoder_hidden_states": given["prompt_embeds"]}
            pipe.transformer(**states, timestep=pipe.scheduler.timesteps[index + 1][None], return_dict=False)
        return {}

    asked = {"callback_on_step_end": ask, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    for policy in (kv.Constant(lock=0.0), kv.Constant(lock=1.0)):
        with locked(pipe, **EDIT, policy=policy):
            wanted = run(pipe)
        with locked(pipe, **EDIT, policy=policy):
            assert torch.equal(run(pipe, **asked), wanted)


def test_a_session_that_is_kept_for_its_trace_keeps_no_network() -> None:
    pipe = classic()
    with locked(pipe, **EDIT, policy="half") as session:
        run(pipe)
    network = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert network() is None
    assert len(session.trace) == 5


def test_steps_are_counted_once_where_a_schedule_has_levels_twice() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler
    from diffusers.guiders import ClassifierFreeGuidance

    pipe, seen = tiny_pipeline("wan"), []
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)

    @kv.stateless
    def counts(obs: kv.Observation) -> kv.Control:
        seen.append(obs.steps_left)
        return kv.Control(lock=0.0)

    with locked(pipe, **EDIT, policy=counts, composite=False):
        run(pipe)
    assert list(dict.fromkeys(seen)) == [4, 3, 2, 1]  # nothing is measured in the first
    plain = modular(pipe, guider=ClassifierFreeGuidance(4.0))()
    guider = KVLockGuider(4.0, policy=kv.Constant(lock=0.0), scheduler=pipe.scheduler)
    assert torch.equal(modular(pipe, guider=guider)(), plain)
    assert len(guider.trace) == 9


def test_two_changes_of_one_class_are_worn_together() -> None:
    from kvlock_sampling.utils.modules import plain_copies, wearing

    linear = torch.nn.Linear(2, 2)
    with (
        wearing(linear, lambda kind: plain_copies(kind, {"one": 1})),
        wearing(linear, lambda kind: plain_copies(kind, {"two": 2})),
    ):
        assert (linear.one, linear.two) == (1, 2)
        assert type(copy.deepcopy(linear)) is torch.nn.Linear
    assert type(linear) is torch.nn.Linear


@pytest.mark.parametrize("name", ["wan", "wan-image"])
def test_one_source_prompt_serves_several_clips_in_a_pass_of_its_own(name: str) -> None:
    pipe, more = classic(name), {"image": Image.new("RGB", (64, 64), "blue")} if name == "wan-image" else {}
    pair = {"prompt": ["a red square", "a blue ball"], "latents": torch.cat([noise(4), noise(5)]), **more}
    found = []
    for batched in (None, False):
        with locked(pipe, **EDIT, policy="half", source_prompt="a circle", batched=batched):
            found.append(run(pipe, **{**pair, "latents": pair["latents"].clone()}))
    assert far_apart(*found) < 1e-4


def test_schedulers_are_known_by_their_bases() -> None:
    from diffusers import DEISMultistepScheduler, FlowMatchEulerDiscreteScheduler

    class Few(FlowMatchEulerDiscreteScheduler):
        """As of a distilled model."""

    class Misses(DEISMultistepScheduler):
        """Misses the clip, as its base does."""

    pipe = classic(times=None)
    pipe.scheduler = Few()
    with locked(pipe, **EDIT, policy="half") as session:
        run(pipe)
    assert len(session.trace) == 5
    pipe.scheduler = Misses(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(PipelineError, match="UniPCMultistepScheduler"), locked(pipe, **EDIT, policy="full"):
        pass


def test_a_loop_that_evaluates_one_branch_alone_is_told() -> None:
    """The blank answer to a branch that waits for the other would be its velocity."""
    pipe = classic()

    class Alone(type(pipe)):  # type: ignore[misc]
        def __call__(self, steps: int) -> Tensor:
            self._guidance_scale, latents = 4.0, START.clone()
            self.scheduler.set_timesteps(5)
            text = self.encode_prompt("a red square", do_classifier_free_guidance=False)[0]
            for time in self.scheduler.timesteps[:steps]:
                states = {"hidden_states": latents, "encoder_hidden_states": text}
                velocity = self.transformer(**states, timestep=time[None], return_dict=False)[0]
                latents = self.scheduler.step(velocity, time, latents)[0]
            return latents

    pipe.__class__ = Alone
    with locked(pipe, **EDIT, policy="half"), pytest.raises(PipelineError, match="one branch alone in a guided step"):
        pipe(5)
    with locked(pipe, **EDIT, policy="half"):
        assert pipe(1).isnan().all()  # the last step has no next one, which would tell
