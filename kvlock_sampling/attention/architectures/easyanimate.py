"""EasyAnimate 5.1 (diffusers): joint attention, text first."""

from ..architecture import Architecture

EASYANIMATE = Architecture(
    name="easyanimate",
    classes=("diffusers.models.transformers.transformer_easyanimate:EasyAnimateTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    patch=lambda network: (1, network.config.patch_size, network.config.patch_size),
    text="first",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_t5"),
)
