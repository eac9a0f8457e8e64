"""Step caches of diffusers (FirstBlockCache, MagCache, PyramidAttentionBroadcast, ...) under a lock.

They keep results of one call for the next, on the network, and assume calls of one kind. A lock makes calls of several
kinds: the source's pass, probes at other points, one branch or two. Therefore
- the source's pass and probes bypass the caches: the caches store nothing, and every layer fires for the source;
- each kind of call of the edit has its own memory, which lives as long as the run;
- after the call each cache has the memory object that it had before.
A layer that the edit skips is not fused and not counted: it reuses what it computed when it was fused.
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
    """The step caches that are enabled on these modules at the time of a call."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self._memories: dict[tuple[Hashable, Any], Any] = {}

    @property
    def active(self) -> bool:
        """Whether any cache is enabled. The source must then not ride in the edit's batch, or it would be cached."""
        return next(self._hooks(), None) is not None

    @contextmanager
    def apart(self, kind: Hashable, branches: tuple[str, ...] = ("guided",)) -> Iterator[None]:
        """Give calls inside this block the memory of their kind in this run.

        `branches` are the call's rows, or ("guided",) if the model arranges them. FasterCache derives one branch from
        the other, so it is bypassed unless uncond and cond are there in this order.
        """
        pair = branches in (("guided",), ("uncond", "cond"))
        with ExitStack() as stack:
            seen: set[Any] = set()
            for hook in self._hooks():
                if not pair and getattr(hook, "is_guidance_distilled", True) is False:  # FasterCache's
                    _pass_by(stack, hook)
                for name, memory in _memories(hook):
                    manager = hasattr(memory, "_state_cache")
                    owner = memory if manager else hook
                    if owner in seen:
                        continue  # the blocks of a network share one manager
                    seen.add(owner)
                    if manager:
                        _give_context(stack, memory)
                        self._exchange(stack, owner, "_state_cache", kind, dict)
                    else:
                        self._exchange(stack, owner, name, kind, partial(_emptied, memory))
            yield

    def _exchange(self, stack: ExitStack, owner: Any, name: str, kind: Hashable, fresh: Callable[[], Any]) -> None:
        found, key = getattr(owner, name), (kind, owner)
        if key not in self._memories:
            self._memories[key] = fresh()
        setattr(owner, name, self._memories[key])

        def put_back() -> None:
            self._memories[key] = getattr(owner, name)
            setattr(owner, name, found)

        stack.callback(put_back)

    @contextmanager
    def passed_by(self) -> Iterator[None]:
        """Compute calls inside this block in full, and store nothing in the caches."""
        with ExitStack() as stack:
            for hook in self._hooks():
                _pass_by(stack, hook)
            yield

    def _hooks(self) -> Iterator[Any]:
        if "diffusers.hooks.hooks" not in sys.modules:
            return
        for module in self.modules:
            registry = module.__dict__.get("_diffusers_hook")
            for hook in getattr(registry, "hooks", {}).values():
                if _memories(hook):
                    yield hook


def _memories(hook: Any) -> list[tuple[str, Any]]:
    """The memories of a hook by attribute name: a manager of states, or a state that can be reset."""
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
    """Name a context for a manager of states that has none; a denoiser of one branch need not call `cache_context`."""
    if getattr(manager, "_context", None) is not None or getattr(manager, "_current_context", None) is not None:
        return
    make = getattr(sys.modules["diffusers.hooks.hooks"], "CacheContext", str)
    manager.set_context(make("kvlock"))
    stack.callback(manager.set_context, None)


def _pass_by(stack: ExitStack, hook: Any) -> None:
    """Call the hook's module as if the hook did not exist."""
    chain = hook.fn_ref
    found = (chain.pre_forward, chain.forward, chain.post_forward)

    def put_back() -> None:
        chain.pre_forward, chain.forward, chain.post_forward = found

    stack.callback(put_back)
    chain.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    chain.post_forward = lambda module, output: output
    chain.forward = chain.original_forward or chain.forward
