"""LTX-2 (diffusers): video-only self-attention in `attn1`; layers for audio and text are not locked."""

from ..architecture import Architecture

ARCHITECTURE = Architecture(
    name="ltx-2",
    classes=("diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (network.config.patch_size_t, network.config.patch_size, network.config.patch_size),
)
