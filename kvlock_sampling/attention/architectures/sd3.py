"""Stable Diffusion 3 and 3.5 (diffusers): joint attention, image first; 3.5 medium adds image-only `attn2`."""

from ..architecture import Architecture, LayerPattern
from ..layers import TokenFlow

SD3 = Architecture(
    name="sd3",
    classes=("diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("transformer_blocks.*.attn2", text="none", optional=True)),
    patch=lambda network: (1, network.config.patch_size, network.config.patch_size),
    text="last",
    flow=TokenFlow("norm_out"),
)
