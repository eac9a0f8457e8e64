"""The source is computed as far as it is needed: nothing of it matters after its last keys and values.

Where the source rides as rows of the edit's call, the block with the last layer is called twice: for the source's rows
alone, as far as their keys and values, and for the edit's rows with those fused in. That block and those after it
return copies of the edit's rows for the source. It saves the source most of its last layer: half of its cost in a
network of two layers, a thirtieth of it in one of thirty, and half again where only the earlier half of the layers is
locked.

Should a layer act once more after that, the call is made again, whole, and so are those that follow: see `Repeats`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import NotBatchable
from .compat.torch_compile import anything_compiled
from .context import Frame
from .forwards import Door

_PLAIN = (Tensor, int, float, complex, str, torch.dtype, torch.device, type(None))


class Ended(BaseException):
    """Every layer has seen the source. Not an `Exception`: no wrapper of a model is to take it for a failure."""


def end_if_seen(frame: Frame) -> None:
    """Break off a pass that is made only for what the layers see of it, once they all have.

    Raises:
        Ended: they have.
    """
    if frame.mode == "capture" and frame.until is not None and frame.until <= frame.fired:
        raise Ended


def ending(layers: frozenset[str], blocks: dict[nn.Module, frozenset[str]], frame: Frame) -> Iterator[Door]:
    """Doors that let the source's rows leave a lockstep call. blocks: all of one network, with the layers in each."""
    for block, inside in blocks.items():
        yield Door(block, around=partial(_without_source, block, layers, inside, frame))


def may_end(module: nn.Module) -> bool:
    """Whether part of a call can be left out, or made apart: nothing else counts on calls being whole, and no compiled
    code would be called in a new way. Offloading, step caches, casting and most tools put hooks on modules.
    """
    return not anything_compiled() and not any(map(_hooked, module.modules()))


def _hooked(module: nn.Module) -> bool:
    own = module.__dict__
    registry = own.get("_diffusers_hook")  # stays when its hooks are taken away
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or own.get("_hf_hook")
        or (registry is not None and getattr(registry, "hooks", True))
    )


def _without_source(
    block: nn.Module,
    layers: frozenset[str],
    inside: frozenset[str],
    frame: Frame,
    call: Callable[..., Any],
    *given: Any,
) -> Any:
    missing = layers - frame.fired
    rows, edit = frame.rows, frame.rows - frame.batch
    # The last block with a layer that is still missing, or one without any behind it.
    here = frame.mode == "lockstep" and edit > 0 and (missing <= inside if missing else not inside)
    if not here or ambiguous(rows, edit, frame) or not plain_call(given, rows) or not may_end(block):
        return call(*given[0], **given[1])
    empty = containers((*given[0], *given[1].values()))
    try:
        if missing and not _captured(call, cut_call(given, rows, slice(edit, rows)), layers, frame):
            frame.mode = "lockstep"
            return call(*given[0], **given[1])
        frame.mode, frame.partial = "inject", True
        frame.times.clear()
        args, kwargs = cut_call(given, rows, slice(0, edit))
        out = call(*args, **kwargs)
        if any(empty) or not is_plain(out, -1):
            raise NotBatchable  # it hands results on by another way than its output
        frame.left = True
        return _padded(out, edit, rows)
    finally:
        frame.mode, frame.partial = "lockstep", False
        frame.store.clear()


def _captured(call: Callable[..., Any], given: Any, layers: frozenset[str], frame: Frame) -> bool:
    """The source's K/V at the layers that are still missing; False where one of them did not act."""
    before = set(frame.fired)
    frame.mode, frame.until = "capture", layers
    frame.times.clear()
    try:
        call(*given[0], **given[1])
    except Ended:
        return True
    finally:
        frame.until = None
    frame.fired.clear()
    frame.fired.update(before)
    return False


def ambiguous(rows: int, edit: int, frame: Frame) -> bool:
    """Whether something else may be as long: a table of positions, of all tokens or along one axis."""
    tokens, text = frame.ratio.shape[1], frame.text or 0
    return bool({rows, edit} & {*(frame.grid or ()), tokens, text, tokens + text})


def plain_call(given: Any, rows: int) -> bool:
    """Whether the rows of a block's arguments can be told, see `is_plain`."""
    return all(is_plain(each, rows) for each in (*given[0], *given[1].values()))


def cut_call(given: Any, rows: int, part: slice) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A block's arguments for some of the rows."""
    args, kwargs = given
    return tuple(cut(a, rows, part) for a in args), {name: cut(a, rows, part) for name, a in kwargs.items()}


def is_plain(value: Any, rows: int) -> bool:
    """Whether `cut` can tell a block's rows: not inside an object, nor where there is one number for each. What a block
    may write to, lists and dicts, must be empty, and stay so.
    """
    if isinstance(value, (list, dict)):
        return not value
    if isinstance(value, tuple):
        numbers = len(value) == rows and not all(isinstance(each, (Tensor, tuple, dict)) for each in value)
        return not numbers and all(is_plain(each, rows) for each in value)
    if isinstance(value, Tensor):
        return value.ndim != 1 or len(value) != rows
    return isinstance(value, _PLAIN)


def containers(value: Any) -> list[Any]:
    """The lists and dicts in it."""
    if isinstance(value, tuple):
        return [found for each in value for found in containers(each)]
    return [value] if isinstance(value, (list, dict)) else []


def cut(value: Any, rows: int, part: slice) -> Any:
    """Some of the rows, of every tensor that has one entry for each."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim > 1 and len(value) == rows else value
    return rebuilt(value, lambda each: cut(each, rows, part))


def _padded(value: Any, edit: int, rows: int) -> Any:
    """The output with some of its rows once more, for the source: what comes after the blocks still counts on all."""
    if isinstance(value, Tensor):
        if not value.ndim or len(value) != edit:
            return value
        return torch.cat([value, value[: rows - edit].detach()])
    return rebuilt(value, lambda each: _padded(each, edit, rows))


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple with each of its parts changed; anything else as it is."""
    if not isinstance(value, tuple):
        return value
    parts = map(change, value)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
