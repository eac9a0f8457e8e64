"""Load the first world's model as a `VideoModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvlock_sampling.tiny import TinyVideo

from .model import PATCH, FirstWan, tokenize
from .world import FRAMES, SIZE

WEIGHTS = Path(__file__).with_name("weights.safetensors")


class FirstVideo(TinyVideo):
    """The model of the first world. It has no VAE: latents are pixels, (batch, 3, 8, 32, 32) in [-1, 1]."""

    frames, size, patch = FRAMES, (SIZE, SIZE), PATCH

    def prompt(self, texts: str | Sequence[str]) -> Tensor:
        return tokenize(texts)


def load(path: Path = WEIGHTS, *, device: torch.device | str = "cpu") -> FirstVideo:
    """Load weights, as `train` writes them, onto a device."""
    network = FirstWan()
    network.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return FirstVideo(network.to(device))
