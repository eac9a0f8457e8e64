"""FLUX.1, Chroma and Bria 3 (diffusers): joint attention, text first; pictures in packed patches of 2 x 2.

Latents may be packed, (batch, tokens, channels), or (batch, channels, height, width) where the denoiser packs.
Kontext's reference stands after: layers=kv.find_layers(model).with_extra(after=its tokens).
"""

from ..architecture import Architecture, LayerPattern
from ..layers import Table, TokenFlow

ARCHITECTURE = Architecture(
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
