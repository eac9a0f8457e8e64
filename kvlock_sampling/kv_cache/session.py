"""A run's way to a bank: which shelf holds the K/V of this clip, noise, mask, prompt and network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..attention import Sites
from ..attention.foreground import Selection
from ..presets import Preset
from ..types import SiteError
from . import (
    Bank,
    BankError,
    BankKey,
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

    def __init__(self, bank: Bank, model: Any, sites: Sites, stack: ExitStack) -> None:
        self.bank, self.model, self.sites = bank, model, sites
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
        key = BankKey(
            model=self._model,
            clip=self._print(clip),
            noise=self._print(noise),
            tokens=self._print(selection.weight),
            sites=tuple(self._names(expert)),
            arguments=arguments_fingerprint(arguments),
            dtype=f"{noise.dtype} {_precision(noise.device)}".removeprefix("torch."),
        )
        name = key.fingerprint()
        if name not in self._shelves:
            while len(self._shelves) >= self.OPEN:
                self._shelves.pop(next(iter(self._shelves)))[1].close()
            stack = ExitStack()
            self._shelves[name] = stack.enter_context(self.bank.opened(key, device=noise.device)), stack
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
        """Names of the sites that one evaluation reaches: of several experts those of one."""
        names, networks = [site.name for site in self.sites.sites], self.sites.networks
        if len(networks) < 2:
            return names
        index = next((i for i, network in enumerate(networks) if expert is network or expert == i), None)
        if index is None:
            raise SiteError(
                f"this model has {len(networks)} networks, and a bank must know which one runs; expert(sigma) said "
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


def chosen_bank(bank: Any, advice: Preset | None, sites: Sites | None) -> Bank | None:
    """The bank that was given, or the one a preset asks for, where these sites can have one; None where there are none.

    Raises:
        SiteError: says what is in the way.
    """
    if bank is None:
        if advice is None or not advice.bank or sites is None or why_not(sites):
            return None
        return Bank(**dict(advice.bank))
    if not isinstance(bank, Bank):
        raise SiteError(f"bank={bank!r}; expected a Bank, e.g. bank=kv.Bank('kv-bank', budget='4GB').")
    if sites is None:
        return None
    why = why_not(sites)
    if why:
        raise SiteError(why)
    return bank


def chosen_layers(sites: Sites, layers: Iterable[int] | slice | None, bank: Any) -> Sites:
    """The sites that are locked: those of the layers that the lock names, or its bank.

    Raises:
        SiteError: no such layers, or both name some and mean others.
    """
    named = getattr(bank, "layers", None)
    if layers is None or named is None:
        return sites.layers(named if layers is None else layers)
    if not isinstance(layers, (slice, int)):
        layers = list(layers)
    chosen, other = sites.layers(layers), sites.layers(named)
    if (chosen.sites, chosen.select) != (other.sites, other.select):
        raise SiteError(
            f"layers={layers!r} of the lock and layers={named!r} of its bank are not the same; what is kept is what is "
            f"locked.\n  Name them once: KVLock(..., layers={layers!r}, bank=kv.Bank(...))."
        )
    return chosen


def plan(
    bank: Bank, sites: Sites, selection: Selection, levels: Iterable[float], dtype: torch.dtype | None = None
) -> Plan:
    """What a bank will hold of a run over these noise levels, before anything runs. Sizes are exact.

    Raises:
        BankError: the attention modules do not say how many heads they have.
    """
    per_network = len(sites.sites) // max(1, len(sites.networks))
    heads, width, own = _heads(sites.sites[0].module)
    return plan_for(
        per_network,
        heads,
        width // heads,
        selection.weight.shape[1],
        len(selection.stored) / selection.weight.shape[1],
        expected_levels(levels, every=bank.refresh.every, ratio=bank.refresh.ratio),
        bank.format,
        bank.budget,
        clips=len(selection.weight),
        dtype=dtype or own,
        directory=bank.directory is not None,
        disk=bank.disk,
    )


def _heads(module: nn.Module) -> tuple[int, int, torch.dtype]:
    """Heads, their width together, and dtype of an attention module, by the names that diffusers and others use."""
    heads = next((getattr(module, n) for n in ("heads", "num_heads", "n_heads") if hasattr(module, n)), None)
    for name, share in (("to_k", 1), ("k_proj", 1), ("to_qkv", 3), ("qkv_proj", 3)):
        projection = getattr(module, name, None)
        if isinstance(projection, nn.Linear) and isinstance(heads, int):
            return heads, projection.out_features // share, projection.weight.dtype
    raise BankError(
        f"{type(module).__name__} does not say how many heads it has and how wide they are.\n"
        "  Plan from counts: kvlock_sampling.kv_cache.plan_for(sites, heads, dim, tokens, background_fraction, levels)."
    )


def why_not(sites: Sites) -> str | None:
    """What keeps the K/V of these sites from being kept; None if nothing does."""
    if sites.watch is not None:
        return (
            "a bank keeps K/V under the names of sites, and a watched model has none; declare it:\n"
            "  sites=kv.Architecture('mine', ('package.module:Class',), sites=('blocks.*.attn',), patch=...).find(net)"
        )
    if sites.rows_apart or any(s.patch is not None for s in sites.sites):
        return f"K/V of architecture {sites.architecture!r} cannot be kept in a bank; leave bank= away."
    return None
