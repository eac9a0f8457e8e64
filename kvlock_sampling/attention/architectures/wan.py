"""Wan 2.1 and 2.2, SkyReels V2, ChronoEdit, Wan Animate and AnyFlow (diffusers): video-only self-attention in `attn1`.

Wan Animate's reference image is the first latent frame.
"""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

ARCHITECTURE = Architecture(
    name="wan",
    classes=(
        "diffusers.models.transformers.transformer_wan:WanTransformer3DModel",
        "diffusers.models.transformers.transformer_skyreels_v2:SkyReelsV2Transformer3DModel",
        "diffusers.models.transformers.transformer_chronoedit:ChronoEditTransformer3DModel",
        "diffusers.models.transformers.transformer_wan_animate:WanAnimateTransformer3DModel",
        "diffusers.models.transformers.transformer_anyflow:AnyFlowTransformer3DModel",
    ),
    layers=("blocks.*.attn1",),
    patch=lambda network: network.config.patch_size,
    flow=TokenFlow(
        "norm_out",
        # Modulation per token is (rows, tokens, 6, dim), but (rows, 6, tokens, dim) in SkyReels' diffusion forcing.
        tables=(Table("rotary_emb", 1), Table("temb", 1, ndim=4), Table("temb", 2, ndim=4)),
        supported=lambda network: (
            not any(kind.__name__.startswith(("WanAnimate", "AnyFlow")) for kind in type(network).mro())
        ),
    ),
)
