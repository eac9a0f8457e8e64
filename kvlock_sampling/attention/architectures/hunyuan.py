"""HunyuanVideo, FramePack, HunyuanVideo 1.5 and HunyuanImage 2.1 (diffusers): joint attention, video first.

The text refiner is not locked. HunyuanVideo 1.5 has two texts and an image behind the video, HunyuanImage two texts.
FramePack packs past frames before the video: layers=kv.find_layers(model).with_extra(before=count).
"""

from ..architecture import Architecture, LayerPattern
from ..layers import Table, TokenFlow

HUNYUAN_IMAGE = Architecture(
    name="hunyuan-image",
    classes=("diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=lambda network: (1, 1, *network.config.patch_size)[-3:],
    text="last",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_2"),
)

HUNYUAN_VIDEO = Architecture(
    name="hunyuan-video",
    classes=(
        "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTransformer3DModel",
        "diffusers.models.transformers.transformer_hunyuan_video_framepack:HunyuanVideoFramepackTransformer3DModel",
    ),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    text="last",
    text_arguments=("encoder_hidden_states", "image_embeds"),
    flow=TokenFlow(
        "norm_out",
        tables=(Table("freqs_cis", 0), Table("image_rotary_emb", 0)),
        # With "token_replace" the first frame has its own timestep, and blocks find its tokens by position.
        supported=lambda network: getattr(network.config, "image_condition_type", None) != "token_replace",
    ),
)

HUNYUAN_VIDEO_15 = Architecture(
    name="hunyuan-video-1.5",
    classes=("diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15Transformer3DModel",),
    layers=("transformer_blocks.*.attn",),
    text="last",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds"),
    flow=TokenFlow("norm_out", tables=(Table("freqs_cis", 0),)),
)
