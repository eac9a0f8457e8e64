"""Which attention calls are sites: self-attention over the video's tokens, found per architecture.

`find_sites(model)` looks through the model for an architecture it knows. An architecture is one thin file with a
function `match(module) -> Sites | None`; see `wan.py`. For anything else use `SdpaSites`, which watches the calls of
`torch.nn.functional.scaled_dot_product_attention` themselves.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..types import SiteError


@dataclass(frozen=True)
class Site:
    """One self-attention module. `start` is the position of the first video token in its key sequence."""

    name: str
    module: nn.Module
    start: int = 0


@dataclass(frozen=True)
class Sites:
    """The sites of one model. `patch` is the patch size (time, height, width) that turns latents into tokens.

    With `watch` set there is no list: every matching attention call inside that module is a site, numbered in call
    order (the generic route), and `select` picks among the numbers.
    """

    patch: tuple[int, int, int]
    sites: tuple[Site, ...] = ()
    watch: nn.Module | None = None
    start: int = 0
    trailing: int | None = 0
    select: frozenset[int] | None = None
    architecture: str = "generic"

    def layers(self, chosen: Iterable[int] | slice | None) -> Sites:
        """Keep only some layers: indices (negative ones count from the end) or a slice. None keeps all.

        Raises:
            SiteError: an index is out of range, or nothing is left.
        """
        if chosen is None:
            return self
        if self.watch is not None:
            if isinstance(chosen, slice):
                raise SiteError("layers of a generic model are known only as calls; give indices: layers=[0, 1, 2].")
            return replace(self, select=frozenset(chosen))
        count = len(self.sites)
        indices = range(count)[chosen] if isinstance(chosen, slice) else list(chosen)
        wrong = [i for i in indices if not -count <= i < count]
        if wrong or not len(indices):
            raise SiteError(
                f"layers={chosen!r} names {wrong or 'no layer'}; this model has {count} sites, 0 to {count - 1}.\n"
                f"  Try layers=range({count // 2}, {count}) for the later half."
            )
        keep = sorted({i % count for i in indices})
        return replace(self, sites=tuple(self.sites[i] for i in keep))

    def grid(self, latent_shape: Sequence[int]) -> tuple[int, int, int]:
        """Tokens along (time, height, width) for latents of shape (batch, channels, time, height, width)."""
        if len(latent_shape) != 5:
            raise SiteError(
                f"latents of shape {tuple(latent_shape)} have {len(latent_shape)} axes; "
                "expected 5: (batch, channels, time, height, width)."
            )
        axes = tuple(latent_shape)[2:]
        if any(size % patch for size, patch in zip(axes, self.patch, strict=True)):
            raise SiteError(
                f"latents of time, height, width {axes} do not divide into patches of {self.patch}.\n"
                "  Crop or pad the clip so that each axis is a multiple of its patch size."
            )
        t, h, w = (size // patch for size, patch in zip(axes, self.patch, strict=True))
        return t, h, w


def SdpaSites(  # noqa: N802 - reads as the constructor it is
    module: nn.Module,
    *,
    patch: tuple[int, int, int],
    start: int = 0,
    trailing: int | None = 0,
    layers: Iterable[int] | None = None,
) -> Sites:
    """Sites of any module that calls `F.scaled_dot_product_attention`, with tokens in the order time, height, width.

    A call is a site when its key sequence holds exactly `start` tokens, the video's, and `trailing` tokens, and the
    query sequence is as long (so cross-attention is left alone). `start` is the position of the first video token: 0
    for video first, the length of the text for text first. `trailing` is what follows the video, None = any number.

    Raises:
        SiteError: not a module, or numbers that cannot be meant.
    """
    if not isinstance(module, nn.Module):
        raise SiteError(f"SdpaSites watches a torch module; got {type(module).__name__}. Pass the network itself.")
    if len(patch) != 3 or min(patch) < 1 or start < 0 or (trailing is not None and trailing < 0):
        raise SiteError(
            f"SdpaSites(patch={patch}, start={start}, trailing={trailing}); expected patch=(time, height, width) of "
            "whole numbers >= 1, and counts of tokens >= 0, e.g. patch=(1, 2, 2), start=0."
        )
    select = None if layers is None else frozenset(layers)
    return Sites(patch=patch, watch=module, start=start, trailing=trailing, select=select)


def find_sites(model: Any) -> Sites:
    """Find the sites of a denoiser, a module, or a function that closes over one.

    Raises:
        SiteError: no known architecture was found; the message says what was looked at and what to pass.
    """
    from . import wan

    seen: list[str] = []
    for module in reachable_modules(model):
        for architecture in (wan,):
            sites = architecture.match(module)
            if sites is not None:
                return sites
        seen.append(type(module).__name__)
    looked = ", ".join(dict.fromkeys(seen)) if seen else f"{type(model).__name__} (no torch module inside)"
    raise SiteError(
        f"no attention sites found in {looked[:400]}.\n"
        "  Known architectures: WanTransformer3DModel. For another model whose attention calls\n"
        "  F.scaled_dot_product_attention say where its tokens are:\n"
        "    KVLock(model, ..., sites=kv.SdpaSites(transformer, patch=(1, 2, 2), start=0))\n"
        "  For control of guidance alone, without a source: KVLock(model, policy=...)."
    )


def reachable_modules(model: Any) -> Iterator[nn.Module]:
    """Every torch module that belongs to a denoiser: itself, its parts, or what a function or wrapper holds."""
    stack, seen = [model], set()
    while stack:
        item = stack.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield from item.modules()
        # Also of a module: a wrapper around a plain function holds it beside its submodules.
        stack += [vars(item)[n] for n in ("inner_model", "model", "transformer", "module") if n in _attributes(item)]
        if isinstance(item, nn.Module):
            continue
        if isinstance(item, functools.partial):
            stack += [item.func, *item.args, *item.keywords.values()]
        if getattr(item, "__self__", None) is not None:
            stack.append(item.__self__)
        for cell in getattr(item, "__closure__", None) or ():
            stack.append(cell.cell_contents)
        names = getattr(getattr(item, "__code__", None), "co_names", ())
        scope = getattr(item, "__globals__", {})
        stack += [scope[n] for n in names if isinstance(scope.get(n), nn.Module)]


def _attributes(item: Any) -> dict[str, Any]:
    return getattr(item, "__dict__", {})
