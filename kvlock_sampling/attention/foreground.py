"""Run the edited tokens only: at full lock the other tokens need no computation.

At lock 1 a background token has the source's K/V, and compositing replaces its output. So the token leaves the network
before the first block and returns after the last; its K/V, from the source, join at every attention layer. The result
equals the dense one up to rounding. KV-Edit (arXiv 2502.17363) does this with K/V from an inversion.
The source's K/V come from a separate pass (`narrowing`); or each block runs on the source's rows, then on the computed
tokens of the edit's rows, so that K/V of one layer exist at a time (`interleaving`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..types import AttentionError
from ..utils.modules import signature_of
from ..utils.threads import setting
from .context import CapturedError, FusionContext, acting, current
from .forward_hooks import Arguments, ForwardHook
from .layers import Table, TokenFlow


def narrowing(network: nn.Module, blocks: Iterable[nn.Module], flow: TokenFlow) -> Iterator[ForwardHook]:
    """Hooks that remove the kept tokens at the first block and restore the sequence at `flow.leave`."""
    for block in blocks:
        yield ForwardHook(block, before=partial(_enter, block, flow))
    yield ForwardHook(network.get_submodule(flow.leave), before=_leave)


def interleaving(blocks: Iterable[nn.Module], flow: TokenFlow) -> Iterator[ForwardHook]:
    """Hooks that call each block twice in a lockstep call: for the source's rows, then for the edit's."""
    for block in blocks:
        yield ForwardHook(block, around=partial(_interleave, block, flow))


def _enter(block: nn.Module, flow: TokenFlow, args: Any, kwargs: Any) -> Arguments:
    bound, context = signature_of(block).bind_partial(block, *args, **kwargs), current()
    # Where text shares the sequence, the first block takes the tokens out, and what later blocks get is narrow already,
    # even if it happens to be as long as the video. Elsewhere a block may be given all tokens again.
    _narrow_arguments(bound.arguments, flow, context, whole=not (context.text and context.record.entered))
    context.record.entered = 1
    given = 1 + len(args)  # what came by keyword stays there, because hooks that run after this one look for it there
    return bound.args[1:given], dict(zip([*bound.arguments][given:], bound.args[given:], strict=False)) | bound.kwargs


def _leave(args: Any, kwargs: Any) -> Arguments:
    context, tokens = current(), args[0]
    if tokens.shape[1] == context.ratio.shape[1] and not (context.text and context.record.entered):
        return args, kwargs
    length = tokens.shape[1] + len(_selection(context).kept)  # with the text, if that is still there
    # The gaps hold copies of the first token, because a norm makes the gradients of zeros NaN.
    whole = tokens[:, :1].detach().repeat(1, length, *[1] * (tokens.ndim - 2))
    return (whole.index_copy_(1, _positions(length, context), tokens), *args[1:]), kwargs


def _interleave(block: nn.Module, flow: TokenFlow, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    context = current()
    bound = signature_of(block).bind_partial(block, *args, **kwargs)
    rows = next(len(bound.arguments[name]) for name in flow.tokens if isinstance(bound.arguments.get(name), Tensor))
    if rows % (context.rows or rows):
        raise AttentionError(
            f"{type(block).__name__} was called with {rows} of {context.rows} rows; expected all in one call.\n"
            "  If the model runs its rows one by one: one clip, and batched=False."
        )
    edit = rows - len(context.ratio)
    # A table whose first axis is that of the tokens has no rows, even if it happens to be as long.
    shared = {table.name for table in flow.tables if table.axis == 0}

    def cut(part: slice) -> dict[str, Any]:
        def take(leaf: Any) -> Any:
            return leaf[part] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == rows else leaf

        return {n: given if n in shared else tree_map(take, given) for n, given in bound.arguments.items()}

    def run(arguments: dict[str, Any], part: FusionContext) -> Any:
        bound.arguments.update(arguments)
        with setting(acting, part):
            return call(*bound.args[1:], **bound.kwargs)

    of_source, of_edit = cut(slice(edit, rows)), cut(slice(edit))
    left = None
    # Text as long as the computed tokens could not be told from them below.
    if context.left is not None and context.text != len(_selection(context).computed):
        left = context.left - context.record.entered
    capture, source = replace(context.fresh("capture"), left=left), None
    with suppress(CapturedError):
        source = run(of_source, capture)
    context.record.entered += len(capture.record.captured)
    inject = context.fresh("inject", capture.record.captured)
    _narrow_arguments(of_edit, flow, inject, whole=True)
    given = {of_edit[n].shape[1:]: of_source[n] for n in flow.tokens if isinstance(of_edit.get(n), Tensor)}
    changed = run(of_edit, inject)
    context.record.fired.update(inject.record.fired)

    def join(of_edit: Any, of_source: Any = None) -> Any:
        if not isinstance(of_edit, Tensor) or of_edit.ndim < 2 or len(of_edit) != edit:
            return of_edit
        if of_source is None:  # nothing reads it: the video as the block was given it, and any rows, will do
            of_source = given.get(of_edit.shape[1:], of_edit[: rows - edit])
        if of_edit.shape[1] == of_source.shape[1]:
            return torch.cat([of_edit, of_source])
        # Gaps hold the source's tokens.
        whole = of_source.to(of_edit).repeat(rows // len(of_source), *[1] * (of_source.ndim - 1))
        whole[:edit].index_copy_(1, _positions(of_source.shape[1], context), of_edit)
        return whole

    return tree_map(join, changed) if source is None else tree_map(join, changed, source)


def narrow_mask(mask: Tensor, context: FusionContext, start: int, length: int) -> Tensor:
    """A mask (rows or 1, heads or 1, queries or 1, keys) for the computed queries and the joined keys.

    `start` is the position of the first video token, `length` that of the narrowed sequence.
    """
    chosen, tokens, whole = _selection(context), context.ratio.shape[1], mask.shape[-1]
    if whole == length:  # a layer made it for the tokens that run: every query may see the kept tokens
        end, shape = start + len(chosen.computed), (*mask.shape[:-1], len(chosen.kept))
        return torch.cat([mask[..., :end], mask.new_full(shape, mask.dtype == torch.bool), mask[..., end:]], -1)
    if (known := context.record.cut.get((id(mask), -length))) is None:  # every layer gets the same mask
        cut = mask.index_select(-1, _with_others(torch.cat([chosen.computed, chosen.kept]), start, tokens, whole))
        cut = cut if cut.shape[-2] == 1 else cut.index_select(-2, _with_others(chosen.computed, start, tokens, whole))
        known = context.record.cut[id(mask), -length] = mask, cut
    return known[1]


def _selection(context: FusionContext) -> Any:
    assert context.selection is not None
    return context.selection


def _narrow_arguments(arguments: dict[str, Any], flow: TokenFlow, context: FusionContext, *, whole: bool) -> None:
    """Cut a block's arguments to the computed tokens: the video itself if it may be whole, and the tables."""
    for name in flow.tokens if whole else ():
        given = arguments.get(name)
        if isinstance(given, Tensor) and (where := _positions(given.shape[1], context)) is not None:
            arguments[name] = given.index_select(1, where)
    for table in flow.tables:
        if arguments.get(table.name) is not None:
            arguments[table.name] = _narrow(arguments[table.name], table, context)


def _narrow(value: Any, table: Table, context: FusionContext) -> Any:
    if isinstance(value, (tuple, list)):
        whole = table._replace(item=None)
        chosen = range(len(value)) if table.item is None else (table.item,)
        return type(value)(_narrow(part, whole, context) if i in chosen else part for i, part in enumerate(value))
    if not isinstance(value, Tensor) or value.ndim <= table.axis or table.ndim not in (None, value.ndim):
        return value
    if (known := context.record.cut.get((id(value), table.axis))) is None:
        if (where := _positions(value.shape[table.axis], context)) is None:
            return value
        known = context.record.cut[id(value), table.axis] = value, value.index_select(table.axis, where)
    return known[1]


def _positions(length: int, context: FusionContext) -> Tensor | None:
    """The positions that stay in a sequence of the video's tokens, or of video and text; None for another length."""
    tokens, text, computed = context.ratio.shape[1], context.text or 0, _selection(context).computed
    if text and length == tokens + text:
        return _with_others(computed, text if context.text_first else 0, tokens, length)
    return computed if length == tokens else None


def _with_others(where: Tensor, start: int, tokens: int, length: int) -> Tensor:
    every = torch.arange(length, device=where.device)
    return torch.cat([every[:start], where + start, every[start + tokens :]])
