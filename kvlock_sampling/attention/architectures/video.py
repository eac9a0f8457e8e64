"""Videos, all of diffusers: Allegro, CogVideoX, Cosmos 1 and 2, EasyAnimate 5.1, Kandinsky 5, LTX-Video, LTX-2, Mochi.

Self-attention is over the video alone, except where text is declared.
"""

from typing import Any

from ...masks.tokens import Grid
from ...types import AttentionError
from ..architecture import ATTN1, Architecture, config_patch
from ..layers import Table, TokenFlow


def _regular_patch(network: Any) -> Grid:
    if network.config.attention_type != "regular":
        raise AttentionError(
            f"Kandinsky 5 has attention_type={network.config.attention_type!r}, which puts tokens in the order of "
            "8 x 8 blocks.\n  Use a checkpoint whose attention_type is 'regular'."
        )
    return config_patch(network)


ALLEGRO = Architecture("allegro", ("diffusers.*:AllegroTransformer3DModel",), ATTN1)

# Also ConsisID. Joint attention, text first; 1.5 has two frames per token.
COGVIDEOX = Architecture(
    "cogvideox",
    ("diffusers.*:CogVideoXTransformer3DModel", "diffusers.*:ConsisIDTransformer3DModel"),
    ATTN1,
    text="first",
    # ConsisID adds face features to all tokens between the blocks.
    flow=TokenFlow(
        "norm_final",
        tables=(Table("image_rotary_emb", 0),),
        supported=lambda network: type(network).__name__ == "CogVideoXTransformer3DModel",
    ),
)

COSMOS = Architecture("cosmos", ("diffusers.*:CosmosTransformer3DModel",), ATTN1)

EASYANIMATE = Architecture(
    "easyanimate",
    ("diffusers.*:EasyAnimateTransformer3DModel",),
    ATTN1,
    text="first",
    text_arguments=("encoder_hidden_states", "encoder_hidden_states_t5"),
)

KANDINSKY5 = Architecture(
    "kandinsky5",
    ("diffusers.*:Kandinsky5Transformer3DModel",),
    ("visual_transformer_blocks.*.self_attention",),
    patch=_regular_patch,
)

# Latents packed or (batch, c, t, h, w). Tokens of appended conditions stand last:
# layers=kv.find_layers(model).with_extra(after=count).
LTX = Architecture(
    "ltx",
    ("diffusers.*:LTXVideoTransformer3DModel",),
    ATTN1,
    flow=TokenFlow("norm_out", tables=(Table("image_rotary_emb", 1), Table("temb", 1))),
)

# Layers for audio and text are not locked.
LTX_2 = Architecture("ltx-2", ("diffusers.*:LTX2VideoTransformer3DModel",), ATTN1)

# Joint attention, video first, then the valid text tokens; one call per row of the batch.
MOCHI = Architecture("mochi", ("diffusers.*:MochiTransformer3DModel",), ATTN1, text="last", rows_apart=True)
