"""Allegro (diffusers): video-only self-attention in `attn1`."""

from ..architecture import Architecture

ALLEGRO = Architecture(
    name="allegro",
    classes=("diffusers.models.transformers.transformer_allegro:AllegroTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (network.config.patch_size_t, network.config.patch_size, network.config.patch_size),
)
