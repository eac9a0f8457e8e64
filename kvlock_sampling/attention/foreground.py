"""Only what can change runs: a token that is locked to the source in full need not be computed at all.

At lock 1 a background token's keys and values are the source's whatever its own are, and its output is replaced by the
source when the prediction is composited. So it is left out between the first block and the last: queries, feed-forward
and text attention run on the other tokens alone, and its K/V, from the source, join at every layer. The result is the
dense path's, to rounding. KV-Edit (arXiv 2502.17363) does so with K/V from an inversion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..types import AttentionError
from .context import Frame, KeyValue
from .forwards import Arguments, Door
from .fuse import fuse


class Table(NamedTuple):
    """A block's argument with one entry per token along `axis`: a rotary table, a modulation per token. Of one that
    has other forms too only those with `ndim` axes are meant; of a tuple with a table for the text only `item`.
    """

    name: str
    axis: int
    ndim: int | None = None
    item: int | None = None


@dataclass(frozen=True)
class TokenFlow:
    """How tokens pass through a network, so that some can be left out on the way.

    leave: the module after the blocks that takes all tokens again, (rows, tokens, dim), as its first argument.
    tokens: the blocks' arguments (rows, tokens, ...) that hold the video's tokens; others, e.g. text, stay as they are.
    tables: see `Table`. Their entries are the video's, or the text's before or after them.
    supported: whether this very network is built so; None: every one of the family.
    """

    leave: str
    tokens: tuple[str, ...] = ("hidden_states",)
    tables: tuple[Table, ...] = ()
    supported: Callable[[Any], bool] | None = None


@dataclass(frozen=True)
class Selection:
    """Which of a video's tokens can come from the source. `weight` is how much of the lock each token takes, 0 where
    it is edited: (batch, tokens) in [0, 1], see `Region.background`.

    Clips of one batch share it: a token is left out where every clip locks it in full. Tensors are positions.
    """

    weight: Tensor

    @cached_property
    def kept(self) -> Tensor:
        """The source's wherever the lock is 1."""
        return (self.weight >= 1).all(0).nonzero().flatten()

    @cached_property
    def computed(self) -> Tensor:
        """All others, which are computed whatever the lock is."""
        return (self.weight < 1).any(0).nonzero().flatten()

    @cached_property
    def mixed(self) -> Tensor:
        """Of the computed ones those that still take something from the source, for some clip, as indices of them."""
        return (self.weight[:, self.computed] > 0).any(0).nonzero().flatten()

    @cached_property
    def stored(self) -> Tensor:
        """Tokens whose source K/V are needed at all: the kept ones, then the mixed ones."""
        return torch.cat([self.kept, self.computed[self.mixed]])

    @property
    def share(self) -> float:
        """Fraction of the tokens that is computed at full lock."""
        return len(self.computed) / self.weight.shape[1]


class Keys(Protocol):
    """The source's K/V by layer, at the tokens of a selection: a dict, or a level of a KV cache."""

    def __contains__(self, layer: object) -> bool: ...
    def get(self, layer: str) -> Any: ...


@dataclass
class SelectedFrame(Frame):
    """A frame that handles the source's K/V at the tokens of a selection alone, and the edit on all of its own."""

    selection: Selection | None = None
    keys: Keys | None = None

    @property
    def chosen(self) -> Selection:
        """The selection, which such a frame always has."""
        assert self.selection is not None
        return self.selection

    def process(self, layer: str, key: Tensor, value: Tensor, start: int, ratio: Tensor | None = None) -> KeyValue:
        """See `Frame.process`."""
        if self.mode == "capture":
            return super().process(layer, key, value, start, ratio)
        keys: Keys = self.store if self.keys is None else self.keys
        name = self._kept(layer, keys)
        if name is None:
            return self._missing(layer, key, value)
        self.fired.add(layer)
        source_key, source_value = keys.get(name)
        return self._joined(key, source_key, start), self._joined(value, source_value, start)

    def _selected(self, source: Tensor) -> Tensor:
        return source.index_select(-2, self.chosen.stored)

    def _missing(self, layer: str, key: Tensor, value: Tensor) -> KeyValue:
        return key, value  # skipped in the source pass, e.g. by a step cache; counted as not fired

    def _joined(self, own: Tensor, source: Tensor, start: int) -> Tensor:
        where, out = self.chosen.stored + start, own.clone()
        out[..., where, :] = self._fused(own[..., where, :], source, self._stored_ratio)
        return out

    @cached_property
    def _stored_ratio(self) -> Tensor:
        return self.ratio[:, self.chosen.stored]

    def _fused(self, own: Tensor, source: Tensor, ratio: Tensor) -> Tensor:
        chunks = len(own) // self.batch
        return fuse(own, source.to(own.dtype).repeat(chunks, *[1] * (own.ndim - 1)), ratio.repeat(chunks, 1))


@dataclass
class ForegroundFrame(SelectedFrame):
    """At full lock: injections run on the computed tokens alone."""

    text_first: bool = False
    narrowed: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def tokens(self) -> int | None:
        """The computed ones where the edit runs; all of them in the source's own pass."""
        return len(self.chosen.computed) if self.mode == "inject" else None

    def _missing(self, layer: str, key: Tensor, value: Tensor) -> KeyValue:
        raise AttentionError(
            f"layer {layer!r} has no K/V of the source: its pass never reached this layer. Is a step cache on?\n"
            "  Disable it (transformer.disable_cache()), or pass foreground=False to KVLock."
        )

    def _joined(self, own: Tensor, source: Tensor, start: int) -> Tensor:
        """Text before, computed tokens, kept tokens from the source, text after: (rows, ..., length + kept, dim)."""
        chosen = self.chosen
        kept, end = len(chosen.kept), start + len(chosen.computed)
        out = own.new_empty(*own.shape[:-2], own.shape[-2] + kept, own.shape[-1])
        out[..., :end, :] = own[..., :end, :]
        out[..., end + kept :, :] = own[..., end:, :]
        out[..., end : end + kept, :].unflatten(0, (-1, self.batch)).copy_(source[..., :kept, :])
        if len(chosen.mixed):
            where = chosen.mixed + start
            out[..., where, :] = self._fused(own[..., where, :], source[..., kept:, :], self._mixed_ratio)
        return out

    @cached_property
    def _mixed_ratio(self) -> Tensor:
        return self.ratio[:, self.chosen.computed[self.chosen.mixed]]

    def mask(self, mask: Tensor | None, start: int, length: int) -> Tensor | None:
        """Rows and columns of the mask in the order of the computed queries and of the joined keys.

        Some networks make their masks before the blocks, for all tokens; others in each block, for those that run.
        """
        if self.mode != "inject" or mask is None:
            return mask
        known = self.narrowed.get((id(mask), -length))  # every layer is given the same one
        if known is None:
            known = self.narrowed[id(mask), -length] = mask, self._cut(mask, start, length)
        return known[1]

    def _cut(self, mask: Tensor, start: int, length: int) -> Tensor:
        chosen, tokens = self.chosen, self.ratio.shape[1]
        end = start + len(chosen.computed)
        if mask.shape[-1] == length:  # of those that run: what is kept may be seen by all
            shape = (*mask.shape[:-1], len(chosen.kept))
            visible = mask.new_ones(shape) if mask.dtype == torch.bool else mask.new_zeros(shape)
            return torch.cat([mask[..., :end], visible, mask[..., end:]], -1)
        before = torch.arange(start, device=mask.device)
        after = torch.arange(start + tokens, mask.shape[-1], device=mask.device)
        computed, kept = (where.to(mask.device) + start for where in (chosen.computed, chosen.kept))
        mask = mask.index_select(-1, torch.cat([before, computed, kept, after]))
        if mask.shape[-2] > 1:
            mask = mask.index_select(-2, torch.cat([before, computed, after]))
        return mask


def narrowing(network: nn.Module, blocks: list[nn.Module], flow: TokenFlow, frame: ForegroundFrame) -> Iterator[Door]:
    """Doors that leave tokens out between the first block and `flow.leave`."""
    for block in blocks:
        yield Door(block, before=partial(_enter, block, flow, frame))
    yield Door(network.get_submodule(flow.leave), before=partial(_leave, frame))


def _enter(block: nn.Module, flow: TokenFlow, frame: ForegroundFrame, args: Any, kwargs: Any) -> Arguments:
    bound = signature(block).bind_partial(block, *args, **kwargs)
    given = bound.arguments
    for name in flow.tokens:
        if isinstance(given.get(name), Tensor) and given[name].shape[1] == frame.ratio.shape[1]:
            given[name] = given[name].index_select(1, frame.chosen.computed)
    for table in flow.tables:
        if given.get(table.name) is not None:
            given[table.name] = narrow(given[table.name], table, frame)
    return bound.args[1:], bound.kwargs


def _leave(frame: ForegroundFrame, args: Any, kwargs: Any) -> Arguments:
    if args[0].shape[1] == frame.ratio.shape[1]:
        return args, kwargs
    return (scattered(args[0], frame.chosen.computed, frame.ratio.shape[1]), *args[1:]), kwargs


def scattered(tokens: Tensor, where: Tensor, length: int) -> Tensor:
    """Tokens (rows, some, ...) at these places of `length`. The others are filled with one that is there: zeros, which
    nobody looks at either, have no direction, and a norm would make the gradients of everything NaN.
    """
    whole = tokens[:, :1].detach().expand(-1, length, *tokens.shape[2:]).clone()
    whole.index_copy_(1, where, tokens)
    return whole


def narrow(value: Any, table: Table, frame: ForegroundFrame) -> Any:
    """A table, or a tuple of them, for the computed tokens alone."""
    if isinstance(value, (tuple, list)):
        whole = table._replace(item=None)
        chosen = range(len(value)) if table.item is None else (table.item,)
        return type(value)(narrow(part, whole, frame) if i in chosen else part for i, part in enumerate(value))
    if not isinstance(value, Tensor) or value.ndim <= table.axis or table.ndim not in (None, value.ndim):
        return value
    known = frame.narrowed.get((id(value), table.axis))
    if known is None:
        where = running(value.shape[table.axis], frame, value.device)
        if where is None:
            return value
        # The original is kept beside: as long as it lives its id is its own.
        known = value, value.index_select(table.axis, where)
        frame.narrowed[id(value), table.axis] = known
    return known[1]


def running(length: int, frame: ForegroundFrame, device: torch.device) -> Tensor | None:
    """Which positions of a sequence of this length are not left out: of the video's, or of it and the text. None where
    it is neither.
    """
    tokens, text = frame.ratio.shape[1], frame.text or 0
    if length == tokens:
        return frame.chosen.computed
    if not text or length != tokens + text:
        return None
    first = text if frame.text_first else 0
    video = frame.chosen.computed + first
    before = torch.arange(first, device=device)
    after = torch.arange(first + tokens, length, device=device)
    return torch.cat([before, video, after])


_signatures: dict[type, inspect.Signature] = {}


def signature(module: nn.Module) -> inspect.Signature:
    # Of the class: offloading replaces the instance's forward, and may hide its signature.
    if type(module) not in _signatures:
        _signatures[type(module)] = inspect.signature(type(module).forward)
    return _signatures[type(module)]
