"""FLUX.1, Chroma and Bria 3 (diffusers): joint attention, text first; latents packed or (batch, c, h, w).

Tokens of Kontext's reference image stand last: layers=kv.find_layers(model).with_extra(after=count).
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
