"""Networks that draw pictures: latents are (batch, channels, height, width), packed where the family wants tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import (
    CHANNELS,
    TEXT,
    Cond,
    Family,
    Grid,
    build,
    masked,
    packed,
    plain,
    pooled,
    positions,
    text,
    unpacked,
    valid,
)


def _halved(grid: Grid) -> tuple[int, ...]:
    return CHANNELS, 2 * grid[1], 2 * grid[2]


def _whole(grid: Grid) -> tuple[int, ...]:
    return CHANNELS, *grid[1:]


# -- Flux --------------------------------------------------------------------------------------------------------------


def _flux(kind: str = "FluxTransformer2DModel", **more: Any) -> nn.Module:
    return build(
        kind,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=10,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        **{"in_channels": 4 * CHANNELS, "axes_dims_rope": (2, 4, 4), **more},
    )


def _call_flux(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor], patch: int = 2) -> Tensor:
    """As Flux, FLUX.2, Chroma and Bria are called; a reference stands after the picture."""
    height, width = z.shape[2] // patch, z.shape[3] // patch
    axes = len(network.config.axes_dims_rope)
    tokens, ids = packed(z, patch), positions(height, width, axes=axes)
    if "reference" in cond:
        tokens = torch.cat([tokens, packed(cond["reference"].to(z), patch)], 1)
        ids = torch.cat([ids, positions(height, width, index=1, axes=axes)])
    given = {"pooled_projections": cond["pooled"]} if "pooled" in cond else {}
    if getattr(network.config, "guidance_embeds", False):
        given["guidance"] = torch.full_like(time, 3.5)
    words = torch.zeros(cond["text"].shape[1], axes)
    out = network(tokens, cond["text"], timestep=time, img_ids=ids, txt_ids=words, return_dict=False, **given)[0]
    return unpacked(out[:, : height * width], z, patch)


def _pooled(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    return {"text": text(generator, clips), "pooled": torch.randn(clips, TEXT, generator=generator)}


def _reference(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    reference = torch.randn(clips, *_halved(grid), generator=generator)
    return {**_pooled(generator, clips, grid), "reference": reference}


def _after(grid: Grid) -> tuple[int, int]:
    return 0, grid[1] * grid[2]


# -- Qwen-Image --------------------------------------------------------------------------------------------------------


def _qwen(**more: Any) -> nn.Module:
    return build(
        "QwenImageTransformer2DModel",
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
        **more,
    )


def _call_qwen(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    shape = 1, z.shape[2] // 2, z.shape[3] // 2
    tokens, shapes = packed(z, 2), [shape]
    if "reference" in cond:
        tokens, shapes = torch.cat([tokens, packed(cond["reference"].to(z), 2)], 1), [shape, shape]
    given = {"timestep": time, "img_shapes": [shapes] * len(z), "return_dict": False}
    out = network(tokens, cond["text"], cond["valid"], **given)[0]
    return unpacked(out[:, : shape[1] * shape[2]], z, 2)


def _qwen_edit(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    return {**masked(generator, clips, grid), "reference": torch.randn(clips, *_halved(grid), generator=generator)}


# -- others ------------------------------------------------------------------------------------------------------------


def _sd3(**more: Any) -> nn.Module:
    return build(
        "SD3Transformer2DModel",
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=TEXT,
        caption_projection_dim=16,
        pooled_projection_dim=TEXT,
        **more,
    )


def _call_sd3(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(z, cond["text"], cond["pooled"], time * 1000, return_dict=False)[0]


def _cogview4() -> nn.Module:
    return build(
        "CogView4Transformer2DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        text_embed_dim=TEXT,
        time_embed_dim=8,
        condition_dim=4,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(16, 16),
    )


def _call_cogview4(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    size = torch.tensor([z.shape[2:]], dtype=z.dtype).expand(len(z), -1)
    return network(z, cond["text"], time * 1000, size, size, 0 * size, return_dict=False)[0]


def _hunyuan_image(patch: tuple[int, ...] = (1, 1), **more: Any) -> nn.Module:
    return build(
        "HunyuanImageTransformer2DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=patch,
        text_embed_dim=TEXT,
        rope_axes_dim=(4, 4) if len(patch) == 2 else (2, 2, 4),
        **more,
    )


def _call_hunyuan_image(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    second = {}
    if "text_2" in cond:
        second = {"encoder_hidden_states_2": cond["text_2"], "encoder_attention_mask_2": cond["valid_2"]}
    return network(z, (time * 1000).to(z.dtype), cond["text"], cond["valid"], return_dict=False, **second)[0]


def _two_texts(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    second = {"text_2": text(generator, clips, 4), "valid_2": valid(clips, 4).flip(0)}
    return {**masked(generator, clips, grid), **second}


def _z_image() -> nn.Module:
    return build(
        "ZImageTransformer2DModel",
        in_channels=CHANNELS,
        dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=TEXT,
        axes_dims=[4, 2, 2],
        axes_lens=[128, 32, 32],
    )


def _call_z_image(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    texts = [row[mask] for row, mask in zip(cond["text"], cond["valid"], strict=True)]
    out = network(list(z.unsqueeze(2)), 1 - time, texts, return_dict=False)[0]
    return -torch.stack(out).squeeze(2)


def _long(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    # Texts are padded to 32 tokens; these are of different lengths after that too.
    return {"text": text(generator, clips, 34), "valid": valid(clips, 34)}


def _pixart() -> nn.Module:
    return build(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=TEXT,
        use_additional_conditions=False,
    )


def _call_pixart(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    given = {"encoder_attention_mask": cond["valid"].to(z.dtype), "added_cond_kwargs": {}, "return_dict": False}
    return network(z, cond["text"], time * 1000, **given)[0]


FAMILIES = {
    "flux": Family(partial(_flux, pooled_projection_dim=TEXT, guidance_embeds=True), _call_flux, _halved, _pooled),
    "flux-kontext": Family(partial(_flux, pooled_projection_dim=TEXT), _call_flux, _halved, _reference, _after),
    "chroma": Family(
        partial(
            _flux,
            "ChromaTransformer2DModel",
            approximator_num_channels=16,
            approximator_hidden_dim=16,
            approximator_layers=1,
        ),
        _call_flux,
        _halved,
        plain,
    ),
    "bria": Family(partial(_flux, "BriaTransformer2DModel", pooled_projection_dim=TEXT), _call_flux, _halved, _pooled),
    "flux-2": Family(
        partial(
            _flux,
            "Flux2Transformer2DModel",
            in_channels=CHANNELS,
            axes_dims_rope=(2, 4, 2, 2),
            timestep_guidance_channels=16,
        ),
        partial(_call_flux, patch=1),
        _whole,
        plain,
    ),
    "qwen-image": Family(_qwen, _call_qwen, _halved, masked),
    "qwen-image-edit": Family(_qwen, _call_qwen, _halved, _qwen_edit, _after),
    "qwen-image-edit-2511": Family(partial(_qwen, zero_cond_t=True), _call_qwen, _halved, _qwen_edit, _after),
    "sd3": Family(_sd3, _call_sd3, _halved, pooled),
    "sd3.5": Family(partial(_sd3, dual_attention_layers=(0,), qk_norm="rms_norm"), _call_sd3, _halved, pooled),
    "cogview4": Family(_cogview4, _call_cogview4, _halved, plain),
    "hunyuan-image": Family(partial(_hunyuan_image, text_embed_2_dim=TEXT), _call_hunyuan_image, _whole, _two_texts),
    "hunyuan-image-refiner": Family(
        partial(_hunyuan_image, (1, 1, 1)), _call_hunyuan_image, lambda grid: (CHANNELS, *grid), masked
    ),
    "z-image": Family(_z_image, _call_z_image, _halved, _long),
    "pixart": Family(_pixart, _call_pixart, _halved, masked),
}
