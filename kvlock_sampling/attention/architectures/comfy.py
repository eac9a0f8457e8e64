"""ComfyUI's own networks: Wan 2.1 and 2.2, and VACE. A network is found in the BaseModel that wraps it."""

from ..architecture import Architecture
from ..layers import Table, TokenFlow

COMFY_WAN_VACE = Architecture(
    name="wan-vace (ComfyUI)",
    classes=("comfy.ldm.wan.model:VaceWanModel",),
    layers=("vace_blocks.*.self_attn", "blocks.*.self_attn"),
    patch=lambda network: network.patch_size,
)

COMFY_WAN = Architecture(
    name="wan (ComfyUI)",
    classes=("comfy.ldm.wan.model:WanModel",),
    layers=("blocks.*.self_attn",),
    patch=lambda network: network.patch_size,
    flow=TokenFlow(
        "head",
        tokens=("x",),
        tables=(Table("freqs", 1),),
        # With 48 channels (Wan 2.2 5B) frames may have times of their own, which blocks spread over all tokens.
        supported=lambda network: type(network).__name__ == "WanModel" and network.in_dim != 48,
    ),
)
