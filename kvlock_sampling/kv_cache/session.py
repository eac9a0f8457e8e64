"""A run's way to a kv_cache: which shelf holds the K/V of this clip, noise, mask, prompt and network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..attention import AttentionLayers
from ..attention.foreground import Selection
from ..presets import Preset
from ..types import AttentionError
from . import (
    KVCache,
    KVCacheError,
    KVCacheKey,
    Plan,
    arguments_fingerprint,
    expected_levels,
    model_fingerprint,
    plan_for,
    tensor_fingerprint,
)
from .shelf import Shelf

OpenShelf = Callable[[Mapping[str, Any]], Shelf]
"""From the arguments of the source's pass to the shelf of its K/V."""


class Keeper:
    """Opens shelves for one run, and keeps the few in use: what they belong to mostly stays the same over a run."""

    OPEN = 4
    """Shelves open at once: one for each expert, and some more for prompts that change on the way."""

    def __init__(self, kv_cache: KVCache, model: Any, layers: AttentionLayers, stack: ExitStack) -> None:
        self.kv_cache, self.model, self.layers = kv_cache, model, layers
        self._shelves: dict[str, tuple[Shelf, ExitStack]] = {}
        self._keys: list[tuple[tuple[Any, Any], str]] = []
        self._prints: dict[Any, tuple[Tensor, str]] = {}
        self._model: str | None = None
        stack.callback(self.restart)

    def shelf(
        self, clip: Tensor, noise: Tensor, selection: Selection, expert: Any, arguments: Mapping[str, Any]
    ) -> Shelf:
        """The shelf of the source noised so, at the tokens of a selection, under these arguments."""
        leaves = tree_leaves([clip, noise, selection.weight, *(arguments[name] for name in sorted(arguments))])
        parts = (expert, *sorted(arguments), *leaves)
        marks = (*map(_mark, parts), _precision(noise.device))
        for (known, _), name in self._keys:
            if known == marks and name in self._shelves:
                return self._shelves[name][0]  # the very same objects, unchanged: nothing has to be read
        if self._model is None:
            self._model = model_fingerprint(self.model)
        key = KVCacheKey(
            model=self._model,
            clip=self._print(clip),
            noise=self._print(noise),
            tokens=self._print(selection.weight),
            layers=tuple(self._names(expert)),
            arguments=arguments_fingerprint(arguments),
            dtype=f"{noise.dtype} {_precision(noise.device)}".removeprefix("torch."),
        )
        name = key.fingerprint()
        if name not in self._shelves:
            while len(self._shelves) >= self.OPEN:
                self._shelves.pop(next(iter(self._shelves)))[1].close()
            stack = ExitStack()
            self._shelves[name] = stack.enter_context(self.kv_cache.opened(key, device=noise.device)), stack
        # The objects are kept beside their marks: as long as they live their ids are their own.
        self._keys = [*self._keys[1 - 2 * self.OPEN :], ((marks, parts), name)]
        return self._shelves[name][0]

    def _print(self, tensor: Tensor) -> str:
        """A tensor's fingerprint, taken once for as long as it is that tensor, unchanged."""
        mark = _mark(tensor)
        if mark not in self._prints:
            self._prints[mark] = tensor, tensor_fingerprint(tensor)
        return self._prints[mark][1]

    def restart(self) -> None:
        """Another run begins in the same block, or the block ends: nothing is in use, all is looked at anew."""
        for _, stack in self._shelves.values():
            stack.close()
        self._shelves, self._keys, self._prints, self._model = {}, [], {}, None

    def _names(self, expert: Any) -> list[str]:
        """Names of the layers that one evaluation reaches: of several experts those of one."""
        names, networks = [layer.name for layer in self.layers.layers], self.layers.networks
        if len(networks) < 2:
            return names
        index = next((i for i, network in enumerate(networks) if expert is network or expert == i), None)
        if index is None:
            raise AttentionError(
                f"this model has {len(networks)} networks, and a KV cache must know which one runs; expert(sigma) said "
                f"{expert!r}.\n  Give the denoiser a method expert(sigma) that returns the network, or its index."
            )
        return [name for name in names if name.startswith(f"{index}.")]


def _mark(part: Any) -> Any:
    """What tells an object from another one, and from itself after a change in place, without reading it."""
    if not isinstance(part, Tensor):
        return part if isinstance(part, (str, int, float, bool, type(None))) else id(part)
    return id(part), None if part.is_inference() else part._version


def _precision(device: torch.device) -> str:
    """The precision that autocast computes in, "" without it."""
    on = torch.is_autocast_enabled(device.type)
    return f"autocast {torch.get_autocast_dtype(device.type)}" if on else ""


def chosen_cache(kv_cache: Any, advice: Preset | None, layers: AttentionLayers | None) -> KVCache | None:
    """The KV cache that was given, or the one a preset asks for, where these layers can have one; None where there are none.

    Raises:
        AttentionError: says what is in the way.
    """
    if kv_cache is None:
        if advice is None or not advice.kv_cache or layers is None or why_not(layers):
            return None
        return KVCache(**dict(advice.kv_cache))
    if not isinstance(kv_cache, KVCache):
        raise AttentionError(
            f"kv_cache={kv_cache!r}; expected a KVCache, e.g. kv_cache=kv.KVCache('kv-bank', budget='4GB')."
        )
    if layers is None:
        return None
    why = why_not(layers)
    if why:
        raise AttentionError(why)
    return kv_cache


def plan(
    kv_cache: KVCache,
    layers: AttentionLayers,
    selection: Selection,
    levels: Iterable[float],
    dtype: torch.dtype | None = None,
) -> Plan:
    """What a KV cache will hold of a run over these noise levels, before anything runs. Sizes are exact.

    Raises:
        KVCacheError: the attention modules do not say how many heads they have.
    """
    per_network = len(layers.layers) // max(1, len(layers.networks))
    heads, width, own = _heads(layers.layers[0].module)
    return plan_for(
        per_network,
        heads,
        width // heads,
        selection.weight.shape[1],
        len(selection.stored) / selection.weight.shape[1],
        expected_levels(levels, every=kv_cache.refresh.every, ratio=kv_cache.refresh.ratio),
        kv_cache.format,
        kv_cache.budget,
        clips=len(selection.weight),
        dtype=dtype or own,
        directory=kv_cache.directory is not None,
        disk=kv_cache.disk,
    )


def _heads(module: nn.Module) -> tuple[int, int, torch.dtype]:
    """Heads, their width together, and dtype of an attention module, by the names that diffusers and others use."""
    heads = next((getattr(module, n) for n in ("heads", "num_heads", "n_heads") if hasattr(module, n)), None)
    for name, share in (("to_k", 1), ("k_proj", 1), ("to_qkv", 3), ("qkv_proj", 3)):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and isinstance(heads, int):
            return heads, projection.out_features // share, projection.weight.dtype
    raise KVCacheError(
        f"{type(module).__name__} does not say how many heads it has and how wide they are.\n"
        "  Plan from counts: kvlock_sampling.kv_cache.plan_for(layers, heads, dim, tokens, background_fraction, levels)."
    )


def why_not(layers: AttentionLayers) -> str | None:
    """What keeps the K/V of these layers from being kept; None if nothing does."""
    if layers.watch is not None:
        return (
            "a KV cache keeps K/V under the names of layers, and a watched model has none; declare it:\n"
            "  layers=kv.Architecture('mine', ('package.module:Class',), layers=('blocks.*.attn',), patch=...).find(net)"
        )
    if layers.rows_apart or any(s.patch is not None for s in layers.layers):
        return f"K/V of architecture {layers.architecture!r} cannot be kept in a KV cache; leave kv_cache= away."
    return None
