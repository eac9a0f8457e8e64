"""Small networks of every family with random weights, made of the libraries' own classes, without a download.

What `random_network` returns goes into `check_layers` as it is. They draw nothing sensible.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...attention import AttentionLayers, find_layers
from ...denoisers import FlowDenoiser
from ...types import KVLockError
from ...utils.torchvision import broken_torchvision_hidden
from . import hunyuan, image, k_diffusion, video, wan
from .base import Called, enliven

FAMILIES = {**wan.FAMILIES, **hunyuan.FAMILIES, **video.FAMILIES, **image.FAMILIES, **k_diffusion.FAMILIES}
"""Names for `random_network`, and how each is made."""


class RandomNetwork(NamedTuple):
    """A denoiser of variance-exploding form, latents of some clips for it, and the arguments that go with them.

    layers: the network's, with extra tokens counted where its call has some.
    """

    denoiser: FlowDenoiser
    x: Tensor
    extra_args: dict[str, Any]
    layers: AttentionLayers


def random_network(
    name: str = "wan", *, grid: tuple[int, int, int] = (2, 3, 4), clips: int = 2, seed: int = 0
) -> RandomNetwork:
    """A network of one family, a few thousand weights, every one of which counts, and all that a call of it needs.

    name: of `FAMILIES`, e.g. "wan", "wan-2.2" (two experts), "cogvideox", "hunyuan-video", "ltx", "mochi", "flux".
    grid: tokens along (time, height, width); pictures have one frame.  clips: rows of x and of every argument.
    seed: of weights, latents and arguments; torch's global generator is left alone.

    >>> network = random_network("cogvideox", grid=(2, 2, 2))
    >>> network.x.shape, network.denoiser(network.x, torch.ones(2), **network.extra_args).shape
    (torch.Size([2, 4, 2, 4, 4]), torch.Size([2, 4, 2, 4, 4]))

    Raises:
        KVLockError: an unknown name, or a library lacks the class.
    """
    if name not in FAMILIES:
        raise KVLockError(f"no random network is called {name!r}; there are {', '.join(FAMILIES)}.")
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)
    with broken_torchvision_hidden(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            network = enliven(family.build(), seed)
        except (ImportError, AttributeError) as error:
            raise KVLockError(f"{name!r} is not to be had here: {error}.\n  pip install -U diffusers") from error
    denoiser = FlowDenoiser(Called(network, family.call).eval())
    x = torch.randn(clips, *family.latents(grid), generator=generator) * 2
    before, after = family.extra(grid)
    layers = find_layers(denoiser).with_extra(before=before, after=after)
    return RandomNetwork(denoiser, x, {"cond": family.cond(generator, clips, grid)}, layers)
