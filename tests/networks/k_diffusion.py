"""k-diffusion's own image transformer, version 1."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvlock_sampling import samplers

from .base import Cond, Family, Grid

CHANNELS = 3
CLASSES = 4


@contextmanager
def _not_compiled() -> Iterator[None]:
    """These networks compile parts of themselves when first called, which takes longer than any test of them."""
    before = os.environ.get("K_DIFFUSION_USE_COMPILE")
    os.environ["K_DIFFUSION_USE_COMPILE"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["K_DIFFUSION_USE_COMPILE"]
        else:
            os.environ["K_DIFFUSION_USE_COMPILE"] = before


def _v1() -> nn.Module:
    with _not_compiled():
        module = samplers._module("models.image_transformer_v1")
    return module.ImageTransformerDenoiserModelV1(
        n_layers=2,
        d_model=64,
        d_ff=64,
        in_features=CHANNELS,
        out_features=CHANNELS,
        patch_size=(2, 2),
        num_classes=CLASSES,
    )


def _call(network: Any, z: Tensor, time: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    sigma = (time / (1 - time)).to(z.dtype)
    with _not_compiled():
        return network(z, sigma, class_cond=cond["class"])


def _cond(generator: torch.Generator, clips: int, grid: Grid) -> Cond:
    return {"class": torch.randint(CLASSES, (clips,), generator=generator)}


FAMILIES = {
    "k-diffusion-v1": Family(_v1, _call, lambda grid: (CHANNELS, 2 * grid[1], 2 * grid[2]), _cond),
}
