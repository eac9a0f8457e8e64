"""FLUX.1, Chroma, Bria 3 and FLUX.2 (diffusers): joint attention, text first.

FLUX.1's latents are packed or (batch, c, h, w); the channels of FLUX.2's are packed 2 x 2 already. Tokens of reference
images, Kontext's too, stand last: layers=kv.find_layers(model).with_extra(after=count).
"""

from ..architecture import Architecture, LayerPattern
from ..layers import Table, TokenFlow

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

FLUX_2 = Architecture(
    name="flux-2",
    classes=("diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=(1, 1, 1),
    text="first",
)
