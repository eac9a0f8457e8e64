"""What K/V belong to: fingerprints of the model, the clip, its noise, the kept tokens and the source's arguments.

All are SHA-256, the same in every process and on every machine, and small enough to be taken at each run.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import types
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..utils.modules import reachable_modules
from .errors import KVCacheError

SAMPLED = 64
"""Numbers of each weight that go into its fingerprint themselves, evenly spread: they tell an order, sums do not."""

BLOCK = 8192
"""Words of 8 bytes that one sum stands for."""


@dataclass(frozen=True)
class KVCacheKey:
    """Everything that must be equal for K/V to be used again. Make one with `KVCacheKey.of`.

    model, clip, noise, tokens, arguments: fingerprints. layers: names of the attention layers that are kept, in the
    order in which the model reaches them. dtype: of the evaluation, e.g. "float32".
    """

    model: str
    clip: str
    noise: str
    tokens: str
    layers: tuple[str, ...]
    arguments: str = ""
    dtype: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise KVCacheError(
                f"layers={self.layers}; expected the distinct names of the layers to keep, at least one."
            )

    @classmethod
    def of(
        cls,
        *,
        model: Any,
        clip: Tensor,
        noise: Tensor,
        background: Tensor,
        layers: Iterable[str],
        arguments: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCacheKey:
        """Take the fingerprints.

        model: the denoiser, a module or anything that holds one. clip: clean latents (clips, ...). noise: what noises
        the clip, of its shape. background: (clips, tokens), which tokens are kept. arguments: what the source pass is
        called with, e.g. {"cond": prompt}. dtype: of the evaluation; that of `clip` by default.

        Raises:
            KVCacheError: an argument that has no fingerprint.
        """
        return cls(
            model=model_fingerprint(model),
            clip=tensor_fingerprint(clip),
            noise=tensor_fingerprint(noise),
            tokens=tensor_fingerprint(background),
            layers=tuple(layers),
            arguments=arguments_fingerprint(arguments or {}),
            dtype=str(dtype or clip.dtype).removeprefix("torch."),
        )

    def fingerprint(self, *extra: str) -> str:
        """One fingerprint of the whole key, and of whatever else matters, e.g. the format."""
        return hashlib.sha256(json.dumps([asdict(self), *extra], sort_keys=True).encode()).hexdigest()


def tensor_fingerprint(x: Tensor) -> str:
    """Of shape, dtype and every byte; the device does not matter."""
    digest = hashlib.sha256()
    _add_tensor(digest, x)
    return digest.hexdigest()


def arguments_fingerprint(arguments: Mapping[str, Any]) -> str:
    """Of nested mappings, sequences, sets, dataclasses, tensors, arrays and plain values. Order of keys is no matter.

    Raises:
        KVCacheError: an object whose contents cannot be told, say a function: its equal could not be recognised later.
    """
    digest = hashlib.sha256()
    _add(digest, dict(arguments), "")
    return digest.hexdigest()


def model_fingerprint(model: Any) -> str:
    """Of a denoiser: class, configuration, and of every weight and saved buffer the name, shape, dtype, a sample, and
    sums over all of its bytes, however it was written to. That takes as long as reading the weights once.

    Adapters count as well, fused (the weights change) or not (there are more of them, and their scales). Weights that
    were offloaded to the meta device have no numbers to read; those are told by name and shape alone.

    Raises:
        KVCacheError: no torch module can be found in it.
    """
    modules = list(dict.fromkeys(reachable_modules(model)))
    if not modules:
        raise KVCacheError(
            f"no torch module was found in {type(model).__name__}, so its K/V could not be told from another model's.\n"
            "  Wrap the network in a module, or make the key yourself: KVCacheKey(model='my-model-v1', ...)."
        )
    digest = hashlib.sha256()
    _add(digest, f"{type(model).__module__}.{type(model).__qualname__}", "")
    if not isinstance(model, nn.Module):
        _add(digest, _settings({"model": model, **getattr(model, "__dict__", {})}), "")
    for module in modules:
        config = getattr(module, "config", None)
        about = [type(module).__qualname__, module.extra_repr()]
        if isinstance(config, Mapping):
            about.append(json.dumps({k: str(v) for k, v in config.items() if not k.startswith("_")}, sort_keys=True))
        # Of adapters (peft): the scale and which one is active are attributes, not weights.
        for name in ("scaling", "merged_adapters", "active_adapters", "disable_adapters"):
            value = getattr(module, name, None)
            if isinstance(value, (dict, list, str, bool)):
                about.append(f"{name}={value}")
        _add(digest, [*about, *_settings(vars(module))], "")
        # What is not saved with the weights is derived from them, or a cache that fills up while the model runs.
        derived = module._non_persistent_buffers_set
        buffers = [(n, b) for n, b in module.named_buffers(recurse=False) if n not in derived]
        for name, weight in (*module.named_parameters(recurse=False), *buffers):
            _add(digest, [name, list(weight.shape), str(weight.dtype)], "")
            _add_tensor(digest, _checksums(weight))
            _add_tensor(digest, _sample(weight))
    return digest.hexdigest()


def _settings(attributes: Mapping[str, Any]) -> list[str]:
    """Plain values among attributes, and what functions among them close over: a guidance, a frame rate, a scale."""
    found = []
    for name, value in sorted(attributes.items()):
        if name.startswith("_") or name == "training":
            continue
        if _is_plain(value):
            found.append(f"{name}={value!r}")
        elif isinstance(value, functools.partial):
            found += _settings({f"{name}.func": value.func, f"{name}.args": value.args, f"{name}.kw": value.keywords})
        elif isinstance(value, types.FunctionType):
            cells = dict(zip(value.__code__.co_freevars, value.__closure__ or (), strict=True))
            inside = {f"{name}.{n}": cell.cell_contents for n, cell in cells.items() if n != name}
            found += _settings(inside | {f"{name}.defaults": value.__defaults__})
    return found


def _is_plain(value: Any, depth: int = 3) -> bool:
    if value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype)):
        return True
    if depth and isinstance(value, (list, tuple)):
        return all(_is_plain(item, depth - 1) for item in value)
    return bool(depth) and type(value) is dict and all(_is_plain(item, depth - 1) for item in value.values())


def _checksums(weight: Tensor) -> Tensor:
    """One sum for each `BLOCK` of a weight's bytes, taken as whole numbers of 8 bytes: exact, so the same on every
    device, and any change of one number tells.

    Every byte is read, at every run. To read again only what has changed, one would have to know: the version counter
    of a tensor does not count writes through `.data` (which is how peft fuses a LoRA), numpy, dlpack, the storage or a
    fused optimizer, and inference tensors have none. Nor has reading to be avoided: whole words are summed as fast as
    memory is read.
    """
    weight = weight.detach()
    if weight.is_meta or not weight.numel():
        return torch.empty(0, dtype=torch.int64)
    if type(weight) not in (Tensor, nn.Parameter):
        if not hasattr(weight, "__tensor_flatten__"):
            return torch.empty(0, dtype=torch.int64)
        parts = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]  # a quantised weight and its scales
        return torch.cat([_checksums(part) for part in parts])
    if weight.is_complex():
        weight = torch.view_as_real(weight.resolve_conj())
    data = weight.resolve_neg().reshape(-1).view(torch.uint8)
    if data.storage_offset() % 8 or data.data_ptr() % 8:
        data = data.clone()  # words have to be aligned
    whole = data.numel() // 8
    words, rest = data[: 8 * whole].view(torch.int64), data[8 * whole :]
    blocks = words[: whole // BLOCK * BLOCK].view(-1, BLOCK).sum(-1)
    return torch.cat([blocks, words[len(blocks) * BLOCK :].sum()[None], rest.long()]).cpu()


def _sample(weight: Tensor) -> Tensor:
    weight = weight.detach()
    if weight.is_meta or not weight.numel():
        return torch.empty(0)
    if type(weight) not in (Tensor, nn.Parameter) and hasattr(weight, "dequantize"):
        weight = weight.dequantize()  # a quantised subclass: its elements cannot be taken one by one
    count = weight.numel()
    index = torch.linspace(0, count - 1, min(count, SAMPLED), dtype=torch.float64).long()
    return torch.take(weight, index.to(weight.device)) if weight.is_contiguous() else weight.reshape(-1)[index]


def _add_tensor(digest: Any, x: Tensor) -> None:
    x = x.detach().cpu().contiguous()
    digest.update(f"tensor {x.dtype} {tuple(x.shape)}\n".encode())
    digest.update(x.reshape(-1).view(torch.uint8).numpy().data)


def _add(digest: Any, value: Any, path: str) -> None:
    """Every value goes in with its type and length, so that no two structures read the same."""
    if isinstance(value, Tensor):
        _add_tensor(digest, value)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        _add_tensor(digest, torch.from_numpy(np.ascontiguousarray(value)))
    elif isinstance(value, Mapping):
        digest.update(f"mapping {len(value)}\n".encode())
        for key in sorted(value, key=repr):
            _add(digest, key, f"{path}[{key!r}]")
            _add(digest, value[key], f"{path}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        digest.update(f"sequence {len(value)}\n".encode())
        for i, item in enumerate(value):
            _add(digest, item, f"{path}[{i}]")
    elif isinstance(value, (set, frozenset)):
        _add(digest, sorted(value, key=repr), path)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        _add(digest, [type(value).__qualname__, fields], path)
    elif value is None or isinstance(value, (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, PurePath)):
        text = repr(value) if isinstance(value, (str, bytes)) else str(value)
        digest.update(f"{type(value).__name__} {len(text)} {text}\n".encode())
    elif isinstance(value, (torch.device, np.generic)):
        digest.update(f"{type(value).__name__} {value}\n".encode())
    else:
        raise KVCacheError(
            f"the source's argument {path or 'given'} is a {type(value).__name__}, which has no fingerprint: K/V made "
            "with it could not be recognised in another run.\n"
            "  Pass tensors and plain values, or run without a KV cache."
        )
