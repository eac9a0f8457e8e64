"""HunyuanVideo, FramePack and HunyuanVideo 1.5."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import CHANNELS, TEXT, Cond, Family, Grid, build, halved, masked, pooled, text, valid, whole


def _hunyuan(kind: str = "HunyuanVideoTransformer3DModel", **more: Any) -> nn.Module:
    return build(
        kind,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        guidance_embeds=True,
        text_embed_dim=TEXT,
        pooled_projection_dim=TEXT,
        rope_axes_dim=(2, 4, 4),
        **more,
    )


def _call_hunyuan(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    guidance = torch.full_like(time, 6000.0)
    arguments = time * 1000, cond["text"], cond["valid"], cond["pooled"], guidance
    return network(z, *arguments, return_dict=False)[0]


def _call_framepack(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    past = cond["past"].to(z)
    frames = torch.arange(z.shape[2] + 7)
    return network(
        z,
        time * 1000,
        cond["text"],
        cond["valid"],
        cond["pooled"],
        cond["image"],
        indices_latents=frames[7:],
        guidance=torch.full_like(time, 6000.0),
        latents_clean=past[:, :, -1:],
        indices_latents_clean=frames[6:7],
        latents_history_2x=past[:, :, 4:6],
        indices_latents_history_2x=frames[4:6],
        latents_history_4x=past[:, :, :4],
        indices_latents_history_4x=frames[:4],
        return_dict=False,
    )[0]


def _past(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    past = torch.randn(clips, CHANNELS, 7, *halved(grid)[2:], generator=generator)
    return {**pooled(generator, clips, grid), "image": text(generator, clips, 3), "past": past}


def _past_tokens(grid: Grid) -> tuple[int, int]:
    _, h, w = grid
    return h * w + -(-h // 2) * -(-w // 2) + -(-h // 4) * -(-w // 4), 0


def _hunyuan15() -> nn.Module:
    return build(
        "HunyuanVideo15Transformer3DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=2,
        num_refiner_layers=1,
        text_embed_dim=TEXT,
        text_embed_2_dim=TEXT,
        image_embed_dim=TEXT,
        rope_axes_dim=(2, 4, 4),
        target_size=16,
    )


def _call_hunyuan15(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(
        z,
        (time * 1000).to(z.dtype),  # as its pipeline does: time alone decides in what precision it is embedded
        cond["text"],
        cond["valid"],
        encoder_hidden_states_2=cond["text_2"],
        encoder_attention_mask_2=cond["valid_2"],
        image_embeds=cond["image"],
        return_dict=False,
    )[0]


def _three_texts(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    second = {"text_2": text(generator, clips, 4), "valid_2": valid(clips, 4).flip(0)}
    return {**masked(generator, clips, grid), **second, "image": text(generator, clips, 3)}


FAMILIES = {
    "hunyuan-video": Family(_hunyuan, _call_hunyuan, halved, pooled),
    "hunyuan-video-image": Family(
        partial(_hunyuan, image_condition_type="token_replace"), _call_hunyuan, halved, pooled
    ),
    "framepack": Family(
        partial(
            _hunyuan,
            "HunyuanVideoFramepackTransformer3DModel",
            has_image_proj=True,
            image_proj_dim=TEXT,
            has_clean_x_embedder=True,
        ),
        _call_framepack,
        halved,
        _past,
        _past_tokens,
    ),
    "hunyuan-video-1.5": Family(_hunyuan15, _call_hunyuan15, whole, _three_texts),
}
