"""Qwen-Image and its edit models (diffusers): joint attention, text first; latents packed or (batch, c, h, w).

Tokens of the images to edit stand last: layers=kv.find_layers(model).with_extra(after=count).
"""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

QWEN_IMAGE = Architecture(
    name="qwen-image",
    classes=("diffusers.models.transformers.transformer_qwenimage:QwenImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    patch=(1, 2, 2),
    text="first",
    flow=TokenFlow(
        "norm_out",
        tables=(Table("image_rotary_emb", 0, item=0), Table("modulate_index", 1)),
        # The later edit models also pass the reference's timesteps to every block, which doubles the rows.
        interleaves=lambda network: not getattr(network, "zero_cond_t", False),
    ),
)
