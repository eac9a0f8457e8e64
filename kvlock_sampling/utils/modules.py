"""Every torch module that belongs to a denoiser, however it was wrapped."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

_HOLDERS = ("inner_model", "model", "transformer", "transformer_2", "module")
"""Attributes under which a plain object keeps the module it wraps: k-diffusion's, diffusers' and torch's own names."""


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
        stack += [vars(item)[n] for n in _HOLDERS if n in _attributes(item)]
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
