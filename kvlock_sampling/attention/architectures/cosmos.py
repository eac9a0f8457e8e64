"""Cosmos 1 and 2 (diffusers): video-only self-attention in `attn1`."""

from ..architecture import Architecture

COSMOS = Architecture(
    name="cosmos",
    classes=("diffusers.models.transformers.transformer_cosmos:CosmosTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: network.config.patch_size,
)
