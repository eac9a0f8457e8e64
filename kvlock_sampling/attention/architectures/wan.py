"""Wan 2.1 and 2.2, VACE, SkyReels V2, ChronoEdit, Wan Animate and AnyFlow (diffusers): video-only self-attention.

Wan Animate's reference image is the first latent frame. VACE's `vace_blocks` run first, on one control token for each
video token; its reference images are latent frames before the clip's: set the mask to 0 there.
"""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

WAN = Architecture(
    "wan",
    tuple(f"diffusers.*:{n}Transformer3DModel" for n in ("Wan", "SkyReelsV2", "ChronoEdit", "WanAnimate", "AnyFlow")),
    ("blocks.*.attn1",),
    flow=TokenFlow(
        "norm_out",
        # Modulation per token is (rows, tokens, 6, dim), but (rows, 6, tokens, dim) in SkyReels' diffusion forcing.
        tables=(Table("rotary_emb", 1), Table("temb", 1, ndim=4), Table("temb", 2, ndim=4)),
        supported=lambda net: not any(k.__name__.startswith(("WanAnimate", "AnyFlow")) for k in type(net).mro()),
    ),
)

WAN_VACE = Architecture(
    "wan-vace",
    ("diffusers.*:WanVACETransformer3DModel",),
    ("vace_blocks.*.attn1", "blocks.*.attn1"),
    flow=TokenFlow("norm_out", tokens=("hidden_states", "control_hidden_states"), tables=(Table("rotary_emb", 1),)),
)
