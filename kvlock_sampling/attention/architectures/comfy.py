"""ComfyUI's own networks. A network is found in the BaseModel that wraps it. Text, where it is joined, stands first.

Reference tokens are declared by the caller: layers=kv.find_layers(model).with_extra(before=count), or after=count.
They stand last for Flux, Qwen-Image, and Wan's `context_latents`, S2V and HuMo; first for HunyuanVideo, Z-Image, and
Wan's `ref_conv`. LTX-Video's guides are latent frames of the clip itself: set the mask to 0 there.
"""

from typing import Any

from ..architecture import Architecture, LayerPattern
from ..layers import Table, TokenFlow


def _is(*names: str) -> Any:
    """Whether a network is of one of these classes, and not of a subclass, whose blocks may take other arguments."""
    return lambda network: type(network).__name__ in names


# Cosmos 1. The first part of a block is self-attention.
COMFY_COSMOS = Architecture(
    name="cosmos (ComfyUI)",
    classes=("comfy.ldm.cosmos.model:GeneralDIT",),
    layers=("blocks.*.blocks.0.block.attn",),
    patch=lambda network: (network.patch_temporal, network.patch_spatial, network.patch_spatial),
)

# Also Anima.
COMFY_COSMOS_2 = Architecture(
    name="cosmos-predict2 (ComfyUI)",
    classes=("comfy.ldm.cosmos.predict2:MiniTrainDIT",),
    layers=("blocks.*.self_attn",),
    patch=lambda network: (network.patch_temporal, network.patch_spatial, network.patch_spatial),
)


def _own_modulation(block: Any) -> bool:
    return bool(getattr(block, "modulation", hasattr(block, "img_mod")))  # older blocks do not say


# FLUX.1 and 2, Kontext, Chroma. A block calls attention in its own forward.
COMFY_FLUX = Architecture(
    name="flux (ComfyUI)",
    classes=("comfy.ldm.flux.model:Flux", "comfy.ldm.chroma.model:Chroma"),
    layers=("double_blocks.*", LayerPattern("single_blocks.*", optional=True)),
    patch=lambda network: (1, network.patch_size, network.patch_size),
    text="first",
    text_arguments=("context",),
    flow=TokenFlow(
        "final_layer",
        tokens=("img", "x"),
        tables=(Table("pe", 2),),
        supported=_is("Flux", "Chroma"),
        # FLUX.2 and Chroma make the modulation outside the blocks, as objects whose rows cannot be told.
        interleaves=lambda network: _own_modulation(network.double_blocks[0]),
    ),
)

# HunyuanVideo, HunyuanVideo 1.5 and HunyuanImage 2.1. A block calls attention in its own forward.
COMFY_HUNYUAN = Architecture(
    name="hunyuan-video (ComfyUI)",
    classes=("comfy.ldm.hunyuan_video.model:HunyuanVideo",),
    layers=("double_blocks.*", LayerPattern("single_blocks.*", optional=True)),
    patch=lambda network: (1, *network.patch_size)[-3:],
    text="first",
    text_arguments=("context", "txt_byt5", "clip_fea"),
    flow=TokenFlow(
        "final_layer",
        tokens=("img", "x"),
        tables=(Table("pe", 2),),
        # With 33 channels (image to video) the first frame may have its own timestep.
        supported=lambda network: network.in_channels != 33,
    ),
)

# Also LTX-2, whose latents are a list of video and audio; layers for audio and text are not locked.
COMFY_LTX = Architecture(
    name="ltx (ComfyUI)",
    classes=("comfy.ldm.lightricks.model:LTXVModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=(1, 1, 1),
    flow=TokenFlow(
        "norm_out",
        tokens=("x",),
        tables=(Table("pe", 1), Table("timestep", 1)),
        supported=_is("LTXVModel"),
    ),
)

# Lumina 2 and Z-Image, which pads text and image to multiples of 32 tokens.
COMFY_LUMINA = Architecture(
    name="lumina (ComfyUI)",
    classes=("comfy.ldm.lumina.model:NextDiT",),
    layers=("layers.*.attention",),
    patch=lambda network: (1, network.patch_size, network.patch_size),
    text="first",
    text_arguments=("context",),
    padding="pad_tokens_multiple",
)

COMFY_QWEN_IMAGE = Architecture(
    name="qwen-image (ComfyUI)",
    classes=("comfy.ldm.qwen_image.model:QwenImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn",),
    patch=lambda network: (1, network.patch_size, network.patch_size),
    text="first",
    text_arguments=("context",),
    flow=TokenFlow(
        "norm_out",
        tables=(Table("image_rotary_emb", 2), Table("image_rotary_emb", 1)),  # newer and older versions
        supported=_is("QwenImageTransformer2DModel"),
    ),
)

COMFY_WAN_VACE = Architecture(
    name="wan-vace (ComfyUI)",
    classes=("comfy.ldm.wan.model:VaceWanModel",),
    layers=("vace_blocks.*.self_attn", "blocks.*.self_attn"),
    patch=lambda network: network.patch_size,
)

# Wan 2.1 and 2.2, camera control, S2V, HuMo, Animate, SCAIL and others.
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
        supported=lambda network: _is("WanModel", "CameraWanModel")(network) and network.in_dim != 48,
    ),
)
