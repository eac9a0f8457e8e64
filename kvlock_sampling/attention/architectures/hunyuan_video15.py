"""HunyuanVideo 1.5 (diffusers): joint attention, video first, then two texts and an image."""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

ARCHITECTURE = Architecture(
    name="hunyuan-video-1.5",
    classes=("diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15Transformer3DModel",),
    layers=("transformer_blocks.*.attn",),
    patch=lambda network: (network.config.patch_size_t, network.config.patch_size, network.config.patch_size),
    text="last",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
    flow=TokenFlow("norm_out", tables=(Table("freqs_cis", 0),)),
)
