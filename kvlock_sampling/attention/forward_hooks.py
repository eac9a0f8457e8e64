"""Run code around a module's forward: for the length of a `with` block, in one thread, compiled or not.

`torch.compile` does not notice forward hooks that are registered later, and does not forget hooks that it has seen. So
a hook here replaces `module.forward` by a function that the compiler does not enter. The compiler's guards notice that,
and it compiles a second graph, which breaks at the hook. Both graphs stay cached; a module without hooks costs nothing.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]  # (call, args, kwargs) -> the output
Before = Callable[[tuple[Any, ...], dict[str, Any]], Arguments]  # (args, kwargs) -> the arguments to call with


class ForwardHook(NamedTuple):
    """Code to run at the calls of a module."""

    module: nn.Module
    around: Around | None = None  # wraps the whole call; nothing inside the module stays compiled
    before: Before | None = None  # changes the arguments only; compiled code inside the module stays compiled


class _Forward:
    """The replacement of one module's forward. It is made once, because compiled graphs hold on to it."""

    def __init__(self, module: nn.Module, whole: bool) -> None:
        self.users, self.hidden = 0, compiler_imported()
        self.own: Any = None
        self.replaced: Any = None
        reference: Callable[[], Any] = weakref.ref(module)

        def prepared(args: Any, kwargs: Any) -> Arguments:
            for hook in _hooks.get().get(id(reference()), ()):
                if hook.before is not None:
                    args, kwargs = hook.before(args, kwargs)
            return args, kwargs

        def forward(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = prepared(args, kwargs)
            call = self.own or reference().forward
            for hook in _hooks.get().get(id(reference()), ()):
                if hook.around is not None:
                    call = partial(_around, hook.around, call)
            return call(*args, **kwargs)

        if self.hidden:  # torch.compiler.disable imports the compiler, which takes seconds
            prepared = torch.compiler.disable(prepared)
            forward = torch.compiler.disable(forward, recursive=whole)
        self.forward = forward


def _around(around: Around, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return around(call, args, kwargs)


_lock = threading.RLock()
_forwards: weakref.WeakKeyDictionary[nn.Module, _Forward] = weakref.WeakKeyDictionary()
_hooks: ContextVar[dict[int, tuple[ForwardHook, ...]]] = ContextVar("kvlock_forward_hooks", default={})  # noqa: B039


@contextmanager
def hooked(hooks: Iterable[ForwardHook]) -> Iterator[None]:
    """Run these hooks for calls made inside the block, by this thread or task. Nested blocks add up."""
    now = dict(_hooks.get())
    with ExitStack() as stack:
        for hook in hooks:
            now[id(hook.module)] = (*now.get(id(hook.module), ()), hook)
            stack.enter_context(_replaced(hook.module, hook.around is not None))
        token = _hooks.set(now)
        try:
            yield
        finally:
            _hooks.reset(token)


@contextmanager
def _replaced(module: nn.Module, whole: bool) -> Iterator[None]:
    with _lock:
        mine = _forwards.get(module)
        if mine is None or (not mine.users and mine.hidden != compiler_imported()):
            mine = _forwards[module] = _Forward(module, whole)
        if not mine.users:
            mine.replaced, mine.own = module.__dict__.get("forward"), module.forward
            module.forward = mine.forward
        mine.users += 1
    try:
        yield
    finally:
        with _lock:
            mine.users -= 1
            # If other code wrapped this forward meanwhile, it stays in place and passes every call on.
            if not mine.users and module.__dict__.get("forward") is mine.forward:
                if mine.replaced is None:
                    del module.forward
                else:
                    module.forward = mine.replaced
                mine.own = mine.replaced = None


def compiler_imported() -> bool:
    """Whether the compiler was imported. Without it nothing can be compiled."""
    return "torch._dynamo" in sys.modules
