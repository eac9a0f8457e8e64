"""What an attention layer does during one call of the model: nothing, keep the source's K/V, or fuse them in.

A `Frame` lives for one evaluation. Three forms of it serve the two lockstep providers:
- lockstep: the source rides as the last `batch` rows of the same call; nothing is stored;
- capture: this call is the source alone; its K/V are kept until the evaluation is over;
- inject: this call is the edit alone; the K/V kept by a capture are fused in.
Rows come in chunks of `batch` clips, e.g. [uncond, cond] or [uncond, cond, source].
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..batching import NotBatchable
from ..masks.tokens import coarser
from ..types import AttentionError
from .fuse import fuse_chunks, fuse_chunks_


class Repeats(NotBatchable):
    """A layer acts again, after the source has left the call."""


Mode = Literal["lockstep", "capture", "inject"]
KeyValue = tuple[Tensor, Tensor]


@dataclass
class Frame:
    """`ratio` is (batch, tokens) in [0, 1], zero on edited tokens: see `fuse.fusion_ratio`. `grid` is the tokens'
    (time, height, width), needed where a layer has larger tokens. `text` counts this call's text tokens, if known,
    and `rows` those of a lockstep call. A capture is over when the layers in `until` have fired, see `ending.py`:
    what is kept of it is `partial`. The source's rows have `left` a lockstep call where they are no longer
    computed. `times` counts how often a layer has acted in this call; K/V of a layer that acts several times, in a
    model that calls its network twice, say, are kept apart.
    """

    mode: Mode
    ratio: Tensor
    store: dict[str, KeyValue] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    text: int | None = None
    fired: set[str] = field(default_factory=set)
    passed_over: list[tuple[int, int]] = field(default_factory=list)
    until: frozenset[str] | None = None
    rows: int = 0
    partial: bool = False
    left: bool = False
    times: dict[str, int] = field(default_factory=dict)
    _coarser: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        """Clips, not rows."""
        return len(self.ratio)

    @property
    def tokens(self) -> int | None:
        """How many of the video's tokens are in the sequences of this call; None: as many as `ratio` says."""
        return None

    def mask(self, mask: Tensor | None, start: int, length: int) -> Tensor | None:
        """The attention mask that goes with the keys `process` returns for a sequence of `length`."""
        return mask

    def ratio_at(self, factor: tuple[int, int, int]) -> Tensor:
        """The ratio on tokens that are `factor` (time, height, width) as large."""
        if factor == (1, 1, 1):
            return self.ratio
        if factor not in self._coarser:
            assert self.grid is not None
            self._coarser[factor] = coarser(self.ratio, self.grid, factor)
        return self._coarser[factor]

    def process(self, layer: str, key: Tensor, value: Tensor, start: int, ratio: Tensor | None = None) -> KeyValue:
        """Handle one attention call.  key, value: (rows, ..., length, dim); video tokens begin at `start`."""
        ratio = self.ratio if ratio is None else ratio
        batch, tokens = ratio.shape
        rows = key.shape[0]
        if rows % batch:
            raise AttentionError(
                f"layer {layer!r} was called with {rows} rows; expected a multiple of the batch of {batch} clips.\n"
                "  A lock needs chunks of whole batches, e.g. torch.cat([x, x]) for guidance. "
                "Run clips one by one if the model mixes its rows."
            )
        video = slice(start, start + tokens)
        if self.mode == "capture":
            # Whatever chunks a guided denoiser makes of the source, they hold the same prompt: the last one serves.
            self.fired.add(layer)
            kept = self._selected(key[-batch:, ..., video, :]), self._selected(value[-batch:, ..., video, :])
            self.store[self._named(layer)] = kept
            return key, value
        if self.mode == "inject":
            name = self._kept(layer, self.store)
            if name is None:
                return key, value  # skipped in the source pass, e.g. by a step cache; counted as not fired
            source_key, source_value = self.store[name]
            edit_rows = rows
        elif self.left:
            raise Repeats
        else:
            source_key, source_value = key[-batch:, ..., video, :], value[-batch:, ..., video, :]
            self.rows, edit_rows = rows, rows - batch
        self.fired.add(layer)
        return (
            _fuse_rows(key, source_key, ratio, video, edit_rows),
            _fuse_rows(value, source_value, ratio, video, edit_rows),
        )

    def _selected(self, source: Tensor) -> Tensor:
        """Of the source's keys or values what is kept."""
        return source

    def _named(self, layer: str) -> str:
        """The name of a layer's K/V, this time that it acts."""
        count = self.times.get(layer, 0)
        self.times[layer] = count + 1
        return f"{layer}#{count}" if count else layer

    def _kept(self, layer: str, keys: Container[str]) -> str | None:
        """The name under which the K/V for this time are kept; None: the layer never acted in the source's pass.

        Where it acted less often there, as of a single branch, the last ones serve the rest.

        Raises:
            Repeats: the source was only followed until the layer had acted once.
        """
        count = self.times.get(layer, 0)
        name = self._named(layer)
        if name not in keys and layer in keys and self.partial:
            raise Repeats
        names = (name, *(f"{layer}#{n}" for n in range(count - 1, 0, -1)), layer)
        return next((n for n in names if n in keys), None)

    def latest(self) -> dict[str, KeyValue]:
        """What is kept, under the layers' own names: of those that acted several times the last."""
        return {name.partition("#")[0]: kept for name, kept in self.store.items()}

    def process_row(self, layer: str, index: int, key: Tensor, value: Tensor, start: int) -> KeyValue:
        """The same where attention is called for each row by itself: this is row `index` of the batch."""
        clip = index % self.batch
        row = Frame(self.mode, self.ratio[clip : clip + 1], self.store)
        fused = row.process(f"{layer}[{clip}]", key, value, start)
        if row.fired:
            self.fired.add(layer)
        return fused


def _fuse_rows(own: Tensor, source: Tensor, ratio: Tensor, video: slice, edit_rows: int) -> Tensor:
    if edit_rows == own.shape[0] and own.shape[-2] == ratio.shape[1]:
        return fuse_chunks(own, source, ratio)
    mixed = own.clone()
    fuse_chunks_(mixed[:edit_rows, ..., video, :], source, ratio)
    return mixed
