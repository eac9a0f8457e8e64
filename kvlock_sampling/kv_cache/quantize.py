"""Store keys and values in int8 with two scales, or unchanged.

x ~ values / 127 * channel * token, with one `channel` scale per clip, head and channel and one `token` scale per clip,
head and token. Each stored number is off by at most channel * token / 254. With |x| over the usual size of its channel,
averaged over channels, as the loudness of a token:
    channel = max over tokens of |x| / loudness,    token = max over channels of |x| / channel.

Outliers of video K/V occur in channels and single tokens (arXiv 2602.02958). RMS error: K 0.42%, V 0.49%, 0.7% beside a
token and a channel 1000 times larger; with one scale per head 0.94%, 1.09% and 100%.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ..types import KVCacheError
from ..utils.host import HostReads, Range

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _FLOATS}
_MAX = 127.0
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = 2.0**100  # products of scales stay finite below this bound; NaN is not below it either
_AT_ONCE = 2**26  # numbers that are quantized together
_BLOCK = 2**28  # bytes of page-locked memory that are taken together

Packed: TypeAlias = tuple[torch.dtype, Mapping[str, Tensor]]
"""One stored tensor: the dtype that `unpack` returns, and "values", for int8 also the scales "channel" and "token"."""

PackedLevel: TypeAlias = Mapping[str, tuple[Packed, Packed]]
"""The stored key and value of every layer at one noise level."""


def layout(shape: Sequence[int], dtype: torch.dtype, format: str | None) -> dict[str, Any]:
    """Return the dtype and shape of each part that `pack` makes of a tensor (..., tokens, dim)."""
    if dtype not in _FLOATS or len(shape) < 3:
        raise KVCacheError(f"K/V are {dtype} of shape {tuple(shape)}; expected floats (clips, heads, tokens, dim).")
    if format is None:
        return {"values": (dtype, tuple(shape))}
    return {
        "channel": (torch.float32, (*shape[:-2], 1, shape[-1])),
        "token": (torch.bfloat16, (*shape[:-1], 1)),
        "values": (torch.int8, tuple(shape)),
    }


def packed_bytes(shape: Sequence[int], dtype: torch.dtype, format: str | None) -> int:
    """Return the bytes that `pack` makes of a tensor (..., tokens, dim)."""
    return sum(math.prod(size) * kind.itemsize for kind, size in layout(shape, dtype, format).values())


def level_bytes(level: PackedLevel) -> int:
    return sum(part.nbytes for part in tree_leaves(level) if isinstance(part, Tensor))


@torch.inference_mode(False)
def on_host(level: PackedLevel) -> PackedLevel:
    """A level in the host's memory. A GPU's goes to page-locked memory, from which it is read ten times as fast.

    Locking pages is slow, so that they come in blocks of one size, which torch keeps and uses again.
    """
    parts = [part for part in tree_leaves(level) if isinstance(part, Tensor)]
    if not parts or parts[0].device.type != "cuda":
        return tree_map_only(Tensor, lambda part: part.to("cpu"), level)
    size, block, used = min(_BLOCK, level_bytes(level) + 64 * len(parts)), torch.empty(0), 0

    def copy(part: Tensor) -> Tensor:
        nonlocal block, used
        if used + part.nbytes > block.numel():
            block, used = torch.empty(max(size, part.nbytes), dtype=torch.uint8, device="cpu", pin_memory=True), 0
        place = block[used : used + part.nbytes].view(part.dtype).view(part.shape)
        used += -(-part.nbytes // 64) * 64  # views of other dtypes must begin at whole numbers of them
        return place.copy_(part, non_blocking=True)

    copied = tree_map_only(Tensor, copy, level)
    torch.cuda.current_stream(parts[0].device).synchronize()
    return copied


@torch.inference_mode(False)
@torch.no_grad()
def pack(x: Tensor, format: str | None, ends: Range | None = None) -> Packed:
    """Store a tensor (..., tokens, dim) on its device; `ends` are its extremes, if they are known on the host.

    The result shares no memory with `x` and is no inference tensor, so a later run may take gradients. A tensor with
    NaN, infinity or numbers above 2^100 is stored unchanged. Raises KVCacheError for anything but floats.
    """
    form = layout(x.shape, x.dtype, format)
    low, high = (ends or HostReads().range(x)) if format is not None and x.numel() else (math.nan, math.nan)
    if not (low > -_LARGEST and high < _LARGEST):
        return x.dtype, {"values": x.clone(memory_format=torch.contiguous_format)}
    parts = {name: x.new_empty(shape, dtype=dtype) for name, (dtype, shape) in form.items()}
    # Some heads at a time: the working copies take several times the room of the result.
    step = max(1, _AT_ONCE * x.shape[-3] // x.numel())
    for start in range(0, x.shape[-3], step):
        some = slice(start, start + step)
        _quantize(x[..., some, :, :], {name: part[..., some, :, :] for name, part in parts.items()})
    return x.dtype, parts


def _quantize(x: Tensor, parts: Mapping[str, Tensor]) -> None:
    """Fill `parts`. K/V of a layer are large, and every pass over them counts: loudness is read from bfloat16."""
    x = x.contiguous()
    size = x.float().abs_() if x.dtype == torch.float16 else x.abs()  # usual sizes have reciprocals beyond float16
    usual = size.mean(-2, keepdim=True).clamp_min_(_TINY)
    loudness = (size @ usual.reciprocal().transpose(-1, -2)).div_(x.shape[-1]).clamp_min_(_TINY)
    channel = size.div_(loudness).amax(-2, keepdim=True).float().clamp_min_(_TINY)
    del size
    wide = x / channel
    token = torch.maximum(wide.amax(-1, keepdim=True), -wide.amin(-1, keepdim=True))
    # The token scale is rounded up, so that no token exceeds it.
    parts["token"].copy_(token.mul_(1 + 2**-8).clamp_min_(_TINY))
    parts["values"].copy_(wide.mul_(_MAX / parts["token"].to(wide.dtype)).round_())
    parts["channel"].copy_(channel)


def unpack(packed: Packed, device: torch.device | str = "cpu") -> Tensor:
    """Return the stored tensor. Do not write to it: a tensor that was stored unchanged may be returned itself."""
    dtype, parts = packed[0], {name: part.to(device) for name, part in packed[1].items()}
    if "token" not in parts:
        return parts["values"]
    out = parts["values"].new_empty(0, dtype=dtype)
    # The first product goes to the result's own memory, so fewer bytes move. In float16 it could overflow.
    first = out if dtype in (torch.bfloat16, torch.float32) else out.float()
    return torch.mul(torch.mul(parts["values"], parts["channel"] / _MAX, out=first), parts["token"], out=out)


class Level(Mapping[str, tuple[Tensor, Tensor]]):
    """K/V by layer, (clips, heads, kept tokens, dim) each, dequantized when they are read; do not write to them.

    `parts` are one stored level with weight 1, or two levels with weights that sum to 1.
    """

    def __init__(self, parts: Sequence[tuple[PackedLevel, float]], device: torch.device) -> None:
        self._parts, self._device = parts, device

    def __getitem__(self, layer: str) -> tuple[Tensor, Tensor]:
        sides = [[unpack(packed, self._device) for packed in stored[layer]] for stored, _ in self._parts]
        if len(sides) == 2:
            sides = [[torch.lerp(a, b, self._parts[1][1]) for a, b in zip(*sides, strict=True)]]
        return sides[0][0], sides[0][1]

    def __contains__(self, layer: object) -> bool:
        return layer in self._parts[0][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts[0][0])

    def __len__(self) -> int:
        return len(self._parts[0][0])
