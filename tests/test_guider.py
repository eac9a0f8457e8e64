"""The lock as a guider: modular pipelines give what the sampler gives, and nothing is left behind."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from in_diffusers import (
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
)
from networks import FAMILIES
from torch import Tensor
from toy_pipelines import tiny_pipeline

import kvlock_sampling as kv
from kvlock_sampling.integrations.diffusers import KVLockGuider, encode_clip
from kvlock_sampling.types import MaskError, PipelineError, PolicyError, RunError, SourceError


@pytest.fixture(scope="module")
def pipe() -> Any:
    return classic()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_guided_modular_pipeline_gives_what_the_sampler_gives(pipe: Any, policy: Any) -> None:
    wanted, trace = by_sampler(pipe, policy)
    guider = KVLockGuider(4.0, policy=policy, **EDIT, scheduler=pipe.scheduler)
    got = modular(pipe, guider=guider)()
    assert far_apart(got, wanted) < 2e-4
    check_same_trace(guider.trace, trace)


def test_off_is_the_same_bits_in_a_modular_pipeline() -> None:
    from diffusers.guiders import ClassifierFreeGuidance

    parts = tiny_pipeline("wan")
    plain = modular(parts, guider=ClassifierFreeGuidance(4.0))()
    guider = KVLockGuider(4.0, policy=kv.Constant(lock=0.0), scheduler=parts.scheduler)
    assert torch.equal(modular(parts, guider=guider)(), plain)
    assert guider.trace.nfe == 10


def test_a_disabled_guider_is_out_of_the_way(pipe: Any) -> None:
    guider = KVLockGuider(4.0, **EDIT, scheduler=pipe.scheduler)
    guider.disable()
    before = pipe.transformer.__dict__.copy()
    guider.set_state(0, 5, torch.tensor(900.0))
    assert len(guider.prepare_inputs({"x": (START, SOURCE)})) == guider.num_conditions == 1
    guider.prepare_models(pipe.transformer)
    assert pipe.transformer.__dict__.keys() == before.keys()
    assert guider.forward(START).pred is START


def test_a_guider_leaves_nothing_in_the_transformer() -> None:
    parts = classic()
    before, kind = dict(parts.transformer.__dict__), type(parts.transformer)
    guider = KVLockGuider(4.0, **EDIT, scheduler=parts.scheduler)
    sample = modular(parts, guider=guider)
    sample()
    assert parts.transformer.__dict__.keys() == before.keys()
    guider.edit(source=SOURCE[..., :4], mask=MASK[..., :4])
    with pytest.raises(Exception, match="source latents have shape"):
        sample()
    assert parts.transformer.__dict__.keys() == before.keys()
    guider.edit(source=SOURCE, mask=MASK)
    first, again = sample(), sample()
    assert torch.equal(first, again)
    assert len(guider.trace) == 5
    assert type(parts.transformer) is kind


def test_a_transformer_that_is_called_otherwise_is_refused_and_left_alone(pipe: Any) -> None:
    network = FAMILIES["z-image"].build()
    kind, guider = type(network), KVLockGuider(4.0, policy="full", scheduler=pipe.scheduler, **EDIT)
    with pytest.raises(PipelineError, match="takes no hidden_states; expected a transformer of Wan, LTX"):
        guider.prepare_models(network)
    assert type(network) is kind
    assert "forward" not in vars(network)


def test_a_guider_has_one_run_at_a_time_in_any_thread(pipe: Any) -> None:
    """The run that began last goes on, as after a run that broke off; every step of another raises."""
    step = {"timestep": torch.tensor([500.0]), "encoder_hidden_states": noise(3, (1, 4, 32)), "return_dict": False}
    guider, kind = KVLockGuider(4.0, **EDIT, policy="half"), type(pipe.transformer)

    def steps() -> Any:
        for number in range(3):
            guider.set_state(number, 3, torch.tensor(900.0 - 300 * number))
            yield
            branches = guider.prepare_inputs_from_block_state(BlockState(), {"text": ("text", "text")})
            yield
            for _ in branches:
                guider.prepare_models(pipe.transformer)
                pipe.transformer(START, **step | {"timestep": torch.tensor([900.0 - 300 * number])})
                yield
                guider.cleanup_models(pipe.transformer)
            with torch.no_grad():
                yield guider.forward(START, START).pred

    def finished(run: Any) -> list[Any]:
        return [pred for pred in run if pred is not None]

    wanted = finished(steps())
    assert len(wanted) == 3
    rows = guider.trace.rows()
    for pauses in range(14):  # wherever it stands when another thread begins
        first = steps()
        for _ in range(pauses):
            next(first)
        assert torch.equal(torch.cat(in_another_thread(lambda: finished(steps()))), torch.cat(wanted))
        assert repr(guider.trace.rows()) == repr(rows)
        if pauses:
            with pytest.raises(RunError, match="give each thread or task its own guider"):
                finished(first)
    assert torch.equal(torch.cat(finished(steps())), torch.cat(wanted))
    assert type(pipe.transformer) is kind


class BlockState:
    """A modular pipeline's state: latents in full precision, and the texts of both branches."""

    latents, timesteps, text = START, torch.tensor([900.0, 600.0, 300.0]), noise(3, (1, 4, 32))


def test_guidance_for_some_steps_leaves_the_lock_on(pipe: Any) -> None:
    guider = KVLockGuider(4.0, policy=kv.Constant(lock=1.0), **EDIT, scheduler=pipe.scheduler, start=0.4)
    modular(pipe, guider=guider)()
    assert [step.nfe for step in guider.trace] == [2, 2, 3, 3, 3]
    assert all(step.fused_layers for step in guider.trace)


def test_one_lock_spans_the_two_guiders_of_a_modular_pipeline() -> None:
    pipe = classic("wan-2.2")
    wanted, trace = by_sampler(pipe, "paper")
    guider = KVLockGuider(4.0, policy="paper", **EDIT, scheduler=pipe.scheduler)
    both = {"guider": guider, "guider_2": guider.partner(4.0), "transformer_2": pipe.transformer_2}
    sample = modular(pipe, "Wan22Blocks", **both)
    assert far_apart(sample(), wanted) < 2e-4
    assert [float(s.lock) for s in guider.trace] == pytest.approx([float(s.lock) for s in trace], abs=1e-4)
    partner = both["guider_2"]
    assert partner.trace is guider.trace
    assert partner.guidance_scale == 4.0


def test_hunyuan_video_15_takes_the_guider() -> None:
    from diffusers import AutoencoderKLHunyuanVideo15, FlowMatchEulerDiscreteScheduler, HunyuanVideo15Pipeline
    from diffusers.guiders import ClassifierFreeGuidance
    from networks.base import build, enliven

    torch.manual_seed(0)
    settings = {"num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 2, "num_refiner_layers": 1}
    widths = {"text_embed_dim": 8, "text_embed_2_dim": 8, "image_embed_dim": 8, "rope_axes_dim": (2, 4, 4)}
    transformer = build(
        "HunyuanVideo15Transformer3DModel", in_channels=9, out_channels=4, target_size=16, **settings, **widths
    )
    vae = AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1)
    plain = ClassifierFreeGuidance(4.0)
    parts = (enliven(transformer, 0).eval(), vae, FlowMatchEulerDiscreteScheduler())
    pipe = HunyuanVideo15Pipeline(None, None, *parts, None, None, plain)
    pipe.set_progress_bar_config(disable=True)
    source, start, mask = noise(1, (1, 4, 3, 4, 4)), noise(2, (1, 4, 3, 4, 4)), torch.zeros(1, 1, 3, 4, 4)
    mask[..., 1:3, 1:3] = 1
    texts = {"prompt_embeds": 5, "prompt_embeds_2": 4, "negative_prompt_embeds": 5, "negative_prompt_embeds_2": 4}
    given = {name: noise(i, (1, length, 8)) for i, (name, length) in enumerate(texts.items())}
    masks = {name.replace("embeds", "embeds_mask"): torch.ones(1, length) for name, length in texts.items()}
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "sigmas": [0.97, 0.8, 0.5, 0.2]}

    def sample(guider: Any) -> Tensor:
        pipe.register_modules(guider=guider)
        return pipe(**given, **masks, **size, latents=start.clone(), output_type="latent").frames

    free = sample(plain)
    assert torch.equal(sample(KVLockGuider(4.0, policy=kv.Constant(lock=0.0))), free)
    guider = KVLockGuider(4.0, policy=kv.Constant(lock=0.5), source=source, mask=mask)
    got = sample(guider)
    assert far_apart(got * (1 - mask), source * (1 - mask)) < 1e-5
    assert all(step.fused_layers == 2 for step in guider.trace)
    other = {"encoder_hidden_states": noise(9, (1, 5, 8)), "encoder_attention_mask": torch.ones(1, 5)}
    assert far_apart(sample(guider.edit(source_embeds=other)), got) > 1e-3
    with pytest.raises(kv.KVLockError, match=r"it gives .*encoder_attention_mask"):
        sample(guider.edit(source_embeds={"text": other["encoder_hidden_states"]}))
    with pytest.raises(kv.KVLockError, match="source_embeds lacks encoder_attention_mask; give the source's own"):
        sample(guider.edit(source_embeds=other["encoder_hidden_states"]))  # would be read under the edit's mask
    for wrong in ((other["encoder_hidden_states"], None), {"encoder_hidden_states": [1.0]}):
        with pytest.raises(kv.KVLockError, match=r"source_embeds is a .*; expected a tensor"):
            sample(guider.edit(source_embeds=wrong))


def test_a_network_that_casts_no_times_gets_the_pipelines_dtype() -> None:
    pipe = tiny_pipeline("hunyuan-1.5")
    pipe.transformer.to(torch.bfloat16)
    size = {"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}
    shape = pipe(prompt="a", **size).frames.shape
    source, mask = noise(1, tuple(shape)), torch.zeros(1, 1, *shape[2:])
    mask[..., :2] = 1
    pipe.register_modules(guider=KVLockGuider(4.0, policy="full", source=source, mask=mask, scheduler=pipe.scheduler))
    got = pipe(prompt="a", **size).frames
    assert far_apart(got * (1 - mask), source * (1 - mask)) < 0.05


def test_packed_latents_are_the_pipelines_own() -> None:
    from diffusers.guiders import ClassifierFreeGuidance
    from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXBlocks

    parts, blocks = tiny_pipeline("ltx"), LTXBlocks()
    blocks.sub_blocks.pop("decode")
    pipe = blocks.init_pipeline()
    pipe.set_progress_bar_config(disable=True)
    names = ("text_encoder", "tokenizer", "transformer", "vae", "scheduler")
    pipe.update_components(**{name: getattr(parts, name) for name in names})
    size = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 4}

    def sample(guider: Any) -> Tensor:
        pipe.update_components(guider=guider)
        texts = {"prompt": "a", "negative_prompt": "", "output": "latents"}
        return pipe(**texts, **size, generator=torch.Generator().manual_seed(0))

    free = sample(ClassifierFreeGuidance(3.0))
    assert torch.equal(sample(KVLockGuider(3.0, policy=kv.Constant(lock=0.0), scheduler=pipe.scheduler)), free)
    source, mask = noise(1, (1, 48, 8)), torch.zeros(1, 48, 1)
    mask[:, :20] = 1
    got = sample(KVLockGuider(3.0, policy="full", scheduler=pipe.scheduler, source=source, mask=mask))
    assert free.shape == (1, 8, 3, 4, 4)
    assert far_apart(got.flatten(2).mT[:, 20:], source[:, 20:]) < 1e-5
    unpacked = {"source": noise(1, (1, 8, 3, 4, 4)), "mask": (noise(2, (1, 1, 3, 4, 4)) > 0).float()}
    with pytest.raises(SourceError, match=r"packed latents as source\.flatten\(2\)\.mT"):
        sample(KVLockGuider(3.0, policy="full", scheduler=pipe.scheduler, **unpacked))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"source": "clip.mp4"}, SourceError, "source is a str; expected the clean latents"),
        ({"mask": "mask.png"}, MaskError, "mask is the path 'mask.png'"),
        ({"noise": 1.0}, SourceError, "noise=1.0; expected a tensor"),
        ({"transition": 1}, MaskError, "transition=1; expected"),
        ({"transition": (1, "a")}, MaskError, r"transition=\(1, 'a'\); expected"),
    ],
    ids=str,
)
def test_what_a_guider_cannot_use_is_refused_where_it_is_given(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        KVLockGuider(4.0, **{**EDIT, **given})


def test_a_guiders_settings_are_saved_and_loaded(tmp_path: Any) -> None:
    for given in ("paper", kv.Windowed(kv.Linear(), above=2.0)):
        guider = KVLockGuider(3.0, policy=given, transition=(1.0, 0.5), layers=[0], rescale=True, start=0.1, **EDIT)
        guider.save_pretrained(tmp_path)
        loaded = KVLockGuider.from_pretrained(tmp_path)
        assert loaded.guidance_scale == 3.0
        assert tuple(loaded.config["transition"]) == (1.0, 0.5)
        assert loaded.config["layers"] == loaded._given["layers"] == [0]
        assert all(loaded.config[name] == guider.config[name] for name in ("rescale", "composite", "batched"))
        assert kv.load_policy(loaded.config["policy"]) == (kv.load_policy(given) if isinstance(given, str) else given)
        assert loaded._start == 0.1
        assert loaded._given["source"] is None
    other = guider.new(guidance_scale=7.0, mask=1 - MASK)
    assert (other.guidance_scale, other._given["source"]) == (7.0, SOURCE)
    assert torch.equal(other._given["mask"], 1 - MASK)


def test_layers_are_chosen_by_index_or_given_as_an_object(pipe: Any, tmp_path: Any) -> None:
    def fused(guider: KVLockGuider) -> list[int]:
        modular(pipe, guider=guider)()
        return [step.fused_layers for step in guider.trace]

    guider = KVLockGuider(4.0, policy=kv.Constant(lock=1.0), **EDIT, scheduler=pipe.scheduler, layers=range(1))
    for one in (0, np.int64(0), torch.tensor([0]), np.array([0])):
        assert guider.new(layers=one).config["layers"] == [0]
    assert fused(guider) == [1] * 5
    assert guider.config["layers"] == [0]
    both = guider.new(layers=kv.find_layers(pipe.transformer))
    assert fused(both) == [2] * 5
    both.save_pretrained(tmp_path)  # an object is not saved
    assert KVLockGuider.from_pretrained(tmp_path).config["layers"] is None
    assert fused(both.edit(layers=slice(1))) == [1] * 5


def test_a_policy_that_is_code_is_not_saved(tmp_path: Any) -> None:
    @kv.stateless
    def mine(obs: kv.Observation) -> kv.Control:
        return kv.Control(lock=0.5)

    guider = KVLockGuider(policy=mine)
    with pytest.raises(PolicyError, match="cannot be written to a file"):
        guider.save_pretrained(tmp_path)
    assert guider.partner(3.0)._policy is mine


def test_the_noise_level_must_be_known_exactly() -> None:
    parts = tiny_pipeline("wan")  # UniPC: integer timesteps
    with pytest.raises(Exception, match=r"scheduler=pipe\.scheduler"):
        modular(parts, guider=KVLockGuider(4.0, **EDIT))()
    strange = euler_of((0.6, 0.3))
    strange.set_timesteps()
    with pytest.raises(Exception, match="not the scheduler of this run"):
        modular(parts, guider=KVLockGuider(4.0, **EDIT, scheduler=strange))()
    floats = classic()
    wanted = modular(floats, guider=KVLockGuider(4.0, **EDIT, scheduler=floats.scheduler))()
    assert far_apart(modular(floats, guider=KVLockGuider(4.0, **EDIT))(), wanted) < 1e-5


def test_a_clip_that_the_vae_would_cut_is_not_encoded(pipe: Any) -> None:
    clip = torch.rand(3, 9, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = encode_clip(pipe.vae, clip)
    assert torch.equal(encode_clip(pipe.vae, clip[None].numpy()), latents)
    assert latents.shape == (1, 16, 3, 8, 8)
    for wrong, message in {
        "bytes": (clip.byte(), r"torch.uint8; .*127.5"),
        "range": (clip * 127, r"expected pixels in \[-1, 1\]"),
        "nan": (clip / 0 * 0, "NaN or inf"),
        "frames": (clip[:, :8], r"8 frames of 64 x 64; .* takes 1 \+ 4 \* n frames.*\n.*frames=5, size=\(64, 64\)"),
        "sides": (clip[..., :60], r"9 frames of 64 x 60; .*sides of 8 \* n.*\n.*size=\(64, 56\)"),
        "channels": (clip[:1], r"shape \(1, 1, 9, 64, 64\); expected \(3, frames"),
        "order": (clip.transpose(0, 1), r"Frames first, as images come: clip.transpose\(0, 1\)"),
        "picture": (clip[:, 0], r"shape \(3, 64, 64\); expected"),
        "path": ("clip.mp4", r"path 'clip.mp4'"),
    }.values():
        with pytest.raises(SourceError, match=message):
            encode_clip(pipe.vae, wrong)


def test_without_diffusers_the_extra_is_named() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import kvlock_sampling as kv; kv.diffusers"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'kvlock-sampling[diffusers]'" in done.stderr


def test_a_source_prompt_is_told_how_to_be_encoded():
    with pytest.raises(PipelineError, match=r"a guider sees no text encoder.*source_embeds=embeds.*locked\(pipe"):
        KVLockGuider(source_prompt="a red ball")


def test_a_policy_of_a_file_is_saved_with_the_guider(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('[policy]\ntype = "Constant"\nlock = 0.7\n')
    KVLockGuider(4.0, policy="mine.toml").save_pretrained(tmp_path / "saved")
    (tmp_path / "mine.toml").write_text('[policy]\ntype = "Constant"\nlock = 0.1\n')
    assert "lock = 0.7" in KVLockGuider.from_pretrained(tmp_path / "saved").config.policy


def test_a_mask_of_the_source_is_asked_for_by_either_name() -> None:
    """Qwen-Image's is called otherwise than HunyuanVideo's."""
    from kvlock_sampling.integrations.diffusers.session import Session

    text = {"encoder_hidden_states": torch.ones(1, 3, 4)}
    for name in ("encoder_attention_mask", "encoder_hidden_states_mask"):
        session = Session(source_embeds=text)
        with pytest.raises(PipelineError, match=f"source_embeds lacks {name}; give the source's own"):
            session._source_args(None, {**text, name: torch.ones(1, 3)})
