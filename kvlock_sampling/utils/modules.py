"""Find every torch module that belongs to a denoiser, and give single modules other methods for a while."""

import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import CellType
from typing import Any

from torch import nn

_HOLDERS = ("inner_model", "model", "transformer", "transformer_2", "module")
"""Attributes that hold a wrapped module in k-diffusion, diffusers and torch."""


def reachable_modules(model: Any) -> Iterator[nn.Module]:
    """Yield the modules of a denoiser: itself, its submodules, and those that a function or wrapper refers to."""
    stack, seen = [model], set()
    while stack:
        if id(item := stack.pop(0)) in seen:
            continue
        seen.add(id(item))
        # Modules too: a wrapper module may hold a plain function, which is not among its submodules.
        parts = [*item.modules()] if isinstance(item, nn.Module) else [item]
        stack += [vars(part)[n] for part in parts if hasattr(part, "__dict__") for n in _HOLDERS if n in vars(part)]
        if isinstance(item, nn.Module):
            yield from parts
            continue
        if isinstance(item, functools.partial):
            stack += [item.func, *item.args, *item.keywords.values()]
        if getattr(item, "__self__", None) is not None:
            stack.append(item.__self__)
        stack += [cell.cell_contents for cell in getattr(item, "__closure__", None) or () if cell != CellType()]
        names = getattr(getattr(item, "__code__", None), "co_names", ())
        scope = getattr(item, "__globals__", {})
        stack += [scope[n] for n in names if isinstance(scope.get(n), nn.Module)]


_LOCK = threading.Lock()
_worn: dict[int, tuple[Any, list[Callable[[Any], Any]]]] = {}


@contextmanager
def wearing(thing: Any, change: Callable[[Any], Any], worn: bool = True) -> Iterator[None]:
    """Inside the block `thing` has the class `change(its class)`, once however often blocks nest or overlap; or not.

    Nothing lies on the object, where a copy would keep it: with another's `forward`, it would compute by its weights.
    """

    def dress(worn: bool) -> None:
        with _LOCK:
            kind, changes = _worn.setdefault(id(thing), (type(thing), []))
            (changes.append if worn else changes.remove)(change)
            made = functools.reduce(lambda kind, change: change(kind), dict.fromkeys(changes), kind)
            object.__setattr__(thing, "__class__", made)
            if not changes:
                del _worn[id(thing)]

    dress(worn)
    try:
        yield
    finally:
        dress(not worn)


class _Unnoticed:
    """Keeps a subclass from the registry that its base keeps of its subclasses."""

    def __init_subclass__(cls, **_: Any) -> None:
        pass


def plain_copies(kind: Any, methods: Mapping[str, Any]) -> Any:
    """A subclass with these methods, whose instances are copied and pickled as those of `kind`."""

    def reduced(thing: Any, protocol: Any) -> Any:
        make, given, *state = kind.__reduce_ex__(thing, 1)  # a later protocol insists on the present class
        make, *given = (kind if isinstance(p, type) and issubclass(p, made) else p for p in (make, *given))
        return make, tuple(given), *state

    bases = (kind,) if issubclass(kind, _Unnoticed) else (_Unnoticed, kind)
    made = type(kind)(kind.__name__, bases, {"__reduce_ex__": reduced, **methods})
    return functools.update_wrapper(made, kind, updated=())


def unhooked(kind: Any) -> Any:
    """The class that `plain_copies` were made of, as its author wrote it."""
    while "__wrapped__" in vars(kind):  # inspect.unwrap leaves classes as they are from Python 3.12.3 on
        kind = kind.__wrapped__
    return kind


_signature = functools.cache(inspect.signature)


def signature_of(module: nn.Module) -> inspect.Signature:
    """The signature of the class's forward, because offloading may replace the instance's forward."""
    return _signature(unhooked(type(getattr(module, "_orig_mod", module))).forward)  # torch.compile keeps it inside
