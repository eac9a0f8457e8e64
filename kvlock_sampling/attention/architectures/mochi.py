"""Mochi (diffusers): joint attention, video first, then the valid text tokens; one call per row of the batch."""

from ..architecture import Architecture

MOCHI = Architecture(
    name="mochi",
    classes=("diffusers.models.transformers.transformer_mochi:MochiTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (1, network.config.patch_size, network.config.patch_size),
    text="last",
    rows_apart=True,
)
