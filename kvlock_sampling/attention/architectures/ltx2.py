"""LTX-2 (diffusers): the video's own attention in `attn1`; sound, text and what passes between them stay out."""

from ..architecture import Architecture

ARCHITECTURE = Architecture(
    name="ltx-2",
    classes=("diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (network.config.patch_size_t, network.config.patch_size, network.config.patch_size),
)
