"""k-diffusion's image transformers: version 1, and the global self-attention of every level of version 2 (HDiT).

Version 2 is an hourglass. Its neighbourhood and shifted-window attention never see the whole image, so those layers are
not locked.
"""

from typing import Any

from ..architecture import Architecture, LayerPattern


def _patch(network: Any, layer: str = "down_levels.0") -> tuple[int, int, int]:
    part, level, *_ = layer.split(".")
    factor = 2 ** (len(network.down_levels) if part == "mid_level" else int(level))
    return 1, network.patch_in.h * factor, network.patch_in.w * factor


IMAGE_TRANSFORMER_V1 = Architecture(
    name="k-diffusion-v1",
    classes=("*k_diffusion.models.image_transformer_v1:ImageTransformerDenoiserModelV1",),
    layers=("blocks.*.self_attn",),
    patch=lambda network: (1, *network.patch_in.patch_size),
)

IMAGE_TRANSFORMER_V2 = Architecture(
    name="k-diffusion-v2",
    classes=("*k_diffusion.models.image_transformer_v2:ImageTransformerDenoiserModelV2",),
    layers=tuple(
        LayerPattern(f"{part}.*.self_attn", kind="SelfAttentionBlock", optional=True)
        for part in ("down_levels.*", "mid_level", "up_levels.*")
    ),
    patch=_patch,
    layer_patch=_patch,
)
