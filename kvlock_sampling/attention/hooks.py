"""Hooks that exist only within a `with` block, and act only during the lock's own calls, in the lock's own thread.

`installed(sites)` registers forward hooks by handle and removes exactly those. A site's hook does nothing unless a
`Frame` is active in this thread; then it watches `F.scaled_dot_product_attention` for the time the site runs, with a
`TorchFunctionMode` (thread-local by construction). K and V are therefore seen after qk-norm and rotary embedding, for
fused and plain projections alike, and everything outside the site runs untouched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..types import SiteError
from .frame import Frame
from .sites import Sites

Rewrite = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _WatchAttention(TorchFunctionMode):
    """Hands query, key, value of every scaled_dot_product_attention call to `rewrite` and uses the K/V it returns."""

    def __init__(self, rewrite: Rewrite) -> None:
        super().__init__()
        self.rewrite = rewrite

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value")
        given = dict(zip(names, args[:3], strict=False)) | {n: kwargs.pop(n) for n in names if n in kwargs}
        key, value = self.rewrite(given["query"], given["key"], given["value"])
        return func(given["query"], key, value, *args[3:], **kwargs)


class Hooks:
    """The hooks of one run. `frame(...)` makes them act for the calls inside its block; otherwise they do nothing."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self._local = threading.local()

    @contextmanager
    def frame(self, frame: Frame) -> Iterator[Frame]:
        """Let the sites act on calls made inside this block, from this thread.

        Raises:
            SiteError: on leaving, if no site fired at all: the model never reached one, and nothing was locked.
        """
        outer = getattr(self._local, "frame", None)
        self._local.frame = frame
        try:
            yield frame
        finally:
            self._local.frame = outer
        if not frame.fired:
            if self.sites.watch is not None:
                s, seen = self.sites, ", ".join(f"{q} x {k}" for q, k in dict.fromkeys(frame.passed_over)) or "none"
                after = "any" if s.trailing is None else s.trailing
                chosen = "" if s.select is None else f", at calls {sorted(s.select)}"
                raise SiteError(
                    f"no attention call fitted, so nothing was locked. Expected {s.start} + {frame.ratio.shape[1]} "
                    f"video tokens + {after} after them{chosen}; other calls (query x key): {seen}.\n"
                    "  Set start= and trailing= of SdpaSites to the text tokens before and after the video, patch= to "
                    "the model's patch size, layers= to calls that exist."
                )
            where = f"{len(self.sites.sites)} sites"
            raise SiteError(
                f"none of the model's {where} fired during this evaluation, so nothing was locked.\n"
                "  Is the model called through another copy (torch.compile, a replica, an exported graph)? "
                "Pass sites= of the module that really runs."
            )

    @contextmanager
    def installed(self) -> Iterator[Hooks]:
        """Register the hooks; on leaving, remove exactly these, whatever happened inside."""
        with ExitStack() as stack:
            if self.sites.watch is not None:
                self._install(stack, self.sites.watch, self._rewrite_any)
            for site in self.sites.sites:
                self._install(stack, site.module, self._rewrite_site(site.name, site.start))
            yield self

    def _install(self, stack: ExitStack, module: nn.Module, make: Callable[[Frame], Rewrite]) -> None:
        local = self._local  # of this thread: the frame, and a stack of modes, since sites may nest

        def enter(module: nn.Module, args: Any) -> None:
            frame = getattr(local, "frame", None)
            if frame is not None and not torch.jit.is_tracing():
                mode = _WatchAttention(make(frame))
                mode.__enter__()
                local.modes = [*getattr(local, "modes", ()), mode]

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if getattr(local, "frame", None) is not None and getattr(local, "modes", None):
                local.modes.pop().__exit__(None, None, None)

        stack.callback(module.register_forward_pre_hook(enter).remove)
        stack.callback(module.register_forward_hook(leave, always_call=True).remove)

    @staticmethod
    def _rewrite_site(name: str, start: int) -> Callable[[Frame], Rewrite]:
        def make(frame: Frame) -> Rewrite:
            def rewrite(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
                tokens = frame.ratio.shape[1]
                if key.shape[-2] < start + tokens:
                    raise SiteError(
                        f"site {name!r} attends over {key.shape[-2]} tokens; the mask has {tokens}"
                        f"{f' after {start} text tokens' if start else ''}.\n"
                        "  The mask's grid and the model's patches differ: check the latents' shape, "
                        "and that no frames or reference tokens were added."
                    )
                return frame.process(name, key, value, start)

            return rewrite

        return make

    def _rewrite_any(self, frame: Frame) -> Rewrite:
        calls = 0

        def rewrite(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            nonlocal calls
            tokens, length = frame.ratio.shape[1], key.shape[-2]
            start, trailing = self.sites.start, self.sites.trailing
            rest = length - start - tokens
            if query.shape[-2] != length or not (rest == trailing or (trailing is None and rest >= 0)):
                frame.passed_over.append((query.shape[-2], length))
                return key, value
            index, calls = calls, calls + 1
            if self.sites.select is not None and index not in self.sites.select:
                return key, value
            return frame.process(f"call.{index}", key, value, start)

        return rewrite
