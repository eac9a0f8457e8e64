"""HunyuanVideo, FramePack, HunyuanVideo 1.5 and HunyuanImage 2.1 (diffusers): joint attention, video first.

The text refiner is not locked. HunyuanVideo 1.5 has two texts and an image behind the video, HunyuanImage two texts.
FramePack packs past frames before the video: layers=kv.find_layers(model).with_extra(before=count).
"""

from ..architecture import DOUBLE_AND_SINGLE, Architecture
from ..layers import Table, TokenFlow

_TEXTS = ("encoder_hidden_states", "encoder_hidden_states_2")

HUNYUAN_IMAGE = Architecture(
    "hunyuan-image",
    ("diffusers.*:HunyuanImageTransformer2DModel",),
    DOUBLE_AND_SINGLE,
    patch=lambda network: (1, 1, *network.config.patch_size)[-3:],
    text="last",
    text_arguments=_TEXTS,
)

HUNYUAN_VIDEO = Architecture(
    "hunyuan-video",
    ("diffusers.*:HunyuanVideoTransformer3DModel", "diffusers.*:HunyuanVideoFramepackTransformer3DModel"),
    DOUBLE_AND_SINGLE,
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
    "hunyuan-video-1.5",
    ("diffusers.*:HunyuanVideo15Transformer3DModel",),
    ("transformer_blocks.*.attn",),
    text="last",
    text_arguments=(*_TEXTS, "image_embeds"),
    flow=TokenFlow("norm_out", tables=(Table("freqs_cis", 0),)),
)
