"""k-diffusion's image transformer, version 1."""

from ..architecture import Architecture

IMAGE_TRANSFORMER_V1 = Architecture(
    name="k-diffusion-v1",
    classes=("*k_diffusion.models.image_transformer_v1:ImageTransformerDenoiserModelV1",),
    layers=("blocks.*.self_attn",),
    patch=lambda network: (1, *network.patch_in.patch_size),
)
