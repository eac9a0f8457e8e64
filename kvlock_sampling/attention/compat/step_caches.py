"""Step caches of diffusers (FirstBlockCache, MagCache, PyramidAttentionBroadcast, ...) under a lock.

Caches reuse results of one call in the next and assume calls of one kind. A lock makes calls of several kinds:
- the source's pass and probes at other points bypass the caches, so that every layer fires for the source;
- each kind of call of the edit (one branch or two) has its own memory, which lives as long as the run.
A layer that the edit skips is not fused and not counted: it reuses what it computed when it was fused.
"""

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
    def apart(self, kind: Hashable, branches: tuple[str, ...] | None) -> Iterator[None]:
        """Give calls in this block the memory of their kind, by their rows, ("guided",) if unknown; None: no memory."""
        # FasterCache derives one branch from the other, so it is bypassed unless both are there in this order.
        pair = branches in (("guided",), ("uncond", "cond"))
        with ExitStack() as stack:
            owners: dict[Any, tuple[str, Callable[[], Any]]] = {}  # the blocks of a network share one manager of states
            for hook in self._hooks():
                if branches is None or (not pair and getattr(hook, "is_guidance_distilled", True) is False):
                    _pass_by(stack, hook)
                if branches is not None:
                    owners |= {owner: (name, fresh) for owner, name, fresh in _memories(hook)}
            for owner, (name, fresh) in owners.items():
                if name == "_state_cache":
                    _give_context(stack, owner)
                stack.callback(self._put_back, owner, name, (kind, owner), getattr(owner, name))
                setattr(owner, name, self._memories[kind, owner] if (kind, owner) in self._memories else fresh())
            yield

    def _put_back(self, owner: Any, name: str, key: tuple[Hashable, Any], found: Any) -> None:
        self._memories[key] = getattr(owner, name)
        setattr(owner, name, found)

    def _hooks(self) -> Iterator[Any]:
        for module in self.modules:
            for hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).values():
                if any(_memories(hook)):
                    yield hook


def _memories(hook: Any) -> Iterator[tuple[Any, str, Callable[[], Any]]]:
    """The owner, attribute and maker of each memory of a hook: a manager of states, or a state that can be reset."""
    for name, value in vars(hook).items():
        if hasattr(value, "_state_cache"):
            yield value, "_state_cache", dict
        elif name == "state" and callable(getattr(value, "reset", None)):
            yield hook, name, partial(_emptied, value)


def _emptied(state: Any) -> Any:
    fresh = copy.copy(state)
    fresh.reset()
    return fresh


def _give_context(stack: ExitStack, manager: Any) -> None:
    # A denoiser of one branch need not call `cache_context`.
    if all(getattr(manager, name, None) is None for name in ("_context", "_current_context")):
        manager.set_context(getattr(sys.modules["diffusers.hooks.hooks"], "CacheContext", str)("kvlock"))
        stack.callback(manager.set_context, None)


def _pass_by(stack: ExitStack, hook: Any) -> None:
    """Call the hook's module as if the hook did not exist."""
    chain = hook.fn_ref
    for name in ("pre_forward", "forward", "post_forward"):
        stack.callback(setattr, chain, name, getattr(chain, name))
    chain.pre_forward = lambda module, *args, **kwargs: (args, kwargs)
    chain.post_forward = lambda module, output: output
    chain.forward = chain.original_forward or chain.forward
