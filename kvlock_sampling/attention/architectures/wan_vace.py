"""Wan VACE (diffusers): as Wan; `vace_blocks` run first, on one control token for each video token.

Reference images are latent frames before the clip's: set the mask to 0 there.
"""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

ARCHITECTURE = Architecture(
    name="wan-vace",
    classes=("diffusers.models.transformers.transformer_wan_vace:WanVACETransformer3DModel",),
    layers=("vace_blocks.*.attn1", "blocks.*.attn1"),
    patch=lambda network: network.config.patch_size,
    flow=TokenFlow("norm_out", tokens=("hidden_states", "control_hidden_states"), tables=(Table("rotary_emb", 1),)),
)
