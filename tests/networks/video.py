"""Video networks of other families."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import CHANNELS, TEXT, Cond, Family, Grid, build, halved, masked, packed, plain, pooled, unpacked, whole

SOUND = 6
"""Tokens of the sound beside LTX-2's video."""


# -- CogVideoX ---------------------------------------------------------------------------------------------------------


def _cogvideox(kind: str = "CogVideoXTransformer3DModel", rotary: bool = True, **more: Any) -> nn.Module:
    return build(
        kind,
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=8,
        text_embed_dim=TEXT,
        num_layers=2,
        sample_width=8,
        sample_height=8,
        sample_frames=9,
        patch_size=2,
        max_text_seq_length=5,
        use_rotary_positional_embeddings=rotary,
        **more,
    )


def _call_cogvideox(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    rotary = None
    if network.config.use_rotary_positional_embeddings:
        t, h, w = z.shape[2] // (getattr(network.config, "patch_size_t", None) or 1), z.shape[3] // 2, z.shape[4] // 2
        from diffusers.models.embeddings import get_3d_rotary_pos_embed

        rotary = get_3d_rotary_pos_embed(16, None, (h, w), t, grid_type="slice", max_size=(h, w))
    frames_first = z.transpose(1, 2)
    out = network(frames_first, cond["text"], time * 1000, image_rotary_emb=rotary, return_dict=False)[0]
    return out.transpose(1, 2)


# -- LTX ---------------------------------------------------------------------------------------------------------------


def _ltx() -> nn.Module:
    return build(
        "LTXVideoTransformer3DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=2,
        caption_channels=TEXT,
    )


def _call_ltx(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    t, h, w = z.shape[2:]
    arguments = cond["text"], time * 1000, cond["valid"].to(z.dtype), t, h, w
    return unpacked(network(packed(z), *arguments, return_dict=False)[0], z)


def _call_ltx_image(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The first frame is known: its tokens are at time 0."""
    t, h, w = z.shape[2:]
    times = (time * 1000)[:, None].repeat(1, t * h * w)
    times[:, : h * w] = 0
    arguments = cond["text"], times, cond["valid"].to(z.dtype), t, h, w
    return unpacked(network(packed(z), *arguments, return_dict=False)[0], z)


def _call_ltx_guided(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """A frame that is known stands after the video, at time 0."""
    t, h, w = z.shape[2:]
    tokens = torch.cat([packed(z), packed(cond["guide"].to(z))], 1)
    times = (time * 1000)[:, None].repeat(1, tokens.shape[1])
    times[:, -h * w :] = 0
    axes = torch.meshgrid(torch.arange(t + 1.0), torch.arange(h + 0.0), torch.arange(w + 0.0), indexing="ij")
    coordinates = torch.stack([axis.flatten() for axis in axes])[None].expand(len(z), -1, -1)
    arguments = cond["text"], times, cond["valid"].to(z.dtype)
    out = network(tokens, *arguments, video_coords=coordinates, return_dict=False)[0]
    return unpacked(out[:, : -h * w], z)


def _guide(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    guide = torch.randn(clips, CHANNELS, 1, *grid[1:], generator=generator)
    return {**masked(generator, clips, grid), "guide": guide}


def _ltx2() -> nn.Module:
    return build(
        "LTX2VideoTransformer3DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        audio_in_channels=CHANNELS,
        audio_out_channels=CHANNELS,
        audio_num_attention_heads=2,
        audio_attention_head_dim=4,
        audio_cross_attention_dim=8,
        num_layers=2,
        caption_channels=TEXT,
        use_prompt_adaln_single=False,
    )


def _call_ltx2(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    t, h, w = z.shape[2:]
    mask = cond["valid"].to(z.dtype)
    return unpacked(
        network(
            packed(z),
            cond["sound"].to(z),
            cond["text"],
            cond["text"],
            time * 1000,
            encoder_attention_mask=mask,
            audio_encoder_attention_mask=mask,
            num_frames=t,
            height=h,
            width=w,
            audio_num_frames=SOUND,
            return_dict=False,
        )[0],
        z,
    )


def _sound(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    sound = torch.randn(clips, SOUND, CHANNELS, generator=generator)
    return {**masked(generator, clips, grid), "sound": sound}


# -- others ------------------------------------------------------------------------------------------------------------


def _mochi() -> nn.Module:
    return build(
        "MochiTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        pooled_projection_dim=16,
        in_channels=CHANNELS,
        text_embed_dim=TEXT,
        time_embed_dim=8,
    )


def _call_mochi(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(z, cond["text"], time * 1000, cond["valid"], return_dict=False)[0]


def _easyanimate() -> nn.Module:
    return build(
        "EasyAnimateTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        patch_size=2,
        num_layers=2,
        mmdit_layers=1,
        time_embed_dim=8,
        text_embed_dim=TEXT,
    )


def _call_easyanimate(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(z, time * 1000, encoder_hidden_states=cond["text"], return_dict=False)[0]


def _allegro() -> nn.Module:
    return build(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        cross_attention_dim=24,
        sample_height=8,
        sample_width=8,
        sample_frames=4,
        caption_channels=TEXT,
    )


def _call_allegro(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    t, h, w = z.shape[2], z.shape[3] // 2, z.shape[4] // 2
    axes = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w)).T.reshape(3, 1, -1)
    pairs = [torch.outer(torch.arange(n), torch.tensor([1.0, 0.1])).repeat(1, 2) for n in (t, h, w)]
    rotary = tuple((angles.cos(), angles.sin()) for angles in pairs), tuple(axes)
    mask = cond["valid"].to(z.dtype)
    return network(z, cond["text"], time * 1000, None, mask, image_rotary_emb=rotary, return_dict=False)[0]


def _cosmos() -> nn.Module:
    return build(
        "CosmosTransformer3DModel",
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        text_embed_dim=TEXT,
        adaln_lora_dim=4,
        max_size=(8, 32, 32),
        concat_padding_mask=False,  # its resizing needs torchvision
        extra_pos_embed_type=None,
    )


def _call_cosmos(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(z, time, cond["text"], return_dict=False)[0]


def _kandinsky() -> nn.Module:
    return build(
        "Kandinsky5Transformer3DModel",
        in_visual_dim=CHANNELS,
        out_visual_dim=CHANNELS,
        in_text_dim=TEXT,
        in_text_dim2=TEXT,
        time_dim=8,
        model_dim=20,
        ff_dim=32,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(2, 4, 4),
    )


def _call_kandinsky(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    places = [torch.arange(n) for n in (z.shape[2], z.shape[3] // 2, z.shape[4] // 2)]
    words = torch.arange(cond["text"].shape[1])
    arguments = cond["text"], (time * 1000).to(z.dtype), cond["pooled"], places, words
    return network(z.movedim(1, -1), *arguments, return_dict=False).movedim(-1, 1)


FAMILIES = {
    "cogvideox": Family(_cogvideox, _call_cogvideox, halved, plain),
    "cogvideox-2b": Family(partial(_cogvideox, rotary=False), _call_cogvideox, halved, plain),
    "cogvideox-1.5": Family(
        partial(_cogvideox, patch_size_t=2),
        _call_cogvideox,
        lambda grid: (CHANNELS, 2 * grid[0], 2 * grid[1], 2 * grid[2]),
        plain,
    ),
    "consisid": Family(partial(_cogvideox, "ConsisIDTransformer3DModel"), _call_cogvideox, halved, plain),
    "ltx": Family(_ltx, _call_ltx, whole, masked),
    "ltx-image": Family(_ltx, _call_ltx_image, whole, masked),
    "ltx-guided": Family(_ltx, _call_ltx_guided, whole, _guide, lambda grid: (0, grid[1] * grid[2])),
    "ltx-2": Family(_ltx2, _call_ltx2, whole, _sound),
    "mochi": Family(_mochi, _call_mochi, halved, masked),
    "easyanimate": Family(_easyanimate, _call_easyanimate, halved, plain),
    "allegro": Family(_allegro, _call_allegro, halved, masked),
    "cosmos": Family(_cosmos, _call_cosmos, halved, plain),
    "kandinsky5": Family(_kandinsky, _call_kandinsky, halved, pooled),
}
