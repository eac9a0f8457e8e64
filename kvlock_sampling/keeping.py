"""A run's way to a bank: which shelf holds the K/V of this clip, noise, mask, prompt and network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .attention import Sites
from .attention.foreground import Selection
from .bank import Bank, BankError, BankKey, Plan, expected_levels, plan_for
from .bank.shelf import Shelf
from .presets import Preset
from .types import SiteError

OpenShelf = Callable[[Mapping[str, Any]], Shelf]
"""From the arguments of the source's pass to the shelf of its K/V."""


class Keeper:
    """Opens shelves for one run, and keeps the one in use: everything it belongs to stays the same over a run."""

    def __init__(self, bank: Bank, model: Any, sites: Sites, stack: ExitStack) -> None:
        self.bank, self.model, self.sites, self.stack = bank, model, sites, stack
        self._known: list[tuple[tuple[Any, ...], Shelf]] = []

    def shelf(
        self, clip: Tensor, noise: Tensor, selection: Selection, expert: Any, arguments: Mapping[str, Any]
    ) -> Shelf:
        """The shelf of the source noised so, at the tokens of a selection, under these arguments."""
        names = sorted(arguments)
        parts = (clip, noise, selection.weight, *names, *(arguments[n] for n in names))
        for known, shelf in self._known:
            # The same objects, not merely equal ones: comparing is then free. What is equal has an equal key anyway.
            if known[0] == expert and list(map(id, known[1:])) == list(map(id, parts)):
                return shelf
        key = BankKey.of(
            model=self.model,
            clip=clip,
            noise=noise,
            background=selection.weight,
            sites=self._names(expert),
            arguments=arguments,
            dtype=noise.dtype,
        )
        shelf = self.stack.enter_context(self.bank.opened(key, device=noise.device))
        self._known.append(((expert, *parts), shelf))
        return shelf

    def restart(self) -> None:
        """Another run begins in the same block."""
        for _, shelf in self._known:
            shelf.restart()

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


def chosen_bank(bank: Any, advice: Preset | None, sites: Sites) -> Bank | None:
    """The bank that was given, or the one a preset asks for, where these sites can have one.

    Raises:
        SiteError: says what is in the way.
    """
    if bank is None:
        if advice is None or not advice.bank or why_not(sites):
            return None
        return Bank(**dict(advice.bank))
    if not isinstance(bank, Bank):
        raise SiteError(f"bank={bank!r}; expected a Bank, e.g. bank=kv.Bank('kv-bank', budget='4GB').")
    why = why_not(sites)
    if why:
        raise SiteError(why)
    return bank


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
        "  Plan from counts: kvlock_sampling.bank.plan_for(sites, heads, dim, tokens, background_fraction, levels)."
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
