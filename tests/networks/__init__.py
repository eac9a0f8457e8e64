"""Small networks with random weights of every family that the package declares, built from the libraries' classes.

`random_network` returns the arguments of `check_layers`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvlock_sampling.attention import AttentionLayers, find_layers
from kvlock_sampling.denoisers import FlowDenoiser
from kvlock_sampling.types import KVLockError

from . import hunyuan, image, k_diffusion, video, wan
from .base import Called, enliven

FAMILIES = {**wan.FAMILIES, **hunyuan.FAMILIES, **video.FAMILIES, **image.FAMILIES, **k_diffusion.FAMILIES}
"""Names for `random_network`, and how to build and call each network."""


class RandomNetwork(NamedTuple):
    """A denoiser in variance-exploding form, latents for it, and the arguments of a call.

    Attributes:
        denoiser: The network behind a `FlowDenoiser`.
        x: Latents, (clips, channels, ...).
        extra_args: The other arguments of a call.
        layers: Its attention layers, with extra tokens counted if its call has some.
    """

    denoiser: FlowDenoiser
    x: Tensor
    extra_args: dict[str, Any]
    layers: AttentionLayers


def random_network(
    name: str = "wan", *, grid: tuple[int, int, int] = (2, 3, 4), clips: int = 2, seed: int = 0
) -> RandomNetwork:
    """Build a network of one family with a few thousand weights, and the arguments of a call.

    Args:
        name: A key of `FAMILIES`, e.g. "wan", "wan-2.2" (two experts), "cogvideox", "hunyuan-video", "ltx", "flux".
        grid: Tokens along (time, height, width); image models have one frame.
        clips: Rows of x and of every argument.
        seed: Seed of weights, latents and arguments. Torch's global generator is not changed.

    >>> network = random_network("cogvideox", grid=(2, 2, 2))
    >>> network.x.shape, network.denoiser(network.x, torch.ones(2), **network.extra_args).shape
    (torch.Size([2, 4, 2, 4, 4]), torch.Size([2, 4, 2, 4, 4]))

    Raises:
        KVLockError: The name is unknown, or the installed library lacks the class.
    """
    if name not in FAMILIES:
        raise KVLockError(f"no random network is called {name!r}; there are {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = enliven(family.build(), seed)
        except (ImportError, AttributeError) as error:
            raise KVLockError(f"{name!r} cannot be built here: {error}.\n  pip install -U diffusers") from error
    denoiser = FlowDenoiser(Called(network, family.call).eval())
    x = torch.randn(clips, *family.latents(grid), generator=generator) * 2
    before, after = family.extra(grid)
    layers = find_layers(denoiser).with_extra(before=before, after=after)
    return RandomNetwork(denoiser, x, {"cond": family.cond(generator, clips, grid)}, layers)
