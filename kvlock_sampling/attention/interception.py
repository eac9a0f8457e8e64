"""See an attention call, whatever computes it: torch, or a backend of diffusers' attention dispatch.

`intercepted(rewrite)` acts for its own thread or task only. Attention is computed by
- `F.scaled_dot_product_attention`, which a `TorchFunctionMode` sees (thread-local by construction);
- diffusers' `dispatch_attention_fn`, which looks up its backend (native, flex, flash, ...) in a table at every call.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..types import AttentionError

Fused = tuple[Tensor, Tensor, Tensor | None]  # the key, value and mask that attention uses instead
Rewrite = Callable[[Tensor, Tensor, Tensor, Tensor | None], Fused]  # of (rows, heads, length, dim) each

_rewrite: ContextVar[Rewrite | None] = ContextVar("kvlock_rewrite", default=None)


@contextmanager
def intercepted(rewrite: Rewrite) -> Iterator[None]:
    """Let `rewrite` change keys, values and mask of every attention call in the block; inner blocks rewrite first."""
    outer = _rewrite.get()
    token = _rewrite.set(rewrite if outer is None else lambda q, k, v, mask: outer(q, *rewrite(q, k, v, mask)))
    try:
        with _dispatch_seen(), _SeesTorch():
            yield
    finally:
        _rewrite.reset(token)


@contextmanager
def _once() -> Iterator[Rewrite | None]:
    # Inside the block there is no rewrite: a backend that calls SDPA is rewritten once.
    rewrite = _rewrite.get()
    token = _rewrite.set(None)
    try:
        yield rewrite
    finally:
        _rewrite.reset(token)


class _SeesTorch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with _once() as rewrite:
            if rewrite is None:
                return func(*args, **kwargs)
            names = ("query", "key", "value", "attn_mask")
            given = dict(zip(names, args[:4], strict=False)) | {n: kwargs.pop(n) for n in names if n in kwargs}
            key, value, mask = rewrite(given["query"], given["key"], given["value"], given.get("attn_mask"))
            return func(given["query"], key, value, mask, *args[4:], **kwargs)


_lock = threading.Lock()
_users = 0
_backends: dict[Any, Callable[..., Any]] = {}


@contextmanager
def _dispatch_seen() -> Iterator[None]:
    """Exchange diffusers' table of backends for a table of wrappers while any thread intercepts calls.

    Afterwards it is the very object that it was, so compiled code that looked into it stays valid. A replaced attention
    processor would lose its backend instead, and the table's enumeration takes no new names.
    """
    global _users, _backends
    registry = getattr(sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None)
    if registry is None:
        yield  # diffusers was never imported, or is older than its dispatch
        return
    with _lock:
        if not _users:
            _backends, registry._backends = registry._backends, {n: _seen(b) for n, b in registry._backends.items()}
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                late = {name: b for name, b in registry._backends.items() if name not in _backends}
                registry._backends = _backends
                _backends.update(late)  # registered meanwhile


@functools.cache
def _seen(backend: Callable[..., Any]) -> Callable[..., Any]:
    """A backend, (rows, length, heads, dim) in and out, whose keys, values and mask are rewritten."""
    takes_mask = "attn_mask" in inspect.signature(backend).parameters

    @functools.wraps(backend)
    def seen(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        with _once() as rewrite:
            if rewrite is None:
                return backend(query, key, value, *args, **kwargs)
            mask: Any = kwargs.get("attn_mask")
            flat = isinstance(mask, Tensor) and mask.ndim == 2  # a key mask (rows, length)
            shown = mask[:, None, None] if flat else mask
            q, k, v = (given.transpose(1, 2) for given in (query, key, value))
            new_key, new_value, new_mask = rewrite(q, k, v, shown)
            if new_mask is not shown:
                if not takes_mask:
                    raise AttentionError(
                        f"the attention backend {backend.__name__.strip('_')!r} takes no mask, and the lock needs one."
                        "\n  Choose one that does: model.set_attention_backend('native'), or 'flex'."
                    )
                kwargs["attn_mask"] = new_mask[:, 0, 0] if flat and new_mask is not None else new_mask
            new_key, new_value = new_key.transpose(1, 2), new_value.transpose(1, 2)
            if key.is_contiguous():
                new_key, new_value = new_key.contiguous(), new_value.contiguous()
            return backend(query, new_key, new_value, *args, **kwargs)

    return seen
