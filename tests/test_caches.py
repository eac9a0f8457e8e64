"""Offloading, casting and step caches of diffusers: what is skipped is counted, what is remembered is kept apart."""

from __future__ import annotations

import pytest
import torch
from conftest import PromptedWan, Setup
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import apply_group_offloading
from test_backends import outputs

import kvlock_sampling as kv
from kvlock_sampling.attention.compat.step_caches import StepCaches
from kvlock_sampling.variance import RenoiseVariance

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")
SIGMAS = (20.0, 12.0, 8.0, 5.0, 3.0, 1.5)
BLOCKS = ("blocks",)


def caching(name: str):
    """Settings under which a cache skips something within six evaluations."""
    if name == "first block":
        return FirstBlockCacheConfig(threshold=1e9)
    if name == "mag":
        return MagCacheConfig(num_inference_steps=6, mag_ratios=torch.ones(6), retention_ratio=0.2, threshold=10.0)
    if name == "attention broadcast":
        return PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=3,
            spatial_attention_block_identifiers=BLOCKS,
            cross_attention_block_identifiers=BLOCKS,
            current_timestep_callback=lambda: 500,
        )
    if name == "faster":
        return FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 901),
            spatial_attention_block_identifiers=BLOCKS,
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 901),
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=lambda: 500,
            tensor_format="BCFHW",
        )
    return TaylorSeerCacheConfig(
        cache_interval=2, max_order=1, disable_cache_before_step=2, cache_identifiers=[r"blocks\.\d+\.(attn1|ffn)$"]
    )


CACHES = ("first block", "mag", "attention broadcast", "faster", "taylor")


class NamedWan(PromptedWan):
    """Called by names, as FasterCache asks for, and telling caches which branch it is, as pipelines do."""

    context: str | None = "both"

    def forward(self, z, t, cond):
        arguments = {
            "hidden_states": z,
            "timestep": (t * 1000).expand(len(z)),
            "encoder_hidden_states": cond.expand(len(z), -1, -1),
        }
        if self.context is None:
            return self.transformer(**arguments, return_dict=False)[0]
        with self.transformer.cache_context(self.context):
            return self.transformer(**arguments, return_dict=False)[0]


def cached(name: str | None, context: str | None = "both") -> Setup:
    setup = Setup()
    named = NamedWan()
    named.load_state_dict(setup.model.inner_model.state_dict())
    named.context = context
    setup.model = kv.FlowDenoiser(named).eval().requires_grad_(False)
    if name is not None:
        named.transformer.enable_cache(caching(name))
    return setup


def memories(setup: Setup) -> list[object]:
    """All memories of the network's caches."""
    hooks = StepCaches(setup.model.modules())._hooks()
    return [
        v for hook in hooks for v in (vars(hook).get("state"), getattr(hook, "state_manager", None)) if v is not None
    ]


def plain(setup: Setup) -> torch.Tensor:
    """Classifier-free guidance with the caches as diffusers has them."""
    guided, noise = kv.CFGDenoiser(setup.model), setup.x / setup.sigmas[0]
    with torch.no_grad():
        return torch.cat([guided(setup.source + s * noise, torch.tensor([s]), **setup.cfg) for s in SIGMAS])


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offloading_changes_nothing(kind):
    expected, fused = outputs(Setup())
    setup, cpu = Setup(), torch.device("cpu")
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    apply_group_offloading(
        setup.model.inner_model.transformer, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks
    )
    got = outputs(setup)
    assert torch.equal(got[0], expected)
    assert got[1] == fused == [2, 2]


def test_layerwise_casting_locks_the_model_of_rounded_weights():
    setup, eight = Setup(), torch.float8_e4m3fn
    setup.model.inner_model.transformer.enable_layerwise_casting(storage_dtype=eight, compute_dtype=torch.float32)
    rounded = Setup()
    stored = dict(setup.model.named_parameters())
    cast = [name for name, weight in stored.items() if weight.dtype == eight]
    assert any("attn1.to_k" in name for name in cast)
    for name, weight in rounded.model.named_parameters():
        if name in cast:
            weight.data = stored[name].data.to(torch.float32)
    got, expected = outputs(setup), outputs(rounded)
    assert torch.equal(got[0], expected[0])
    assert got[1] == expected[1] == [2, 2]


@pytest.mark.parametrize("name", CACHES)
def test_an_idle_lock_caches_as_diffusers_does_and_leaves_its_memory_alone(name):
    expected = plain(cached(name))
    assert not torch.equal(expected, plain(cached(None)))  # it does skip
    setup = cached(name)
    idle = kv.stateless(lambda obs: kv.Control(0.0))
    before = [dict(vars(memory)) for memory in memories(setup)]
    assert before
    got, fused = outputs(setup, sigmas=SIGMAS, policy=idle)
    assert torch.equal(got, expected)
    assert fused == [0] * 6
    assert [dict(vars(memory)) for memory in memories(setup)] == before
    assert torch.equal(plain(setup), expected)  # the next user of the model starts where a run starts


@pytest.mark.parametrize("name", CACHES)
def test_layers_that_are_skipped_are_tolerated_and_counted(name):
    setup = cached(name)
    got, fused = outputs(setup, sigmas=SIGMAS)
    full, all_fused = outputs(cached(None), sigmas=SIGMAS)
    assert all_fused == [2] * 6
    assert fused[0] == 2
    assert min(fused) < 2
    assert got.isfinite().all()
    assert not torch.equal(got, outputs(setup, sigmas=SIGMAS, lock=0.0)[0])
    assert torch.equal(got, outputs(setup, sigmas=SIGMAS)[0])  # another run begins with nothing remembered
    # What is computed in full, before the first skip, is locked as without a cache.
    torch.testing.assert_close(got[:1], full[:1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("batched", [True, False])
def test_a_lock_that_comes_and_goes_with_a_scale_that_does(name, batched):
    # Rows go from two branches to one and back, the source from there to not there: caches crash or mix if they share.
    def policy(obs):
        return kv.Control(
            lock=1.0 if 2 < obs.sigma < 10 else 0.0, cfg_scale=1.0 if obs.sigma > 10 else obs.requested_cfg_scale
        )

    setup = cached(name)
    options = {
        "sigmas": SIGMAS,
        "policy": kv.stateless(policy),
        "batched": batched,
        "estimator": RenoiseVariance(passes=1),
    }
    got, fused = outputs(setup, **options)
    assert got.isfinite().all()
    assert fused[0] == fused[1] == 0 < max(fused)
    assert torch.equal(outputs(setup, **options)[0], got)


@pytest.mark.parametrize("name", ["first block", "taylor"])
def test_a_denoiser_of_one_branch_need_not_name_it(name):
    got, _ = outputs(cached(name, context=None), sigmas=SIGMAS)
    assert torch.equal(got, outputs(cached(name), sigmas=SIGMAS)[0])


@pytest.mark.parametrize("name", ["first block", "attention broadcast"])
def test_the_foreground_path_with_a_cache(name):
    options = {"sigmas": SIGMAS, "lock": 1.0, "composite": True, "foreground": True}
    got, fused = outputs(cached(name), **options)
    assert got.isfinite().all()
    assert fused[0] == 2
    assert min(fused) < 2
    torch.testing.assert_close(got[:1], outputs(cached(None), **options)[0][:1], atol=1e-4, rtol=1e-4)


def test_a_model_that_guides_itself_keeps_its_own_contexts():
    class Guided(torch.nn.Module):
        def __init__(self, setup: Setup) -> None:
            super().__init__()
            self.model = setup.model

        def forward(self, x, sigma, cond, uncond, cond_scale=3.0):
            answers = []
            for name, text in (("cond", cond), ("uncond", uncond)):
                self.model.inner_model.context = name
                answers.append(self.model(x, sigma, cond=text))
            return answers[1] + (answers[0] - answers[1]) * cond_scale

    setup = cached("first block")
    got, fused = outputs(setup, sigmas=SIGMAS, model=Guided(setup))
    # Guidance by the lock, one branch after another, each with a memory of its own, is the same arithmetic.
    expected, same = outputs(cached("first block"), sigmas=SIGMAS, batched=False)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
    assert fused == same == [2, 1, 1, 1, 1, 1]


def test_the_sources_pass_is_computed_in_full_whatever_the_cache_has_seen(monkeypatch):
    from kvlock_sampling.attention import FusionContext

    kept = []
    process = FusionContext.process

    def spy(self, layer, key, value, *rest):
        if self.mode == "capture":
            kept.append((layer, key.clone()))
        return process(self, layer, key, value, *rest)

    monkeypatch.setattr(FusionContext, "process", spy)
    outputs(cached("first block"), sigmas=SIGMAS)
    with_cache, kept = kept, []
    monkeypatch.setattr(FusionContext, "process", lambda *a: spy(*a))
    setup = cached(None)
    monkeypatch.setattr(StepCaches, "active", property(lambda self: True))  # the source apart, as with a cache
    outputs(setup, sigmas=SIGMAS)
    assert len(with_cache) == len(kept) == 2 * len(SIGMAS)
    assert all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(with_cache, kept, strict=True))
