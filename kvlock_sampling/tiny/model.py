"""The embedded model: a word embedding and a small `WanTransformer3DModel` of diffusers.

It has no VAE: its latents are the clip, (batch, 3, 8, 64, 64) in [-1, 1]. It predicts x0, because a velocity would have
to carry the noise of each patch, 384 values, through a residual stream that is 192 wide.
"""

import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..denoisers import FlowDenoiser
from ..samplers import flow_sigmas
from ..types import KVLockError
from ..utils.extras import hide_broken_torchvision, require
from .world import COLOURS, EMPTY_PROMPT, FRAMES, MOTIONS, SHAPES, SIZE

WEIGHTS = Path(__file__).with_name("weights.safetensors")
PATCH = (2, 8, 8)
SURFACES = ("matte", "glowing")
POSTS = ("with a post", "without a post")

# A prompt is five words: colour, shape, motion, surface, post. The position here is the word's row in the embedding;
# row 0 says nothing. An empty stage says EMPTY_PROMPT four times, then its post.
WORDS = ("", *COLOURS, *SHAPES, *MOTIONS, *SURFACES, EMPTY_PROMPT, *POSTS)
UNSAID = {tuple(MOTIONS): "standing still", SURFACES: "matte", POSTS: "without a post"}
EXAMPLE = '  Try "a red ball moving left, glowing, beside a post" or "an empty stage".'


def tokenize(prompts: str | Sequence[str]) -> Tensor:
    """Convert one or more prompts to rows of `WORDS`, (batch, 5); "" is unconditional.

    A prompt names a colour and a shape, or an empty stage. An object stands still, is matte, and has no post beside it
    unless the prompt says otherwise. Raises KVLockError for an unknown word, or without a colour or a shape.
    """
    return torch.tensor([_rows(p) for p in ([prompts] if isinstance(prompts, str) else prompts)])


def _rows(prompt: str) -> list[int]:
    text = re.sub(r"[\s,.]+", " ", f" {prompt.lower()} ").replace(" beside a ", " with a ")
    slots: list[tuple[str, ...]] = [tuple(COLOURS), SHAPES, tuple(MOTIONS), SURFACES, POSTS]
    if not text.strip():
        return [0] * len(slots)
    said = []
    if text.startswith(f" {EMPTY_PROMPT} "):
        text, said, slots = text.removeprefix(f" {EMPTY_PROMPT}"), [EMPTY_PROMPT] * 4, [POSTS]
    for phrases in slots:
        if (named := next((phrase for phrase in phrases if f" {phrase} " in text), UNSAID.get(phrases))) is None:
            raise KVLockError(f"prompt {prompt!r} names none of {', '.join(phrases)}.\n{EXAMPLE}")
        text = text.replace(f" {named} ", " ", 1)
        said.append(named)
    if unread := [word for word in text.split() if word != "a"]:
        near = difflib.get_close_matches(unread[0], " ".join(WORDS).split(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near and near[0] != unread[0] else ""
        raise KVLockError(f"the embedded model cannot read {unread[0]!r} in prompt {prompt!r}.{hint}\n{EXAMPLE}")
    return [WORDS.index(phrase) for phrase in said]


class TinyWan(nn.Module):
    """A text-to-video rectified-flow model of 5.2 million parameters that predicts x0; needs diffusers."""

    def __init__(self) -> None:
        super().__init__()
        hide_broken_torchvision()
        wan = require("diffusers.models.transformers.transformer_wan", "diffusers")
        self.emb = nn.Embedding(len(WORDS), 64)
        sizes = {"num_attention_heads": 6, "attention_head_dim": 32, "ffn_dim": 768, "num_layers": 8}
        text = {"text_dim": 64, "freq_dim": 64, "cross_attn_norm": True, "rope_max_seq_len": 64}
        self.dit = wan.WanTransformer3DModel(PATCH, in_channels=3, out_channels=3, **sizes, **text)

    def forward(self, z: Tensor, t: Tensor, cond: Tensor | Sequence[str] | str) -> Tensor:
        """Predict x0 from noisy clips z at flow time t (batch,) and prompts, or word indices (batch, words)."""
        words = cond if isinstance(cond, Tensor) else tokenize(cond)
        return self.dit(z, t * 1000, self.emb(words.to(z.device).expand(len(z), -1)), return_dict=False)[0]


class TinyVideo:
    """The embedded model as a `VideoModel` for `edit_video`. It has no VAE: latents are pixels.

    Attributes:
        network: The `TinyWan` that predicts x0.
        patch: Pixels per token along (time, height, width).
    """

    frames, size, patch = FRAMES, (SIZE, SIZE), PATCH
    cfg_scale = 3.0

    def __init__(self, network: TinyWan) -> None:
        self.network = network.eval().requires_grad_(False)
        self.denoiser = FlowDenoiser(self.network, prediction="x0")

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.to(next(self.network.parameters()).device, copy=True)

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    def prompt(self, texts: str | Sequence[str]) -> Tensor:
        return tokenize(texts)

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        return flow_sigmas(steps, shift=3.0, t_max=min(0.98, strength)).to(next(self.network.parameters()).device)


def load(path: str | os.PathLike[str] = "tiny", *, device: torch.device | str = "cpu") -> TinyVideo:
    """Load the embedded model.

    Args:
        path: "tiny" for the weights in the package, a `.safetensors` file, or a folder with `weights.safetensors`.
        device: Where to put the weights.

    Raises:
        KVLockError: The file does not exist or holds weights of another architecture, or diffusers is not installed.
    """
    file = WEIGHTS if str(path) == "tiny" else Path(path)
    network = TinyWan()
    try:
        weights = load_file(file / "weights.safetensors" if file.is_dir() else file)
        network.load_state_dict({name: value.float() for name, value in weights.items()})
    except (OSError, SafetensorError, RuntimeError) as error:
        text = f"does not hold weights of the embedded architecture: {' '.join(str(error).split())[:100]}"
        raise KVLockError(f"{str(path)!r} {text}\n  Expected 'tiny', or a folder of a diffusers pipeline.") from error
    return TinyVideo(network.to(device))
