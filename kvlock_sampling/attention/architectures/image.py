"""Images, all of diffusers: CogView 4, FLUX.1 and 2, PixArt, Qwen-Image, Stable Diffusion 3 and 3.5, and Z-Image."""

from ..architecture import Architecture, LayerPattern
from ..layers import Table, TokenFlow

# Joint attention, text first.
COGVIEW_4 = Architecture(
    name="cogview4",
    classes=("diffusers.models.transformers.transformer_cogview4:CogView4Transformer2DModel",),
    layers=("transformer_blocks.*.attn1",),
    text="first",
)

# Also Chroma and Bria 3. Joint attention, text first; latents packed or (batch, c, h, w). Tokens of reference images,
# as of Kontext and FLUX.2, stand last: layers=kv.find_layers(model).with_extra(after=count).
FLUX = Architecture(
    name="flux",
    classes=(
        "diffusers.models.transformers.transformer_flux:FluxTransformer2DModel",
        "diffusers.models.transformers.transformer_chroma:ChromaTransformer2DModel",
        "diffusers.models.transformers.transformer_bria:BriaTransformer2DModel",
    ),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=(1, 2, 2),
    text="first",
    flow=TokenFlow("norm_out", tables=(Table("image_rotary_emb", 0),)),
)

# Likewise; the latents' channels are packed 2 x 2 already.
FLUX_2 = Architecture(
    name="flux-2",
    classes=("diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=(1, 1, 1),
    text="first",
)

# Alpha and sigma: image-only self-attention.
PIXART = Architecture(
    name="pixart",
    classes=("diffusers.models.transformers.pixart_transformer_2d:PixArtTransformer2DModel",),
    layers=("transformer_blocks.*.attn1",),
)

# Also its edit models. Joint attention, text first; latents packed or (batch, c, h, w). Tokens of the images to edit
# stand last: layers=kv.find_layers(model).with_extra(after=count).
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

# Joint attention, image first; 3.5 medium adds image-only `attn2`.
SD3 = Architecture(
    name="sd3",
    classes=("diffusers.models.transformers.transformer_sd3:SD3Transformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("transformer_blocks.*.attn2", text="none", optional=True)),
    text="last",
    flow=TokenFlow("norm_out"),
)

# Joint attention, image first, padded to a multiple of 32 tokens, then text.
Z_IMAGE = Architecture(
    name="z-image",
    classes=("diffusers.models.transformers.transformer_z_image:ZImageTransformer2DModel",),
    layers=("layers.*.attention",),
    patch=(1, 2, 2),
    text="last",
    text_arguments=(),
)
