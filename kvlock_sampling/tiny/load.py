"""Load the embedded model with the codec, prompts and schedule that an edit needs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..denoisers import FlowDenoiser
from ..samplers import flow_sigmas
from ..types import KVLockError
from .model import PATCH, TinyWan, tokenize
from .world import FRAMES, SIZE

WEIGHTS = Path(__file__).with_name("weights.safetensors")


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
        return pixels.clone()

    def decode(self, latents: Tensor) -> Tensor:
        return latents.clamp(-1, 1)

    def prompt(self, texts: str | Sequence[str]) -> Tensor:
        return tokenize(texts)

    def sigmas(self, steps: int, strength: float = 1.0) -> Tensor:
        return flow_sigmas(steps, shift=3.0, t_max=min(0.98, strength))


def load(path: str | os.PathLike[str] = "tiny", *, device: torch.device | str = "cpu") -> TinyVideo:
    """Load the embedded model.

    Args:
        path: "tiny" for the weights in the package, a `.safetensors` file, or a folder with `weights.safetensors`.
        device: Where to put the weights.

    Raises:
        KVLockError: The file does not exist or holds weights of another architecture, or diffusers is not installed.
    """
    file = WEIGHTS if str(path) == "tiny" else Path(path)
    if file.is_dir():
        file = file / "weights.safetensors"
    if not file.is_file():
        raise KVLockError(
            f"no model at {str(path)!r}; expected 'tiny', or a file or folder of its weights.safetensors."
        )
    network = TinyWan()
    try:
        with safe_open(file, framework="pt") as weights:
            state = {name: weights.get_tensor(name).float() for name in weights.keys()}  # noqa: SIM118 - not a dict
        network.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise KVLockError(f"{str(path)!r} does not hold weights of the embedded architecture: {first}") from error
    return TinyVideo(network.to(device))
