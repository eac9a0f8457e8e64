"""Wan 2.1 and 2.2 (diffusers): video-only self-attention in `attn1`; text and image live in `attn2`."""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

ARCHITECTURE = Architecture(
    name="wan",
    classes=("diffusers.models.transformers.transformer_wan:WanTransformer3DModel",),
    layers=("blocks.*.attn1",),
    patch=lambda network: network.config.patch_size,
    flow=TokenFlow("norm_out", tables=(Table("rotary_emb", 1), Table("temb", 1, ndim=4))),
)
