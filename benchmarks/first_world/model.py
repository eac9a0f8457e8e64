"""The model of the first world: a word embedding and a small `WanTransformer3DModel` of diffusers.

It has no VAE: its latents are the clip, (batch, 3, 8, 32, 32) in [-1, 1]. It predicts x0, because a velocity would have
to carry the noise of each patch, 96 values, through a residual stream that is 128 wide.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kvlock_sampling.types import KVLockError
from kvlock_sampling.utils.extras import hide_broken_torchvision, require

from .world import COLOURS, EMPTY_PROMPT, MOTIONS, SHAPES

PROMPT_LENGTH = 8
PATCH = (2, 4, 4)

_PHRASES = " ".join([EMPTY_PROMPT, *(phrase for phrase, _ in MOTIONS.values())])
VOCABULARY = tuple(dict.fromkeys(["a", *COLOURS, *SHAPES, *_PHRASES.split()]))
_INDEX = {word: i + 1 for i, word in enumerate(VOCABULARY)}  # 0 is padding


def tokenize(prompts: str | Sequence[str]) -> Tensor:
    """Convert one or more prompts to word indices (batch, PROMPT_LENGTH), padded with 0; "" is unconditional."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = torch.zeros(len(prompts), PROMPT_LENGTH, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        if len(words) > PROMPT_LENGTH:
            raise KVLockError(f"prompt {prompt!r} has {len(words)} words; this model reads {PROMPT_LENGTH} at most.")
        for i, word in enumerate(words):
            if word not in _INDEX:
                near = difflib.get_close_matches(word, VOCABULARY, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise KVLockError(
                    f"the first world's model does not know the word {word!r} in prompt {prompt!r}.{hint}\n"
                    f'  It knows: {", ".join(VOCABULARY)}. Try "a red circle moving left".'
                )
            row[i] = _INDEX[word]
    return rows


class FirstWan(nn.Module):
    """A text-to-video rectified-flow model of about 1.8 million parameters that predicts x0; needs diffusers."""

    def __init__(self, dim: int = 128, layers: int = 6, heads: int = 4, text_dim: int = 64) -> None:
        super().__init__()
        hide_broken_torchvision()
        wan = require("diffusers.models.transformers.transformer_wan", "diffusers")
        self.words = nn.Embedding(len(VOCABULARY) + 1, text_dim)
        self.transformer = wan.WanTransformer3DModel(
            patch_size=PATCH,
            num_attention_heads=heads,
            attention_head_dim=dim // heads,
            in_channels=3,
            out_channels=3,
            text_dim=text_dim,
            freq_dim=64,
            ffn_dim=4 * dim,
            num_layers=layers,
            cross_attn_norm=True,
            rope_max_seq_len=32,
        )

    def forward(self, z: Tensor, t: Tensor, cond: Tensor | Sequence[str] | str) -> Tensor:
        """Predict x0 from noisy clips z at flow time t (batch,) and prompts, or word indices (batch, words)."""
        words = cond if isinstance(cond, Tensor) else tokenize(cond)
        text = self.words(words.to(z.device).expand(len(z), -1))
        return self.transformer(z, t * 1000, text, return_dict=False)[0]
