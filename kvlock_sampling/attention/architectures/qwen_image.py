"""Qwen-Image and its edit models (diffusers): joint attention, text first; pictures in packed patches of 2 x 2.

Latents may be packed, (batch, tokens, channels), or (batch, channels, height, width) where the denoiser packs.
Pictures to edit stand after: layers=kv.find_layers(model).with_extra(after=their tokens).
"""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

ARCHITECTURE = Architecture(
    name="qwen-image",
    classes=("diffusers.models.transformers.transformer_qwenimage:QwenImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    patch=(1, 2, 2),
    text="first",
    flow=TokenFlow(
        "norm_out",
        tables=(Table("image_rotary_emb", 0, item=0), Table("modulate_index", 1)),
        # The later edit models give every block the reference's times beside the picture's: twice the rows.
        interleaves=lambda network: not getattr(network, "zero_cond_t", False),
    ),
)
