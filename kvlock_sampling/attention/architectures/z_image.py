"""Z-Image (diffusers): joint attention in `layers`, image first, padded to a multiple of 32 tokens, then text."""

from ..architecture import Architecture

Z_IMAGE = Architecture(
    name="z-image",
    classes=("diffusers.models.transformers.transformer_z_image:ZImageTransformer2DModel",),
    layers=("layers.*.attention",),
    patch=(1, 2, 2),
    text="last",
    text_arguments=(),
)
