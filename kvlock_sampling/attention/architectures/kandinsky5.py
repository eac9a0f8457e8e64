"""Kandinsky 5 (diffusers): video-only self-attention of `visual_transformer_blocks`."""

from typing import Any

from ...types import AttentionError
from ..architecture import Architecture


def _patch(network: Any) -> tuple[int, ...]:
    if network.config.attention_type != "regular":
        raise AttentionError(
            f"Kandinsky 5 has attention_type={network.config.attention_type!r}, which puts tokens in the order of "
            "8 x 8 blocks.\n  Use a checkpoint whose attention_type is 'regular'."
        )
    return tuple(network.config.patch_size)


KANDINSKY5 = Architecture(
    name="kandinsky5",
    classes=("diffusers.models.transformers.transformer_kandinsky:Kandinsky5Transformer3DModel",),
    layers=("visual_transformer_blocks.*.self_attention",),
    patch=_patch,
)
