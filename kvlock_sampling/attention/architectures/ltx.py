"""LTX-Video and LTX-2 (diffusers): video-only self-attention in `attn1`.

LTX-Video's latents are packed or (batch, c, t, h, w). Tokens of appended conditions stand last:
layers=kv.find_layers(model).with_extra(after=count). LTX-2's layers for audio and text are not locked.
"""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

LTX = Architecture(
    name="ltx",
    classes=("diffusers.models.transformers.transformer_ltx:LTXVideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (network.config.patch_size_t, network.config.patch_size, network.config.patch_size),
    flow=TokenFlow("norm_out", tables=(Table("image_rotary_emb", 1), Table("temb", 1))),
)

LTX_2 = Architecture(
    name="ltx-2",
    classes=("diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (network.config.patch_size_t, network.config.patch_size, network.config.patch_size),
)
