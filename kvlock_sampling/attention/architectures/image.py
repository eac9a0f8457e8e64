"""Images: CogView 4, FLUX.1 and 2, PixArt, Qwen-Image, SD 3/3.5, Z-Image (diffusers); k-diffusion's transformer 1."""

from ..architecture import ATTN1, DOUBLE_AND_SINGLE, Architecture, LayerPattern
from ..layers import Table, TokenFlow

COGVIEW_4 = Architecture("cogview4", ("diffusers.*:CogView4Transformer2DModel",), ATTN1, text="first")

# Also Chroma and Bria 3. Joint attention, text first; latents packed or (batch, c, h, w). Tokens of reference images,
# as of Kontext and FLUX.2, stand last: layers=kv.find_layers(model).with_extra(after=count).
FLUX = Architecture(
    "flux",
    tuple(f"diffusers.*:{name}Transformer2DModel" for name in ("Flux", "Chroma", "Bria")),
    DOUBLE_AND_SINGLE,
    patch=(1, 2, 2),
    text="first",
    flow=TokenFlow("norm_out", tables=(Table("image_rotary_emb", 0),)),
)

# Likewise; the latents' channels are packed 2 x 2 already.
FLUX_2 = Architecture("flux-2", ("diffusers.*:Flux2Transformer2DModel",), DOUBLE_AND_SINGLE, (1, 1, 1), "first")

IMAGE_TRANSFORMER_V1 = Architecture(
    "k-diffusion-v1",
    ("*k_diffusion.models.image_transformer_v1:ImageTransformerDenoiserModelV1",),
    ("blocks.*.self_attn",),
    patch=lambda network: (1, *network.patch_in.patch_size),
)

# Alpha and sigma: image-only self-attention.
PIXART = Architecture("pixart", ("diffusers.*:PixArtTransformer2DModel",), ATTN1)

# Also its edit models. Joint attention, text first; latents packed or (batch, c, h, w). Tokens of the images to edit
# stand last: layers=kv.find_layers(model).with_extra(after=count).
QWEN_IMAGE = Architecture(
    "qwen-image",
    ("diffusers.*:QwenImageTransformer2DModel",),
    ("transformer_blocks.*.attn",),
    patch=(1, 2, 2),
    text="first",
    flow=TokenFlow(
        "norm_out",
        tables=(Table("image_rotary_emb", 0, item=0), Table("modulate_index", 1)),
        # The later edit models also pass the reference's timesteps to every block, which doubles the rows.
        interleaves=lambda network: not getattr(network, "zero_cond_t", False),
    ),
)

# Joint attention, image first; 3.5 medium adds image-only `attn2`.
SD3 = Architecture(
    "sd3",
    ("diffusers.*:SD3Transformer2DModel",),
    ("transformer_blocks.*.attn", LayerPattern("transformer_blocks.*.attn2", text="none", optional=True)),
    text="last",
    flow=TokenFlow("norm_out"),
)

# Joint attention, image first, padded to a multiple of 32 tokens, then text.
Z_IMAGE = Architecture(
    "z-image",
    ("diffusers.*:ZImageTransformer2DModel",),
    ("layers.*.attention",),
    patch=(1, 2, 2),
    text="last",
    text_arguments=(),
)
