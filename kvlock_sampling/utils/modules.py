"""Find every torch module that belongs to a denoiser, through wrappers and closures."""

import functools
from collections.abc import Iterator
from typing import Any

from torch import nn

_HOLDERS = ("inner_model", "model", "transformer", "transformer_2", "module")
"""Attributes that hold a wrapped module in k-diffusion, diffusers and torch."""


def reachable_modules(model: Any) -> Iterator[nn.Module]:
    """Yield the modules of a denoiser: itself, its submodules, and those that a function or wrapper refers to."""
    stack, seen = [model], set()
    while stack:
        item = stack.pop(0)
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            yield from item.modules()
        # Modules too: a wrapper module may hold a plain function, which is not among its submodules.
        held = getattr(item, "__dict__", {})
        stack += [held[n] for n in _HOLDERS if n in held]
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
