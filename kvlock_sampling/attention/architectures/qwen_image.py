"""Qwen-Image and its edit models (diffusers): joint attention, text first; pictures in packed patches of 2 x 2.

Latents may be packed, (batch, tokens, channels), or (batch, channels, height, width) where the denoiser packs.
Pictures to edit stand after: layers=kv.find_layers(model).with_extra(after=their tokens).
"""

from ..architecture import Architecture
from ..foreground import Table, TokenFlow

ARCHITECTURE = Architecture(
    name="qwen-image",
    classes=("diffusers.models.transformers.transformer_qwenimage:QwenImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    # Its second edit models give every block times for the reference beside those of the picture: twice the rows.
    rows_first=lambda network: not getattr(network, "zero_cond_t", False),
    patch=(1, 2, 2),
    text="first",
    axes="b tokens c",
    flow=TokenFlow("norm_out", tables=(Table("image_rotary_emb", 0, item=0), Table("modulate_index", 1))),
)
