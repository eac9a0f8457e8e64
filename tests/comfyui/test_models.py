"""Other families in ComfyUI's own sampling: pictures of FLUX and Qwen-Image, clips of LTX and HunyuanVideo."""

from __future__ import annotations

import importlib

import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from conftest import sample

from kvlock_sampling.integrations.comfyui import ComfyLock

JOINT = {"in_channels": 16, "out_channels": 16, "vec_in_dim": 8, "context_in_dim": 16, "hidden_size": 48}
JOINT |= {"mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 8, 8], "theta": 100}
JOINT |= {"qkv_bias": True, "guidance_embed": True}
SIZES = {"attention_head_dim": 24, "num_attention_heads": 2, "num_layers": 2}
# class, settings of the network, shape of the latents
FAMILIES = {
    "flux": ("Flux", JOINT | {"patch_size": 2, "txt_ids_dims": []}, (1, 16, 16, 16)),
    "hunyuan_video": (
        "HunyuanVideo",
        JOINT
        | {"patch_size": [1, 2, 2], "byt5": False, "meanflow": False, "meanflow_sum": False}
        | {"use_cond_type_embedding": False, "vision_in_dim": None},
        (1, 16, 3, 8, 8),
    ),
    "ltxv": (
        "LTXV",
        SIZES | {"in_channels": 128, "cross_attention_dim": 48, "caption_channels": 16},
        (1, 128, 3, 8, 8),
    ),
    "qwen_image": (
        "QwenImage",
        SIZES | {"in_channels": 64, "out_channels": 16, "joint_attention_dim": 16, "axes_dims_rope": (8, 8, 8)},
        (1, 16, 1, 16, 16),
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    kind, config, shape = FAMILIES[request.param]
    params = {"Flux": "flux.model:FluxParams", "HunyuanVideo": "hunyuan_video.model:HunyuanVideoParams"}.get(kind)
    if params is not None:  # an older version has fewer settings
        module, _, name = params.partition(":")
        known = vars(importlib.import_module(f"comfy.ldm.{module}"))[name].__dataclass_fields__
        config = {name: value for name, value in config.items() if name in known}
    found = getattr(comfy.supported_models, kind)({"image_model": request.param, **config})
    found.set_inference_dtype(torch.float32, None)
    model = found.get_model({}, "", device="cpu").eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu")), torch.randn(shape, generator=g), request.param


def said(seed: int, kind: str):
    g = torch.Generator().manual_seed(seed)
    more = {"pooled_output": torch.randn(1, 8, generator=g)}
    if kind == "ltxv":  # whose network asks for one
        more["attention_mask"] = torch.ones(1, 12, dtype=torch.long)
    return [[torch.randn(1, 12, 16, generator=g), more]]


@pytest.mark.parametrize("policy", ["off", "full", "half", "release"])
def test_a_locked_edit(family, policy):
    model, latents, kind = family
    height, width = latents.shape[-2:]
    mask = torch.zeros(1, 8 * height, 8 * width)
    mask[:, : 4 * height, : 4 * width] = 1
    options = {"source": {"samples": latents}, "positive": said(5, kind), "negative": said(6, kind)}
    lock = ComfyLock({"samples": latents}, mask=mask, source_prompt=said(9, kind), options={"policy": policy})
    plain, found = sample(model, **options), sample(lock.patch(model), **options)
    if policy == "off":
        assert torch.equal(found, plain)
        return
    edited = (..., slice(0, height // 2), slice(0, width // 2))
    assert float((found - plain)[edited].abs().max()) > 1e-3
    assert all(step.fused_layers for step in lock.trace)
    assert set(lock.trace.routes) == {"interleaved" if policy == "full" else "lockstep"}
    gap = (found - latents).abs()
    gap[edited] = 0
    if policy != "release":
        assert float(gap.max()) <= 1e-5


@pytest.mark.parametrize("policy", ["half", "release"])
def test_a_mask_of_the_latent_is_a_mask_of_the_lock(family, policy):
    """Some networks take ComfyUI's noise mask for a map of noise levels; pictures have no time."""
    model, latents, kind = family
    height, width = latents.shape[-2:]
    mask = torch.zeros(1, 8 * height, 8 * width)
    mask[:, : 4 * height, : 4 * width] = 1
    prompts = {"positive": said(5, kind), "negative": said(6, kind)}
    plain, masked = {"samples": latents}, {"samples": latents, "noise_mask": mask.reshape(-1, 1, *mask.shape[-2:])}
    found = []
    for given, sampled in ((mask, plain), (mask, masked), (None, masked)):
        lock = ComfyLock(plain, mask=given, options={"policy": policy})
        found.append(sample(lock.patch(model), source=sampled, **prompts))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
