"""CogView 4 (diffusers): joint attention, text first."""

from ..architecture import Architecture

ARCHITECTURE = Architecture(
    name="cogview4",
    classes=("diffusers.models.transformers.transformer_cogview4:CogView4Transformer2DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (1, network.config.patch_size, network.config.patch_size),
    text="first",
)
