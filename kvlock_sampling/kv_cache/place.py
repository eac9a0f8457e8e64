"""Where stored tensors live, and how they reach the device of the evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .file import Pair
from .format import Packed
from .pool import Stored


def is_copied(tier: str, device: torch.device) -> bool:
    """Whether a level on disk gains from being held in memory. A map of the file is the host's memory already."""
    return device.type != "cpu" if tier == "device" else torch.cuda.is_available()


@torch.inference_mode(False)
def placed(packed: Packed, tier: str, device: torch.device) -> Packed:
    """Parts where the tier keeps them: on the device of the evaluation, or on the host, pinned beside CUDA."""
    return _moved(packed, device) if tier == "device" else packed.each(_to_host)


def _to_host(part: Tensor) -> Tensor:
    if not torch.cuda.is_available():
        return part.cpu()
    # CUDA's allocator rounds pinned blocks up to a power of two: what is counted is what is stored.
    return torch.empty(part.shape, dtype=part.dtype, pin_memory=True).copy_(part)


class Mover:
    """Brings one layer after another to the device, the next one while this one is being used.

    Stored bytes travel and are unpacked there: 8 bits halve the traffic as well. On the CPU, and for levels that live
    on the device already, nothing is moved. One layer at most is under way.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Stored, str, Pair] | None = None

    def fetch(self, stored: Stored, layer: str) -> Pair:
        """The layer's stored pair on the device."""
        if self._stream is None:
            return _both(stored.read(layer), self.device)
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] is not stored or ahead[1] != layer:
            pair = _both(stored.read(layer), self.device)
        else:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            pair = ahead[2]
            for packed in pair:  # made on the side stream, used on this one: not to be reused before that is done
                for part in packed.parts.values():
                    part.record_stream(current)
        self._prefetch(stored, layer)
        return pair

    def _prefetch(self, stored: Stored, layer: str) -> None:
        layers = stored.drawer.layers
        index = layers.index(layer) + 1
        if index < len(layers):
            with torch.cuda.stream(self._stream):
                self._ahead = (stored, layers[index], _both(stored.read(layers[index]), self.device))

    def forget(self) -> None:
        """Let go of what is under way."""
        self._ahead = None


def _both(pair: Pair, device: torch.device) -> Pair:
    key, value = pair
    return _moved(key, device), _moved(value, device)


def _moved(packed: Packed, device: torch.device) -> Packed:
    return packed if packed.device == device else packed.each(lambda part: part.to(device, non_blocking=True))
