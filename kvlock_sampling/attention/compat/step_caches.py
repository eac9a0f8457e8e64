"""Step caches of diffusers (FirstBlockCache, MagCache, PyramidAttentionBroadcast, ...) beside a lock.

They keep results of one call for the next, on the network itself, and take it that all calls are of one kind. A lock's
are not: the source's pass, probes at other points, one branch or two. So
- the source's pass and probes go past the caches: nothing they see is remembered, and every layer fires for the source;
- each kind of call of the edit has a memory of its own, which lives as long as the run;
- the network's own memory is afterwards what it was, by identity.
A layer that the edit skips then is not fused, and not counted: it reuses what it computed when it was.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


class StepCaches:
    """The step caches on some modules, whichever are enabled at the time of a call."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._memories: dict[tuple[Hashable, int], Any] = {}
        self._owners: dict[int, Any] = {}  # kept alive, so that an id stays theirs

    @property
    def active(self) -> bool:
        """Whether any is enabled. The source must then not ride in the edit's batch, or its rows would be remembered
        with the edit's, and rows would come and go between calls.
        """
        return next(self._hooks(), None) is not None

    @contextmanager
    def apart(self, kind: Hashable, branches: tuple[str, ...] = ("guided",)) -> Iterator[None]:
        """Calls inside this block are of one kind: they remember what earlier calls of that kind did, in this run.

        branches: the call's rows, or that the model arranges them itself. FasterCache derives one branch from the
            other: it is passed by where they are not there both, the unconditional one first.
        """
        pair = branches in (("guided",), ("uncond", "cond"))
        with ExitStack() as stack:
            seen: set[int] = set()
            for hook in self._hooks():
                if not pair and getattr(hook, "is_guidance_distilled", True) is False:  # FasterCache's
                    _pass_by(stack, hook)
                for name, memory in _memories(hook):
                    manager = hasattr(memory, "_state_cache")
                    owner = memory if manager else hook
                    if id(owner) in seen:
                        continue  # the blocks of a network share one manager
                    seen.add(id(owner))
                    self._owners[id(owner)] = owner
                    if manager:
                        _give_context(stack, memory)
                        self._exchange(stack, owner, "_state_cache", kind, dict)
                    else:
                        self._exchange(stack, owner, name, kind, partial(_emptied, memory))
            yield

    def _exchange(self, stack: ExitStack, owner: Any, name: str, kind: Hashable, fresh: Callable[[], Any]) -> None:
        found, key = getattr(owner, name), (kind, id(owner))
        if key not in self._memories:
            self._memories[key] = fresh()
        setattr(owner, name, self._memories[key])

        def put_back() -> None:
            self._memories[key] = getattr(owner, name)
            setattr(owner, name, found)

        stack.callback(put_back)

    @contextmanager
    def passed_by(self) -> Iterator[None]:
        """Calls inside this block are computed in full, and nothing of them is remembered."""
        kind = object()
        with ExitStack() as stack:
            stack.callback(self._forget, kind)
            stack.enter_context(self.apart(kind))
            for hook in self._hooks():
                _pass_by(stack, hook)
            yield

    def _forget(self, kind: Hashable) -> None:
        self._memories = {key: memory for key, memory in self._memories.items() if key[0] is not kind}

    def _hooks(self) -> Iterator[Any]:
        if "diffusers.hooks.hooks" not in sys.modules:
            return
        for module in self.modules:
            registry = module.__dict__.get("_diffusers_hook")
            for hook in getattr(registry, "hooks", {}).values():
                if _memories(hook):
                    yield hook


def _memories(hook: Any) -> list[tuple[str, Any]]:
    """What a hook remembers from call to call: a manager of states, or a state that can be reset."""
    return [
        (name, value)
        for name, value in vars(hook).items()
        if hasattr(value, "_state_cache") or (name == "state" and callable(getattr(value, "reset", None)))
    ]


def _emptied(state: Any) -> Any:
    fresh = copy.copy(state)
    fresh.reset()
    return fresh


def _give_context(stack: ExitStack, manager: Any) -> None:
    """A manager of states wants to be told a name, by `cache_context`; a denoiser of one branch need not bother."""
    if getattr(manager, "_context", None) is not None or getattr(manager, "_current_context", None) is not None:
        return
    make = getattr(sys.modules["diffusers.hooks.hooks"], "CacheContext", str)
    manager.set_context(make("kvlock"))
    stack.callback(manager.set_context, None)


def _arguments(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


def _output(module: nn.Module, output: Any) -> Any:
    return output


def _pass_by(stack: ExitStack, hook: Any) -> None:
    """The hook's module is called as if the hook were not there."""
    chain = hook.fn_ref
    found = (chain.pre_forward, chain.forward, chain.post_forward)

    def put_back() -> None:
        chain.pre_forward, chain.forward, chain.post_forward = found

    stack.callback(put_back)
    chain.pre_forward, chain.post_forward = _arguments, _output
    chain.forward = chain.original_forward or chain.forward
