"""FLUX.2 (diffusers): joint attention, text first; its latents come packed 2 x 2 into channels already.

Latents may be packed, (batch, tokens, channels), or (batch, channels, height, width) of one latent per token.
References stand after: sites=kv.find_sites(model).with_extra(after=their tokens).
"""

from ..architecture import Architecture, Layers

ARCHITECTURE = Architecture(
    name="flux-2",
    classes=("diffusers.models.transformers.transformer_flux2:Flux2Transformer2DModel",),
    sites=("transformer_blocks.*.attn", Layers("single_transformer_blocks.*.attn", optional=True)),
    rows_first=True,
    patch=(1, 1, 1),
    text="first",
    axes="b tokens c",
)
