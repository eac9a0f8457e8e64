"""PixArt alpha and sigma (diffusers): image-only self-attention in `attn1`."""

from ..architecture import Architecture

PIXART = Architecture(
    name="pixart",
    classes=("diffusers.models.transformers.pixart_transformer_2d:PixArtTransformer2DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (1, network.config.patch_size, network.config.patch_size),
)
