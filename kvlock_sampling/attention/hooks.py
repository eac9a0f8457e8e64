"""Hooks that exist only within a `with` block, and act only during the lock's own calls, in the lock's own thread.

`installed(sites)` registers forward hooks by handle and removes exactly those. A site's hook does nothing unless a
`Frame` is active in this thread; then it watches `F.scaled_dot_product_attention` for the time the site runs, with a
`TorchFunctionMode` (thread-local by construction). K and V are therefore seen after qk-norm and rotary embedding, for
fused and plain projections alike, and everything outside the site runs untouched.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..types import SiteError
from .foreground import TokenFlow, install_narrowing, parents
from .frame import Frame
from .sites import Site, Sites

Rewrite = Callable[[Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]
"""query, key, value, mask -> key, value, mask that attention is to use instead; (rows, heads, length, dim) each.
"""


class _WatchAttention(TorchFunctionMode):
    """Hands every scaled_dot_product_attention call's query, key, value and mask to `rewrite`, and uses its answer."""

    def __init__(self, rewrite: Rewrite) -> None:
        super().__init__()
        self.rewrite = rewrite

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask")
        given = dict(zip(names, args[:4], strict=False)) | {n: kwargs.pop(n) for n in names if n in kwargs}
        key, value, mask = self.rewrite(given["query"], given["key"], given["value"], given.get("attn_mask"))
        return func(given["query"], key, value, mask, *args[4:], **kwargs)


class Hooks:
    """The hooks of one run. `frame(...)` makes them act for the calls inside its block; otherwise they do nothing."""

    def __init__(self, sites: Sites) -> None:
        self.sites = sites
        self._local = threading.local()
        self._worked = False

    @contextmanager
    def frame(self, frame: Frame) -> Iterator[Frame]:
        """Let the sites act on calls made inside this block, from this thread.

        A site that is skipped, say by a step cache, is not an error: `frame.fired` holds those that acted.

        Raises:
            SiteError: on leaving, if no site has fired in the whole run: the model never reached one.
        """
        outer = getattr(self._local, "frame", None)
        self._local.frame = frame
        try:
            yield frame
        finally:
            self._local.frame = outer
        self._worked = self._worked or bool(frame.fired)
        if not self._worked:
            raise SiteError(self._never_fired(frame))

    def _never_fired(self, frame: Frame) -> str:
        sites = self.sites
        if sites.watch is None:
            return (
                f"none of the model's {len(sites.sites)} sites fired during this evaluation, so nothing was locked.\n"
                "  Is the model called through another copy (torch.compile, a replica, an exported graph)? "
                "Pass sites= of the module that really runs."
            )
        seen = ", ".join(f"{q} x {k}" for q, k in dict.fromkeys(frame.passed_over)) or "none"
        after = "any" if sites.trailing is None else sites.trailing
        chosen = "" if sites.select is None else f", at calls {sorted(sites.select)}"
        return (
            f"no attention call fitted, so nothing was locked. Expected {sites.start} + {frame.ratio.shape[1]} "
            f"video tokens + {after} after them{chosen}; other calls (query x key): {seen}.\n"
            "  Set start= and trailing= of SdpaSites to the text tokens before and after the video, patch= to "
            "the model's patch size, layers= to calls that exist."
        )

    @contextmanager
    def installed(self) -> Iterator[Hooks]:
        """Register the hooks; on leaving, remove exactly these, whatever happened inside."""
        with ExitStack() as stack:
            if self.sites.watch is not None:
                self._install(stack, self.sites.watch, self._rewrite_any)
            for network in self.sites.networks if self.sites.text_arguments else ():
                count = functools.partial(self._count_text, self.sites.text_arguments)
                stack.callback(network.register_forward_pre_hook(count, with_kwargs=True).remove)
            if self.sites.narrows:
                self._install_narrowing(stack, self.sites.flow)
            for site in self.sites.sites:
                self._install(stack, site.module, functools.partial(self._rewrite_site, site))
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

    def _install_narrowing(self, stack: ExitStack, flow: TokenFlow | None) -> None:
        assert flow is not None
        for network in self.sites.networks:
            inside = {id(part) for part in network.modules()}
            names = {id(part): name for name, part in network.named_modules()}
            own = [names[id(s.module)] for s in self.sites.sites if id(s.module) in inside]
            install_narrowing(stack, network, parents(own, network), flow, lambda: getattr(self._local, "frame", None))

    def _count_text(self, names: tuple[str, ...], network: nn.Module, args: Any, kwargs: Any) -> None:
        """Note how many text tokens this call of the network has: its sequences hold them beside the video's."""
        frame = getattr(self._local, "frame", None)
        if frame is None:
            return
        # Of the class: offloading and caches replace the instance's forward, and may hide its signature.
        bound = inspect.signature(type(network).forward).bind_partial(network, *args, **kwargs).arguments
        frame.text = sum(bound[n].shape[1] for n in names if isinstance(bound.get(n), Tensor))

    def _rewrite_site(self, site: Site, frame: Frame) -> Rewrite:
        patch, extra = self.sites.patch, self.sites.extra
        t, h, w = (a // b for a, b in zip(site.patch or patch, patch, strict=True))
        ratio, rows = frame.ratio_at((t, h, w)), itertools.count()

        def rewrite(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            start = video_start(site, key.shape[-2], frame.tokens or ratio.shape[1], frame.text, extra)
            if self.sites.rows_apart:
                return *frame.process_row(site.name, next(rows), key, value, start), mask
            return *frame.process(site.name, key, value, start, ratio), frame.mask(mask, start)

        return rewrite

    def _rewrite_any(self, frame: Frame) -> Rewrite:
        calls = 0

        def rewrite(
            query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            nonlocal calls
            tokens, length = frame.ratio.shape[1], key.shape[-2]
            start, trailing = self.sites.start, self.sites.trailing
            rest = length - start - tokens
            if query.shape[-2] != length or not (rest == trailing or (trailing is None and rest >= 0)):
                frame.passed_over.append((query.shape[-2], length))
                return key, value, mask
            index, calls = calls, calls + 1
            if self.sites.select is not None and index not in self.sites.select:
                return key, value, mask
            return *frame.process(f"call.{index}", key, value, start), mask

        return rewrite


def video_start(site: Site, length: int, tokens: int, text: int | None, extra: tuple[int, int]) -> int:
    """Where the video's `tokens` begin in a sequence of `length`.

    `text` is how many text tokens the network was given (None: unknown), `extra` what else stands before and after.

    Raises:
        SiteError: the sequence cannot be taken apart so.
    """
    before, after = extra
    rest = length - before - tokens - after
    fits = rest == 0 if site.text == "none" else rest >= 0 if text is None else rest == text
    if site.text == "last" and text is not None:
        fits = 0 <= rest <= text  # some models drop the padding of the text
    if fits:
        return before + (rest if site.text == "first" else 0)
    parts = "" if site.text == "none" else f" + {'its' if text is None else text} text tokens"
    others = "" if extra == (0, 0) else f" + {before + after} others"
    surplus = length - tokens - before - after - (text or 0)
    hint = (
        f"If {surplus} of them are reference frames or guides, say where they stand: "
        f"sites=kv.find_sites(model).with_extra(after={surplus})."
        if surplus > 0
        else "The mask's grid and the model's patches differ: check the latents' shape."
    )
    raise SiteError(
        f"site {site.name!r} attends over {length} tokens; expected the mask's {tokens}{parts}{others}.\n  {hint}"
    )
