"""One level on disk: a safetensors file, written as a stream and read through a memory map.

It is written layer by layer, so that a level larger than the memory budget never stands in memory as a whole (the
library's own writer wants all of it at once). Checksums (CRC-32) are known only when the last byte is out: the header
is written with zeros in their place and rewritten, equally long, before the file gets its name. Any reader of
safetensors reads it.
"""

from __future__ import annotations

import json
import math
import threading
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .format import Layout, Packed, layout, well_formed
from .own import ENTRY

VERSION = 1
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_SIDES = ("key", "value")

Pair = tuple[Packed, Packed]
Kinds = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Of key and value: format, dtype that comes back, shape."""


class BadFile(Exception):  # noqa: N818 - a signal, not an error a user sees
    """This file is no level of this KV cache; the text says why."""


def name_of(sigma: float) -> str:
    """The file's name. Every digit of the noise level is in it, and names sort by it."""
    return f"sigma-{sigma:.16e}.safetensors"


def file_size(fingerprint: str, sigma: float, kinds: Mapping[str, Kinds]) -> int:
    """Bytes that `write_level` will write, exactly."""
    tensors = _tensors(kinds)
    header = _header(fingerprint, sigma, kinds, tensors, [0] * len(tensors))
    return len(header) + sum(_padded(math.prod(shape) * dtype.itemsize) for _, dtype, shape in tensors)


def write_level(
    out: BinaryIO, fingerprint: str, sigma: float, kinds: Mapping[str, Kinds], pairs: Iterable[tuple[str, Pair]]
) -> None:
    """Write a level. `kinds` says beforehand what `pairs` will hold, in the same order.

    Without fsync: a crash of the machine may leave a file of this name with other bytes, and the checksums tell.
    """
    tensors = _tensors(kinds)
    out.write(_header(fingerprint, sigma, kinds, tensors, [0] * len(tensors)))
    sums = []
    for (layer, pair), sides in zip(pairs, kinds.items(), strict=True):
        assert layer == sides[0]
        for packed in pair:
            for name in layout(packed.shape, packed.dtype, packed.format):
                sums.append(_write(out, packed.parts[name]))
    out.seek(0)
    out.write(_header(fingerprint, sigma, kinds, tensors, sums))


def _tensors(kinds: Mapping[str, Kinds]) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    """Every tensor of the file, in order."""
    return [
        (f"{layer}/{side}/{part}", *about)
        for layer, sides in kinds.items()
        for side, (format, dtype, shape) in zip(_SIDES, sides, strict=True)
        for part, about in layout(shape, dtype, format).items()
    ]


def _header(
    fingerprint: str,
    sigma: float,
    kinds: Mapping[str, Kinds],
    tensors: Sequence[tuple[str, torch.dtype, tuple[int, ...]]],
    sums: Sequence[int],
) -> bytes:
    about: dict[str, Any] = {
        "version": VERSION,
        "key": fingerprint,
        "sigma": sigma.hex(),
        "layers": [
            [layer, *([f, str(d).removeprefix("torch."), list(shape)] for f, d, shape in kinds[layer])]
            for layer in kinds
        ],
    }
    about["crc"] = "".join(f"{s:08x}" for s in (_sum(about), *sums))
    entries: dict[str, Any] = {"__metadata__": {ENTRY: json.dumps(about)}}
    at = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += _padded(size)
        if at > entries[name]["data_offsets"][1]:
            # The format allows no holes, and torch no misaligned views: the bytes between are a tensor of their own.
            entries[f"{name}/padding"] = {
                "dtype": "U8",
                "shape": [at - entries[name]["data_offsets"][1]],
                "data_offsets": [entries[name]["data_offsets"][1], at],
            }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sum(about: Mapping[str, Any]) -> int:
    """Checksum of what the header says, the checksums themselves apart."""
    return zlib.crc32(json.dumps([about[name] for name in ("version", "key", "sigma", "layers")]).encode())


def _padded(size: int) -> int:
    return size + -size % 8


def _bytes(x: Tensor) -> memoryview:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write(out: BinaryIO, part: Tensor) -> int:
    data = _bytes(part)
    out.write(data)
    out.write(b"\0" * (-len(data) % 8))
    return zlib.crc32(data)


class LevelFile:
    """A level on disk, checked as far as its header goes. `read` maps one layer at a time, `sound` reads all bytes.

    Raises:
        BadFile: truncated, of another key or version, renamed, gone, or not a file of this format.
    """

    def __init__(self, path: Path, fingerprint: str, layers: Sequence[str], *, sound: bool | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._sound = sound
        try:
            self._file = safe_open(path, framework="pt")
            about = json.loads((self._file.metadata() or {})[ENTRY])
            version, key = about["version"], about["key"]
            self.sigma = float.fromhex(about["sigma"])
            self._kinds: dict[str, Kinds] = {
                layer: tuple((f, getattr(torch, dtype), tuple(shape)) for f, dtype, shape in sides)
                for layer, *sides in about["layers"]
            }
            sums = about["crc"]
            own, *self._sums = [int(sums[i : i + 8], 16) for i in range(0, len(sums), 8)]
            whole = own == _sum(about)
            self.nbytes = path.stat().st_size
        # RuntimeError: torch maps the file after its header is read, and another process may have removed it by then.
        except (SafetensorError, OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadFile(f"it cannot be read ({str(error).splitlines()[0] if str(error) else error!r})") from error
        if version != VERSION:
            raise BadFile(f"it is of version {version} of the format; this is version {VERSION}")
        if key != fingerprint:
            raise BadFile("it was made for another model, clip or setting")
        if not whole or path.name != name_of(self.sigma) or tuple(self._kinds) != tuple(layers):
            raise BadFile("its header is damaged, or does not fit its name or its layers")

    @property
    def shapes(self) -> dict[str, Any]:
        """Shapes of the key and value of each layer."""
        return {layer: tuple(shape for _, _, shape in kinds) for layer, kinds in self._kinds.items()}

    def sound(self) -> bool:
        """Whether every byte is as it was written. The answer is kept: a file of this name is never changed."""
        with self._lock:
            if self._sound is None:
                self._sound = self._check()
        return self._sound

    def _check(self) -> bool:
        sums = iter(self._sums)
        try:
            for layer, kinds in self._kinds.items():
                for packed, (_, _, shape) in zip(self.read(layer), kinds, strict=True):
                    if packed.shape != shape or not well_formed(packed):
                        return False
                    for name in layout(packed.shape, packed.dtype, packed.format):
                        if next(sums, None) != zlib.crc32(_bytes(packed.parts[name])):
                            return False
        except (SafetensorError, OSError, RuntimeError, KeyError):
            return False
        return next(sums, None) is None

    def read(self, layer: str) -> Pair:
        """Keys and values of one layer, memory-mapped on the CPU."""
        key, value = (
            Packed(format, dtype, {part: self._file.get_tensor(f"{layer}/{side}/{part}") for part in _parts(format)})
            for side, (format, dtype, _) in zip(_SIDES, self._kinds[layer], strict=True)
        )
        return key, value


def _parts(format: str) -> Layout:
    return layout((1, 1), torch.float32, format)
