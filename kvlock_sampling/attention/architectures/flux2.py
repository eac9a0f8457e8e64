"""FLUX.2 (diffusers): joint attention, text first; the latents' channels are packed 2 x 2 already.

Tokens of reference images stand last: layers=kv.find_layers(model).with_extra(after=count).
"""

from ..architecture import Architecture, LayerPattern

ARCHITECTURE = Architecture(
    name="flux-2",
    classes=("diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=(1, 1, 1),
    text="first",
)
