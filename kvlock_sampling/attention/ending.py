"""The source is computed as far as it is needed: nothing of it matters after its last keys and values.

A pass of the source by itself is broken off there, by an exception. Where the source rides as rows of the edit's call,
the block with the last site is called twice: for the source's rows alone, as far as their keys and values, and for the
edit's rows with those fused in. That block and those after it return zeros for the source.

Both save the source most of its last layer: half of its cost in a network of two layers, a thirtieth of it in one of
thirty, and half again where only the earlier half of the layers is locked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import anything_compiled
from .doors import Door
from .frame import Frame

_PLAIN = (Tensor, int, float, complex, str, torch.dtype, torch.device, type(None))


class Ended(BaseException):
    """Every site has seen the source. Not an `Exception`: no wrapper of a model is to take it for a failure."""


def end_if_seen(frame: Frame) -> None:
    """Break off a pass that is made only for what the sites see of it, once they all have.

    Raises:
        Ended: they have.
    """
    if frame.mode == "capture" and frame.until is not None and frame.until <= frame.fired:
        raise Ended


def ending(sites: frozenset[str], blocks: dict[nn.Module, frozenset[str]], frame: Frame) -> Iterator[Door]:
    """Doors that let the source's rows leave a lockstep call. blocks: all of one network, with the sites in each."""
    for block, inside in blocks.items():
        yield Door(block, around=partial(_without_source, block, sites, inside, frame))


def may_end(module: nn.Module) -> bool:
    """Whether part of a call can be left out, or made apart: nothing else counts on calls being whole, and no compiled
    code would be called in a new way. Offloading, step caches, casting and most tools put hooks on modules.
    """
    return not anything_compiled() and not any(map(_hooked, module.modules()))


def _hooked(module: nn.Module) -> bool:
    own = module.__dict__
    return bool(module._forward_hooks or module._forward_pre_hooks or own.get("_hf_hook") or own.get("_diffusers_hook"))


def _without_source(
    block: nn.Module, sites: frozenset[str], inside: frozenset[str], frame: Frame, call: Callable[..., Any], *given: Any
) -> Any:
    missing = sites - frame.fired
    rows, edit = frame.rows, frame.rows - frame.batch
    here = frame.mode == "lockstep" and edit > 0 and missing <= inside
    if not here or ambiguous(rows, frame) or not is_plain(given) or not may_end(block):
        return call(*given[0], **given[1])
    try:
        if missing and not _captured(call, cut(given, rows, slice(edit, rows)), sites, frame):
            frame.mode = "lockstep"
            return call(*given[0], **given[1])
        frame.mode = "inject"
        args, kwargs = cut(given, rows, slice(0, edit))
        return _padded(call(*args, **kwargs), edit, rows)
    finally:
        frame.mode = "lockstep"
        frame.store.clear()


def _captured(call: Callable[..., Any], given: Any, sites: frozenset[str], frame: Frame) -> bool:
    """The source's K/V at the sites that are still missing; False where one of them did not act."""
    before = set(frame.fired)
    frame.mode, frame.until = "capture", sites
    try:
        call(*given[0], **given[1])
    except Ended:
        return True
    finally:
        frame.until = None
    frame.fired.clear()
    frame.fired.update(before)
    return False


def ambiguous(rows: int, frame: Frame) -> bool:
    """Whether something else may be as long: a table of positions, of all tokens or along one axis."""
    tokens, text = frame.ratio.shape[1], frame.text or 0
    return rows in (*(frame.grid or ()), tokens, text, tokens + text)


def is_plain(value: Any) -> bool:
    """Whether `cut` can look into it: an object might hold rows of its own."""
    if isinstance(value, dict):
        return all(map(is_plain, value.values()))
    return all(map(is_plain, value)) if isinstance(value, (tuple, list)) else isinstance(value, _PLAIN)


def cut(value: Any, rows: int, part: slice) -> Any:
    """Some of the rows, of every tensor that has one entry for each."""
    if isinstance(value, Tensor):
        return value[part] if value.ndim > 1 and len(value) == rows else value
    if isinstance(value, dict):
        return {name: cut(each, rows, part) for name, each in value.items()}
    return rebuilt(value, lambda each: cut(each, rows, part))


def _padded(value: Any, edit: int, rows: int) -> Any:
    """The output with zeros for the source: what comes after the blocks still counts on all rows."""
    if isinstance(value, Tensor):
        if not value.ndim or len(value) != edit:
            return value
        return torch.cat([value, value.new_zeros(rows - edit, *value.shape[1:])])
    return rebuilt(value, lambda each: _padded(each, edit, rows))


def rebuilt(value: Any, change: Callable[[Any], Any]) -> Any:
    """A tuple or list with each of its parts changed; anything else as it is."""
    if not isinstance(value, (tuple, list)):
        return value
    parts = map(change, value)
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
