"""FLUX.2 (diffusers): joint attention, text first; its latents come packed 2 x 2 into channels already.

Latents may be packed, (batch, tokens, channels), or (batch, channels, height, width) of one latent per token.
References stand after: layers=kv.find_layers(model).with_extra(after=their tokens).
"""

from ..architecture import Architecture, LayerPattern

ARCHITECTURE = Architecture(
    name="flux-2",
    classes=("diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=(1, 1, 1),
    text="first",
)
