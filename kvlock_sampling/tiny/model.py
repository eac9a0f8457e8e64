"""The embedded model: a word table in front of diffusers' own `WanTransformer3DModel`, in a small size.

It works in pixel space (there is no VAE): its latents are the clip itself, (batch, 3, 8, 32, 32) in [-1, 1].
It predicts x0 from the rectified-flow input z_t = (1 - t) * x0 + t * noise, because 96 values of patch noise do not
fit through a 128-wide stream, which a velocity prediction would have to carry.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..types import KVLockError
from ..utils.torchvision import broken_torchvision_hidden
from .world import COLOURS, EMPTY_PROMPT, MOTIONS, SHAPES

with broken_torchvision_hidden():
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

PROMPT_LENGTH = 8
PATCH = (2, 4, 4)


def _vocabulary() -> tuple[str, ...]:
    words = ["a", *COLOURS, *SHAPES]
    for sentence in [EMPTY_PROMPT, *(phrase for phrase, _ in MOTIONS.values())]:
        words += sentence.split()
    return tuple(dict.fromkeys(words))


VOCABULARY = _vocabulary()
_INDEX = {word: i + 1 for i, word in enumerate(VOCABULARY)}  # 0 is padding


class PromptError(KVLockError, ValueError):
    """A prompt the embedded model cannot read."""


def tokenize(prompts: str | Sequence[str]) -> Tensor:
    """Turn prompts into word indices (batch, PROMPT_LENGTH), padded with 0. The empty prompt is the unconditional one.

    Raises:
        PromptError: a word is not in the vocabulary, or the prompt is too long.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    rows = torch.zeros(len(prompts), PROMPT_LENGTH, dtype=torch.long)
    for row, prompt in zip(rows, prompts, strict=True):
        words = prompt.lower().replace(",", " ").replace(".", " ").split()
        if len(words) > PROMPT_LENGTH:
            raise PromptError(
                f"prompt {prompt!r} has {len(words)} words; the embedded model reads {PROMPT_LENGTH} at most.\n"
                '  Try "a red circle moving left".'
            )
        for i, word in enumerate(words):
            if word not in _INDEX:
                near = difflib.get_close_matches(word, VOCABULARY, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise PromptError(
                    f"the embedded model does not know the word {word!r} in prompt {prompt!r}.{hint}\n"
                    f"  It knows: {', '.join(VOCABULARY)}.\n"
                    '  Try "a red circle moving left" or "an empty scene".'
                )
            row[i] = _INDEX[word]
    return rows


class TinyWan(nn.Module):
    """A text-to-video rectified-flow model of about 1.8 million parameters that predicts x0."""

    def __init__(self, dim: int = 128, layers: int = 6, heads: int = 4, text_dim: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY) + 1, text_dim)
        self.transformer = WanTransformer3DModel(
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
        """Predict x0.  z: (batch, 3, frames, height, width); t: (batch,) in [0, 1]; cond: prompts or word indices."""
        words = cond if isinstance(cond, Tensor) else tokenize(cond)
        text = self.words(words.to(z.device).expand(len(z), -1))
        return self.transformer(z, t * 1000, text, return_dict=False)[0]
