"""How keys and values are stored: as they come, in float32 or bfloat16, or in 8 bits with scales of every head.

int8:  x ~ values / 127 * channel * token,  one `channel` per clip, head and channel, one `token` per clip, head and
token; each stored number is off by at most channel * token / 254. With |x| over its usual size in each channel,
averaged over channels, as the loudness of a token:  channel = max over tokens of |x| / loudness,
token = max over channels of |x| / channel.
fp8:   x ~ values / 448 * channel (e4m3: 3 bits of mantissa), off by at most 1/16 of itself.

Why two scales. Outliers of video K/V stand in channels and in single tokens (Quant VideoGen, arXiv 2602.02958: tokens
of max |V| ~ 1e3); one scale per head would make everything else pay for them, and plain maxima over tokens would lend
one loud token's pattern to all channels. Relative error (RMS) on K/V of the embedded model, 17 noise levels, all
layers; "loud" is what is left of normal numbers beside one token and one channel that are 1000 times larger:

    ========================= ======= ======= =======
    scales                    K       V       loud
    ========================= ======= ======= =======
    int8, one per head        0.94%   1.09%   100%
    int8, per channel         0.43%   0.67%
    int8, channel and token,
    of plain maxima           0.37%   0.50%   29%
    int8, as above            0.42%   0.49%   0.7%
    fp8, per channel          2.6%    2.6%
    bfloat16                  0.16%   0.17%
    ========================= ======= ======= =======

Centring by the temporal mean of each spatial token halves the error again, but costs a token in 16 bits for each
position; and 0.4% is already ten times smaller than what changes between two noise levels that are a ratio of 1.2
apart (K 3.5%, V 8%). It does not pay at 8 bits and is left out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import KVCacheError

VERBATIM = "verbatim"
FORMATS = ("float32", "bf16", "int8", "fp8")
_PLAIN = {"float32": torch.float32, "bf16": torch.bfloat16}
_FP8, _FP8_MAX, _INT8_MAX = torch.float8_e4m3fn, 448.0, 127.0
_TINY = torch.finfo(torch.float32).tiny
_LARGEST = 2.0**100
"""Products of scales stay finite below this. NaN is not below it either."""

_AT_ONCE = 2**24
"""Numbers that are brought into 8 bits together."""

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Packed:
    """One stored tensor. `parts` hold its bytes, `format` says how to read them, `dtype` what `unpack` returns."""

    format: str
    dtype: torch.dtype
    parts: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what `unpack` returns."""
        return tuple(self.parts["values"].shape)

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.parts["values"].device

    def each(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """The same with every part changed, e.g. moved."""
        return Packed(self.format, self.dtype, {name: change(part) for name, part in self.parts.items()})


def check_format(name: Any) -> str:
    """The name of a format; None means as it comes.

    Raises:
        KVCacheError: there is no such format.
    """
    if name is None or name == VERBATIM:
        return VERBATIM
    if isinstance(name, str) and name in FORMATS:
        return name
    near = difflib.get_close_matches(str(name), FORMATS, n=1, cutoff=0.4)
    hint = f' Did you mean "{near[0]}"?' if near else ""
    raise KVCacheError(
        f"format={name!r}; expected one of {', '.join(FORMATS)}, or None to keep K/V as they come.{hint}"
    )


def layout(shape: Sequence[int], dtype: torch.dtype, format: str) -> Layout:
    """The parts that `pack` makes of a tensor (..., tokens, dim): name -> (dtype, shape)."""
    shape = tuple(shape)
    if format == VERBATIM:
        return {"values": (dtype, shape)}
    if format in _PLAIN:
        return {"values": (_PLAIN[format], shape)}
    channel: tuple[torch.dtype, tuple[int, ...]] = (torch.float32, (*shape[:-2], 1, shape[-1]))
    if format == "fp8":
        return {"channel": channel, "values": (_FP8, shape)}
    return {"channel": channel, "token": (torch.bfloat16, (*shape[:-1], 1)), "values": (torch.int8, shape)}


def nbytes(parts: Layout) -> int:
    """Bytes of a layout."""
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in parts.values())


def format_for(x: Tensor, format: str) -> str:
    """The format this tensor can have: 8 bits have no room for NaN, infinity and the like; those are kept verbatim.

    Raises:
        KVCacheError: not a floating tensor of at least two axes.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2:
        given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise KVCacheError(
            f"a KV cache was given {given}; expected floating keys and values (clips, heads, tokens, dim)."
        )
    if format in _PLAIN or format == VERBATIM:
        return format
    return format if x.numel() and bool(x.detach().abs().amax() < _LARGEST) else VERBATIM


@torch.inference_mode(False)
@torch.no_grad()
def pack(x: Tensor, format: str | None) -> Packed:
    """Store a tensor (..., tokens, dim). The result shares no memory with `x`, nor its inference mode: another run may
    take gradients.

    Raises:
        KVCacheError: not a floating tensor, or no such format.
    """
    format = format_for(x, check_format(format))
    if format == VERBATIM or format in _PLAIN:
        values = x.to(_PLAIN.get(format, x.dtype), memory_format=torch.contiguous_format, copy=True)
        return Packed(format, x.dtype, {"values": values.contiguous()})
    parts = {name: x.new_empty(shape, dtype=dtype) for name, (dtype, shape) in layout(x.shape, x.dtype, format).items()}
    # Some heads at a time: what is computed on the way takes several times the room of what is stored.
    if x.ndim < 3:
        _in_8_bits(x, format, parts)
    else:
        heads = x.shape[-3]
        step = max(1, _AT_ONCE * heads // x.numel())
        for start in range(0, heads, step):
            some = slice(start, start + step)
            _in_8_bits(x[..., some, :, :], format, {name: part[..., some, :, :] for name, part in parts.items()})
    return Packed(format, x.dtype, parts)


def _in_8_bits(x: Tensor, format: str, parts: Mapping[str, Tensor]) -> None:
    """Fill `parts`. One working copy is changed in place: K/V of a layer are large, and every pass over them counts."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32), memory_format=torch.contiguous_format, copy=True)
    if format == "fp8":
        channel = torch.linalg.vector_norm(wide, float("inf"), -2, keepdim=True).float().clamp_min_(_TINY)
        # Rounding may lead past 1 by an ulp, and what e4m3 cannot hold becomes NaN.
        parts["values"].copy_(wide.div_(channel).clamp_(-1, 1).mul_(_FP8_MAX))
        parts["channel"].copy_(channel)
        return
    size = wide.abs()
    usual = size.mean(-2, keepdim=True).clamp_min_(_TINY)
    loudness = (size @ usual.reciprocal().transpose(-1, -2)).div_(x.shape[-1]).clamp_min_(_TINY)
    channel = size.div_(loudness).amax(-2, keepdim=True).float().clamp_min_(_TINY)
    token = torch.linalg.vector_norm(wide.div_(channel), float("inf"), -1, keepdim=True)
    # Rounded up, so that no token exceeds its scale.
    parts["token"].copy_(token.mul_(1 + 2**-8).clamp_min_(_TINY))
    parts["values"].copy_(wide.mul_(_INT8_MAX / parts["token"].to(wide.dtype)).round_())
    parts["channel"].copy_(channel)


def unpack(packed: Packed) -> Tensor:
    """The stored tensor, in the dtype it came in, where its parts are. Verbatim parts are returned themselves."""
    values = packed.parts["values"]
    if packed.format == VERBATIM or packed.format in _PLAIN:
        return values.to(packed.dtype)
    channel = packed.parts["channel"]
    if packed.format == "fp8":
        return values.float().mul_(channel / _FP8_MAX).to(packed.dtype)
    return torch.mul(values, channel / _INT8_MAX).mul_(packed.parts["token"]).to(packed.dtype)


def well_formed(packed: Packed) -> bool:
    """Whether the parts fit one another and the format, as they may not in a file of unknown origin."""
    if "values" not in packed.parts or packed.parts["values"].ndim < 2 or packed.format not in (*FORMATS, VERBATIM):
        return False
    expected = layout(packed.shape, packed.dtype, packed.format)
    return {name: (part.dtype, tuple(part.shape)) for name, part in packed.parts.items()} == expected
