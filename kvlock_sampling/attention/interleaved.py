"""The source on all tokens and the edit on some of them, through the network side by side, block by block.

Each block is called twice: for the source's rows, then, at the computed tokens alone, for the edit's, with the source's
K/V of this one block. So no more than one layer's are ever kept, where a pass of the source by itself keeps all layers'
for the edit's pass: at full depth several times the memory of an evaluation. Between the blocks the rows are together
again, with copies of others where nothing was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..batching import NotBatchable
from .context import Repeats
from .ending import Ended, ambiguous, containers, cut_call, is_plain, plain_call, rebuilt
from .foreground import ForegroundFrame, TokenFlow, narrow, running, scattered, signature
from .forwards import Door


def side_by_side(
    layers: frozenset[str], blocks: dict[nn.Module, frozenset[str]], flow: TokenFlow, frame: ForegroundFrame
) -> Iterator[Door]:
    """Doors for a lockstep call at full lock. blocks: all of one network; layers: all that are in them.

    The call raises NotBatchable, before its first block has run, where rows cannot be told from other things.
    """
    for block, inside in blocks.items():
        yield Door(block, around=partial(_both, block, layers, inside, flow, frame))


def _both(
    block: nn.Module,
    layers: frozenset[str],
    inside: frozenset[str],
    flow: TokenFlow,
    frame: ForegroundFrame,
    call: Callable[..., Any],
    *given: Any,
) -> Any:
    if frame.mode != "lockstep":
        return call(*given[0], **given[1])
    bound = signature(block).bind_partial(block, *given[0], **given[1])
    rows = next(len(bound.arguments[name]) for name in flow.tokens if isinstance(bound.arguments.get(name), Tensor))
    edit = rows - frame.batch
    _check(rows, edit, given, frame)
    if layers <= frame.fired and inside:
        raise Repeats
    empty = containers((*given[0], *given[1].values()))
    try:
        source = None
        if not layers <= frame.fired:
            frame.mode, frame.until = "capture", layers
            frame.times.clear()
            source = _run(call, cut_call(given, rows, slice(edit, rows)))
        frame.mode, frame.until, frame.partial = "inject", None, True
        frame.times.clear()
        for name in flow.tokens:
            part = bound.arguments.get(name)
            if isinstance(part, Tensor) and (where := running(part.shape[1], frame, part.device)) is not None:
                bound.arguments[name] = part[:edit].index_select(1, where)
        for table in flow.tables:
            if bound.arguments.get(table.name) is not None:
                bound.arguments[table.name] = narrow(bound.arguments[table.name], table, frame)
        # Tables are the same objects in every block; what is cut from them for this one is not to be remembered.
        known = dict(frame.narrowed)
        args, kwargs = cut_call((bound.args[1:], bound.kwargs), rows, slice(0, edit))
        changed = call(*args, **kwargs)
        frame.narrowed = known
        if any(empty) or not is_plain(changed, -1):
            raise NotBatchable  # it hands results on by another way than its output
        return _together(changed, source, rows, frame)
    finally:
        frame.mode, frame.until, frame.partial = "lockstep", None, False
        frame.store.clear()


def _run(call: Callable[..., Any], given: Any) -> Any:
    """The source's output, or None where nothing more of it is needed."""
    try:
        return call(*given[0], **given[1])
    except Ended:
        return None


def _check(rows: int, edit: int, given: Any, frame: ForegroundFrame) -> None:
    computed, text = len(frame.chosen.computed), frame.text or 0
    chunks = edit > 0 and rows % frame.batch == 0
    counts = {computed, computed + text}
    told_apart = not ambiguous(rows, edit, frame) and not counts & {rows, edit} and computed != text
    if not (chunks and told_apart and plain_call(given, rows)):
        raise NotBatchable


def _together(changed: Any, source: Any, rows: int, frame: ForegroundFrame) -> Any:
    """The edit's output and the source's as that of all rows, copies where there is none."""
    if not isinstance(changed, Tensor):
        parts = iter(source) if isinstance(source, (tuple, list)) else None
        return rebuilt(changed, lambda each: _together(each, None if parts is None else next(parts), rows, frame))
    edit = rows - frame.batch
    if changed.ndim < 2 or len(changed) != edit:
        return changed
    length = _whole_length(changed.shape[1], frame) if source is None else source.shape[1]
    where = None if length == changed.shape[1] else running(length, frame, changed.device)
    whole = changed if where is None else scattered(changed, where, length)
    return torch.cat([whole, whole[: rows - edit].detach() if source is None else source])


def _whole_length(length: int, frame: ForegroundFrame) -> int:
    """Of a sequence with some of its tokens left out."""
    computed, tokens, text = len(frame.chosen.computed), frame.ratio.shape[1], frame.text or 0
    return length + tokens - computed if length in (computed, computed + text) else length
