"""Work done around a module's call: in one thread, for the length of a block, compiled or not.

`torch.compile` neither notices forward hooks that are registered later nor forgets those it has once seen: in a
compiled graph they would never run, or run for a lock that is gone. So this library's hooks are doors. While one is
open, `module.forward` is a function that the compiler does not enter. Its guards notice the change, and it compiles a
second form of the graph, which stops at the door. Both forms stay cached, and closed doors cost nothing.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""`around(call, args, kwargs)` calls `call`, with what arguments it likes, and returns the output."""
Before = Callable[[tuple[Any, ...], dict[str, Any]], Arguments]
"""`before(args, kwargs)` returns the arguments to call the module with."""


class Door(NamedTuple):
    """What to do at the calls of a module: `around` them, where nothing inside is compiled then, or only `before`
    them, where compiled code goes on inside.
    """

    module: nn.Module
    around: Around | None = None
    before: Before | None = None


class _Frame:
    """The doorframe of one module. It is made once: a compiled graph that holds on to it holds the right one."""

    def __init__(self, module: nn.Module, whole: bool) -> None:
        self.users = 0
        self.own: Any = None
        self.replaced: Any = None
        self.hidden = compiler_in_use()
        reference = weakref.ref(module)

        def here() -> nn.Module:
            module = reference()
            assert module is not None
            return module

        def prepared(args: Any, kwargs: Any) -> Arguments:
            for door in _open_doors().get(id(here()), ()):
                if door.before is not None:
                    args, kwargs = door.before(args, kwargs)
            return args, kwargs

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = prepared(args, kwargs)
            call = self.own or here().forward
            for door in _open_doors().get(id(here()), ()):
                if door.around is not None:
                    call = _bound(door.around, call)
            return call(*args, **kwargs)

        if self.hidden:  # not before: torch.compiler.disable would import the compiler, which takes seconds
            prepared = torch.compiler.disable(prepared)
            forward = torch.compiler.disable(forward, recursive=whole)
        self.forward = forward

    def hang(self, module: nn.Module) -> None:
        self.replaced, self.own = module.__dict__.get("forward"), module.forward
        module.forward = self.forward

    def unhang(self, module: nn.Module) -> None:
        if module.__dict__.get("forward") is not self.forward:
            return  # somebody wrapped it meanwhile; what they hold passes everything on
        if self.replaced is None:
            del module.forward
        else:
            module.forward = self.replaced
        self.own = self.replaced = None


_lock = threading.RLock()
_frames: weakref.WeakKeyDictionary[nn.Module, _Frame] = weakref.WeakKeyDictionary()
_here = threading.local()


def _open_doors() -> dict[int, tuple[Door, ...]]:
    return getattr(_here, "doors", {})


def _bound(around: Around, call: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: around(call, args, kwargs)


@contextmanager
def opened(doors: Iterable[Door]) -> Iterator[None]:
    """Do the doors' work for calls made inside this block, from this thread. Where blocks are nested all of it is done.

    Every module's `forward` is what it was, by identity, once all threads have left.
    """
    before = _open_doors()
    now = dict(before)
    with ExitStack() as stack:
        for door in doors:
            now[id(door.module)] = (*now.get(id(door.module), ()), door)
            _open(door)
            stack.callback(_close, door.module)
        _here.doors = now
        try:
            yield
        finally:
            _here.doors = before


def _open(door: Door) -> None:
    with _lock:
        frame = _frames.get(door.module)
        if frame is None or (not frame.users and frame.hidden != compiler_in_use()):
            frame = _frames[door.module] = _Frame(door.module, door.around is not None)
        if not frame.users:
            frame.hang(door.module)
        frame.users += 1


def _close(module: nn.Module) -> None:
    with _lock:
        frame = _frames[module]
        frame.users -= 1
        if not frame.users:
            frame.unhang(module)


def compiler_in_use() -> bool:
    """Whether anything can have been compiled: the first use of the compiler imports it."""
    return "torch._dynamo" in sys.modules
