"""Load the embedded model, or one trained by `python -m kvlock_sampling.tiny.train`, ready for a sampler."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..denoisers import FlowDenoiser
from ..samplers import flow_sigmas
from ..types import KVLockError
from ..utils.files import atomic
from .model import PATCH, TinyWan, tokenize
from .world import FRAMES, SIZE

WEIGHTS = Path(__file__).with_name("weights.safetensors")


class ModelError(KVLockError, ValueError):
    """A model that cannot be loaded."""


class TinyVideo:
    """The embedded model with everything an edit needs around it. There is no VAE: latents are the pixels.

    denoiser: `denoiser(x, sigma, cond=words) -> x0-hat` in variance-exploding form, for any k-diffusion sampler.
    frames, size: the clips it was trained on, 8 frames of 32 x 32 in [-1, 1].
    """

    frames, size, patch = FRAMES, (SIZE, SIZE), PATCH
    cfg_scale = 3.0

    def __init__(self, network: TinyWan) -> None:
        self.network = network.eval().requires_grad_(False)
        self.denoiser = FlowDenoiser(self.network, prediction="x0")

    def encode(self, pixels: Tensor) -> Tensor:
        """Clips (batch, 3, frames, height, width) in [-1, 1] to latents; here the same."""
        return pixels.clone()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to clips in [-1, 1]."""
        return latents.clamp(-1, 1)

    def prompt(self, texts: str | Sequence[str]) -> Tensor:
        """Prompts to conditioning, (batch, words). "" is the unconditional prompt. Raises PromptError."""
        return tokenize(texts)

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        """The model's schedule: `steps` noise levels and a final 0. strength < 1 starts at that time."""
        return flow_sigmas(steps, shift=3.0, t_max=min(0.98, strength))


def save(weights: Mapping[str, Tensor], path: str | os.PathLike[str], *, about: Mapping[str, object]) -> Path:
    """Write weights as float16 safetensors with `about` in the header, under a temporary name first."""
    path = Path(path)
    half = {k: v.detach().half().contiguous().cpu() if v.is_floating_point() else v.cpu() for k, v in weights.items()}
    with atomic(path) as temporary:
        save_file(half, temporary, metadata={"kvlock": json.dumps(dict(about))})
    return path


def load(path: str | os.PathLike[str] = "tiny", *, device: torch.device | str = "cpu") -> TinyVideo:
    """Load the embedded model ("tiny"), a folder made by the training script, or a `.safetensors` file of it.

    Raises:
        ModelError: nothing there, or not weights of this architecture.
    """
    file = WEIGHTS if str(path) == "tiny" else Path(path)
    if file.is_dir():
        file = file / "weights.safetensors"
    if not file.is_file():
        raise ModelError(
            f"no model at {str(path)!r}; expected 'tiny' (the embedded model) or a folder holding weights.safetensors, "
            "as written by\n  python -m kvlock_sampling.tiny.train --out FOLDER"
        )
    try:
        with safe_open(file, framework="pt") as weights:
            state = {name: weights.get_tensor(name).float() for name in weights.keys()}  # noqa: SIM118 - not a dict
        network = TinyWan()
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise ModelError(
            f"{str(path)!r} does not hold weights of the embedded architecture: {str(error).splitlines()[0]}\n"
            "  Weights come from python -m kvlock_sampling.tiny.train --out FOLDER."
        ) from error
    return TinyVideo(network.to(device))
