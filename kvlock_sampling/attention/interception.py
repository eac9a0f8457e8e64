"""See an attention call, whatever computes it: torch, or a backend of diffusers' attention dispatch.

`intercepted(rewrite)` acts for its own thread or task only. Attention is computed by
- torch's own `F.scaled_dot_product_attention`, which a `TorchFunctionMode` sees (thread-local by construction);
- what torch itself calls by that name, as in nn.MultiheadAttention, or what replaced it, as by SageAttention's recipe;
- diffusers' `dispatch_attention_fn`, which looks up its backend (native, flex, flash, ...) in a table at every call;
- ComfyUI's `optimized_attention`, see `compat.comfy`.
The compiler does not enter what rewrites: it would trace the rewriting, and the result be rewritten once more.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..types import AttentionError
from ..utils.threads import compiler_imported, setting, shared

Fused = tuple[Tensor, Tensor, Tensor | None]  # the key, value and mask that attention uses instead
Rewrite = Callable[[Tensor, Tensor, Tensor, Tensor | None], Fused]  # of (rows, heads, length, dim) each

_rewrite: ContextVar[Rewrite | None] = ContextVar("kvlock_rewrite", default=None)


@contextmanager
def intercepted(rewrite: Rewrite) -> Iterator[None]:
    """Let `rewrite` change keys, values and mask of every attention call in the block; inner blocks rewrite first."""
    outer = _rewrite.get()
    chained = rewrite if outer is None else lambda q, k, v, mask: outer(q, *rewrite(q, k, v, mask))
    with setting(_rewrite, chained), _exchanged(), _SeesTorch():
        yield


@contextmanager
def taken() -> Iterator[Rewrite | None]:
    """The rewriting of this block, for the call of one kernel: inside, what the kernel calls is not rewritten again."""
    rewrite = _rewrite.get()
    with setting(_rewrite, None):
        yield rewrite


_TORCHS_OWN: Any = torch._C._nn.scaled_dot_product_attention
_NAMES = ("query", "key", "value", "attn_mask")


@functools.cache
def _seen(function: Callable[..., Any], hidden: bool, lengths_first: bool) -> Callable[..., Any]:
    """A function called as F.scaled_dot_product_attention, whose keys, values and mask are rewritten.

    `lengths_first` for a backend of diffusers: (rows, length, heads, dim), and a mask may be (rows, length).
    """
    takes_mask = not lengths_first or "attn_mask" in inspect.signature(function).parameters

    def turned(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if lengths_first else x

    @functools.wraps(function)
    def seen(*args: Any, **kwargs: Any) -> Any:
        with taken() as rewrite:
            if rewrite is None:
                return function(*args, **kwargs)
            given: Any = dict(zip(_NAMES, args[:4], strict=False)) | {n: kwargs[n] for n in _NAMES if n in kwargs}
            mask = given.get("attn_mask")
            flat = lengths_first and isinstance(mask, Tensor) and mask.ndim == 2
            shown = mask[:, None, None] if flat else mask
            query, key, value = (turned(given[name]) for name in _NAMES[:3])
            *changed, new_mask = rewrite(query, key, value, shown)
            if changed[0].shape[-2] != key.shape[-2] and kwargs.get("is_causal", args[5] if len(args) > 5 else False):
                raise AttentionError(
                    "attention with is_causal=True counts places among all tokens, and only the edited ones run.\n"
                    "  Pass foreground=False to KVLock, or the mask as attn_mask= to the kernel."
                )
            dense = given["key"].is_contiguous()
            given["key"], given["value"] = (turned(new).contiguous() if dense else turned(new) for new in changed)
            if new_mask is not shown:
                if not takes_mask:
                    raise AttentionError(
                        f"the attention backend {function.__name__.strip('_')!r} takes no mask, and the lock needs one."
                        "\n  Choose one that does: model.set_attention_backend('native'), or 'flex'."
                    )
                given["attn_mask"] = new_mask[:, 0, 0] if flat and new_mask is not None else new_mask
            # Another function may have another fourth argument, so every argument stays where it was given.
            return function(*(given.pop(name) for name in _NAMES[: len(args)]), *args[4:], **{**kwargs, **given})

    return torch.compiler.disable(seen) if hidden else seen


class _SeesTorch(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _seen(func, compiler_imported(), False) if func is _TORCHS_OWN else func
        return call(*args, **(kwargs or {}))


@shared
def _exchanged(undo: ExitStack) -> None:
    """Exchange the functions that calls look up. (A replaced attention processor would lose its backend instead.)"""

    def exchange(table: dict[Any, Any], name: Any, lengths_first: bool) -> None:
        own = table[name]
        # Remembered, a function of the user's would live as long as the process, with all that it closes over.
        make = _seen if lengths_first or own is _TORCHS_OWN else _seen.__wrapped__
        table[name] = seen = make(own, compiler_imported(), lengths_first)
        undo.callback(lambda: table.update({name: own} if table[name] is seen else {}))  # else replaced meanwhile

    exchange(vars(F), "scaled_dot_product_attention", False)
    # Without backends diffusers was never imported, or is older than its dispatch.
    dispatch = sys.modules.get("diffusers.models.attention_dispatch")
    backends = getattr(getattr(dispatch, "_AttentionBackendRegistry", None), "_backends", {})
    for name in list(backends):
        exchange(backends, name, True)
