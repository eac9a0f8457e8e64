"""Videos, all of diffusers: Allegro, CogVideoX, Cosmos 1 and 2, EasyAnimate 5.1, Kandinsky 5, LTX-Video, LTX-2, Mochi.

Self-attention is over the video alone, except where text is declared.
"""

from typing import Any

from ...masks.tokens import Grid
from ...types import AttentionError
from ..architecture import Architecture, config_patch
from ..layers import Table, TokenFlow


def _regular_patch(network: Any) -> Grid:
    if network.config.attention_type != "regular":
        raise AttentionError(
            f"Kandinsky 5 has attention_type={network.config.attention_type!r}, which puts tokens in the order of "
            "8 x 8 blocks.\n  Use a checkpoint whose attention_type is 'regular'."
        )
    return config_patch(network)


ALLEGRO = Architecture(
    name="allegro",
    classes=("diffusers.models.transformers.transformer_allegro:AllegroTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
)

# Also ConsisID. Joint attention, text first; 1.5 has two frames per token.
COGVIDEOX = Architecture(
    name="cogvideox",
    classes=(
        "diffusers.models.transformers.cogvideox_transformer_3d:CogVideoXTransformer3DModel",
        "diffusers.models.transformers.consisid_transformer_3d:ConsisIDTransformer3DModel",
    ),
    layers=("transformer_blocks.*.attn1",),
    text="first",
    # ConsisID adds face features to all tokens between the blocks.
    flow=TokenFlow(
        "norm_final",
        tables=(Table("image_rotary_emb", 0),),
        supported=lambda network: type(network).__name__ == "CogVideoXTransformer3DModel",
    ),
)

COSMOS = Architecture(
    name="cosmos",
    classes=("diffusers.models.transformers.transformer_cosmos:CosmosTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
)

# Joint attention, text first.
EASYANIMATE = Architecture(
    name="easyanimate",
    classes=("diffusers.models.transformers.transformer_easyanimate:EasyAnimateTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    text="first",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_t5"),
)

KANDINSKY5 = Architecture(
    name="kandinsky5",
    classes=("diffusers.models.transformers.transformer_kandinsky:Kandinsky5Transformer3DModel",),
    layers=("visual_transformer_blocks.*.self_attention",),
    patch=_regular_patch,
)

# Latents packed or (batch, c, t, h, w). Tokens of appended conditions stand last:
# layers=kv.find_layers(model).with_extra(after=count).
LTX = Architecture(
    name="ltx",
    classes=("diffusers.models.transformers.transformer_ltx:LTXVideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    flow=TokenFlow("norm_out", tables=(Table("image_rotary_emb", 1), Table("temb", 1))),
)

# Layers for audio and text are not locked.
LTX_2 = Architecture(
    name="ltx-2",
    classes=("diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
)

# Joint attention, video first, then the valid text tokens; one call per row of the batch.
MOCHI = Architecture(
    name="mochi",
    classes=("diffusers.models.transformers.transformer_mochi:MochiTransformer3DModel",),
    layers=("transformer_blocks.*.attn1",),
    text="last",
    rows_apart=True,
)
