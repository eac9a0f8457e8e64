"""HunyuanImage 2.1 and its refiner (diffusers): joint attention, image first, then two texts."""

from ..architecture import Architecture, LayerPattern

ARCHITECTURE = Architecture(
    name="hunyuan-image",
    classes=("diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageTransformer2DModel",),
    layers=("transformer_blocks.*.attn", LayerPattern("single_transformer_blocks.*.attn", optional=True)),
    patch=lambda network: (1, 1, *network.config.patch_size)[-3:],
    text="last",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_2"),
)
