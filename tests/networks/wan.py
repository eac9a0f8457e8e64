"""Wan and what is built on it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .base import CHANNELS, TEXT, Cond, Experts, Family, Grid, build, halved, plain, text

CONTROL = 6
"""Channels of the control, of VACE, and of an image's latents and mask beside the noisy ones."""

IMAGE = 3
"""Tokens of an image's embedding."""


def _build(kind: str = "WanTransformer3DModel", **more: Any) -> nn.Module:
    return build(
        kind,
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=CHANNELS,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=64,
        **{"in_channels": CHANNELS, **more},
    )


def _call(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return network(z, time * 1000, cond["text"], return_dict=False)[0]


def _call_image(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    both = torch.cat([z, cond["control"].to(z)], 1)
    return network(both, time * 1000, cond["text"], cond["image"], return_dict=False)[0]


def _call_per_token(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """The first frame is known: its tokens are at time 0."""
    frame = z.shape[3] * z.shape[4] // 4
    times = (time * 1000)[:, None].repeat(1, z.shape[2] * frame)
    times[:, :frame] = 0
    return network(z, times, cond["text"], return_dict=False)[0]


def _call_experts(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    return _call(network.at(time), z, time, cond)


def _call_vace(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    control = cond["control"].to(z)
    return network(z, time * 1000, cond["text"], control_hidden_states=control, return_dict=False)[0]


def _call_forcing(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """Diffusion forcing: every frame has a time of its own; the first is known."""
    times = (time * 1000)[:, None].repeat(1, z.shape[2])
    times[:, 0] = 0
    return network(z, times, cond["text"], enable_diffusion_forcing=True, return_dict=False)[0]


def _call_anyflow(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    times = (time * 1000)[:, None].expand(-1, z.shape[2])  # one per frame
    return network(z.transpose(1, 2), times, times / 2, cond["text"], return_dict=False)[0].transpose(1, 2)


def _call_animate(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    both = torch.cat([z, cond["control"].to(z)], 1)
    given = {"pose_hidden_states": cond["pose"].to(z), "face_pixel_values": cond["face"].to(z)}
    return network(both, time * 1000, cond["text"], cond["image"], return_dict=False, **given)[0]


def _control(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    shape = clips, CONTROL, *halved(grid)[1:]
    return {"text": text(generator, clips), "control": torch.randn(shape, generator=generator)}


def _image(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    # The layers take the last 512 tokens for text, whatever stands before them for the image.
    embedding = {"image": text(generator, clips, IMAGE), "text": text(generator, clips, 512)}
    return {**_control(generator, clips, grid), **embedding}


def _animated(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    """The reference is the first latent frame: a pose for each of the others, four pictures of a face for each."""
    frames, height, width = halved(grid)[1:]
    pose = torch.randn(clips, CHANNELS, frames - 1, height, width, generator=generator)
    face = torch.randn(clips, 3, 4 * (frames - 2) + 1, 8, 8, generator=generator)
    control = torch.randn(clips, CHANNELS + 4, frames, height, width, generator=generator)
    return {**_image(generator, clips, grid), "control": control, "pose": pose, "face": face}


FAMILIES = {
    "wan": Family(_build, _call, halved, plain),
    "wan-2.2": Family(partial(Experts, _build), _call_experts, halved, plain),
    "wan-2.2-ti2v": Family(_build, _call_per_token, halved, plain),
    "wan-image": Family(
        partial(_build, image_dim=TEXT, added_kv_proj_dim=24, in_channels=CHANNELS + CONTROL),
        _call_image,
        halved,
        _image,
    ),
    "wan-vace": Family(
        partial(_build, "WanVACETransformer3DModel", vace_layers=[0], vace_in_channels=CONTROL),
        _call_vace,
        halved,
        _control,
    ),
    "skyreels-v2": Family(partial(_build, "SkyReelsV2Transformer3DModel"), _call, halved, plain),
    "skyreels-v2-df": Family(partial(_build, "SkyReelsV2Transformer3DModel"), _call_forcing, halved, plain),
    "chronoedit": Family(partial(_build, "ChronoEditTransformer3DModel"), _call, halved, plain),
    "wan-animate": Family(
        partial(
            _build,
            "WanAnimateTransformer3DModel",
            in_channels=2 * CHANNELS + 4,
            latent_channels=CHANNELS,
            image_dim=TEXT,
            added_kv_proj_dim=24,
            motion_encoder_channel_sizes={"4": 4, "8": 4},
            motion_encoder_size=8,
            motion_style_dim=8,
            motion_dim=4,
            motion_encoder_dim=8,
            face_encoder_hidden_dim=8,
            face_encoder_num_heads=2,
            inject_face_latents_blocks=2,
        ),
        _call_animate,
        halved,
        _animated,
    ),
    "anyflow": Family(partial(_build, "AnyFlowTransformer3DModel"), _call_anyflow, halved, plain),
}
