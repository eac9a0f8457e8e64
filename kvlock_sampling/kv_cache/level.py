"""A level as a run sees it: K/V of every layer at one noise level, dequantised when they are asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.precision import working
from .errors import KVCacheError
from .format import unpack
from .place import Mover
from .pool import Stored


class Level:
    """K/V at one noise level. Good until the next lookup or put of its shelf, which may need its room.

    sigma: the noise level it stands for: the stored one, or the one asked for where two are interpolated.
    """

    def __init__(self, sigma: float, parts: tuple[tuple[Stored, float], ...], movers: tuple[Mover, ...]) -> None:
        self.sigma, self._parts, self._movers = sigma, parts, movers

    @property
    def sigmas(self) -> tuple[float, ...]:
        """The stored noise levels it is made of: one, or two."""
        return tuple(stored.sigma for stored, _ in self._parts)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in the order of the key."""
        return self._parts[0][0].drawer.layers

    def __contains__(self, layer: object) -> bool:
        return layer in self.layers

    def get(self, layer: str) -> tuple[Tensor, Tensor]:
        """Keys and values, (clips, heads, kept tokens, dim) each, in the dtype they came in, on the shelf's device.

        They may be the KV cache's own tensors: not to be written to.

        Raises:
            KVCacheError: no such layer, or the level has been dropped since.
        """
        if layer not in self.layers:
            raise KVCacheError(
                f"no K/V are kept of layer {layer!r}; this KV cache keeps those of {', '.join(self.layers)}."
            )
        sides = [
            [unpack(packed) for packed in mover.fetch(stored, layer)]
            for (stored, _), mover in zip(self._parts, self._movers, strict=False)
        ]
        if len(sides) == 1:
            return sides[0][0], sides[0][1]
        weight = self._parts[1][1]
        key, value = (torch.lerp(working(a), working(b), weight).to(a.dtype) for a, b in zip(*sides, strict=True))
        return key, value

    def __repr__(self) -> str:
        return f"Level(sigma={self.sigma:.4g}, from {', '.join(f'{s:.4g}' for s in self.sigmas)})"
