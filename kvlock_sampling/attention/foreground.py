"""Only what can change runs: a token that is locked to the source in full need not be computed at all.

At lock 1 a background token's keys and values are the source's whatever its own are, and its output is replaced by the
source when the prediction is composited. So it is left out between the first block and the last: queries, feed-forward
and text attention run on the other tokens alone, and its K/V, from the source, join at every site. The result is the
dense path's, to rounding. KV-Edit (arXiv 2502.17363) does so with K/V from an inversion.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..types import SiteError
from .doors import Arguments, Door
from .frame import Frame, KeyValue
from .fuse import fuse


class Table(NamedTuple):
    """A block's argument with one entry per token along `axis`: a rotary table, a modulation per token. Of one that
    has other forms too only those with `ndim` axes are meant.
    """

    name: str
    axis: int
    ndim: int | None = None


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
    """Which of a video's tokens are computed. `ratio` is the fusion ratio of all of them, (batch, tokens).

    Clips of one batch share it: a token is left out where every clip locks it in full.
    """

    ratio: Tensor

    @cached_property
    def computed(self) -> Tensor:
        """Positions that are computed, (n,)."""
        return (self.ratio < 1).any(0).nonzero().flatten()

    @cached_property
    def kept(self) -> Tensor:
        """Positions that are the source's, (tokens - n,)."""
        return (self.ratio >= 1).all(0).nonzero().flatten()

    @cached_property
    def blend(self) -> Tensor | None:
        """Ratio of the computed tokens, (batch, n); None where none of them takes anything from the source."""
        ratio = self.ratio[:, self.computed]
        return ratio if bool((ratio > 0).any()) else None

    @cached_property
    def stored(self) -> Tensor:
        """Positions whose source K/V are needed: the kept ones first."""
        return self.kept if self.blend is None else torch.cat([self.kept, self.computed])

    @property
    def share(self) -> float:
        """Fraction of the tokens that is computed."""
        return len(self.computed) / self.ratio.shape[1]


@dataclass
class ForegroundFrame(Frame):
    """A frame whose captures hold only the tokens of a selection, and whose injections run on the others alone."""

    selection: Selection | None = None
    text_first: bool = False
    narrowed: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def chosen(self) -> Selection:
        """The selection, which such a frame always has."""
        assert self.selection is not None
        return self.selection

    @property
    def tokens(self) -> int | None:
        """The computed ones where the edit runs; all of them in the source's own pass."""
        return len(self.chosen.computed) if self.mode == "inject" else None

    def process(self, site: str, key: Tensor, value: Tensor, start: int, ratio: Tensor | None = None) -> KeyValue:
        """See `Frame.process`."""
        if self.mode == "capture":
            super().process(site, key, value, start, ratio)
            where = self.chosen.stored
            self.store[site] = tuple(part.index_select(-2, where) for part in self.store[site])  # type: ignore[assignment]
            return key, value
        if site not in self.store:
            raise SiteError(
                f"site {site!r} has no K/V of the source: its pass never reached this layer. Is a step cache on?\n"
                "  Disable it (transformer.disable_cache()), or pass foreground=False to KVLock."
            )
        self.fired.add(site)
        source_key, source_value = self.store[site]
        return self._joined(key, source_key, start), self._joined(value, source_value, start)

    def _joined(self, own: Tensor, source: Tensor, start: int) -> Tensor:
        """Text before, computed tokens, kept tokens from the source, text after: (rows, ..., length + kept, dim)."""
        kept, end = len(self.chosen.kept), start + len(self.chosen.computed)
        chunks = len(own) // self.batch
        out = own.new_empty(*own.shape[:-2], own.shape[-2] + kept, own.shape[-1])
        out[..., :end, :] = own[..., :end, :]
        out[..., end + kept :, :] = own[..., end:, :]
        out[..., end : end + kept, :].unflatten(0, (chunks, self.batch)).copy_(source[..., :kept, :])
        if self.chosen.blend is not None:
            blended = fuse(
                own[..., start:end, :],
                source[..., kept:, :].to(own.dtype).repeat(chunks, *[1] * (own.ndim - 1)),
                self.chosen.blend.repeat(chunks, 1),
            )
            out[..., start:end, :] = blended
        return out

    def mask(self, mask: Tensor | None, start: int) -> Tensor | None:
        """Rows and columns of the mask in the order of the computed queries and of the joined keys."""
        if self.mode != "inject" or mask is None:
            return mask
        tokens = self.ratio.shape[1]
        device = mask.device
        before, after = torch.arange(start, device=device), torch.arange(start + tokens, mask.shape[-1], device=device)
        computed, kept = self.chosen.computed.to(device) + start, self.chosen.kept.to(device) + start
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
    bound = _signature(block).bind_partial(block, *args, **kwargs)
    given = bound.arguments
    for name in flow.tokens:
        if isinstance(given.get(name), Tensor) and given[name].shape[1] == frame.ratio.shape[1]:
            given[name] = given[name].index_select(1, frame.chosen.computed)
    for table in flow.tables:
        if given.get(table.name) is not None:
            given[table.name] = _narrow(given[table.name], table, frame)
    return bound.args[1:], bound.kwargs


def _leave(frame: ForegroundFrame, args: Any, kwargs: Any) -> Arguments:
    if args[0].shape[1] == frame.ratio.shape[1]:
        return args, kwargs
    whole = args[0].new_zeros(len(args[0]), frame.ratio.shape[1], *args[0].shape[2:])
    whole[:, frame.chosen.computed] = args[0]
    return (whole, *args[1:]), kwargs


def _narrow(value: Any, table: Table, frame: ForegroundFrame) -> Any:
    """A table, or a tuple of them, for the computed tokens alone."""
    if isinstance(value, (tuple, list)):
        return type(value)(_narrow(part, table, frame) for part in value)
    tokens, text = frame.ratio.shape[1], frame.text or 0
    if not isinstance(value, Tensor) or value.ndim <= table.axis or table.ndim not in (None, value.ndim):
        return value
    length = value.shape[table.axis]
    if length == tokens:
        first = 0
    elif text and length == tokens + text:
        first = text if frame.text_first else 0
    else:
        return value
    known = frame.narrowed.get((id(value), table.axis))
    if known is None:
        video = torch.arange(first, first + tokens, device=value.device)[frame.chosen.computed]
        before = torch.arange(first, device=value.device)
        after = torch.arange(first + tokens, length, device=value.device)
        # The original is kept beside: as long as it lives its id is its own.
        known = value, value.index_select(table.axis, torch.cat([before, video, after]))
        frame.narrowed[id(value), table.axis] = known
    return known[1]


_signatures: dict[type, inspect.Signature] = {}


def _signature(module: nn.Module) -> inspect.Signature:
    # Of the class: offloading replaces the instance's forward, and may hide its signature.
    if type(module) not in _signatures:
        _signatures[type(module)] = inspect.signature(type(module).forward)
    return _signatures[type(module)]


def parents(sites: Iterable[str], network: nn.Module) -> list[nn.Module]:
    """The blocks that hold the sites of these names."""
    return [network.get_submodule(name) for name in dict.fromkeys(n.rpartition(".")[0] for n in sites)]
