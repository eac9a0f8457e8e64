"""A frame that remembers what it saw and what it answered, to look at keys and values from inside attention."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from ..attention import Frame
from ..attention.context import KeyValue


class Seen(NamedTuple):
    """One attention call of a layer. Keys and values are (rows, ..., length, dim).

    clips: which clip each row belongs to.  start: where the video's tokens begin.  ratio: (rows, tokens), of the lock.
    own: the call's keys and values as they came.  used: as attention got them.
    """

    layer: str
    clips: list[int]
    start: int
    ratio: Tensor
    own: KeyValue
    used: KeyValue


@dataclass
class SpyFrame(Frame):
    """A `Frame` that does the same and keeps it in `seen`."""

    seen: list[Seen] = field(default_factory=list)

    def process(self, layer: str, key: Tensor, value: Tensor, start: int, ratio: Tensor | None = None) -> KeyValue:
        """See `Frame.process`."""
        used = super().process(layer, key, value, start, ratio)
        chunks = len(key) // self.batch
        per_row = (self.ratio if ratio is None else ratio).repeat(chunks, 1)
        clips = list(range(self.batch)) * chunks
        self.seen.append(Seen(layer, clips, start, per_row, (key.clone(), value.clone()), used))
        return used

    def process_row(self, layer: str, index: int, key: Tensor, value: Tensor, start: int) -> KeyValue:
        """See `Frame.process_row`."""
        used = super().process_row(layer, index, key, value, start)
        clip = index % self.batch
        ratio = self.ratio[clip : clip + 1]
        self.seen.append(Seen(f"{layer}[{index}]", [clip], start, ratio, (key.clone(), value.clone()), used))
        return used
