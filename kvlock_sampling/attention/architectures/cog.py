"""CogVideoX, also 1.5 with two frames per token, ConsisID and CogView 4 (diffusers): joint attention, text first."""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

COGVIDEOX = Architecture(
    name="cogvideox",
    classes=(
        "diffusers.models.transformers.cogvideox_transformer_3d:CogVideoXTransformer3DModel",
        "diffusers.models.transformers.consisid_transformer_3d:ConsisIDTransformer3DModel",
    ),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (network.config.get("patch_size_t") or 1, *[network.config.patch_size] * 2),
    text="first",
    # ConsisID adds face features to all tokens between the blocks.
    flow=TokenFlow(
        "norm_final",
        tables=(Table("image_rotary_emb", 0),),
        supported=lambda network: type(network).__name__ == "CogVideoXTransformer3DModel",
    ),
)

COGVIEW_4 = Architecture(
    name="cogview4",
    classes=("diffusers.models.transformers.transformer_cogview4:CogView4Transformer2DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (1, network.config.patch_size, network.config.patch_size),
    text="first",
)
