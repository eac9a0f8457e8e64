"""k-diffusion's image transformer, version 2 (hourglass, HDiT): the global self-attention of every level.

Tokens of each level are twice as large as those of the level above. Neighbourhood and shifted-window attention have no
sequence of the whole picture; those layers stay as they are.
"""

from typing import Any

from ..architecture import Architecture, Layers


def _patch(network: Any, site: str = "down_levels.0") -> tuple[int, int, int]:
    part, level, *_ = site.split(".")
    factor = 2 ** (len(network.down_levels) if part == "mid_level" else int(level))
    return 1, network.patch_in.h * factor, network.patch_in.w * factor


ARCHITECTURE = Architecture(
    name="k-diffusion-v2",
    classes=("*k_diffusion.models.image_transformer_v2:ImageTransformerDenoiserModelV2",),
    sites=(
        Layers("down_levels.*.*.self_attn", kind="SelfAttentionBlock", optional=True),
        Layers("mid_level.*.self_attn", kind="SelfAttentionBlock", optional=True),
        Layers("up_levels.*.*.self_attn", kind="SelfAttentionBlock", optional=True),
    ),
    patch=_patch,
    site_patch=_patch,
    axes="b c h w",
)
