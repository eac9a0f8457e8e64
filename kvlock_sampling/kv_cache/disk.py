"""Levels on disk: one safetensors file each, which gets its name only when it is whole.

DIRECTORY/<entry>/sigma-1.2500000000000000e+00.safetensors
"""

import contextlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils._pytree import tree_map_only

from ..types import KVCacheError, KVCacheWarning
from ..utils.files import atomic
from ..utils.warn import warn
from .fingerprint import block_sums, content_fingerprint
from .quantize import DTYPES, Packed, PackedLevel

STALE = 3600.0  # age in seconds after which the temporary file of a killed run is removed
_TEMPORARY = re.compile(r"\.sigma-.*\.tmp\.safetensors|\.tmp\w{6}")  # those of `atomic` and of safetensors


def sigmas_in(folder: Path) -> set[float]:
    """Return the noise levels of one cache entry that have a file. Old temporary files are removed."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            if _TEMPORARY.fullmatch(item.name):
                with contextlib.suppress(OSError):
                    if time.time() - item.stat(follow_symlinks=False).st_mtime > STALE:
                        os.unlink(item)
            with contextlib.suppress(ValueError):
                sigma = float(item.name.removeprefix("sigma-").removesuffix(".safetensors"))
                if item.name == _name(sigma) and 0 < sigma < float("inf"):
                    found.add(sigma)
    return found


@torch.inference_mode(False)
def read(folder: Path, entry: str, sigma: float, layers: Sequence[str]) -> PackedLevel | None:
    """Map a level into memory and read it once to check it. Returns None, with a warning, if it is not valid."""
    path = folder / _name(sigma)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("it is not a regular file")
        with safe_open(path, framework="pt") as file:
            about, names = file.metadata() or {}, set(file.keys())

            def packed(prefix: str) -> Packed:
                parts = ("channel", "token", "values") if f"{prefix}/token" in names else ("values",)
                return DTYPES[about[prefix]], {part: file.get_tensor(f"{prefix}/{part}") for part in parts}

            level = {layer: (packed(f"{layer}/key"), packed(f"{layer}/value")) for layer in layers}
            if about["checksum"] != _checksum(entry, sigma, level):
                raise ValueError("its checksum does not fit: it is damaged, or it belongs to another entry")
        return level
    except FileNotFoundError:
        return None
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        why = str(error).splitlines()[0] if str(error) else repr(error)
        then = "The source pass at this noise level runs again and replaces the file."
        warn(f"{path} is ignored: {why}. {then}", KVCacheWarning)
        return None


def write(folder: Path, entry: str, sigma: float, level: PackedLevel) -> None:
    """Write a level on the host, in place of an older file. Raises OSError if that fails, and leaves nothing behind."""
    tensors: dict[str, torch.Tensor] = {}
    about = {"checksum": _checksum(entry, sigma, level)}
    for layer, pair in level.items():
        for side, (dtype, parts) in zip(("key", "value"), pair, strict=True):
            about[f"{layer}/{side}"] = str(dtype).removeprefix("torch.")
            tensors |= {f"{layer}/{side}/{name}": part for name, part in parts.items()}
    try:
        # There is no fsync: after a crash of the machine the checksum shows whether all bytes arrived.
        if (path := folder / _name(sigma)).is_symlink():
            path.unlink()  # another cache may own what it leads to
        with atomic(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, about)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
    except (OSError, SafetensorError) as error:
        raise OSError(f"{folder.parent} cannot be written to: {error}") from error


def _name(sigma: float) -> str:
    return f"sigma-{sigma:.16e}.safetensors"


def _checksum(entry: str, sigma: float, level: PackedLevel) -> str:
    """A fingerprint of dtypes, shapes and sums, which are several times faster than a hash of every byte."""
    contents = tree_map_only(torch.Tensor, lambda x: (x.dtype, list(x.shape), block_sums(x)), dict(level))
    return content_fingerprint({"entry": entry, "sigma": sigma, "content": contents})


def checked(directory: Any) -> Path:
    """Return the directory as a path, made if it is missing. Raises KVCacheError if it cannot be used."""
    if not isinstance(directory, (str, os.PathLike)) or not str(directory).strip():
        raise KVCacheError(
            f"directory={directory!r} names no folder; expected a path, e.g. KVCache('kv-cache') or KVCache('.'), or "
            "None to keep K/V in memory alone."
        )
    path = Path(os.path.expanduser(directory)).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        with contextlib.suppress(OSError):
            if next(path.glob("**/sigma-*.safetensors"), None) is not None:
                return path  # a filled directory that can only be read still serves
        raise KVCacheError(
            f"directory={os.fspath(directory)!r} cannot be written to: {error.strerror or error}.\n"
            "  Pass a folder of your own, e.g. KVCache('kv-cache'), or None to keep K/V in memory alone."
        ) from error
